"""Every source tensor accounted for, under the names of the gguf package, in rows that are where they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures import Architecture, TensorMap, open_architecture
from llm_quantize.architectures.mapping import row_order
from llm_quantize.architectures.rows import read_output_rows, to_float32
from llm_quantize.errors import MalformedInputError
from llm_quantize.models.safetensors import Checkpoint, open_checkpoint

from ..tiny_models import TINY, WITH_TOWERS, make_tiny, to_version_4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {variant: make_tiny(variant, root / variant) for variant in TINY}


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Any:
    """A model of its own to spoil: ``copy(variant, **changes)`` with the configuration changed."""

    def make(variant: str, **changes: Any) -> Path:
        directory = tmp_path / variant
        shutil.copytree(models[variant], directory)
        config = json.loads((directory / "config.json").read_text())
        config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def opened(directory: Path) -> tuple[Checkpoint, Architecture, TensorMap]:
    checkpoint = open_checkpoint(str(directory))
    architecture = open_architecture(checkpoint.config, file=directory / "config.json")
    try:
        return checkpoint, architecture, architecture.map_tensors(checkpoint.tensors)
    except BaseException:
        checkpoint.close()
        raise


def respoil(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("variant", TINY)
def test_every_tensor_is_used_or_explained(variant: str, models: dict[str, Path]) -> None:
    checkpoint, _, mapped = opened(models[variant])
    with checkpoint:
        used = {piece.source for output in mapped.outputs for piece in output.pieces}
        assert used | set(mapped.left_out) == set(checkpoint.tensors)
        assert not used & set(mapped.left_out)
        assert bool(mapped.left_out) == (variant in WITH_TOWERS)
        assert len({output.name for output in mapped.outputs}) == len(mapped.outputs)
        weights = sum(int(np.prod(o.shape)) for o in mapped.outputs if o.constant is None)
        stored = sum(info.elements for name, info in checkpoint.tensors.items() if name not in mapped.left_out)
        assert weights == stored


@pytest.mark.parametrize("variant", TINY)
def test_names_are_those_of_the_gguf_package(variant: str, models: dict[str, Path]) -> None:
    checkpoint, architecture, mapped = opened(models[variant])
    checkpoint.close()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.family.arch)
    table = gguf.get_tensor_name_map(arch, architecture.hyper.n_layer)
    checked = 0
    for output in mapped.outputs:
        if output.constant is not None:
            assert output.name.startswith(("rope_freqs", "rope_factors_"))
            continue
        source = output.pieces[0].source.replace("language_model.model.", "model.")
        source = source.replace("model.language_model.", "model.")
        source += ".weight" if source.endswith("layer_scalar") else ""  # as convert_hf_to_gguf does
        expected = table.get_name(source, try_suffixes=(".weight", ".bias"))
        if expected is not None and "experts." not in source and ".norms." not in source:
            assert output.name == expected + (".weight" if source.endswith(".sinks") else "")
            checked += 1
        kinds = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
        layer = output.name.split(".")[1] if output.name.startswith("blk.") else ""
        bare = output.name.removesuffix(".weight").removesuffix(".bias")
        assert (bare.replace(f"blk.{layer}.", "blk.{bid}.", 1) if layer else bare) in kinds
    assert checked > 10


@pytest.mark.parametrize("variant", TINY)
def test_a_version_4_configuration_means_the_same(variant: str, copy: Any, models: dict[str, Path]) -> None:
    directory = copy(variant)
    if variant == "gemma3":
        config = json.loads((directory / "config.json").read_text())
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["text_config"]["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["text_config"]["rope_scaling"] = {"type": "linear", "factor": rope["full_attention"]["factor"]}
        (directory / "config.json").write_text(json.dumps(config))
    else:
        to_version_4(directory)
    (one, old, old_map), (two, new, new_map) = opened(directory), opened(models[variant])
    with one, two:
        assert old.metadata() == new.metadata()
        assert old.hyper == new.hyper
        for ours, theirs in zip(old_map.outputs, new_map.outputs, strict=True):
            assert (ours.name, ours.shape, ours.float32) == (theirs.name, theirs.shape, theirs.float32)
            assert (ours.constant is None) or np.array_equal(ours.constant, theirs.constant)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_row_orders_against_plain_loops(heads: tuple[int, int]) -> None:
    n, kv = heads
    size = 6
    hyper = open_architecture(
        {
            "model_type": "llama",
            "hidden_size": n * size,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": n,
            "num_key_value_heads": kv,
            "vocab_size": 8,
            "max_position_embeddings": 8,
        }
    ).hyper
    assert row_order("", hyper) is None
    for order, count in (("rope_q", n), ("rope_k", kv)):
        expected = [
            h * size + half * (size // 2) + i for h in range(count) for i in range(size // 2) for half in (0, 1)
        ]
        assert np.array_equal(row_order(order, hyper), expected)  # type: ignore[arg-type]
    shared, expected = n // kv, []
    group = shared + 2
    for head in range(n):
        expected += [((head // shared) * group + head % shared) * size + i for i in range(size)]
    for which in (shared, shared + 1):
        expected += [(g * group + which) * size + i for g in range(kv) for i in range(size)]
    assert np.array_equal(row_order("grouped_qkv", hyper), expected)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text"])
def test_fused_experts_are_the_same_as_single_ones(variant: str, copy: Any, models: dict[str, Path]) -> None:
    directory = copy(variant)
    gate, up, down = ("w1", "w3", "w2") if variant == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            block = "block_sparse_moe" if variant == "mixtral" else "mlp"
            prefix = f"model.layers.{layer}.{block}.experts."
            take = [[tensors.pop(f"{prefix}{e}.{w}.weight") for e in range(4)] for w in (gate, up, down)]
            both = [torch.cat(pair) for pair in zip(take[0], take[1], strict=True)]
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(take[2])

    respoil(directory, fuse)
    (one, _, fused), (two, _, single) = opened(directory), opened(models[variant])
    with one, two:
        for ours, theirs in zip(fused.outputs, single.outputs, strict=True):
            assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
            rows = int(np.prod(ours.shape[:-1])) if len(ours.shape) > 1 else 1
            got = to_float32(read_output_rows(one, ours, 0, rows))
            assert np.array_equal(got, to_float32(read_output_rows(two, theirs, 0, rows))), ours.name


def test_buffers_and_extra_heads_are_named_not_lost(copy: Any) -> None:
    directory = copy("gpt_neox")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        tensors["gpt_neox.layers.1.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)

    respoil(directory, add)
    checkpoint, _, mapped = opened(directory)
    checkpoint.close()
    assert len(mapped.left_out) == 3
    assert "mask" in mapped.left_out["gpt_neox.layers.0.attention.bias"]

    directory = copy("llama", num_nextn_predict_layers=1)
    respoil(directory, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(4, 4)}))
    checkpoint, _, mapped = opened(directory)
    checkpoint.close()
    assert list(mapped.left_out) == ["model.layers.2.eh_proj.weight"]


@pytest.mark.parametrize("same", [True, False])
def test_tied_and_yet_an_output_matrix(same: bool, copy: Any) -> None:
    directory = copy("qwen3")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not same:
            tensors["lm_head.weight"][-1, -1] += 1

    respoil(directory, add)
    checkpoint, _, mapped = opened(directory)
    checkpoint.close()
    names = [output.name for output in mapped.outputs]
    assert ("output.weight" in names) != same
    assert ("lm_head.weight" in mapped.left_out) == same

    directory = copy("gemma")
    respoil(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (not same)}))
    if same:
        opened(directory)[0].close()
    else:
        checkpoint, _, mapped = opened(directory)
        checkpoint.close()
        assert "embedding" in str(mapped.limits[0])
        assert mapped.outputs[-1].name == "output.weight"


def test_hub_names_without_prefix(copy: Any, models: dict[str, Path]) -> None:
    """GPT-2 on the hub has no "transformer." before its names; newer Gemma 3 files turn two prefixes round."""
    for variant, old, new in (
        ("gpt2", "transformer.", ""),
        ("gemma3", "language_model.model.", "model.language_model."),
    ):
        directory = copy(variant)

        def rename(tensors: dict[str, torch.Tensor], old: str = old, new: str = new) -> None:
            for name in [n for n in tensors if n.startswith(old)]:
                tensors[new + name[len(old) :]] = tensors.pop(name)

        respoil(directory, rename)
        (one, _, ours), (two, _, theirs) = opened(directory), opened(models[variant])
        with one, two:
            assert [(o.name, o.shape) for o in ours.outputs] == [(o.name, o.shape) for o in theirs.outputs]


REFUSED = [
    ("a weight is missing", {}, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "not in the checkpoint"),
    ("a bias is missing", {"attention_bias": True}, lambda t: None, "not in the checkpoint"),
    ("more layers than weights", {"num_hidden_layers": 3}, lambda t: None, "no weights for layer 2"),
    ("fewer layers than weights", {"num_hidden_layers": 1}, lambda t: None, "weights for layer 1"),
    ("vocabulary of another size", {"vocab_size": 321}, lambda t: None, "disagrees"),
    ("hidden size of another model", {"hidden_size": 128, "head_dim": 16}, lambda t: None, "disagrees"),
    ("feed-forward of another model", {"intermediate_size": 97}, lambda t: None, "disagrees"),
    ("untied without output", {}, lambda t: t.pop("lm_head.weight"), "not in the checkpoint"),
    ("an unknown tensor", {}, lambda t: t.update(adapter=torch.ones(2)), "does not have"),
    (
        "a bias that the configuration denies",
        {},
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "does not have",
    ),
    (
        "the same weight twice",
        {},
        lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}),
        "same meaning",
    ),
]


@pytest.mark.parametrize(("changes", "spoil", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_does_not_fit_is_refused(changes: dict[str, Any], spoil: Any, words: str, copy: Any) -> None:
    directory = copy("llama", **changes)
    respoil(directory, spoil)
    with pytest.raises(MalformedInputError, match=words) as caught:
        opened(directory)
    assert caught.value.exit_code == 3
    assert caught.value.file is not None
    assert caught.value.tensor is not None

"""Plans of model directories: filled by hand, read by safetensors and transformers, and everything that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_quantize.architectures.base import Piece
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import scheme_of
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.plan import ArtifactPlan
from tests.formats.filled import fill
from tests.formats.grids import unpacked
from tests.safetensors_by_hand import entries, write_raw
from tests.tiny_models import make_tiny, quiet, reference_logits, reference_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def plan_of(source: Source, format: str, level: str, options: dict[str, Any]) -> ArtifactPlan:
    choice = Options(method=MethodOptions(**{"method": "rtn", "group_size": 32} | options))
    (plan,) = FORMATS[format].plan(source, [level], "tiny", None, choice)
    return plan


def planned(model: Path, format: str = "gptq", level: str = "4bit", **options: Any) -> ArtifactPlan:
    source = open_source(str(model))
    with closing(source.checkpoint):
        return plan_of(source, format, level, options)


def filled(
    model: Path, directory: Path, format: str, level: str, **options: Any
) -> tuple[ArtifactPlan, dict[str, Any]]:
    """The plan, and {module: float32 values} of what was put in the files."""
    source = open_source(str(model))
    with closing(source.checkpoint):
        plan = plan_of(source, format, level, options)
        found = fill(source, plan, directory)
    return plan, {name: grid.decode(codes) for name, (grid, codes) in found.items()}


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, by safetensors' own reader."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def changed(model: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a model of one file, with other tensors."""
    directory.mkdir()
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    save_file(change(load_file(model / "model.safetensors")), directory / "model.safetensors", {"format": "pt"})
    return directory


def arrays_of(plan: ArtifactPlan, tensors: dict[str, torch.Tensor], fields: tuple[int, ...]) -> dict[str, np.ndarray]:
    found = {}
    for index in fields:
        name = plan.tensors[index].name
        value = tensors[name]
        array = value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
        found[name.rpartition(".")[2]] = array
    return found


@pytest.mark.parametrize(
    ("format", "level", "name"),
    [
        ("gptq", "4bit", "tiny-GPTQ-4bit-g32"),
        ("gptq", "3bit", "tiny-GPTQ-3bit-g32"),
        ("awq", "4bit", "tiny-AWQ-4bit-g32"),
        ("compressed-tensors", "W4A16_ASYM", "tiny-W4A16_ASYM-g32"),
    ],
)
def test_every_format_filled_and_read_again(llama: Path, tmp_path: Path, format: str, level: str, name: str) -> None:
    plan, values = filled(llama, tmp_path / "out", format, level)
    assert (plan.name, plan.format) == (name, format)
    assert {file.name: file.size for file in plan.files} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()
    }
    source, found = load_file(llama / "model.safetensors"), read(tmp_path / "out")
    scheme = scheme_of(plan)
    assert len(plan.matrices) == 14
    for matrix in plan.matrices:
        decoded = unpacked(PACKED[format], scheme, arrays_of(plan, found, matrix.fields), *matrix.weight.shape)
        assert torch.equal(torch.from_numpy(decoded), values[matrix.name])
        weight = source.pop(f"{matrix.name}.weight").float()
        assert (values[matrix.name] - weight).norm() < 0.3 * weight.norm()
    kept = {name: value for name, value in found.items() if name in source}
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], source[name]) and kept[name].dtype == source[name].dtype for name in kept)
    assert len(found) == len(kept) + sum(len(matrix.fields) for matrix in plan.matrices)
    assert plan.weights == sum(value.numel() for value in load_file(llama / "model.safetensors").values())


def test_transformers_and_the_package_run_it(llama: Path, tmp_path: Path) -> None:
    """The owner's own loading: compressed-tensors in transformers gives the logits of our decoded values."""
    import transformers

    _, values = filled(llama, tmp_path / "out", "compressed-tensors", "W4A16")
    ids = [5, 80, 7, 200, 31, 9]
    reference = reference_model(llama)
    for name, value in values.items():
        reference.get_submodule(name).weight.data.copy_(value)
    expected = reference_logits(reference, ids)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
        )
    found = reference_logits(model.eval(), ids)
    assert torch.allclose(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-4)


def test_config_and_small_files(llama: Path, tmp_path: Path) -> None:
    model = changed(llama, tmp_path / "model", lambda tensors: tensors)
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nbase_model: a/b\n---\nold text\n")
    (model / "chat_template.jinja").write_text("{{ messages }}\n")
    (model / "LICENSE").write_bytes(b"\xff\x00 bytes")
    (model / "optimizer.pt").write_bytes(b"weights")
    (model / ".hidden").write_text("x")
    (model / "odd name.txt").write_text("x")
    plan = planned(model)
    files = {file.name: b"".join(piece for _, piece in file.known()) for file in plan.files}
    assert set(files) == {
        *("model.safetensors", "config.json", "README.md", "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "LICENSE"),
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert files[name] == (model / name).read_bytes()
    config = json.loads(files["config.json"])
    assert config.pop("quantization_config")["quant_method"] == "gptq"
    assert list(config.items()) == list(json.loads((model / "config.json").read_text()).items())
    told = "\n".join(plan.warnings)
    assert "odd name.txt" in told
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert "old text" not in card
    assert "base_model" not in card  # a directory on disk is no model of the hub, and its own base is not its name


def test_shards_are_filled_in_order_and_indexed(llama: Path, tmp_path: Path) -> None:
    whole, _ = filled(llama, tmp_path / "one", "gptq", "4bit")
    plan, _ = filled(llama, tmp_path / "many", "gptq", "4bit", shard_size=30_000)
    shards = [file for file in plan.files if file.name.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[1].name == f"model-00002-of-{len(shards):05d}.safetensors"
    sizes = [[tensor.nbytes for tensor in plan.tensors if tensor.file == number] for number in range(len(shards))]
    assert all(sum(found) <= 30_000 or len(found) == 1 for found in sizes)  # the embedding alone is larger
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    places = {tensor.name: plan.files[tensor.file].name for tensor in plan.tensors}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plan.tensors)
    for matrix in plan.matrices:
        assert len({plan.tensors[index].file for index in matrix.fields}) == 1
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert plan.digest != whole.digest
    assert planned(llama).digest == whole.digest


def test_ignored_modules_stay_and_are_named(llama: Path) -> None:
    plan = planned(llama, ignore=("mlp.down_proj$", r"layers\.0\..*q_proj", "nothing"))
    names = [matrix.name for matrix in plan.matrices]
    assert len(names) == 11
    assert "model.layers.0.mlp.down_proj.weight" in [tensor.name for tensor in plan.tensors if tensor.qtype == "bf16"]
    config = json.loads(next(file.header for file in plan.files if file.name == "config.json"))["quantization_config"]
    assert r"-:^model\.layers\.1\.mlp\.down_proj$" in config["dynamic"]
    told = "\n".join(plan.warnings)
    assert "'nothing' finds no module" in told
    assert "model.layers.0.self_attn.q_proj stays as it is, but not all of q_proj, k_proj, v_proj do" in told
    awq = planned(llama, "awq", ignore=("down_proj",))
    config = json.loads(next(file.header for file in awq.files if file.name == "config.json"))["quantization_config"]
    assert config["modules_to_not_convert"] == [*(f"model.layers.{n}.mlp.down_proj" for n in (0, 1)), "lm_head"]
    with pytest.raises(UsageError, match="nothing is left to pack"):
        planned(llama, ignore=(".",))
    with pytest.raises(UsageError, match="not a regular expression"):
        planned(llama, ignore=("(",))


def test_experts_of_one_tensor_become_modules(tmp_path: Path) -> None:
    """However a mixture is stored, the artifact is the same, experts under single names, the router as it was."""
    model = make_tiny("qwen3_moe", tmp_path / "moe", moe_intermediate_size=64)

    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = dict(tensors)
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = [[found.pop(f"{prefix}.{e}.{n}_proj.weight") for n in ("gate", "up", "down")] for e in range(4)]
            found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
            found[f"{prefix}.down_proj"] = torch.stack([part[2] for part in parts])
        return found

    fused = changed(model, tmp_path / "fused", fuse)
    plan, values = filled(model, tmp_path / "a", "compressed-tensors", "W4A16")
    other, others = filled(fused, tmp_path / "b", "compressed-tensors", "W4A16")
    assert len(values) == 2 * (4 + 3 * 4)
    assert values.keys() == others.keys()
    one, two = read(tmp_path / "a"), read(tmp_path / "b")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    up = next(matrix for matrix in other.matrices if matrix.name == "model.layers.1.mlp.experts.2.up_proj")
    assert up.weight.pieces == (Piece("model.layers.1.mlp.experts.gate_up_proj", 2 * 128 + 64, 64),)
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]
    assert {tensor.qtype for tensor in plan.tensors if tensor.name.endswith("mlp.gate.weight")} == {"bf16"}
    kept = planned(fused, ignore=(r"layers\.0\.mlp\.experts",))
    assert {m.name.split(".")[2] for m in kept.matrices if "experts" in m.name} == {"1"}
    with pytest.raises(UsageError, match="some of the experts"):
        planned(fused, ignore=(r"experts\.2\.",))


def test_other_parts_of_a_model_stay(tmp_path: Path) -> None:
    """A vision tower, and buffers; F64 becomes F32; integers are left out by name."""
    model = make_tiny("gemma3", tmp_path / "gemma")
    source = load_file(model / "model.safetensors")
    plan, _ = filled(model, tmp_path / "out", "compressed-tensors", "W4A16")
    found = read(tmp_path / "out")
    outside = [name for name in source if "language_model" not in name]
    assert len(outside) > 10
    assert all(torch.equal(found[name], source[name]) for name in outside)
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(entry.startswith("re:") and r"mlp\.fc1$" in entry for entry in ignore)

    def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {
            "model.norm.weight": tensors["model.norm.weight"].double(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(4),
        }

    wide = changed(make_tiny("llama", tmp_path / "llama"), tmp_path / "wide", widen)
    plan, _ = filled(wide, tmp_path / "wide-out", "awq", "4bit")
    found = read(tmp_path / "wide-out")
    assert found["model.norm.weight"].dtype == torch.float32
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [0, 1, 2, 3]
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" not in found
    assert any("inv_freq: left out, a buffer of I64" in text for text in plan.notes)
    assert not any("left out" in text for text in plan.warnings)


def test_heads_that_predict_several_tokens_stay(llama: Path, tmp_path: Path) -> None:
    def extend(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {name: value for name, value in tensors.items() if name.startswith("model.layers.1.")}
        return tensors | {name.replace("layers.1.", "layers.2."): value.clone() for name, value in last.items()}

    model = changed(llama, tmp_path / "mtp", extend)
    config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    plan = planned(model)
    assert len(plan.matrices) == 14
    extra = [tensor for tensor in plan.tensors if tensor.name.startswith("model.layers.2.")]
    assert len(extra) == 9
    assert {tensor.qtype for tensor in extra} == {"bf16"}
    config = json.loads(next(file.header for file in plan.files if file.name == "config.json"))["quantization_config"]
    assert len(config["dynamic"]) == 7
    assert r"-:^model\.layers\.2\.mlp\.up_proj$" in config["dynamic"]


def test_tied_head_stored_twice_stays_stored_twice(tmp_path: Path) -> None:
    model = make_tiny("llama3", tmp_path / "tied")
    copy = changed(
        model,
        tmp_path / "twice",
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
    )
    assert "lm_head.weight" not in [tensor.name for tensor in planned(model).tensors]
    assert "lm_head.weight" in [tensor.name for tensor in planned(copy).tensors]


def written_config(plan: ArtifactPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(file.header for file in plan.files if file.name == "config.json"))
    return found


@pytest.mark.parametrize(("format", "level"), [("gptq", "4bit"), ("safetensors", "F16")])
@pytest.mark.parametrize("own", [False, True])
def test_a_head_in_the_files_is_not_called_tied(format: str, level: str, own: bool, tmp_path: Path) -> None:
    """vLLM reads no head where the configuration says that it is tied, and transformers 4 overwrites it."""

    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * (2 if own else 1)}

    tied = make_tiny("llama3", tmp_path / "tied")
    options = {"group_size": 32} if format == "gptq" else {"group_size": None}
    assert written_config(planned(tied, format, level, **options))["tie_word_embeddings"] is True
    plan = planned(changed(tied, tmp_path / "twice", with_head), format, level, **options)
    assert written_config(plan)["tie_word_embeddings"] is False
    assert ("lm_head.weight has values of its own" in "\n".join(plan.warnings)) is own


def test_a_copy_of_the_embedding_stays_tied_where_every_runtime_ties_it(tmp_path: Path) -> None:
    def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    model = changed(make_tiny("gemma2", tmp_path / "gemma"), tmp_path / "twice", with_head)
    before = json.loads((model / "config.json").read_text())
    assert written_config(planned(model)).get("tie_word_embeddings") == before.get("tie_word_embeddings")


def test_families_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stored \\(in, out\\)") as caught:
        planned(make_tiny("gpt2", tmp_path / "gpt2"))
    assert caught.value.exit_code == 4
    granite = make_tiny("granitemoe", tmp_path / "granite")
    with pytest.raises(UnsupportedError, match="no runtime has names"):
        planned(granite)
    plan = planned(granite, ignore=("block_sparse_moe",))
    assert {matrix.name.split(".")[3] for matrix in plan.matrices} == {"self_attn"}


def test_sizes_that_do_not_divide_name_the_module(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"96 weights are not whole groups of 64[\s\S]*mlp\.down_proj"):
        planned(llama, group_size=64)
    assert planned(llama, group_size=-1).name == "tiny-GPTQ-4bit-channel"
    told = "\n".join(planned(llama).warnings)
    assert "CUDA (Marlin)" in told
    told = "\n".join(planned(llama, level="2bit").warnings)
    assert "vLLM will not load" in told
    asymmetric = planned(llama, symmetric=False)
    assert scheme_of(asymmetric).variant == "gptq_v2"
    assert asymmetric.name == "tiny-GPTQ-4bit-g32-asym"
    with pytest.raises(UsageError, match="must be positive"):
        planned(llama, shard_size=0)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_fp8_sources_lose_their_scales_and_their_config(llama: Path, tmp_path: Path, key: str) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = dict(tensors)
        for name in tensors:
            if name.endswith("proj.weight"):
                found[name] = (tensors[name].float() / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
                found[f"{name}_scale"] = torch.tensor(0.01)
        return found

    model = changed(llama, tmp_path / "fp8", narrow)
    config = json.loads((model / "config.json").read_text())
    config[key] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (model / "config.json").write_text(json.dumps(config))
    plan, _ = filled(model, tmp_path / "out", "compressed-tensors", "W4A16", ignore=("o_proj",))
    found = read(tmp_path / "out")
    assert not any(name.endswith("weight_scale") and "o_proj" in name for name in found)
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert found["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in written
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"
    assert {matrix.qtype for matrix in plan.matrices} == {"int4_g32"}


def test_a_7b_model_is_planned_at_the_size_people_expect(llama: Path, tmp_path: Path) -> None:
    """LLaMA-2-7B's shapes, from headers alone; AutoAWQ's file of it has 3.89 GB."""
    width, feed, vocabulary = 4096, 11008, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(32):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (feed, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, feed)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    model = tmp_path / "7b"
    header = entries({name: ("F16", shape) for name, shape in shapes.items()})
    path = write_raw(model / "model.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + max(entry["data_offsets"][1] for entry in header.values()))
    for path in llama.iterdir():
        if path.name.startswith("tokenizer"):
            (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text()) | {
        "hidden_size": width,
        "intermediate_size": feed,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": vocabulary,
    }
    (model / "config.json").write_text(json.dumps(config))
    plan = planned(model, "awq", group_size=None)
    assert plan.name == "tiny-AWQ-4bit"
    assert len(plan.matrices) == 224
    assert abs(plan.size - 3.89e9) < 0.02e9
    assert plan.warnings == ()
    assert "up to 2 devices" in next(file.header for file in plan.files if file.name == "README.md").decode()
    parts = planned(model, "awq", group_size=None, shard_size=10**9)
    assert sum(file.name.endswith(".safetensors") for file in parts.files) == 4


def test_a_plan_loads_neither_torch_nor_transformers(llama: Path) -> None:
    code = (
        "import sys; from llm_quantize.models.opening import open_source; "
        "from llm_quantize.formats.table import FORMATS; from llm_quantize.options import MethodOptions, Options; "
        "options = Options(method=MethodOptions(method='rtn', group_size=32)); "
        f"source = open_source({str(llama)!r}); "
        "(plan,) = FORMATS['compressed-tensors'].plan(source, ['W4A16'], 'x', None, options); "
        "print(len(plan.matrices), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["14", "False", "False"]

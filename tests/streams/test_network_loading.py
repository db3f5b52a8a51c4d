"""What a network reads: every weight named, nothing made up, nothing kept, other values in their places."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError
from llm_quantize.models.opening import open_source
from llm_quantize.streams.network import open_network
from llm_quantize.streams.weights import CheckpointWeights
from tests.streams.networks import opened, streamed_logits, streamed_states, whole_logits, windows
from tests.tiny_models import make_tiny


class OtherWeights:
    """The named tensors only, and no way to read but whole ones."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.asked: list[str] = []

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def read(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self._tensors[name]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("models") / "mixtral")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def rewritten(model: Path, target: Path, change: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy of ``model`` with tensors added, changed, or (None) removed."""
    shutil.copytree(model, target)
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_other_weights_of_the_same_names(mixtral: Path) -> None:
    """Weights that can only be read whole give the same; each part asks for its own tensors and no others."""
    network, weights = opened(mixtral)
    ids = windows(1, 9)
    other = OtherWeights({name: weights.read(name).float() for name in weights.names})
    assert torch.equal(streamed_logits(network, other, ids)[0], streamed_logits(network, weights, ids)[0])
    assert sorted(other.asked) == sorted(weights.names)
    other.asked.clear()
    with network.block(1, other) as block:
        assert set(other.asked) == set(block.tensors) == set(network.tensors(1))
    assert all(".layers.1." in name for name in other.asked)


def test_a_weight_that_the_checkpoint_lacks_is_named(llama: Path, tmp_path: Path) -> None:
    """transformers would make random ones; the map of tensors says so first, the network says so too."""
    name = "model.layers.1.mlp.up_proj.weight"
    source = open_source(str(llama))
    del source.checkpoint.tensors[name]
    with pytest.raises(MalformedInputError) as caught:
        open_network(source, dtype="float32")
    assert caught.value.tensor == name


def test_a_weight_that_others_lack_is_named(llama: Path) -> None:
    network, weights = opened(llama)
    name = "model.layers.1.mlp.up_proj.weight"
    other = OtherWeights({one: weights.read(one) for one in weights.names if one != name})
    with network.block(0, other):
        pass
    with pytest.raises(MalformedInputError) as caught, network.block(1, other):
        pass
    assert caught.value.tensor == name


def test_a_weight_of_another_shape_is_named(llama: Path) -> None:
    network, weights = opened(llama)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = {one: weights.read(one) for one in weights.names}
    tensors[name] = tensors[name][:-1]
    with pytest.raises(MalformedInputError) as caught, network.block(0, OtherWeights(tensors)):
        pass
    assert caught.value.tensor == name
    assert caught.value.found == "(31, 64)"


def test_an_expert_that_is_missing_is_an_error(mixtral: Path) -> None:
    source = open_source(str(mixtral))
    del source.checkpoint.tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(MalformedInputError):
        open_network(source, dtype="float32")


@pytest.mark.parametrize("name", ["self_attn.q_proj", "block_sparse_moe.experts.2.w3"])
def test_a_tensor_of_another_shape_is_an_error(name: str, mixtral: Path) -> None:
    source = open_source(str(mixtral))
    tensors, name = source.checkpoint.tensors, f"model.layers.0.{name}.weight"
    tensors[name] = replace(tensors[name], shape=tensors[name].shape[::-1] if "w3" in name else (64, 32))
    with pytest.raises(MalformedInputError) as caught:
        open_network(source, dtype="float32")
    assert caught.value.tensor == name


def test_a_tensor_that_nothing_uses_is_an_error(llama: Path) -> None:
    source = open_source(str(llama))
    name = "model.layers.0.self_attn.o_proj.bias"
    source.checkpoint.tensors[name] = source.checkpoint.tensors["model.layers.0.input_layernorm.weight"]
    with pytest.raises(MalformedInputError) as caught:
        open_network(source, dtype="float32")
    assert caught.value.tensor == name


def test_tensors_that_are_left_out_are_not_used(llama: Path, tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), torch.nan)}
    directory = rewritten(llama, tmp_path / "model", buffer)
    ids = windows(1, 9)
    assert torch.equal(streamed_logits(*opened(directory), ids)[0], whole_logits(llama, ids)[0])


def test_experts_stored_together(mixtral: Path, tmp_path: Path) -> None:
    """The three-dimensional spelling of transformers 5 in memory is that of some files too."""
    tensors = load_file(mixtral / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe.experts"
        each = [[tensors[f"{old}.{e}.{w}.weight"] for e in range(4)] for w in ("w1", "w3", "w2")]
        change |= {name: None for name in tensors if name.startswith(old)}
        new = f"model.layers.{layer}.mlp.experts"
        change[f"{new}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(each[0], each[1], strict=True)])
        change[f"{new}.down_proj"] = torch.stack(each[2])
    network, weights = opened(rewritten(mixtral, tmp_path / "model", change))
    ids = windows(1, 9)
    assert torch.equal(streamed_logits(network, weights, ids)[0], whole_logits(mixtral, ids)[0])
    tap = next(tap for tap in network.taps(0) if tap.matrices == 4)
    assert tap.tensors == {"model.layers.0.mlp.experts.gate_up_proj": None}


@pytest.mark.parametrize("own", ["same", "other"])
def test_a_tied_output_that_is_stored_nevertheless(own: str, tmp_path: Path) -> None:
    tied = make_tiny("qwen3", tmp_path / "tied")
    table = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    stored = table.clone() if own == "same" else table.flip(0)
    directory = rewritten(tied, tmp_path / "model", {"lm_head.weight": stored.contiguous()})
    ids = windows(1, 9)
    network, weights = opened(directory)
    found = streamed_logits(network, weights, ids)[0]
    assert torch.equal(found, whole_logits(directory, ids)[0])
    assert torch.equal(found, whole_logits(tied, ids)[0]) == (own == "same")
    source = "model.embed_tokens.weight" if own == "same" else "lm_head.weight"
    assert network.head_tap().tensors == {source: None}


def test_float8_is_decoded_with_its_scales(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    decoded: dict[str, torch.Tensor | None] = {}
    for name, value in tensors.items():
        if "_proj" not in name:
            continue
        tiles = [-(-size // 16) for size in value.shape]
        scale = 0.01 + torch.rand(tiles, generator=torch.Generator().manual_seed(len(name)))
        wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[: value.shape[0], : value.shape[1]]
        codes = (value.float() / wide).clamp(-440, 440).to(torch.float8_e4m3fn)
        change |= {name: codes, name + "_scale_inv": scale}
        decoded[name] = codes.float() * wide
    directory = rewritten(llama, tmp_path / "float8", change)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (directory / "config.json").write_text(json.dumps(config))
    plain = rewritten(llama, tmp_path / "plain", decoded)
    ids = windows(1, 9)
    assert torch.equal(streamed_logits(*opened(directory), ids)[0], whole_logits(plain, ids)[0])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.3.w3.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    ],
)
def test_one_tensor_replaced(name: str, mixtral: Path) -> None:
    network, weights = opened(mixtral)
    tensors = {one: weights.read(one).float() for one in weights.names}
    state = next(network.embed(weights, windows(1, 20)))
    changed = {**tensors, name: tensors[name] * 1.5}
    with network.block(0, OtherWeights(changed)) as block:
        expected = block(state)
    with network.block(0, weights) as block:
        before = block(state)
        block.replace(name, changed[name])
        assert torch.equal(block(state), expected)
        assert not torch.equal(expected, before)
        block.replace(name, tensors[name].bfloat16())
        assert torch.equal(block(state), before)
        with pytest.raises(ValueError, match="shape"):
            block.replace(name, changed[name][:-1])
        with pytest.raises(KeyError):
            block.replace("model.layers.1.input_layernorm.weight", tensors["model.norm.weight"])


def test_two_blocks_at_once_do_not_mix(llama: Path) -> None:
    """Source and artifact side by side: one network, the same block with two sets of weights."""
    network, weights = opened(llama)
    other = OtherWeights({name: weights.read(name).float() * 1.25 for name in weights.names})
    state = next(network.embed(weights, windows(1, 9)))
    with network.block(0, weights) as block:
        alone = block(state)
    with network.block(0, other) as block:
        other_alone = block(state)
    with network.block(0, weights) as one, network.block(0, other) as two:
        assert torch.equal(one(state), alone)
        assert torch.equal(two(state), other_alone)
        assert torch.equal(one(state), alone)
    with network.head(weights) as one_head, network.head(other) as two_head:
        assert not torch.equal(one_head(state), two_head(state))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_are_those_of_the_parts(dtype: str, size: int, mixtral: Path) -> None:
    network, weights = opened(mixtral, dtype)
    shapes = {name: weights.read(name).numel() for name in weights.names}
    for part, found in [
        (0, [n for n in shapes if ".layers.0." in n]),
        ("embedding", ["model.embed_tokens.weight"]),
        ("head", ["model.norm.weight", "lm_head.weight"]),
    ]:
        assert network.bytes(part) == size * sum(shapes[name] for name in found)  # type: ignore[arg-type]


def test_ids_beyond_the_embedding_are_refused(llama: Path) -> None:
    network, weights = opened(llama)
    for bad in (-1, 320):
        with pytest.raises(UsageError, match="token id"):
            next(network.embed(weights, torch.tensor([[1, bad]])))


def test_only_the_rows_that_occur_are_read(llama: Path) -> None:
    class Watched(CheckpointWeights):
        rows: list[int] = []  # noqa: RUF012

        def read(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

        def read_into(self, name: str, out: torch.Tensor) -> None:
            raise AssertionError(name)

        def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
            self.rows += rows.tolist()
            return super().read_rows(name, rows)

    source = open_source(str(llama))
    network = open_network(source, dtype="float32")
    ids = torch.tensor([[5, 5, 319], [0, 6, 5]])
    found = list(network.embed(Watched(source.checkpoint), ids))
    table = CheckpointWeights(source.checkpoint).read("model.embed_tokens.weight").float()
    assert torch.equal(torch.stack(found), table[ids])
    assert Watched.rows == [0, 5, 6, 319]


def test_nothing_is_kept_of_a_block(llama: Path) -> None:
    """Neither the network nor the closed block holds a loaded weight."""
    network, weights = opened(llama)
    state = next(network.embed(weights, windows(1, 9)))
    with network.block(0, weights) as block:
        block(state)
        loaded = [p.untyped_storage() for p in block._module.parameters()]
    assert all(p.is_meta for one in network._skeleton.blocks for p in one.parameters())
    assert all(p.is_meta for p in network._skeleton.model.parameters())
    assert list(block._module.parameters()) == []
    assert all(sys.getrefcount(one) <= 4 for one in loaded)
    assert streamed_states(network, weights, windows(1, 9))


def test_a_device_that_is_not_here_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    source = open_source(str(llama))
    with source.checkpoint:
        with pytest.raises(UnsupportedError, match="not here"):
            open_network(source, dtype="float32", device="cuda")
        with pytest.raises(UnsupportedError, match="not here"):
            open_network(source, dtype="float32", device="cpu:1")
        for name in ("tpu", "cuda:x", ""):
            with pytest.raises(UsageError, match="no such device"):
                open_network(source, dtype="float32", device=name)

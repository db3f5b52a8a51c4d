"""Scales folded into every family, in real transformers: the logits stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures import ARCHITECTURES
from llm_quantize.architectures.scaling import ScaleGroup, changed_floats, scale_groups
from llm_quantize.models.opening import Source, open_source
from llm_quantize.transforms.applying import apply, apply_all, readers, scaled_hessian, settle

from ..tiny_models import STREAMED, TINY, VOCABULARY, make_tiny, reference_logits, reference_model

_TOKENS = np.random.Generator(np.random.PCG64(1)).integers(0, VOCABULARY, 40).tolist()
# variant -> letters of the groups of a layer: a = norm to attention, v = values, f = norm to the feed-forward block,
# b = one norm to both, d = up to down (for every expert). Not listed: avfd.
_GROUPS = {
    "mixtral": "avfdddd",
    "qwen3_moe": "avfdddd",
    "qwen2_moe": "avfddddd",
    "granitemoe": "avfdddd",
    "olmoe": "avfdddd",
    "gpt_oss": "av",
    "lfm2": ("fd", "avfd"),
    "glm4_moe": ("avfd", "avfddddd"),
    "ernie4_5_moe": ("avfd", "avfddddd"),
    "gpt2": "avf",
    "gpt_neox": "avf",
    "gpt_neox-serial": "avf",
    "starcoder2": "avf",
    "phi": "bv",
    "falcon": "bv",
    "falcon-new": "avf",
    "cohere": "bvd",
    "cohere2": "bvd",
    "stablelm-12b": "bvd",
    "olmo": "d",
    "olmo2": "vd",
    "exaone4": "vd",
    "olmo3": "vd",
    "olmo3-pattern": "vd",
    # The first layers have no attention: what a delta rule gives is normed before it is multiplied.
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_text-equal", "qwen3_5_text-yarn", "qwen3_5"), "afd"),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe"), "afddddd"),
}
_LETTERS = {
    "attention_in": "a",
    "attention_out": "v",
    "feed_forward_in": "f",
    "block_in": "b",
    "feed_forward_out": "d",
}


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_groups(source: Source) -> list[ScaleGroup]:
    return [group for layer in range(source.architecture.hyper.n_layer) for group in scale_groups(source, layer)]


def random_scales(group: ScaleGroup, seed: int) -> torch.Tensor:
    own = 0.5 + 1.5 * torch.rand(group.channels, generator=torch.Generator().manual_seed(seed))
    return own if group.spread is None else own[torch.from_numpy(group.spread)]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def rewritten(directory: Path, changed: dict[str, torch.Tensor], target: Path) -> Path:
    """The checkpoint with other values for some of its tensors."""
    shutil.copytree(directory, target)
    tensors = stored(directory)
    assert changed.keys() <= tensors.keys()
    save_file(tensors | {k: v.contiguous() for k, v in changed.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def distance(directory: Path, changed: dict[str, torch.Tensor], target: Path) -> float:
    """Largest difference of the logits as a share of their range."""
    expected = reference_logits(reference_model(directory), _TOKENS)
    got = reference_logits(reference_model(rewritten(directory, changed, target)), _TOKENS)
    assert np.ptp(expected) > 4, "flat logits prove nothing"
    return float(np.abs(got - expected).max() / np.ptp(expected))


def test_every_family_is_tried() -> None:
    assert {model_type for model_type, _ in TINY.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", STREAMED)
def test_the_scaled_model_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    source = open_source(str(model))
    with source.checkpoint:
        groups = all_groups(source)
        kinds = ["".join(_LETTERS[g.role] for g in scale_groups(source, i)) for i in (0, 1)]
        floats = changed_floats(source)
    wanted = _GROUPS.get(variant, "avfd")
    assert kinds == ([wanted] * 2 if isinstance(wanted, str) else list(wanted))
    tensors = stored(model)
    changed = apply_all(groups, [random_scales(group, i) for i, group in enumerate(groups)], tensors)
    assert all((changed[name] != tensors[name]).any() for name in changed)
    vectors = {name for name in changed if tensors[name].ndim == 1}
    assert vectors <= floats <= changed.keys()
    routers = [name for name in floats if tensors[name].ndim == 2]
    assert all(any(word in name for word in ("gate", "router", "in_proj_a", "in_proj_b")) for name in routers)
    assert distance(model, changed, tmp_path / "scaled") < 1e-5


@pytest.mark.parametrize("variant", ["llama-bias", "gpt2", "nemotron"])
def test_half_of_any_group_moves_the_logits(variant: str, tmp_path: Path) -> None:
    """What the test above would see if a tensor were forgotten."""
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    source = open_source(str(model))
    with source.checkpoint:
        groups = scale_groups(source, 1)
    tensors = stored(model)
    for number, group in enumerate(groups):
        changed = apply(group, random_scales(group, 0), tensors)
        assert list(changed) == list(group.tensors)
        for name in changed:
            part = {key: value for key, value in changed.items() if key != name}
            if part:
                assert distance(model, part, tmp_path / f"{number}-{name}") > 1e-4, (group.role, name)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen3", "olmoe"])
def test_norms_stored_in_sixteen_bits_lose_nothing(variant: str, tmp_path: Path) -> None:
    """Scales settled on what the stored norm can say: the norm is rounded to bfloat16 and the logits stay."""
    model = make_tiny(variant, tmp_path / "model", dtype="bfloat16")
    source = open_source(str(model))
    with source.checkpoint:
        groups = all_groups(source)
    tensors = stored(model)
    wanted = [random_scales(group, i) for i, group in enumerate(groups)]
    scales = [settle(group, scale, tensors) for group, scale in zip(groups, wanted, strict=True)]
    for own, scale in zip(scales, wanted, strict=True):
        assert ((own / scale - 1).abs() < 0.02).all()
    changed = apply_all(groups, scales, tensors)
    for name, value in changed.items():
        if value.ndim == 1:
            changed[name] = value.bfloat16()
    assert any(value.dtype == torch.bfloat16 for value in changed.values())
    assert distance(model, changed, tmp_path / "scaled") < 1e-5


def group_of(variant: str, role: str, directory: Path) -> tuple[ScaleGroup, dict[str, torch.Tensor]]:
    model = make_tiny(variant, directory)
    source = open_source(str(model))
    with source.checkpoint:
        group = next(group for group in scale_groups(source, 0) if group.role == role)
    return group, stored(model)


@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_settled_scales_and_stored_norms_multiply_to_the_old_norm(variant: str, tmp_path: Path) -> None:
    group, tensors = group_of(variant, "attention_in", tmp_path)
    name, add = group.divided[0].name, group.divided[0].add
    assert add == (1.0 if variant == "gemma" else 0.0)
    old = tensors[name]
    old[:3] = torch.tensor([0.0, 3e38, 1e-38]).bfloat16() - add
    wanted = torch.exp(torch.linspace(-4, 4, group.columns))
    wanted[1] = 1e-3
    scales = settle(group, wanted, tensors)
    new = apply(group, scales, tensors)[name].bfloat16()
    whole, divided = old.double() + add, new.double() + add
    assert torch.isfinite(new).all()
    assert (scales > 0).all()
    assert torch.allclose(divided * scales.double(), whole, rtol=1e-6, atol=0)
    assert scales[0] == 1.0  # nothing to divide
    assert scales[1] == 1.0  # the quotient would overflow
    assert (scales[3:] / wanted[3:] - 1).abs().max() < (0.5 if variant == "gemma" else 0.005)
    other, values = group_of("llama", "attention_out", tmp_path / "other")
    assert torch.equal(settle(other, random_scales(other, 1), values), random_scales(other, 1))


def test_readers_are_what_is_quantized_in_their_own_orientation(tmp_path: Path) -> None:
    group, tensors = group_of("mixtral", "feed_forward_in", tmp_path / "mixtral")
    experts, everything = readers(group, tensors), readers(group, tensors, floats=True)
    assert (len(experts), len(everything)) == (8, 9)  # w1 and w3 of four experts; the router
    assert group.seen_at.endswith("block_sparse_moe.gate.weight")
    down, tensors = group_of("granitemoe", "feed_forward_out", tmp_path / "granitemoe")
    (matrix,) = readers(down, tensors)
    assert down.expert == 0
    assert down.seen_at == down.multiplied[0].name
    assert matrix.shape == (64, 96)
    assert torch.equal(matrix, tensors[down.multiplied[0].name][0])
    fused, tensors = group_of("gpt2", "attention_out", tmp_path / "gpt2")
    (matrix,) = readers(fused, tensors)
    assert torch.equal(matrix, tensors["transformer.h.0.attn.c_proj.weight"].T)
    before = {name: value.clone() for name, value in tensors.items()}
    apply(fused, random_scales(fused, 2), tensors)
    assert all(torch.equal(tensors[name], value) for name, value in before.items()), "apply changed its inputs"


def test_products_of_scaled_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scales = torch.randn(50, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    assert torch.allclose(scaled_hessian(x.T @ x, scales), (x / scales).T @ (x / scales), rtol=1e-5, atol=1e-5)

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
from llm_quantize.source import Source, open_source
from llm_quantize.transforms.scaling import apply_all

from ..tiny_models import TINY, VOCABULARY, make_tiny, reference_logits, reference_model

_TOKENS = np.random.Generator(np.random.PCG64(1)).integers(0, VOCABULARY, 40).tolist()
# variant -> letters of the groups of a layer: a = norm to attention, v = values, f = norm to the feed-forward block,
# b = one norm to both, d = up to down (for every expert). Not listed: avfd.
_GROUPS = {
    "mixtral": "avfdddd",
    "qwen3_moe": "avfdddd",
    "qwen2_moe": "avfddddd",
    "granitemoe": "avfdddd",
    "olmoe": "avfdddd",
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
    "olmo3": "vd",
    "olmo3-pattern": "vd",
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


@pytest.mark.parametrize("variant", TINY)
def test_the_scaled_model_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    source = open_source(str(model))
    with source.checkpoint:
        groups = all_groups(source)
        kinds = ["".join(_LETTERS[g.role] for g in scale_groups(source, i)) for i in (0, 1)]
        floats = changed_floats(source)
    assert kinds == [_GROUPS.get(variant, "avfd")] * 2
    tensors = stored(model)
    changed = apply_all(groups, [random_scales(group, i) for i, group in enumerate(groups)], tensors)
    assert all((changed[name] != tensors[name]).any() for name in changed)
    vectors = {name for name in changed if tensors[name].ndim == 1}
    assert vectors <= floats <= changed.keys()
    routers = [name for name in floats if tensors[name].ndim == 2]
    assert all("gate" in name or "router" in name for name in routers)
    assert distance(model, changed, tmp_path / "scaled") < 1e-5

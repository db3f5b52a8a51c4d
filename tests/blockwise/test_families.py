"""Every family through the blocks, into GGUF and into a directory: it runs, verifies, and loses less than rounding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.opening import open_source
from tests.streams.networks import opened, streamed_logits

from ..tiny_models import STREAMED, TINY, make_tiny
from .tiny import ids_of, matrices, options, run, write_noise

QUICK = ("gpt2", "phi3", "mixtral", "qwen2_moe", "gemma3_text", "falcon-new", "qwen3_5_text")
AWQ = ("llama-bias", "qwen2_moe", "qwen3_5")
DIRECTORIES = ("phi3", "qwen3_moe", "mixtral", "granitemoe", "qwen3_5_moe")
REFUSED = {"gpt2": "Linear only", "granitemoe": "stored in one tensor", "gpt_oss": "stored in one tensor"}


def divergence(model: Path, artifact: Path, ids: torch.Tensor) -> float:
    """Mean KLD from the model's next-token distribution to the artifact's, nats per token."""
    network, weights = opened(model)
    source = open_source(str(model))
    with source.checkpoint:
        decoded = open_decoded(source, artifact)
        pairs = zip(streamed_logits(network, weights, ids), streamed_logits(network, decoded, ids), strict=True)
        values = [
            torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
            for a, b in pairs
        ]
        decoded.close()
    return float(torch.stack(values).mean())


def sides(variant: str) -> dict[str, Any]:
    """Sizes that make rows multiples of 32 where the variant does not say otherwise."""
    changes = TINY[variant][1]
    wide = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    return {name: value for name, value in wide.items() if name in changes} | (
        {"head_dim": 32} if changes.get("head_dim") == 24 else {}
    )


def compare(variant: str, root: Path, format: str, level: str, **method: Any) -> None:
    """Feedback against rounding on the same grid, on tokens that were not calibrated on."""
    model = make_tiny(variant, root / "model", dtype="float32", **sides(variant))
    text, other = (write_noise(root / f"{seed}.txt", seed) for seed in (1, 2))
    with (source := open_source(str(model))).checkpoint:
        ids = ids_of(source, options(other, samples=8, length=48))
    losses = {}
    for chosen in ("rtn", "gptq"):
        given = options(text, samples=48, length=48, **{**method, "method": chosen})
        result, manifest = run(model, root / chosen, given, format, level)
        outcome = verify(result.path, source=str(model))
        assert outcome.ok, outcome.all_problems()[:5]
        losses[chosen] = divergence(model, result.path, ids)
    assert losses["gptq"] <= 1.05 * losses["rtn"], losses
    told = matrices(manifest)
    assert told
    assert sum(entry["loss"] for entry in told.values()) < 0.7 * sum(entry["plain_loss"] for entry in told.values())
    finite(entry[name] for entry in told.values() for name in ("loss", "plain_loss"))


def finite(values: Iterable[float]) -> None:
    assert all(value == value and abs(value) != float("inf") for value in values)


@pytest.mark.parametrize("variant", [pytest.param(v, marks=() if v in QUICK else pytest.mark.heavy) for v in STREAMED])
def test_feedback_into_gguf(variant: str, tmp_path: Path) -> None:
    compare(variant, tmp_path, "gguf", "Q4_0")


def into_a_directory(variant: str, root: Path, format: str, level: str) -> None:
    """``compare``; what no runtime of directories can hold is refused by name, never left out in silence."""
    if variant not in REFUSED:
        compare(variant, root, format, level, group_size=32)
        return
    model = make_tiny(variant, root / "model", dtype="float32")
    with pytest.raises(UnsupportedError, match=REFUSED[variant]) as caught:
        run(model, root / "out", options(write_noise(root / "1.txt", 1), group_size=32), format, level)
    assert caught.value.to_dict()["tensor"]
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in DIRECTORIES else pytest.mark.heavy) for v in STREAMED]
)
def test_feedback_into_a_directory(variant: str, tmp_path: Path) -> None:
    into_a_directory(variant, tmp_path, "compressed-tensors", "W4A16")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=() if v in AWQ else pytest.mark.heavy) for v in STREAMED])
def test_scales_and_feedback_into_awq(variant: str, tmp_path: Path) -> None:
    into_a_directory(variant, tmp_path, "awq", "4bit")

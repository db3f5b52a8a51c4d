"""Matrices whose columns the artifact has in another order than the source: feedback follows the inputs, not their
places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.blockwise.segments import Segment, column_orders
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.opening import open_source
from tests.blockwise.tiny import ids_of, options, run, write_noise
from tests.tiny_models import make_tiny, reference_model

NAME = "model.layers.{}.linear_attn.out_proj.weight"


def losses(model: Path, artifact: Path, ids: torch.Tensor) -> list[float]:
    """What rounding does to the outputs of every layer's ``out_proj``, on the inputs that transformers gives it."""
    reference = reference_model(model)
    seen: dict[int, list[torch.Tensor]] = {}
    layers = [index for index, layer in enumerate(reference.model.layers) if hasattr(layer, "linear_attn")]
    for index in layers:
        module = reference.model.layers[index].linear_attn.out_proj
        module.register_forward_pre_hook(lambda _, given, index=index: seen.setdefault(index, []).append(given[0][0]))
    with torch.inference_mode():
        for window in ids:
            reference(input_ids=window[None])
    found = []
    with (source := open_source(str(model))).checkpoint:
        decoded = open_decoded(source, artifact)
        for index in layers:
            weight = reference.get_parameter(NAME.format(index)).detach()
            off = decoded.read(NAME.format(index)) - weight
            found.append(float((torch.cat(seen[index]) @ off.T).square().sum()))
        decoded.close()
    return found


@pytest.mark.parametrize("inputs", ["sequential", "source"])
def test_feedback_lowers_the_loss_on_the_very_inputs(inputs: str, tmp_path: Path) -> None:
    model = make_tiny("qwen3_5_text", tmp_path / "model", dtype="float32")
    text = write_noise(tmp_path / "1.txt", 1)
    with (source := open_source(str(model))).checkpoint:
        ids = ids_of(source, options(text, samples=48, length=48))
    found = {}
    for method in ("rtn", "gptq"):
        given = options(text, samples=48, length=48, method=method, inputs=inputs)
        result, _ = run(model, tmp_path / method, given, "gguf", "Q4_0")
        found[method] = losses(model, result.path, ids)
    ratios = np.divide(found["gptq"], found["rtn"])
    assert ratios.shape == (4,)
    assert (ratios < 0.9).all(), ratios


def test_matrices_of_one_input_must_agree() -> None:
    order = np.array([1, 0])
    seen = [Segment(0, 3, "tap", 0)]
    turned, plain = (OutputTensor("x", (3, 2), (Piece("w", columns=columns),)) for columns in (order, None))
    assert column_orders([(turned, seen), (turned, seen)])["tap"] is order
    assert column_orders([(plain, seen)]) == {}
    with pytest.raises(UnsupportedError, match="different orders"):
        column_orders([(turned, seen), (plain, seen)])

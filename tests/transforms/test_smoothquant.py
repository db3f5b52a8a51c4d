"""SmoothQuant's search: against the dense twin, and what it gains where activations are hard to round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.errors import UsageError
from llm_quantize.grids import grid_type
from llm_quantize.grids.inputs import calibrated, rounded_inputs
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.transforms.awq import AwqOptions, Seen
from llm_quantize.transforms.smoothquant import search

from ..oracles import dense_smoothquant as dense
from .test_awq import _Plain

TOKENS, N = 600, 32
INT8 = InputGrid("int8")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(seed: int, *, loud: float = 1.0, inputs: InputGrid | None = INT8) -> tuple[list[torch.Tensor], Seen]:
    """Two matrices, and what is seen of inputs two of whose channels are ``loud`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, N, generator=generator)
    x[:, [3, 20]] *= loud
    weights = [torch.randn(rows, N, generator=generator) / N**0.5 for rows in (24, 8)]
    return weights, Seen(x.T @ x, TOKENS, x[::10], x.abs().amax(dim=0), inputs)


@pytest.mark.parametrize("spread", [None, torch.arange(N) % 16])
def test_every_candidate_and_its_loss_equal_the_dense_twin(spread: torch.Tensor | None) -> None:
    weights, seen = layer(1, loud=20)
    matrix = torch.cat(weights).double().numpy()
    mean, rows = seen.hessian.double().numpy() / TOKENS, seen.rows.double().numpy()
    largest = seen.largest.double().numpy()

    def loss(scales: np.ndarray) -> float:
        return dense.weight_loss(matrix, mean, scales) + dense.input_loss(matrix, rows, scales)

    listed = dense.candidates(largest, np.abs(matrix).max(axis=0), 5)
    if spread is not None:
        shared = {k: [j for j in range(N) if spread[j] == k] for k in set(spread.tolist())}
        alone = [np.array([np.exp(np.log(s[shared[k]]).mean()) for k in spread.tolist()]) for _, s in listed]
        listed = [(a, s / np.sqrt(s.max() * s.min())) for (a, _), s in zip(listed, alone, strict=True)]
    losses = [loss(scales) for _, scales in listed]
    strength, scales = listed[int(np.argmin(losses))]
    options = AwqOptions(judge="rounding", points=5, rows=0, finalists=1, least_gain=0.0)
    found = search(weights, seen, _Plain(grid_type("int8")), options, spread=spread)
    assert (found.kind, found.exponent) == ("migration", strength)
    np.testing.assert_allclose(found.scales.numpy(), scales, rtol=2e-5)
    assert found.loss == pytest.approx(min(losses), rel=0.02)
    assert found.plain_loss == pytest.approx(loss(np.ones(N)), rel=0.02)
    assert found.loss < found.plain_loss


@pytest.mark.parametrize("inputs", [INT8, InputGrid("e2m1", 16, "e4m3", True), InputGrid("int8", static=True)])
@pytest.mark.parametrize("judge", ["feedback", "rounding"])
def test_loud_channels_are_moved_into_the_weights(judge: str, inputs: InputGrid) -> None:
    weights, seen = layer(2, loud=60, inputs=inputs)
    found = search(weights, seen, grid_type("int8"), AwqOptions(judge=judge))
    assert found.loss < 0.5 * found.plain_loss
    assert found.scales[[3, 20]].min() > 4 * found.scales.median()
    matrix = torch.cat(weights)
    lost = []
    for scales in (torch.ones(N), found.scales):
        x = seen.rows / scales
        grid = calibrated(inputs, float(x.abs().max()))
        lost.append(float(((rounded_inputs(x, grid) - x) * scales @ matrix.T).square().sum()))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_no_scales(seed: int) -> None:
    weights, seen = layer(seed, loud=1 + seed)
    found = search(weights, seen, grid_type("int8"), AwqOptions(points=4, rows=0, least_gain=0.0))
    assert found.loss <= found.plain_loss
    again = search(weights, seen, grid_type("int8"), AwqOptions(points=4, rows=0, least_gain=0.0))
    assert torch.equal(found.scales, again.scales)


def test_channels_that_are_never_seen_and_weights_of_zero() -> None:
    weights, seen = layer(4, loud=10)
    for weight in weights:
        weight[:, 5] = 0
    rows = seen.rows.clone()
    rows[:, 7] = 0
    hessian = seen.hessian.clone()
    hessian[7] = hessian[:, 7] = 0
    largest = seen.largest.clone()
    largest[7] = 0
    found = search(weights, Seen(hessian, TOKENS, rows, largest, INT8), grid_type("int8"))
    assert torch.isfinite(found.scales).all()
    assert (found.scales > 0).all()


def test_nothing_to_go_by_is_refused() -> None:
    weights, seen = layer(0)
    for lacking in (Seen(seen.hessian, TOKENS), Seen(seen.hessian, TOKENS, seen.rows, seen.largest, None)):
        with pytest.raises(UsageError, match="SmoothQuant"):
            search(weights, lacking, grid_type("int8"))

"""The search for scales: against the dense twin, its promises, and what it gains where AWQ should gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.grids import grid_type
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import factorize
from llm_quantize.transforms.applying import scaled_hessian
from llm_quantize.transforms.awq import AwqOptions, conditional_variances, search

from ..oracles import dense_awq

TOKENS = 4000
N = 64


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(seed: int, *, unevenness: float = 1.0, columns: int = N) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two matrices, and sum x x^T of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    size = (unevenness * torch.randn(columns, generator=generator)).exp()
    x = torch.randn(TOKENS, columns, generator=generator) @ mix * size
    weights = [torch.randn(rows, columns, generator=generator) / columns**0.5 for rows in (48, 24)]
    return weights, x.T @ x


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("judge", ["feedback", "rounding"])
def test_every_candidate_and_its_loss_equal_the_dense_twin(judge: str, shared: bool) -> None:
    weights, hessian = layer(3)
    spread = torch.arange(N) % 32 if shared else None
    wide = [w.double().numpy() for w in weights]
    mean = hessian.double().numpy() / TOKENS
    conditioned = factorize(hessian, TOKENS, GptqOptions()).hessian.double().numpy()
    conditional = dense_awq.conditional_variances(conditioned)
    grid, matrix = grid_type("int4_g16_asym"), np.concatenate(wide)

    def loss(scales: np.ndarray) -> float:
        return dense_awq.loss(matrix, scales, mean, conditional if judge == "feedback" else None, 4, 16)

    listed = dense_awq.candidates(wide, mean, conditional, 5, 16, None if spread is None else spread.tolist())
    losses = [loss(scales) for _, _, scales in listed]
    kind, exponent, scales = listed[int(np.argmin(losses))]
    plain = _Plain(grid)
    options = AwqOptions(judge=judge, points=5, rows=0, finalists=1, least_gain=0.0)
    found = search(weights, hessian, TOKENS, plain, options, spread=spread)
    assert (found.kind, found.exponent) == (kind, exponent)
    np.testing.assert_allclose(found.scales.numpy(), scales, rtol=2e-5)
    assert found.loss == pytest.approx(min(losses), rel=1e-3)
    assert found.plain_loss == pytest.approx(loss(np.ones(N)), rel=1e-3)
    assert found.notes == ()


class _Plain:
    """A grid type whose fitted grid is its plain one."""

    def __init__(self, inner) -> None:
        self.name, self.block, self.plain = inner.name, inner.block, inner.plain

    def fit(self, weight, importance, *, refine=True):
        return self.plain(weight, importance)[0]


@pytest.mark.parametrize("tokens", [100, TOKENS])
def test_conditional_variances_are_schur_complements(tokens: int) -> None:
    _, hessian = layer(5, columns=300)
    factor = factorize(hessian, tokens, GptqOptions())
    dense = dense_awq.conditional_variances(factor.hessian.double().numpy())
    np.testing.assert_allclose(conditional_variances(factor).numpy(), dense, rtol=1e-4)
    assert (dense < 0.999 * factor.hessian.diagonal().numpy()).any()


def test_inputs_that_span_little_or_nothing() -> None:
    """Equal channels, dead channels, no signal at all: finite scales, and a note where H had to be helped."""
    weights, hessian = layer(6)
    same = torch.ones_like(hessian) * TOKENS
    dead = hessian.clone()
    dead[:10] = dead[:, :10] = 0
    for changed in (same, dead, torch.zeros_like(hessian)):
        found = search(weights, changed, TOKENS, grid_type("int4_g32_asym"))
        assert torch.isfinite(found.scales).all()
        assert (found.scales > 0).all()
        assert found.loss <= found.plain_loss
        assert 1 / 256 <= float(found.scales.min()) <= float(found.scales.max()) <= 256


@pytest.mark.parametrize("judge", ["feedback", "rounding"])
@pytest.mark.parametrize("qtype", ["int4_g32_asym", "int3_g32", "int4", "q4_0"])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_no_scales(seed: int, qtype: str, judge: str) -> None:
    weights, hessian = layer(seed, unevenness=0.3 * seed)
    options = AwqOptions(judge=judge, points=5, rows=0, least_gain=0.0)
    found = search(weights, hessian, TOKENS, grid_type(qtype), options)
    assert found.loss <= found.plain_loss
    if found.kind == "ones":
        assert (found.scales == 1).all()
        assert found.loss == found.plain_loss
    assert float(found.scales.max() * found.scales.min()) == pytest.approx(1, rel=1e-4)


def test_channels_of_uneven_size_are_worth_scaling() -> None:
    """A few loud channels: their weights must be enlarged, and plain rounding then loses much less."""
    weights, hessian = layer(1, unevenness=0.1)
    loud = torch.ones(N)
    loud[[3, 40]] = 30.0
    hessian = hessian * loud[:, None] * loud[None]
    for judge in ("feedback", "rounding"):
        found = search(weights, hessian, TOKENS, grid_type("int3_g32_asym"), AwqOptions(judge=judge))
        assert found.loss < 0.8 * found.plain_loss
        assert found.scales[[3, 40]].min() > 2 * found.scales.median()


def test_the_loss_is_that_of_the_scaled_layer() -> None:
    """Quantizing W s against the inputs x / s, as the run does, leaves the loss that the search reports."""
    weights, hessian = layer(1, unevenness=1.5)
    grid_maker = grid_type("int4_g32_asym")
    found = search(weights, hessian, TOKENS, grid_maker, AwqOptions(judge="rounding", rows=0))
    own = scaled_hessian(hessian, found.scales) / TOKENS
    total = 0.0
    for weight in weights:
        scaled = weight * found.scales
        grid = grid_maker.fit(scaled, own.diagonal())
        error = (grid.decode(grid.nearest(scaled)) - scaled).double()
        total += float(((error @ own.double()) * error).sum())
    assert found.kind != "ones"
    assert found.loss == pytest.approx(total, rel=1e-4)


def test_the_same_answer_again_and_for_other_forms_of_the_weights() -> None:
    weights, hessian = layer(2)
    maker = grid_type("int4_g32_asym")
    halves = [w.bfloat16() for w in weights]
    first = search(halves, hessian, TOKENS, maker)
    for again in (search(halves, hessian, TOKENS, maker), search([w.float() for w in halves], hessian, TOKENS, maker)):
        assert torch.equal(again.scales, first.scales)
        assert again.loss == first.loss


def test_sampled_rows_stand_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, N, generator=generator) for rows in (600, 300)]
    hessian = layer(4)[1]
    whole = search(weights, hessian, TOKENS, grid_type("int4_g32_asym"), AwqOptions(rows=0, points=4))
    part = search(weights, hessian, TOKENS, grid_type("int4_g32_asym"), AwqOptions(rows=300, points=4))
    assert part.plain_loss == pytest.approx(whole.plain_loss, rel=0.05)
    assert part.loss == pytest.approx(whole.loss, rel=0.08)


def test_shares_weigh_the_experts() -> None:
    weights, hessian = layer(7)
    maker, options = grid_type("int4_g32_asym"), AwqOptions(rows=0, points=4)
    one, both = (
        search(w, hessian, TOKENS, maker, options, shares=s) for w, s in ((weights[:1], None), (weights, [1.0, 0.0]))
    )
    assert both.plain_loss == pytest.approx(one.plain_loss, rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    weights, hessian = layer(0)
    maker = grid_type("int4_g32_asym")
    for bad in (
        lambda: search([], hessian, TOKENS, maker),
        lambda: search([weights[0][:, :32]], hessian, TOKENS, maker),
        lambda: search(weights, hessian, 0, maker),
        lambda: search(weights, hessian, TOKENS, maker, shares=[1.0]),
    ):
        with pytest.raises(UsageError, match="fit together"):
            bad()
    hessian[0, 0] = float("nan")
    with pytest.raises(NumericPolicyError):
        search(weights, hessian, TOKENS, maker)

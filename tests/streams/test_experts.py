"""Experts run one by one, and what cannot be run or seen is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.streams import experts
from llm_quantize.streams.names import find_places
from llm_quantize.streams.taps import find_points


@pytest.fixture
def layer() -> Any:
    config = MixtralConfig(hidden_size=6, intermediate_size=5, num_local_experts=7, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    made = MixtralExperts(config)
    generator = torch.Generator().manual_seed(5)
    for value in made.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator))
    return made.eval()


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_the_sum_is_that_of_transformers(tokens: int, layer: Any) -> None:
    """Bit for bit, with experts that no token chose among them."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, 6), generator=generator)
    share, index = torch.randn((tokens, 5), generator=generator).softmax(-1).topk(3)
    heard: list[tuple[str, int, torch.Tensor]] = []
    with torch.inference_mode():
        expected = layer(hidden, index, share)
        assert torch.equal(experts.one_by_one(layer, hidden, index, share), expected)
        setattr(layer, experts.LISTENER, lambda *told: heard.append(told))
        assert torch.equal(experts.one_by_one(layer, hidden, index, share), expected)
    for number in range(7):
        rows = {tuple(row.tolist()) for row in hidden[(index == number).any(1)]}
        told = [inputs for name, expert, inputs in heard if (name, expert) == ("gate_up_proj", number)]
        assert ([{tuple(row.tolist()) for row in inputs} for inputs in told] or [set()]) == [rows]
        assert sum(len(inputs) for inputs in told) == int((index == number).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_has_few_numbers_of_rows(dtype: torch.dtype, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows costs memory for good (oneDNN's kernels); zeros that fill them up change no value."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def noted(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.shape[0])
        return linear(inputs, weight)

    layer = layer.to(dtype)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn((99, 6), generator=generator).to(dtype)
    share, index = torch.randn((99, 5), generator=generator).softmax(-1).topk(3)
    with torch.inference_mode():
        expected = layer(hidden, index, share.to(dtype))
        monkeypatch.setattr(experts.functional, "linear", noted)
        assert torch.equal(experts.one_by_one(layer, hidden, index, share.to(dtype)), expected)
    assert len(seen) == 10
    assert all(rows % experts.ROWS == 0 for rows in seen) == (dtype == torch.bfloat16)


def test_other_kinds_of_experts_are_refused(layer: Any) -> None:
    assert experts.is_experts(layer)
    assert not experts.is_experts(torch.nn.Linear(2, 2))
    layer.has_bias = True
    with pytest.raises(UnsupportedError, match="experts of this kind"):
        experts.is_experts(layer)
    layer.has_bias = False
    layer.register_parameter("gate_up_proj_bias", torch.nn.Parameter(torch.zeros(7, 10)))
    with pytest.raises(UnsupportedError, match="experts of this kind"):
        experts.is_experts(layer)


class Bare(torch.nn.Module):
    """A matrix that no module of its own multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3, bias=False, device="meta")
        self.mixing = torch.nn.Parameter(torch.empty((3, 3), device="meta"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.first(hidden) @ self.mixing


class Written(torch.nn.Module):
    """Two matrices in turn of one tensor, which is changed in between."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.change = change
        self.first = torch.nn.Linear(3, 3, bias=False, device="meta")
        self.second = torch.nn.Linear(3, 3, bias=False, device="meta")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.first(hidden)
        if self.change:
            hidden.add_(1)
        return found + self.second(hidden.view(1, -1, 3))


def places(block: torch.nn.Module) -> Any:
    class Slot:
        def __init__(self, name: str) -> None:
            self.name, self.expert = name, None

    return {f"block.{name}": (Slot(name),) for name, _ in block.named_parameters()}


def dry_run(block: torch.nn.Module) -> None:
    with torch.no_grad():
        block(torch.empty((4, 3), device="meta"))


def test_a_matrix_that_is_not_seen_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be observed") as caught:
        find_points(Bare(), "block", places(Bare()), dry_run)
    assert caught.value.tensor == "block.mixing"


@pytest.mark.parametrize("change", [False, True])
def test_a_tensor_written_to_is_another_input(change: bool) -> None:
    points = find_points(Written(change), "block", places(Written(change)), dry_run)
    names = [set(point.tap.tensors) for point in points]
    assert names == ([{"first.weight"}, {"second.weight"}] if change else [{"first.weight", "second.weight"}])


class Model(torch.nn.Module):
    """Enough of a transformers' model to ask for its conversions."""

    base_model_prefix = "model"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"a.weight": (3, 2)}, "does not fit its place"),
        ({"a.weight": (2, 3), "model.a.weight": (2, 3)}, "exactly"),
        ({"a.weight": (2, 3), "b.weight": (2, 3)}, "no place"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    state = {"model.a.weight": torch.empty((2, 3), device="meta")}
    assert find_places(Model(), state, {}, {"a.weight": (2, 3)}, ())["model.a.weight"][0].name == "a.weight"
    with pytest.raises(MalformedInputError, match=said):
        find_places(Model(), state, {}, shapes, ())

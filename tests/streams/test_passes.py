"""The loop through the blocks: the states of the plain one, whatever the threads; what it gives, and refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llm_quantize.errors import NumericPolicyError, StoppedError
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Network
from llm_quantize.streams.passes import Finite, Move, Pass
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.replaced import ReplacedWeights
from llm_quantize.streams.weights import CheckpointWeights
from tests.streams.networks import opened, streamed_states, windows
from tests.tiny_models import make_tiny

COUNT, LENGTH = 5, 12
IDS = windows(COUNT, LENGTH)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, CheckpointWeights]:
    return opened(make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def states(model: tuple[Network, CheckpointWeights]) -> Iterator[Activations]:
    with Activations(COUNT, LENGTH, model[0].width, torch.float32) as opened_states:
        yield opened_states


def way_of(network: Network, threads: int = 2, stop: threading.Event | None = None) -> Pass:
    return Pass(network, IDS, Pool(threads, stop, resumable=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_states_are_those_of_the_plain_loop(
    threads: int, model: tuple[Network, CheckpointWeights], states: Activations
) -> None:
    network, weights = model
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = streamed_states(network, weights, IDS)
    torch.set_num_threads(before)
    way = way_of(network, threads)
    way.embed(weights, states)
    way.run(range(network.n_blocks), [weights], lambda block, _: way.through(block, [Move(states, states, Finite())]))
    for window in range(COUNT):
        assert torch.equal(states.read(window), expected[window])
    assert torch.get_num_threads() == before


def test_blocks_come_one_after_another_with_each_weights(model: tuple[Network, CheckpointWeights]) -> None:
    network, weights = model
    seen: list[tuple[int, int]] = []
    blocks: list[Block] = []

    def on_block(block: Block, number: int) -> None:
        assert all(isinstance(old._module, torch.nn.Identity) for old in blocks)
        blocks.append(block)
        seen.append((block.index, number))

    way_of(network).run(range(1, network.n_blocks), [weights, weights], on_block)
    assert seen == [(index, number) for index in range(1, network.n_blocks) for number in range(2)]


def test_some_windows_are_run_and_told_of(model: tuple[Network, CheckpointWeights], states: Activations) -> None:
    network, weights = model
    told: list[int] = []
    way = Pass(network, IDS, Pool(2, None, resumable=True), lambda: told.append(1))
    way.embed(weights, states)
    entered = [states.read(window).clone() for window in range(COUNT)]
    looked: list[int] = []

    def look(block: Block, hidden: torch.Tensor, window: int) -> torch.Tensor | None:
        looked.append(window)
        return block(hidden) if window % 2 else None

    with way.block(0, weights) as block:
        way.through(block, [Move(states, states, Finite(), look, [1, 2]), Move(states, None, Finite(), windows=[4])])
    assert sorted(looked) == [1, 2]
    assert len(told) == 3
    changed = [not torch.equal(states.read(window), entered[window]) for window in range(COUNT)]
    assert changed == [False, True, False, False, False]


def test_what_is_not_finite_is_named(model: tuple[Network, CheckpointWeights], states: Activations) -> None:
    network, weights = model
    name = next(name for name in network.tensors(1) if name.endswith("down_proj.weight"))
    broken = weights.read(name).clone()
    broken[0, 0] = float("nan")
    way = way_of(network)
    way.embed(weights, states)
    for check, file, tensor in (
        (Finite(Path("/a/file")), "/a/file", None),
        (Finite(tensor="blk.1"), None, "blk.1"),
        (Finite(), None, None),
    ):
        with way.block(1, ReplacedWeights(weights, {name: broken})) as block:
            with pytest.raises(NumericPolicyError, match=r"states of window \d are not finite after block 1") as caught:
                way.through(block, [Move(states, None, check)])
            assert (caught.value.file, caught.value.tensor) == (file, tensor)
            expected = f"{LENGTH} of {LENGTH * network.width} values" if file else None
            assert caught.value.found == expected
            way.through(block, [Move(states, None, None)])


def test_a_signal_stops_it(model: tuple[Network, CheckpointWeights], states: Activations) -> None:
    network, weights = model
    stop = threading.Event()
    way = way_of(network, stop=stop)
    way.embed(weights, states)
    stop.set()
    with way.block(0, weights) as block, pytest.raises(StoppedError, match="are kept"):
        way.through(block, [Move(states, states, Finite())])

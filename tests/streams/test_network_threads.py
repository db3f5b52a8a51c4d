"""Threads: the same bits whatever their number, and each observer hears its own thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from llm_quantize.streams.network import Network, Tap
from llm_quantize.streams.weights import CheckpointWeights
from tests.streams.networks import opened, windows
from tests.tiny_models import make_tiny

Result = TypeVar("Result")
COUNT, LENGTH = 7, 33


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def get(variant: str) -> Path:
        directory = root / variant
        return directory if directory.exists() else make_tiny(variant, directory)

    return get


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def each_window(threads: int, work: Callable[[int], Result]) -> list[Result]:
    def alone(index: int) -> Result:
        torch.set_num_threads(1)
        return work(index)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, range(COUNT)))


def run(network: Network, weights: CheckpointWeights, threads: int) -> tuple[list[Any], list[Any]]:
    """Logits of every window, and what its observer heard."""
    states = list(network.embed(weights, windows(COUNT, LENGTH)))
    heard: list[list[tuple[str, int, torch.Tensor]]] = [[] for _ in range(COUNT)]
    for index in range(network.n_blocks):
        with network.block(index, weights) as block:

            def step(window: int, block: Any = block, states: Any = states) -> torch.Tensor:
                def sink(tap: Tap, matrix: int, inputs: torch.Tensor) -> None:
                    heard[window].append((tap.name, matrix, inputs.clone()))

                with block.observe(sink):
                    found: torch.Tensor = block(states[window])
                return found

            states = each_window(threads, step)
    with network.head(weights) as head:
        return each_window(threads, lambda window: head(states[window])), heard


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "gemma2"])
def test_bits_do_not_depend_on_threads(variant: str, dtype: Any, models: Callable[[str], Path]) -> None:
    network, weights = opened(models(variant), dtype)
    logits, heard = run(network, weights, 1)
    for threads in (2, 3):
        other, others_heard = run(network, weights, threads)
        for one, two in zip(logits, other, strict=True):
            assert torch.equal(one, two)
        for one, two in zip(heard, others_heard, strict=True):
            assert [(name, matrix) for name, matrix, _ in one] == [(name, matrix) for name, matrix, _ in two]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True))


def test_an_observer_hears_its_own_thread(models: Callable[[str], Path]) -> None:
    network, weights = opened(models("llama"))
    state = next(network.embed(weights, windows(1, LENGTH)))
    heard: list[int] = []
    with network.block(0, weights) as block, block.observe(lambda *_: heard.append(threading.get_ident())):
        thread = threading.Thread(target=block, args=(state,))
        thread.start()
        thread.join()
        assert heard == []
        block(state)
        assert heard == [threading.get_ident()] * len(network.taps(0))
        inner: list[Tap] = []
        with block.observe(lambda tap, _matrix, _inputs: inner.append(tap)):
            block(state)
        assert inner == network.taps(0)
        block(state)
    assert len(heard) == 2 * len(network.taps(0))


def test_an_observer_of_one_block_does_not_hear_another(models: Callable[[str], Path]) -> None:
    network, weights = opened(models("qwen3_moe"))
    state = next(network.embed(weights, windows(1, LENGTH)))
    heard: list[Tap] = []
    with (
        network.block(0, weights) as one,
        network.block(1, weights) as two,
        one.observe(lambda tap, _matrix, _inputs: heard.append(tap)),
    ):
        two(state)
        assert heard == []
        one(state)
    assert {tap.name for tap in heard} == {tap.name for tap in network.taps(0)}


def test_a_failing_sink_ends_the_call(models: Callable[[str], Path]) -> None:
    network, weights = opened(models("qwen3_moe"))
    state = next(network.embed(weights, windows(1, LENGTH)))

    def sink(tap: Tap, _matrix: int, _inputs: torch.Tensor) -> None:
        raise KeyError(tap.name)

    with network.block(0, weights) as block:
        with pytest.raises(KeyError), block.observe(sink):
            block(state)
        assert block(state).shape == state.shape

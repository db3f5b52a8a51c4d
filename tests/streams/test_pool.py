"""The pool of what torch computes: one thread of torch in each job, and elsewhere as many as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from llm_quantize.errors import StoppedError
from llm_quantize.streams.pool import Pool


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def elsewhere() -> int:
    """How many threads of torch a new thread has."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_one_thread_of_torch_in_each_job() -> None:
    pool = Pool(2, None, resumable=True)
    assert set(pool.each(lambda _: torch.get_num_threads(), range(6))) == {1}
    assert list(pool.in_order(lambda job: (job, torch.get_num_threads()), range(6))) == [(n, 1) for n in range(6)]
    seen: list[int] = []
    pool.do([lambda: seen.append(torch.get_num_threads())] * 3)
    assert seen == [1, 1, 1]
    assert (torch.get_num_threads(), elsewhere()) == (3, 3)


def test_as_before_also_after_an_error_and_a_stop() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError, match="--no-checkpoints"):
        list(Pool(1, stop, resumable=False).each(lambda job: job, range(3)))
    with pytest.raises(ZeroDivisionError):
        list(Pool(1, None, resumable=True).in_order(lambda job: 1 // job, range(3)))
    assert (torch.get_num_threads(), elsewhere()) == (3, 3)

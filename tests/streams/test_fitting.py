"""What a pass needs is known before it begins: fewer threads, hidden states on disk, or a refusal with the figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import memory
from llm_quantize.errors import ResourceError
from llm_quantize.models.opening import open_source
from llm_quantize.streams import fitting

MB = 1 << 20


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 100 MB on a machine of four CPUs without limits."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MB)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 150 * MB)
    monkeypatch.setattr(memory, "mapped_bytes", lambda: 1000 * MB)
    monkeypatch.setattr(memory, "available_cpus", lambda: 4)
    monkeypatch.setattr(memory, "memory_limit", lambda max_ram: max_ram)
    monkeypatch.setattr(memory, "address_limit", lambda: None)


def fit(**more: Any) -> fitting.Fitted:
    facts: dict[str, Any] = {"fixed": 200 * MB, "each": 50 * MB, "hidden": 100 * MB, "threads": None, "max_ram": None}
    return fitting.fit(**{**facts, **more})


def test_without_a_limit_everything_is_used_and_the_peak_is_the_sum() -> None:
    found = fit()
    assert (found.threads, found.in_memory, found.hidden_bytes) == (4, True, 100 * MB)
    assert found.peak == 100 * MB + fitting.MARGIN_BYTES + 200 * MB + 4 * 50 * MB + 100 * MB
    assert fit(fixed=0, each=0, hidden=0).peak == 164 * MB
    assert fit(device="cuda").threads == 1


def test_many_hidden_states_go_to_disk_and_are_not_counted() -> None:
    found = fit(hidden=200 * MB, copies=2)
    assert (found.in_memory, found.hidden_bytes) == (False, 400 * MB)
    assert found.peak == 100 * MB + fitting.MARGIN_BYTES + 200 * MB + 4 * 50 * MB


def test_a_limit_takes_hidden_states_first_and_threads_then() -> None:
    whole = fit().peak
    assert fit(max_ram=whole).threads == 4
    assert fit(max_ram=whole - 1).threads == 3
    tight = 100 * MB + fitting.MARGIN_BYTES + 250 * MB
    found = fit(max_ram=tight)
    assert (found.threads, found.in_memory, found.peak) == (1, False, tight)
    with pytest.raises(ResourceError, match="do not fit") as caught:
        fit(max_ram=tight - 1)
    assert caught.value.expected == f"{tight:,} bytes"
    assert caught.value.found == f"a limit of {tight - 1:,} bytes"


def test_address_space_counts_what_is_mapped_and_what_threads_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    need = 1000 * MB + fitting.MARGIN_BYTES + 200 * MB + 50 * MB + memory.thread_address_bytes()
    monkeypatch.setattr(memory, "address_limit", lambda: need)
    assert fit().threads == 1
    monkeypatch.setattr(memory, "address_limit", lambda: need - 1)
    with pytest.raises(ResourceError, match="do not fit"):
        fit()


def test_scores_of_all_heads_count_where_they_are_computed_at_once(demo_model: Path) -> None:
    source = open_source(str(demo_model))
    with source.checkpoint:
        hyper = source.architecture.hyper
    tiled, whole = (fitting.workspace_bytes(hyper, 1024, 2, eager=eager) for eager in (False, True))
    assert whole - tiled == 1024 * 1024 * (hyper.n_head * 8 - 16)
    assert fitting.workspace_bytes(hyper, 2048, 2, eager=True) > 3 * whole


def test_a_full_disk_is_refused_before_work(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    fitting.check_disk(tmp_path, 1)
    with pytest.raises(ResourceError, match="not enough disk space"):
        fitting.check_disk(tmp_path, 2 * facts.f_blocks * facts.f_frsize)

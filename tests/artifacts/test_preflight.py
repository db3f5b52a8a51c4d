"""What a run needs is known before it begins."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from llm_quantize import memory, pipeline
from llm_quantize.artifacts import preflight
from llm_quantize.errors import ResourceError


def test_memory_of_rounding_goes_by_what_a_chunk_holds(demo_model: Path) -> None:
    (planned,) = pipeline.plan(str(demo_model), levels=["F32"])
    rows, columns = 2048, 256
    for itemsize, converted in ((2, 0), (4, 0), (8, 4), (1, 4)):
        sizes = preflight.rounding_sizes([replace(planned, source_itemsize=itemsize)])
        chunk = rows * columns * (3 * itemsize + 2 * converted + 4)
        assert memory.of_run(sizes, 3) - memory.of_run(sizes, 2) == preflight.PER_THREAD + chunk


def test_the_highest_phase_counts_and_each_must_fit(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 100 << 20)
    (planned,) = pipeline.plan(str(demo_model), levels=["Q8_0"])
    threads, alone = preflight.fit([planned], threads=3, max_ram=None)
    phases = (memory.Sizes(block=300 << 20), memory.Sizes(block=1 << 30, each=1 << 20))
    with_phases = [replace(planned, phases=phases)]
    assert preflight.fit(with_phases, threads=3, max_ram=None) == (3, memory.peak(phases[1], 3))
    assert threads == 3
    assert alone < 200 << 20
    assert preflight.fit(with_phases, threads=3, max_ram=memory.peak(phases[1], 1))[0] == 3
    with pytest.raises(ResourceError, match="do not fit the memory limit"):
        preflight.fit(with_phases, threads=3, max_ram=memory.peak(phases[1], 1) - 1)
    with pytest.raises(ResourceError, match="too small for this model's rows"):
        preflight.fit([planned], threads=3, max_ram=100 << 20)


def test_a_full_disk_is_refused_before_work(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    more = 2 * facts.f_blocks * facts.f_frsize
    preflight.check_disk(tmp_path, 1, remedy="take less")
    preflight.check_disk(tmp_path, more, held=more, remedy="take less")
    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        preflight.check_disk(tmp_path, more, remedy="take less")
    assert caught.value.remedy == "free some space, take less"

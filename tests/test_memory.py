"""Limits are found where they are set; what a run takes is one sum, and it is fitted before work begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_quantize import memory
from llm_quantize.errors import ResourceError
from llm_quantize.memory import cgroup_limits, peak_resident_bytes, resident_bytes


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_nested_control_groups(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    member = tmp_path / "self"
    member.write_text("0::/user.slice/job.scope\n")
    write(root / "user.slice" / "memory.max", "3000000000\n")
    write(root / "user.slice" / "job.scope" / "memory.max", "max\n")
    assert cgroup_limits(member, root) == [3_000_000_000]
    write(root / "user.slice" / "job.scope" / "memory.max", "2000000000\n")
    assert min(cgroup_limits(member, root)) == 2_000_000_000


def test_version_1_control_groups(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    member = tmp_path / "self"
    member.write_text("4:cpu,cpuacct:/x\n3:memory:/box\n")
    write(root / "memory" / "box" / "memory.limit_in_bytes", "1000000000")
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712")
    assert sorted(cgroup_limits(member, root))[0] == 1_000_000_000


def test_no_control_groups(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path / "absent", tmp_path / "absent") == []


def test_memory_figures() -> None:
    assert 10 << 20 < resident_bytes() <= peak_resident_bytes() + (64 << 20)


MB = 1 << 20
SIZES = memory.Sizes(block=200 * MB, each=50 * MB, hidden=100 * MB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 100 MB, torch not among it, on a machine of four CPUs without limits."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MB)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 150 * MB)
    monkeypatch.setattr(memory, "mapped_bytes", lambda: 1000 * MB)
    monkeypatch.setattr(memory, "available_cpus", lambda: 4)
    monkeypatch.setattr(memory, "memory_limit", lambda max_ram: max_ram)
    monkeypatch.setattr(memory, "address_limit", lambda: None)
    monkeypatch.setattr(memory, "torch_is_loaded", lambda: False)


def fit(max_ram: int | None = None, **more: Any) -> memory.Fitted:
    return memory.fit(replace(SIZES, **more), threads=None, max_ram=max_ram)


def test_the_sum_takes_the_ends_or_a_block_and_everything_else() -> None:
    sizes = memory.Sizes(
        libraries=1, margin=10, ends=100, block=20, sums=20, captured=20, factor=20, values=21, working=1000,
        each=10_000, hidden=100_000, copies=2, inputs=1_000_000,
    )  # fmt: skip
    assert memory.of_run(sizes, 3) == 1_231_112
    assert memory.of_run(sizes, 3, hidden=False) == 1_031_112
    assert memory.of_run(sizes, 3, inputs=False) == 231_112
    assert memory.of_run(replace(sizes, ends=105), 1, hidden=False, inputs=False) == 11_116


@pytest.mark.usefixtures("machine")
def test_without_a_limit_everything_is_used_and_the_peak_is_the_sum() -> None:
    found = fit()
    assert (found.threads, found.in_memory, found.hidden_bytes) == (4, True, 100 * MB)
    assert found.peak == 100 * MB + memory.MARGIN_BYTES + 200 * MB + 4 * 50 * MB + 100 * MB
    assert fit(block=0, each=0, hidden=0).peak == 164 * MB
    assert fit(margin=0, block=0, each=0, hidden=0).peak == 150 * MB
    assert fit(device="cuda").threads == 1


@pytest.mark.usefixtures("machine")
def test_many_hidden_states_go_to_disk_and_are_not_counted() -> None:
    found = fit(hidden=200 * MB, copies=2)
    assert (found.in_memory, found.hidden_bytes, found.disk_bytes) == (False, 400 * MB, 800 * MB)
    assert found.peak == 100 * MB + memory.MARGIN_BYTES + 200 * MB + 4 * 50 * MB


@pytest.mark.usefixtures("machine")
def test_inputs_stay_where_that_costs_nothing_else() -> None:
    whole = fit().peak
    found = fit(inputs=30 * MB)
    assert (found.inputs_in_memory, found.inputs_bytes, found.disk_bytes) == (True, 30 * MB, 0)
    assert found.peak == whole + 30 * MB
    found = fit(inputs=30 * MB, max_ram=whole + 30 * MB - 1)
    assert (found.threads, found.in_memory, found.inputs_in_memory, found.disk_bytes) == (4, True, False, 30 * MB)
    assert found.peak == whole
    assert not fit(inputs=memory.INPUT_BYTES + 1).inputs_in_memory


@pytest.mark.usefixtures("machine")
def test_a_limit_takes_hidden_states_first_and_threads_then() -> None:
    whole = fit().peak
    assert fit(max_ram=whole).threads == 4
    assert fit(max_ram=whole - 1).threads == 3
    tight = 100 * MB + memory.MARGIN_BYTES + 250 * MB
    found = fit(max_ram=tight)
    assert (found.threads, found.in_memory, found.peak) == (1, False, tight)
    with pytest.raises(ResourceError, match="do not fit") as caught:
        fit(max_ram=tight - 1)
    assert caught.value.expected == f"{tight:,} bytes"
    assert caught.value.found == f"a limit of {tight - 1:,} bytes"
    limits: dict[str, Any] = {"threads": None, "max_ram": tight - 1}
    assert memory.foreseen(SIZES, **limits) == tight
    assert memory.foreseen(SIZES, threads=4, max_ram=None) == whole


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "sizes", [SIZES, replace(SIZES, libraries=memory.TORCH_BYTES, inputs=70 * MB, copies=2, sums=9)]
)
def test_what_a_refusal_asks_for_is_enough_and_no_byte_less(sizes: memory.Sizes) -> None:
    """Whoever raises the limit to the figure that was named is not asked for more."""
    with pytest.raises(ResourceError) as refused:
        memory.fit(sizes, threads=3, max_ram=1, before=120 * MB)
    asked = int(str(refused.value.expected).removesuffix(" bytes").replace(",", ""))
    growth = sizes.libraries + memory.MARGIN_BYTES + sizes.block + sizes.sums + sizes.each
    assert asked == 120 * MB + growth == memory.least(sizes, before=120 * MB)
    for more in (0, 40 * MB, 400 * MB, 4000 * MB):
        found = memory.fit(sizes, threads=3, max_ram=asked + more, before=120 * MB)
        assert asked <= found.peak <= asked + more
    with pytest.raises(ResourceError) as refused:
        memory.fit(sizes, threads=3, max_ram=asked - 1, before=120 * MB)
    assert refused.value.expected == f"{asked:,} bytes"


@pytest.mark.usefixtures("machine")
def test_address_space_counts_what_is_mapped_and_what_threads_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    need = 1000 * MB + memory.MARGIN_BYTES + 200 * MB + 50 * MB + memory.thread_address_bytes()
    monkeypatch.setattr(memory, "address_limit", lambda: need)
    assert fit().threads == 1
    monkeypatch.setattr(memory, "address_limit", lambda: need - 1)
    with pytest.raises(ResourceError, match="do not fit") as caught:
        fit()
    assert (caught.value.expected, caught.value.found) == (f"{need:,} bytes", f"a limit of {need - 1:,} bytes")
    assert "ulimit -v" in str(caught.value.remedy)


@pytest.mark.usefixtures("machine")
def test_libraries_count_once_whether_they_are_loaded_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(SIZES, libraries=memory.TORCH_BYTES)
    before = memory.before_libraries()
    planned = memory.peak(sizes, 2, before=before)
    assert planned == memory.peak(SIZES, 2) + memory.TORCH_BYTES
    monkeypatch.setattr(memory, "torch_is_loaded", lambda: True)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MB + memory.TORCH_BYTES - 7 * MB)
    assert memory.before_libraries() == 93 * MB
    assert memory.peak(sizes, 2, before=before) == planned
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 * MB + memory.TORCH_BYTES + 9 * MB)
    assert memory.peak(sizes, 2, before=before) == planned + 9 * MB
    monkeypatch.setattr(memory, "resident_bytes", lambda: 60 * MB)
    assert memory.before_libraries() == memory.OWN_BYTES

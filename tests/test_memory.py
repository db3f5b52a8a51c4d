"""Limits are found where they are set."""

from __future__ import annotations

from pathlib import Path

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

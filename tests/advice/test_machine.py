"""The machine: what nvidia-smi says and fails to say, and what the options make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize import memory
from llm_quantize.advice import machine
from llm_quantize.advice.machine import Gpu, apple_working_set, detect, nvidia_gpus, parse_smi
from llm_quantize.errors import ResourceError, UsageError

ONE = (Gpu("NVIDIA RTX 4090", 24 << 30, 20 << 30),)


def smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi of our own, first on the path."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


def test_gpus_as_nvidia_smi_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo 'NVIDIA RTX 4090, 24564, 20000'; echo 'A, B, 100, 90'; echo 'No devices'")
    assert nvidia_gpus() == (Gpu("NVIDIA RTX 4090", 24564 << 20, 20000 << 20), Gpu("A, B", 100 << 20, 90 << 20))


@pytest.mark.parametrize("script", ["exit 9", "echo broken, driver; exit 1", "sleep 20"])
def test_a_program_that_fails_or_hangs_is_no_gpu(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, script.replace("sleep", "exec sleep"))
    monkeypatch.setattr(machine, "SMI_SECONDS", 0.5)
    assert nvidia_gpus() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert nvidia_gpus() == ()


@pytest.mark.parametrize(
    "text", ["", "\n\n", "name, 1, -2", "name, 1e3, 2", "name, [N/A], [N/A]", "a, 9" + "9" * 40 + ", 1"]
)
def test_lines_that_say_no_sizes_are_passed_over(text: str) -> None:
    assert parse_smi(text) == ()


def test_names_do_nothing_to_a_terminal() -> None:
    (found,) = parse_smi("\x1b[2Jname, 10, 20")
    assert found == Gpu("\\x1b[2Jname", 10 << 20, 10 << 20)


def test_automatic() -> None:
    ours = memory.memory_limit(None)
    found = detect(gpus=lambda: ONE, is_apple=lambda: False)
    assert (found.device, found.ram, found.vram, found.gpus) == ("cuda", ours, 20 << 30, ONE)
    assert "nvidia-smi (NVIDIA RTX 4090)" in found.sources[1]
    assert detect(gpus=lambda: ONE * 2, is_apple=lambda: False).vram == 40 << 30
    alone = detect(gpus=tuple, is_apple=lambda: False)
    assert (alone.device, alone.vram, alone.sources[1]) == ("cpu", 0, "GPU: none seen")
    apple = detect(ram=16 << 30, gpus=lambda: ONE, is_apple=lambda: True)
    assert (apple.device, apple.vram) == ("apple", (16 << 30) * 2 // 3)


def test_given_figures_describe_another_machine() -> None:
    def never() -> tuple[Gpu, ...]:
        raise AssertionError("this machine was asked")

    given = detect(ram=16_000_000_000, vram=8_000_000_000, gpus=never)
    assert (given.device, given.ram, given.vram) == ("cuda", 16_000_000_000, 8_000_000_000)
    assert detect("cpu", ram=1000, gpus=never).vram == 0
    assert detect("apple", ram=64 << 30, gpus=never).vram == 48 << 30


def test_the_system_keeps_its_part() -> None:
    assert detect("cpu", ram=8_000_000_000).usable_ram == 7_000_000_000
    assert detect("cpu", ram=64_000_000_000).usable_ram == 62_000_000_000


def test_metal_leaves_two_thirds_or_three_quarters() -> None:
    assert apple_working_set(16 << 30) / (16 << 20) == pytest.approx(682.67, abs=0.01)  # 10922.67 MiB, as Metal says
    assert apple_working_set(64 << 30) == 48 << 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"device": "tpu"}, "unknown device"),
        ({"device": "cpu", "vram": 1}, "does not go with --device cpu"),
        ({"device": "apple", "vram": 1}, "the memory is shared"),
        ({"device": "cuda", "gpus": tuple}, "--vram 8G"),
    ],
)
def test_contradictions_are_refused(words: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        detect(**words)


def test_memory_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda _max_ram: None)
    with pytest.raises(ResourceError, match="--ram 16G"):
        detect("cpu")


def test_a_container_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [4 << 30])
    found = detect("cpu")
    assert (found.ram, found.sources) == (4 << 30, ("RAM: the limit of this container",))


def test_compute_capability_as_nvidia_smi_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = 'case "$*" in *compute_cap*) echo "NVIDIA L4, x, 23034, 20000, 8.9";; *) exit 2;; esac'
    smi(tmp_path, monkeypatch, told)
    (found,) = nvidia_gpus()
    assert found == Gpu("NVIDIA L4, x", 23034 << 20, 20000 << 20, 8.9)
    # A driver that knows no such field is asked again; the name may be in the table then.
    smi(
        tmp_path,
        monkeypatch,
        'case "$*" in *compute_cap*) exit 2;; *) echo "NVIDIA GeForce RTX 3090, 24576, 24000";; esac',
    )
    assert nvidia_gpus() == (Gpu("NVIDIA GeForce RTX 3090", 24576 << 20, 24000 << 20),)
    assert detect("cuda", ram=1 << 34).capability == 8.6
    mixed = (Gpu("a", 10, 10, 9.0), Gpu("b", 10, 10, 8.0))
    assert detect(ram=1 << 34, gpus=lambda: mixed, is_apple=lambda: False).capability == 8.0
    assert detect(ram=1 << 34, vram=1 << 33, gpus=tuple).capability is None


def test_a_gpu_by_name_or_capability() -> None:
    named = detect(ram=1 << 34, gpu="nvidia rtx 4090", gpus=tuple)
    assert (named.device, named.vram, named.capability) == ("cuda", 24564 << 20, 8.9)
    assert named.sources[1] == "GPU memory: of nvidia rtx 4090"
    given = detect(ram=1 << 34, vram=8 << 30, gpu="12.0", gpus=tuple)
    assert (given.vram, given.capability) == (8 << 30, 12.0)
    assert detect(ram=1 << 34, gpu="8.6", gpus=lambda: ONE).vram == ONE[0].free
    for words, message in (
        ({"gpu": "RTX"}, "not in the table"),
        ({"gpu": "A100"}, "not in the table"),  # of 40 or of 80 GB
        ({"gpu": "L4", "device": "apple"}, "--gpu does not go with --device apple"),
        ({"gpu": "8.6", "gpus": tuple}, "--vram 8G"),
    ):
        with pytest.raises(UsageError, match=message):
            detect(**{"ram": 1 << 34, "gpus": lambda: ONE, **words})

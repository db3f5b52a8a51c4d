"""The machine that a model shall run on: memory of the computer, of its GPUs, and what of it a model may have.

Nothing here imports a framework: /proc, the control groups, ``nvidia-smi``, and the platform's name.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from llm_quantize import memory
from llm_quantize.errors import ResourceError, UsageError, printable

DEVICES = ("auto", "cpu", "cuda", "apple")
SMI_SECONDS = 5.0
SMI_BYTES = 1 << 16

# What the system and other programs keep: an eighth, at most 2 GB.
RESERVE_SHARE, RESERVE_MOST = 8, 2_000_000_000

# What Metal lets the GPU hold of the memory that it shares with the CPU, by default: two thirds, and three quarters of
# more than 32 GiB (recommendedMaxWorkingSetSize, as llama.cpp prints it: 10.9 of 16 GiB, 48 of 64 GiB).
APPLE_LARGE = 32 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes in all, and free now."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """Where a model shall run. ``device``: cpu, cuda or apple. ``ram``: bytes of the computer, or of the container;
    ``vram``: bytes that GPUs have for a model (0: none; on ``apple`` it is part of ``ram``). ``sources``: where each
    figure is from, in words."""

    device: str
    ram: int
    vram: int = 0
    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1
    sources: tuple[str, ...] = ()

    @property
    def usable_ram(self) -> int:
        """What a model may have of ``ram``: the system keeps an eighth, at most 2 GB."""
        return self.ram - min(self.ram // RESERVE_SHARE, RESERVE_MOST)


def apple_working_set(ram: int) -> int:
    """Bytes of unified memory that the GPU may hold by default."""
    return ram * 3 // 4 if ram > APPLE_LARGE else ram * 2 // 3


def detect(
    device: str = "auto",
    *,
    ram: int | None = None,
    vram: int | None = None,
    gpus: Callable[[], tuple[Gpu, ...]] | None = None,
    is_apple: Callable[[], bool] | None = None,
) -> Machine:
    """This machine, or the one that ``device``, ``ram`` and ``vram`` (bytes) describe. ``gpus`` and ``is_apple`` ask
    the machine, and can be replaced.

    Raises UsageError for what contradicts itself (GPU memory without a GPU, cuda without a GPU to be seen), and
    ResourceError where the size of the memory cannot be told.
    """
    if device not in DEVICES:
        raise UsageError("unknown device", expected=", ".join(DEVICES), found=device)
    if vram is not None and device in ("cpu", "apple"):
        why = "the memory is shared: give --ram" if device == "apple" else "leave --vram out, or take --device cuda"
        raise UsageError(f"--vram does not go with --device {device}", remedy=why)
    total, sources = _ram(ram)
    cpus = memory.available_cpus()
    if device == "apple" or (device == "auto" and vram is None and (is_apple or on_apple)()):
        sources.append("GPU memory: part of the RAM, as Metal limits it by default")
        return Machine("apple", total, apple_working_set(total), (), cpus, tuple(sources))
    if device == "cpu":
        return Machine("cpu", total, 0, (), cpus, tuple(sources))
    if vram is not None:
        return Machine("cuda", total, vram, (), cpus, (*sources, "GPU memory: as given"))
    found = (gpus or nvidia_gpus)()
    if not found and device == "cuda":
        raise UsageError(
            "no NVIDIA GPU can be seen here", expected="an answer of nvidia-smi", remedy="give its memory: --vram 8G"
        )
    if not found:
        return Machine("cpu", total, 0, (), cpus, (*sources, "GPU: none seen"))
    names = ", ".join(gpu.name for gpu in found)
    sources.append(f"GPU memory: free now, by nvidia-smi ({names})")
    return Machine("cuda", total, sum(gpu.free for gpu in found), found, cpus, tuple(sources))


def _ram(given: int | None) -> tuple[int, list[str]]:
    if given is not None:
        return given, ["RAM: as given"]
    found = memory.memory_limit(None)
    if found is None:
        raise ResourceError("the size of the memory cannot be told here", remedy="give it: --ram 16G")
    limited = any(limit <= found for limit in memory.cgroup_limits())
    return found, ["RAM: the limit of this container" if limited else "RAM: of this computer"]


def on_apple() -> bool:
    """Whether this is a computer with an Apple chip."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that ``nvidia-smi`` lists; none where it is absent, fails, or does not answer within five seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run([program, *query], capture_output=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_smi(done.stdout[:SMI_BYTES].decode("utf-8", "replace")) if done.returncode == 0 else ()


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """The GPUs in the answer of ``nvidia-smi``: lines "name, total MiB, free MiB"; other lines are passed over."""
    found = []
    for line in text.splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if len(sizes) == 2 and all(size.isascii() and size.isdigit() and len(size) < 10 for size in sizes):
            total, free = (int(size) << 20 for size in sizes)
            found.append(Gpu(printable(name, 80), total, min(free, total)))
    return tuple(found)

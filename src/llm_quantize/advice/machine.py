"""The machine that a model shall run on: memory of the computer, of its GPUs, and what of it a model may have.

Nothing here imports a framework: /proc, the control groups, ``nvidia-smi``, and the platform's name.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from llm_quantize import memory
from llm_quantize.advice import gpus as known
from llm_quantize.errors import ResourceError, UsageError, printable

DEVICES = ("auto", "cpu", "cuda", "apple")
SMI_SECONDS = 5.0
SMI_BYTES = 1 << 16
_CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]")

# What the system and other programs keep: an eighth, at most 2 GB.
RESERVE_SHARE, RESERVE_MOST = 8, 2_000_000_000

# What Metal lets the GPU hold of the memory that it shares with the CPU, by default: two thirds, and three quarters of
# more than 32 GiB (recommendedMaxWorkingSetSize, as llama.cpp prints it: 10.9 of 16 GiB, 48 of 64 GiB).
APPLE_LARGE = 32 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes in all, and free now; its compute capability, None where that is not known."""

    name: str
    total: int
    free: int
    capability: float | None = None


@dataclass(frozen=True)
class Machine:
    """Where a model shall run. ``device``: cpu, cuda or apple. ``ram``: bytes of the computer, or of the container;
    ``vram``: bytes that GPUs have for a model (0: none; on ``apple`` it is part of ``ram``). ``capability``: the
    compute capability of the least of them, None where that is not known. ``sources``: where each figure is from, in
    words."""

    device: str
    ram: int
    vram: int = 0
    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1
    sources: tuple[str, ...] = ()
    capability: float | None = None

    @property
    def one_gpu(self) -> int:
        """Bytes that the largest single GPU has for a model."""
        return max((gpu.free for gpu in self.gpus), default=self.vram)

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
    gpu: str | None = None,
    gpus: Callable[[], tuple[Gpu, ...]] | None = None,
    is_apple: Callable[[], bool] | None = None,
) -> Machine:
    """This machine, or the one that ``device``, ``ram`` and ``vram`` (bytes) describe. ``gpu``: the GPU by its name or
    compute capability (gpus.py). ``gpus`` and ``is_apple`` ask the machine, and can be replaced.

    Raises UsageError for what contradicts itself (GPU memory without a GPU, cuda without a GPU to be seen), and
    ResourceError where the size of the memory cannot be told.
    """
    if device not in DEVICES:
        raise UsageError("unknown device", expected=", ".join(DEVICES), found=device)
    if vram is not None and device in ("cpu", "apple"):
        why = "the memory is shared: give --ram" if device == "apple" else "leave --vram out, or take --device cuda"
        raise UsageError(f"--vram does not go with --device {device}", remedy=why)
    if gpu is not None and device in ("cpu", "apple"):
        raise UsageError(f"--gpu does not go with --device {device}", remedy="leave it out, or take --device cuda")
    size, capability = (None, None) if gpu is None else known.described(gpu)
    own = f"GPU memory: of {gpu}" if vram is None and size is not None else "GPU memory: as given"
    vram = size if vram is None else vram
    total, sources = _ram(ram)
    cpus = memory.available_cpus()
    if device == "apple" or (device == "auto" and vram is None and gpu is None and (is_apple or on_apple)()):
        sources.append("GPU memory: part of the RAM, as Metal limits it by default")
        return Machine("apple", total, apple_working_set(total), (), cpus, tuple(sources))
    if device == "cpu":
        return Machine("cpu", total, 0, (), cpus, tuple(sources))
    if vram is not None:
        return Machine("cuda", total, vram, (), cpus, (*sources, own), capability)
    found = (gpus or nvidia_gpus)()
    if not found and (device == "cuda" or gpu is not None):
        raise UsageError(
            "no NVIDIA GPU can be seen here", expected="an answer of nvidia-smi", remedy="give its memory: --vram 8G"
        )
    if not found:
        return Machine("cpu", total, 0, (), cpus, (*sources, "GPU: none seen"))
    names = ", ".join(one.name for one in found)
    sources.append(f"GPU memory: free now, by nvidia-smi ({names})")
    capability = capability or min((one for one in map(_capability, found) if one is not None), default=None)
    return Machine("cuda", total, sum(one.free for one in found), found, cpus, tuple(sources), capability)


def _capability(gpu: Gpu) -> float | None:
    """What nvidia-smi says, or the table."""
    return gpu.capability or (known.find(gpu.name) or (0, None))[1]


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
    # Drivers of before 2022 know no compute_cap.
    for fields in ("name,memory.total,memory.free,compute_cap", "name,memory.total,memory.free"):
        query = (f"--query-gpu={fields}", "--format=csv,noheader,nounits")
        try:
            done = subprocess.run([program, *query], capture_output=True, timeout=SMI_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if done.returncode == 0:
            return parse_smi(done.stdout[:SMI_BYTES].decode("utf-8", "replace"))
    return ()


def parse_smi(text: str) -> tuple[Gpu, ...]:
    """The GPUs in the answer of ``nvidia-smi``: lines "name, total MiB, free MiB", and a compute capability if it told
    one; other lines are passed over."""
    found = []
    for line in text.splitlines():
        name, end, last = (part.strip() for part in line.rpartition(","))
        capability = float(last) if end and _CAPABILITY.fullmatch(last) else None
        name, *sizes = (part.strip() for part in (line if capability is None else name).rsplit(",", 2))
        if len(sizes) == 2 and all(size.isascii() and size.isdigit() and len(size) < 10 for size in sizes):
            total, free = (int(size) << 20 for size in sizes)
            found.append(Gpu(printable(name, 80), total, min(free, total), capability))
    return tuple(found)

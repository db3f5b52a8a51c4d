"""Memory: what this machine and this process have, what a run takes, and whether that fits.

There is one sum, ``of_run``, over ``Sizes``. Whoever plans, prints, refuses or runs makes ``Sizes`` (from headers, or
from the network at hand, by the same formulas) and asks here, so that a user sees one figure: resident bytes of the
process at its peak (``peak``).
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.errors import ResourceError

ARENA_BYTES = 64 << 20  # address space that glibc's allocator reserves for each thread, used or not
DEFAULT_STACK_BYTES = 8 << 20


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(max_ram: int | None) -> int | None:
    """The smallest of --max-ram, the cgroup's limit and physical memory, in bytes of resident memory."""
    limits = [] if max_ram is None else [max_ram]
    limits += cgroup_limits()
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None


def cgroup_limits(memberships: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Memory limits in bytes of the control groups this process is in, from its own up to the root; v1 and v2."""
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        lines = []
    files = [(root, Path("/"), "memory.max"), (root / "memory", Path("/"), "memory.limit_in_bytes")]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not controllers:
            files.append((root, Path(name), "memory.max"))
        elif "memory" in controllers.split(","):
            files.append((root / "memory", Path(name), "memory.limit_in_bytes"))
    limits = []
    for base, group, file in files:
        for place in (group, *group.parents):
            try:
                text = (base / str(place).lstrip("/") / file).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def address_limit() -> int | None:
    """RLIMIT_AS in bytes: what may be mapped, not what may be used; None without such a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def mapped_bytes() -> int:
    """Address space of this process now; a guess where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 256 << 20


def thread_address_bytes() -> int:
    """Address space that a new thread takes before it does anything: its stack and its allocator's arena."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (DEFAULT_STACK_BYTES if stack == resource.RLIM_INFINITY else stack) + ARENA_BYTES


def resident_bytes() -> int:
    """Resident memory of this process now; the peak so far where the system does not tell the present."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# What a run takes

HIDDEN_BYTES = 256 << 20
"""Hidden states beyond this go to a file: a killed run then goes on from them, and memory does not grow with text."""

INPUT_BYTES = 2 << 30
"""The source's inputs of one block beyond this go to a file."""

MARGIN_BYTES = 64 << 20  # allocator slack, oneDNN's reordered copies, Python objects
TORCH_BYTES = 360 << 20  # torch, transformers and their libraries, loaded
OWN_BYTES = 40 << 20  # this process before them, at least


@dataclass(frozen=True)
class Sizes:
    """What one phase of a run holds, in bytes: plain numbers, from headers alone or from the network at hand.

    ``libraries``: torch and what comes with it, where the phase needs it. ``margin``: what nobody counts.
    ``ends``: the embedding or the output, which stand when no block does. ``block``: weights of the largest block;
    while it stands ``sums`` over its inputs grow, inputs are ``captured``, a ``factor`` is made, and the largest matrix
    has ``values``. ``working``: what libraries keep for themselves once they multiply. ``each``: a thread's own.
    ``hidden``: hidden states of all windows, ``copies`` times; ``inputs``: those of the source's block: both lie in
    files where they are many or the limit is small. ``device``: where the arithmetic is done, on all but the CPU by one
    thread. ``refusal``: what to say where it does not fit, and what the user can do.
    """

    libraries: int = 0
    margin: int = MARGIN_BYTES
    ends: int = 0
    block: int = 0
    sums: int = 0
    captured: int = 0
    factor: int = 0
    values: int = 0
    working: int = 0
    each: int = 0
    hidden: int = 0
    copies: int = 1
    inputs: int = 0
    device: str = "cpu"
    refusal: tuple[str, str] = (
        "one block of this model and its statistics do not fit the memory limit",
        "raise --max-ram or the limit, take a smaller --sequence-length, or collect imatrix without hessian",
    )


def of_run(sizes: Sizes, threads: int, *, hidden: bool = True, inputs: bool = True) -> int:
    """The sum: bytes that a phase with ``threads`` takes on top of a process that has loaded nothing for it.

    ``hidden``, ``inputs``: whether they stay in memory.
    """
    block = sizes.block + sizes.sums + sizes.captured + sizes.factor + sizes.values
    kept = (sizes.copies * sizes.hidden if hidden else 0) + (sizes.inputs if inputs else 0)
    fixed = sizes.libraries + sizes.margin + sizes.working + max(sizes.ends, block)
    return fixed + threads * sizes.each + kept


def torch_is_loaded() -> bool:
    """Whether what is resident now holds torch already."""
    return "torch" in sys.modules


def before_libraries() -> int:
    """Resident bytes of this process now, less torch's where it is loaded: where a run of it begins."""
    return max(OWN_BYTES, resident_bytes() - TORCH_BYTES) if torch_is_loaded() else resident_bytes()


def peak(sizes: Sizes, threads: int, *, hidden: bool = True, inputs: bool = True, before: int | None = None) -> int:
    """Resident bytes of this process at the height of a phase: the one figure that users see.

    ``before``: resident bytes when the run began and no library was loaded (None: as it looks now). Said again later
    in the run it is the same, unless more than was foreseen is resident by then.
    """
    growth = of_run(sizes, threads, hidden=hidden, inputs=inputs)
    begun = before_libraries() if before is None else before
    return max(begun, resident_bytes() - (sizes.libraries if torch_is_loaded() else 0)) + growth


@dataclass(frozen=True)
class Fitted:
    """A phase that fits: ``threads``, whether hidden states and the source's inputs stay in memory, bytes of both, and
    the ``peak`` of the process, in resident bytes."""

    threads: int
    in_memory: bool
    hidden_bytes: int
    peak: int
    inputs_in_memory: bool = True
    inputs_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        """What lies in files meanwhile: hidden states twice (before and after a block), inputs once."""
        hidden = 0 if self.in_memory else 2 * self.hidden_bytes
        return hidden + (0 if self.inputs_in_memory else self.inputs_bytes)


def fit(sizes: Sizes, *, threads: int | None, max_ram: int | None, before: int | None = None) -> Fitted:
    """Threads, at most ``threads`` (None: all CPUs), and the place of hidden states and inputs for a phase.

    Where memory is short hidden states leave it first, then there are fewer threads; inputs stay only where that costs
    neither. Raises ResourceError naming the figures where one thread, everything else in files, does not fit the limit
    (--max-ram, cgroup, address space).
    """
    count = 1 if sizes.device != "cpu" else threads or available_cpus()
    limit, address = memory_limit(max_ram), address_limit()

    def room(number: int, hidden: bool, inputs: bool = False) -> bool:
        kept = {"hidden": hidden, "inputs": inputs}
        resident = limit is None or peak(sizes, number, **kept, before=before) <= limit
        return resident and (address is None or _addressed(sizes, number, **kept) <= address)

    in_memory = sizes.copies * sizes.hidden <= HIDDEN_BYTES and room(1, True)
    while count > 1 and not room(count, in_memory):
        count -= 1
    if not room(count, in_memory):
        raise _refusal(sizes, limit, address, before)
    inputs = sizes.inputs <= INPUT_BYTES and room(count, in_memory, True)
    height = peak(sizes, count, hidden=in_memory, inputs=inputs, before=before)
    kept = sizes.copies * sizes.hidden
    return Fitted(count, in_memory, kept, max(peak_resident_bytes(), height), inputs, sizes.inputs)


def foreseen(sizes: Sizes, *, threads: int | None, max_ram: int | None) -> int:
    """The peak of ``fit``; where nothing fits, of the one thread that it refuses."""
    try:
        return fit(sizes, threads=threads, max_ram=max_ram).peak
    except ResourceError:
        return least(sizes)


def least(sizes: Sizes, *, before: int | None = None) -> int:
    """The peak with one thread and everything else in files: what a refusal asks for."""
    return peak(sizes, 1, hidden=False, inputs=False, before=before)


def _addressed(sizes: Sizes, threads: int, *, hidden: bool, inputs: bool) -> int:
    """Address space: what is mapped now; for each thread a stack, an arena and its buffers."""
    growth = of_run(sizes, threads, hidden=hidden, inputs=inputs)
    loaded = sizes.libraries if torch_is_loaded() else 0
    return mapped_bytes() + threads * thread_address_bytes() + growth - loaded


def _refusal(sizes: Sizes, limit: int | None, address: int | None, before: int | None) -> ResourceError:
    """The error that says what one thread needs, of the limit that it breaks."""
    what, remedy = sizes.refusal
    needed = least(sizes, before=before)
    if limit is None or needed <= limit:
        needed, limit = _addressed(sizes, 1, hidden=False, inputs=False), address
        remedy = "raise the limit of address space (ulimit -v)"
    return ResourceError(what, expected=f"{needed:,} bytes", found=f"a limit of {limit:,} bytes", remedy=remedy)

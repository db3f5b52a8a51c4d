"""Facts about the model and the machine, for the reports."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from llm_quantize import __version__
from llm_quantize.architectures.rows import weights_of
from llm_quantize.events import EventSink, ignore
from llm_quantize.memory import available_cpus
from llm_quantize.models.identity import header_digest
from llm_quantize.reports.findings import MachineFacts, ModelFacts

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

PROGRAMS = ("numpy", "torch", "transformers", "xllamacpp")


def model_facts(source: Source, given: str, *, on_event: EventSink = ignore) -> ModelFacts:
    """What the source is. ``given``: how the user named it. Raises as ``Source.content``, whose reading ``on_event``
    hears of."""
    checkpoint = source.checkpoint
    kept: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        kept[tensor.dtype] += tensor.nbytes
    return ModelFacts(
        name=source.stem if checkpoint.adapters else checkpoint.name,
        source=given,
        revision=checkpoint.revision,
        architecture=source.architecture.gguf_name,
        parameters=sum(weights_of(output.shape) for output in source.tensors.outputs if output.constant is None),
        size=sum(header.file_size for header in checkpoint.headers),
        dtype=max(kept, key=lambda name: kept[name]) if kept else "",
        layers=source.architecture.hyper.n_layer,
        fingerprint=source.content(on_event),
        headers=header_digest(checkpoint),
    )


def machine_facts(runtime: str, threads: int | None) -> MachineFacts:
    """This machine. ``runtime``: what artifacts ran in, or why in none."""
    names = os.sysconf_names
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else 0
    return MachineFacts(
        _cpu(), threads or available_cpus(), memory, f"{platform.system()} {platform.machine()}", runtime
    )


def _cpu() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def program_versions() -> dict[str, str]:
    """llm-quantize, Python, and those of PROGRAMS that are installed."""
    found = {"llm-quantize": __version__, "Python": platform.python_version()}
    for name in PROGRAMS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

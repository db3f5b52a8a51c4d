"""How the golden cases are run and compared.

**The version.** The package's version stands in GGUF metadata, cards, configurations and manifests, and moves offsets.
So it is not taken out of the outputs: every run sees the version that golden/origin.json notes, put in the place of
``llm_quantize.__version__``. A release changes no golden file.

**Exact, or nearly.** Plain cases are exact on every machine. What torch computes depends on the processor, on torch,
numpy and BLAS; origin.json notes those of the machine that made the files. On the same kind, everything is exact.
Elsewhere the weights may differ, so compared are: exit codes, warnings, names and sizes, files without weights whole,
the headers of the others, manifests without what depends on weights; figures of quality with a tolerance.

**How it was made** (the manifest's "made") is not among it, as it names the versions of torch; what stands there is
held by tests/provenance. Hashes of manifests are of the same bytes without it.

**Memory** is told in memory.json only: such a figure may change on purpose, and then shows in a small difference.
Plans start from what the process holds, which differs from run to run; /proc says RESIDENT here, whoever asks, and
that torch is not among it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import llm_quantize
from llm_quantize import memory
from llm_quantize.artifacts.manifest import SEAL, manifest_bytes
from llm_quantize.cli import run
from tests.golden.cases import Case, Command

HERE = Path(__file__).parent

# In printed JSON: gone, as they differ from run to run, or with the machine's CPUs and memory.
VOLATILE = {"cpu_seconds", "seconds", "peak", "memory_peak", "limit", "cpus", "statistics"}
# In printed JSON: figures of memory, and what follows from them.
MEMORY = {"memory", "memory_needed", "memory_planned", "placement", "usable_ram", "planned"}
# Among the reasons of `recommend`.
MEMORY_TEXT = re.compile(r"\d [kMG]B\b")
# In a manifest: what changes with the version alone.
VERSIONED = {"version", "plan_sha256", "manifest_sha256", "made"}
# In a manifest: what depends on weights, or on statistics of torch.
WEIGHTS = VERSIONED | {"sha256", "card_sha256", "front_sha256", "layout_sha256", "imatrix"}
WEIGHTS |= {"loss", "plain_loss", "plain_rows", "measured", "tokens"}  # an expert gets other tokens too

RESIDENT = 64 << 20
PROC = {
    "/proc/self/statm": f"0 {RESIDENT // os.sysconf('SC_PAGE_SIZE')} 0 0 0 0 0\n",
    "/proc/self/status": f"VmHWM:\t{RESIDENT >> 10} kB\nVmRSS:\t{RESIDENT >> 10} kB\n",
}

KLD_TOLERANCE, KLD_FLOOR = 0.3, 0.005  # of calibrated weights on another machine: other codes, about the same loss
FIGURE_TOLERANCE, FIGURE_FLOOR = 1e-4, 1e-6  # of the same weights on another machine: other sums


@dataclass(frozen=True)
class Call:
    """What a run printed and how it ended."""

    code: int
    out: str
    events: list[dict[str, Any]]

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


def stored(name: str) -> dict[str, Any]:
    """A golden file."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return found


def machine() -> dict[str, Any]:
    """All that sums of floats depend on."""
    import numpy
    import torch
    import transformers

    facts: dict[str, Any] = {"machine": platform.machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    facts |= {module.__name__: str(module.__version__) for module in (numpy, torch, transformers)}
    facts |= {name: os.environ.get(name) for name in ("OPENBLAS_CORETYPE", "MKL_ENABLE_INSTRUCTIONS")}
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text() if cpus.is_file() else ""
    for name in ("vendor_id", "cpu family", "model"):
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        facts[name] = found[1] if found else None
    return facts


def call(models: Path, cache: Path, words: Sequence[str], version: str) -> Call:
    """Run the command line among ``models``, with a cache of its own, as the program of that ``version``."""
    out, err = io.StringIO(), io.StringIO()
    environment = {"LLM_QUANTIZE_CACHE": str(cache), "OPENBLAS_NUM_THREADS": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(llm_quantize, "__version__", version),
        mock.patch.object(Path, "read_text", _read_text),
        mock.patch.object(memory, "torch_is_loaded", return_value=False),
        contextlib.chdir(models),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run([*words, "--json"])
    events = [json.loads(line) for line in err.getvalue().splitlines() if line.startswith("{")]
    return Call(code, out.getvalue().replace(str(models), "MODELS"), events)


def quantized(case: Case, models: Path, out: Path, version: str) -> dict[str, Any]:
    """Run ``case``; what it told and wrote. The last key, "memory", belongs to memory.json."""
    words = ["quantize", case.model, *case.words.split(), "--threads", "2", "-o", str(out / "made")]
    found = call(models, out / "cache", words, version)
    memory = [
        event["memory_needed"] for event in found.events if event["event"] == "start" and "memory_needed" in event
    ]
    told = _filled(without(json.loads(found.out.replace(f"{out / 'made'}/", "")), VOLATILE))
    record: dict[str, Any] = {
        "exit": found.code,
        "warnings": sorted({event["text"] for event in found.events if event["event"] == "warning"}),
        "told": told,
        "files": hashes(out / "made"),
        "manifests": {name: canonical(manifest, VERSIONED) for name, manifest in _manifests(out / "made")},
    }
    if case.calibrated:
        record["outline"] = outline(out / "made")
    return {**record, "memory": memory}


def commanded(command: Command, models: Path, out: Path, version: str) -> dict[str, Any]:
    """Run ``command``; what it told and wrote, with "memory" apart."""
    (out / "made").mkdir(parents=True)
    for words in command.before:
        done = call(models, out / "cache", words.replace("OUT", str(out / "made")).split(), version)
        assert done.code in (0, 20), done.out
    made = set(hashes(out / "made"))
    found = call(models, out / "cache", command.words.replace("OUT", str(out / "made")).split(), version)
    told = without(json.loads(found.out.replace(str(out / "made"), "OUT")), set(command.volatile))
    memory = list(_memory(told))
    record: dict[str, Any] = {"exit": found.code, "told": _without_memory_text(without(told, VOLATILE | MEMORY))}
    files = {name: value for name, value in hashes(out / "made").items() if name not in made}
    if command.volatile:
        files = dict.fromkeys(files, "not looked into")
    return {**record, "files": files, "memory": memory}


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below ``directory``; of a run that stopped the names alone, as journals hold times."""
    names = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    stopped = any(name.endswith(".journal") for name in names)
    return {name: "unfinished" if stopped else _sha(_without_made(path)) for name, path in names.items()}


def _without_made(path: Path) -> bytes:
    """The bytes of a file; of a manifest those that it would have if it did not say how its artifact was made."""
    data = path.read_bytes()
    if not path.name.endswith("manifest.json"):
        return data
    content = json.loads(data)
    if content.pop("made", None) is None:
        return data
    return manifest_bytes({key: value for key, value in content.items() if key != SEAL})


def outline(directory: Path) -> dict[str, Any]:
    """{file: what of it does not depend on the weights that torch had a part in}."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, data = path.relative_to(directory).as_posix(), path.read_bytes()
        if name.endswith("manifest.json"):
            found[name] = canonical(json.loads(data), WEIGHTS)
        elif path.suffix == ".safetensors":
            head = 8 + int.from_bytes(data[:8], "little")
            found[name] = f"{len(data)} bytes, head {_sha(data[:head])}"
        elif path.suffix == ".gguf":
            found[name] = f"{len(data)} bytes"
        elif path.name == "README.md":
            found[name] = _sha(data.partition(b"## Loss")[0])
        else:
            found[name] = _sha(data)
    return found


def canonical(value: Any, left_out: set[str]) -> str:
    """SHA-256 of ``value`` as sorted JSON, without the keys ``left_out`` at any depth."""
    return _sha(json.dumps(without(value, left_out), sort_keys=True, separators=(",", ":")).encode())


def without(value: Any, keys: set[str]) -> Any:
    """JSON without ``keys``, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def differences(golden: Any, found: Any, *, relative: float = 0.0, floor: float = 0.0, at: str = "") -> Iterator[str]:
    """A line for each place where JSON differs; floats may by ``relative`` of the larger, or by ``floor``."""
    if isinstance(golden, dict) and isinstance(found, dict):
        for key in sorted({*golden, *found}):
            if key not in golden or key not in found:
                yield f"{at}/{key}: {'gone' if key in golden else 'new'}"
            else:
                yield from differences(golden[key], found[key], relative=relative, floor=floor, at=f"{at}/{key}")
    elif isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        for index, (one, other) in enumerate(zip(golden, found, strict=True)):
            yield from differences(one, other, relative=relative, floor=floor, at=f"{at}/{index}")
    elif isinstance(golden, float) and isinstance(found, float):
        if golden != found and not math.isclose(golden, found, rel_tol=relative, abs_tol=floor):
            yield f"{at}: {golden!r}, now {found!r}"
    elif golden != found:
        yield f"{at}: {golden!r}, now {found!r}"


def kld_figures(record: Mapping[str, Any]) -> list[float]:
    """What a calibrated run measured of its own artifacts."""
    return [one["measured"]["kld"] for one in record["told"]["artifacts"] if one.get("measured")]


def readable(value: Any, indent: int = 0, room: int = 110) -> str:
    """JSON with a line for what is short, and for each item of a list that is not too long."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or len(flat) + indent < room:
        return flat
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {readable(value[key], indent + 1)}" for key in value]
        return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(pad + readable(item, indent + 1, 600) for item in value) + "\n" + " " * indent + "]"


_REAL_READ_TEXT = Path.read_text


def _read_text(path: Path, *arguments: Any, **options: Any) -> str:
    return PROC.get(str(path)) or _REAL_READ_TEXT(path, *arguments, **options)


def _filled(value: Any) -> Any:
    """JSON without what is empty in the objects: most facts of most artifacts."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item not in ({}, [])}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _memory(value: Any) -> Iterator[Any]:
    """Every figure of memory in printed JSON, and every sentence about it, in order."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in MEMORY:
                yield {key: without(item, VOLATILE)}
            elif key == "why":
                yield from (text for text in item if MEMORY_TEXT.search(text))
            elif key not in VOLATILE:
                yield from _memory(item)
    elif isinstance(value, list):
        for item in value:
            yield from _memory(item)


def _without_memory_text(value: Any) -> Any:
    if isinstance(value, dict) and "why" in value:
        return {**value, "why": [text for text in value["why"] if not MEMORY_TEXT.search(text)]}
    return value


def _manifests(directory: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(directory.rglob("*manifest.json")):
        yield path.relative_to(directory).as_posix(), json.loads(path.read_bytes())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

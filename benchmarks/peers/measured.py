"""What a peer's run costs: CPU and wall seconds and peak memory of calibration and quantization, not of imports.

Standard library only: every runner in this folder is run by the interpreter of its peer's own environment, where
llm-quantize is not installed. A runner's last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


class Phase:
    """Costs of a ``with`` block: ``cpu_seconds`` (user and system, children included), ``wall_seconds``, and resident
    memory at its start (``rss_before``: interpreter, imports) and at its peak (``rss_peak``), in bytes."""

    def __enter__(self) -> Phase:
        self.rss_before = _resident()
        self._peak = self.rss_before
        self._reset = _reset_peak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._cpu, self._wall = _cpu(), time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_seconds = time.monotonic() - self._wall
        self.cpu_seconds = _cpu() - self._cpu
        self._stop.set()
        self._thread.join()
        high = _status("VmHWM") if self._reset else self._peak
        self.rss_peak = max(high, self._peak)

    def _watch(self) -> None:
        # Where the kernel does not let the high-water mark be reset, resident memory is looked at 20 times a second.
        while not self._reset and not self._stop.wait(0.05):
            self._peak = max(self._peak, _resident())

    def to_dict(self) -> dict[str, float]:
        """The four figures."""
        return {
            "cpu_seconds": round(self.cpu_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "rss_before": self.rss_before,
            "rss_peak": self.rss_peak,
        }


def _cpu() -> float:
    """User and system seconds of this process and of the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return _status("VmRSS")


def _reset_peak() -> bool:
    """Set VmHWM to what is resident now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def report(phase: Phase, output: Path, packages: list[str], **facts: Any) -> None:
    """Print the JSON line."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    print(json.dumps({**phase.to_dict(), "output": str(output), "versions": versions, **facts}), file=sys.stdout)
    sys.stdout.flush()


def copy_for_transformers_4(source: Path, target: Path) -> Path:
    """A copy of a checkpoint with the configuration keys of transformers 4: ``rope_theta``, ``torch_dtype``, and a
    tokenizer class that it has. Weights are linked."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        elif file.is_file():
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (target / "config.json").write_text(json.dumps(config, indent=1))
    place = target / "tokenizer_config.json"
    if place.is_file():
        tokenizer = json.loads(place.read_text())
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        place.write_text(json.dumps(tokenizer, indent=1))
    return target

"""Make the golden files anew: ``PYTHONPATH=src python -m tests.golden.make``.

Only where bytes or figures change on purpose, and with a line in CHANGELOG.md that says so: never to make a
refactoring pass. Look at the difference before it is committed. A new version of torch or another machine is a reason
for calibrated.json and commands.json alone; if plain.json changes with it, that is a bug.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import llm_quantize
from tests.golden import harness
from tests.golden.cases import CALIBRATED, COMMANDS, PLAIN
from tests.golden.models import digest, make_models


def make(directory: Path) -> None:
    """Run every case in ``directory`` and write the golden files beside this module."""
    models, version = directory / "models", llm_quantize.__version__
    make_models(models)
    sources = {path.name: digest(path) for path in sorted(models.iterdir())}
    files: dict[str, dict[str, Any]] = {
        "origin": {"version": version, "machine": harness.machine(), "sources": sources},
        **{name: {} for name in ("plain", "calibrated", "commands", "memory")},
    }
    for name, cases in (("plain", PLAIN), ("calibrated", CALIBRATED)):
        for case in cases:
            files[name][case.id] = harness.quantized(case, models, directory / case.id, version)
    for command in COMMANDS:
        files["commands"][command.id] = harness.commanded(command, models, directory / command.id, version)
    for name in ("plain", "calibrated", "commands"):
        odd = [
            key for key, record in files[name].items() if (record["exit"] not in (0, 20)) != key.endswith("-refused")
        ]
        assert not odd, f"these end as their names do not say: {odd}"
        files["memory"] |= {key: record.pop("memory") for key, record in files[name].items()}
    for name, content in files.items():
        (harness.HERE / f"{name}.json").write_text(harness.readable(content) + "\n", "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as place:
        make(Path(place).resolve())
    sys.stdout.write("written: look at `git diff --stat tests/golden`, and say in CHANGELOG.md why\n")

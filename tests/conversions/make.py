"""Make cells.json anew: ``PYTHONPATH=src python -m tests.conversions.make [SOURCE ...]``; without names, every row.

Look at the difference before it is committed: a cell that was exact is not to become anything else. Then run
scripts/generate_docs.py, which writes docs/reference/conversions.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.conversions.cells import FILE, TARGETS, cell, stored
from tests.conversions.sources import SIZES, SOURCES
from tests.tiny_models import make_tiny


def make(directory: Path, names: list[str]) -> None:
    """Run the rows ``names`` in ``directory`` and write cells.json."""
    model = make_tiny("llama", directory / "model", **SIZES)
    rows = {name: row for name, row in (stored() if FILE.is_file() else {}).items() if name in SOURCES}
    for number, name in enumerate(names):
        place = directory / str(number)
        place.mkdir()
        source = SOURCES[name].given(SOURCES[name].make(model, place / "source"))
        with source.here():
            rows[name] = {column: cell(source, target, place / "made")[0] for column, target in TARGETS.items()}
    ordered = {name: rows[name] for name in SOURCES if name in rows}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), sys.argv[1:] or list(SOURCES))

"""Imported by a process that forks (tests/faults/server.py): one run, so that its children find every import done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..tiny_models import make_tiny
from .tiny import options, run, write_text

with tempfile.TemporaryDirectory() as _name:
    _model = make_tiny("llama", Path(_name) / "model", dtype="float32")
    _options = options(write_text(Path(_name)), samples=1, length=16, group_size=32)
    run(_model, Path(_name) / "out", _options, "awq", "4bit")

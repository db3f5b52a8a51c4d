"""The count of conditionals that ask for a format, method or runtime by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_names

TEXT = """
_PACKED = ("gptq", "awq")
if format == "gguf" or format in _PACKED: ...
ok = layout != "pack-quantized"
chosen = TABLE["gguf"] if suffix == ".gguf" else TABLE.get("awq")
match runtime:
    case "vllm" | "llama.cpp": ...
    case _: ...
if strategy == "none" or transform != "none": ...
known = kind in frozenset({"gemm"})
"""


def test_what_counts() -> None:
    found = [(one.line, one.names) for one in check_names.offenders(TEXT, "pipeline.py")]
    assert found == [
        (3, ("gguf",)),
        (3, ("gptq", "awq")),
        (4, ("pack-quantized",)),
        (7, ("vllm", "llama.cpp")),
        (9, ("none",)),
        (10, ("gemm",)),
    ]


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("formats/gguf/levels.py", 'format == "gguf"', 0),
        ("formats/gguf_like.py", 'format == "gguf"', 1),
        ("runtimes/vllm.py", 'name == "vllm"', 0),
        ("runtimes/vllm.py", 'name == "transformers"', 1),
        ("methods/gptq.py", 'method != "gptq"', 0),
    ],
)
def test_names_are_free_at_home(path: str, text: str, count: int) -> None:
    assert len(check_names.offenders(text, path)) == count


def test_the_budget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text('a = format == "gguf"\n')
    monkeypatch.setattr(check_names, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["check_names.py"])
    for budget, code in ((1, 0), (0, 1)):
        monkeypatch.setattr(check_names, "BUDGET", budget)
        assert check_names.main() == code
        assert ("pipeline.py:1: gguf" in capsys.readouterr().out) is bool(code)

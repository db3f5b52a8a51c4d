"""Who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm_quantize

PACKAGE = Path(llm_quantize.__file__).parent
FORBIDDEN = {
    "qtypes": {"io", "formats", "engine", "calibration", "cli", "pipeline"},
    "kernels": {"io", "formats", "engine", "calibration", "cli", "pipeline"},
    "methods": {"io", "formats", "engine", "calibration", "cli", "pipeline", "blockwise"},
    "transforms": {"io", "formats", "engine", "calibration", "cli", "pipeline", "blockwise"},
}
LAZY = {"decoded.py"}  # torch comes with the first tensor that is asked for
LIGHT = ("artifacts", "models", "architectures", "advice", "pipeline", "options", "memory", "formats", "io")


def modules(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, relative imports resolved."""
    found: set[str] = set()
    parts = ("llm_quantize", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_mathematics_does_not_know_files(part: str) -> None:
    for path in modules(part):
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] == "llm_quantize" and len(pieces) > 1:
                assert pieces[1] not in FORBIDDEN[part], f"{path.name} imports {name}"


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_do_not_import_torch(part: str) -> None:
    for path in modules(part):
        if path.name not in LAZY:
            assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}, path


def test_only_cli_and_report_print() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).parts[0]
        if place in ("cli", "report.py"):
            continue
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_no_pickle_and_no_evaluated_code() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "marshal", "shelve", "dill"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile"), path


def loaded_after(code: str) -> set[str]:
    script = code + "\nimport sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    loaded = loaded_after("from llm_quantize.cli import run; run(['--help'])")
    assert not loaded & {"numpy", "rich", "gguf", "torch", "transformers", "huggingface_hub", "tokenizers"}


def test_plan_imports_no_torch(demo_model: Path) -> None:
    loaded = loaded_after(
        f"from llm_quantize.cli import run; assert run(['plan', {str(demo_model)!r}, 'gguf', '-q', 'Q4_K_M']) == 0"
    )
    assert not loaded & {"torch", "transformers", "huggingface_hub", "xllamacpp"}
    assert "numpy" in loaded

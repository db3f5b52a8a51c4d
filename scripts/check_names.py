"""Counts the conditionals that ask for a format, method, transform, runtime or engine by name, and fails above BUDGET.

A thing of the tables is to be asked what it can do, not which one it is: then one more of its kind is one file and one
row. A name may be compared only where it is at home, in the file of that format, method, transform, runtime or engine.
Looking a name up in a table is no conditional.

    scripts/check_names.py            fails above the budget, and names every offender then
    scripts/check_names.py --list     names them always
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BUDGET = 0
"""None. What needs one needs a column in a table instead."""

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llm_quantize"

_GPTQ, _AWQ = ("formats/gptq", "methods/gptq"), ("formats/awq", "transforms/awq")
_PACKED = ("formats/compressed_tensors",)
HOMES: Mapping[str, tuple[str, ...]] = {
    # formats
    "gguf": ("formats/gguf", "models/gguf"),
    "gptq": _GPTQ,
    "awq": _AWQ,
    "compressed-tensors": _PACKED,
    "bitsandbytes": ("formats/bitsandbytes",),
    "ctranslate2": ("formats/ctranslate2", "runtimes/ctranslate2"),
    "mlx": ("formats/mlx",),
    # layouts within a format
    "gptq_v2": _GPTQ,
    "gemm": _AWQ,
    "gemv": _AWQ,
    "pack-quantized": _PACKED,
    "int-quantized": _PACKED,
    "naive-quantized": _PACKED,
    # methods and transforms
    "rtn": ("methods/rtn",),
    "none": ("transforms/none",),
    # runtimes
    "llama.cpp": ("runtimes/llama_cpp",),
    "transformers": ("runtimes/transformers", "runtimes/workers/in_transformers"),
    "vllm": ("runtimes/vllm", "runtimes/workers/in_vllm"),
    "vLLM": ("runtimes/vllm", "runtimes/workers/in_vllm"),
    # engines
    "local": ("engine/local",),
    "processes": ("engine/processes",),
    "ray": ("engine/ray",),
}
"""{name: the files, or folders, in which it may be compared}."""

COMMON_WORDS = {"none": "transform", "local": "engine", "processes": "engine", "ray": "engine"}
"""Names that mean other things too: they count where this word stands in the conditional."""


@dataclass(frozen=True)
class Offender:
    """A conditional at ``line`` of ``path`` (below the package) that compares with ``names``."""

    path: str
    line: int
    names: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"src/llm_quantize/{self.path}:{self.line}: {', '.join(self.names)}: {self.text}"


def offenders(source: str, path: str) -> list[Offender]:
    """Every offending conditional of a module; ``path``: below the package, with slashes."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        for conditional, operands in _conditionals(node):
            said = dict.fromkeys(name for operand in operands for name in _names(operand, constants))
            text = ast.unparse(conditional)
            names = tuple(name for name in said if _counts(name, text, path))
            if names:
                found.append(Offender(path, operands[0].lineno, names, text))
    return sorted(found, key=lambda one: one.line)


def _conditionals(node: ast.AST) -> Iterator[tuple[ast.AST, list[ast.expr]]]:
    """(what is shown, what is compared) of each comparison for equality or membership, and of each case of a match."""
    if isinstance(node, ast.Compare):
        if any(isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops):
            yield node, [node.left, *node.comparators]
    elif isinstance(node, ast.Match):
        for case in node.cases:
            values = [inner.value for inner in ast.walk(case.pattern) if isinstance(inner, ast.MatchValue)]
            if values:
                yield case.pattern, [*values, node.subject]


def _names(node: ast.expr, constants: Mapping[str, ast.expr], deep: bool = True) -> Iterator[str]:
    """Names that an operand is, or that a literal collection holds, also behind a constant of the module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in HOMES:
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from _names(element, constants, deep)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("frozenset", "set"):
        for argument in node.args:
            yield from _names(argument, constants, deep)
    elif isinstance(node, ast.Name) and node.id in constants and deep:
        yield from _names(constants[node.id], constants, deep=False)


def _counts(name: str, text: str, path: str) -> bool:
    at_home = any(path == f"{home}.py" or path.startswith(f"{home}/") for home in HOMES[name])
    return not at_home and COMMON_WORDS.get(name, "") in text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name every conditional")
    listed = parser.parse_args().list
    found: list[Offender] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        found += offenders(file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix())
    if listed or len(found) > BUDGET:
        for one in found:
            print(one)
    print(f"{len(found)} conditionals ask for a name; the budget is {BUDGET}")
    return 1 if len(found) > BUDGET else 0


if __name__ == "__main__":
    sys.exit(main())

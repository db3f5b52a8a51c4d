"""Who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

import llm_quantize

PACKAGE = Path(llm_quantize.__file__).parent
DOOR = "__init__"
LAYERS = (
    (DOOR, "errors", "events", "results"),
    ("data", "memory", "measures", "qtypes", "engine"),
    ("kernels",),
    ("grids",),
    ("methods",),
    ("io",),
    ("architectures",),
    ("plan", "transforms"),
    ("formats",),
    ("options",),
    ("models",),
    ("streams", "runtimes"),
    ("artifacts",),
    ("calibration",),
    ("blockwise",),
    ("pipeline", "evaluation"),
    ("reports",),
    ("compare", "advice", "conversion"),
    ("api",),
    ("cli",),
    ("__main__",),
)
"""Every room (a folder, or a module at the root), from the lowest. A module imports from its own layer and from lower
ones; what is imported for types alone does not count, what a function imports does."""

MOST_CIRCLES = 2
"""Circles of modules within folders, all folders together."""

LAZY = {"decoded.py", "store.py", "packed_store.py"}  # torch comes with the first matrix that is asked for
LIGHT = ("artifacts", "models", "architectures", "advice", "pipeline", "options", "memory", "formats", "io")


def modules(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def imports(path: Path, *, types: bool = True) -> set[str]:
    """Absolute names of everything a file imports, relative imports resolved; ``types`` False: when it runs."""
    found: set[str] = set()
    parts = ("llm_quantize", *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if types else run_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    """Dotted name below the package; a package has the name of its folder, the door of all its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or DOOR


def run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from run_nodes(other)
        else:
            yield from run_nodes(node)


def imported_modules(text: str, package: tuple[str, ...], known: Collection[str]) -> set[str]:
    """Which modules of ours a file of ``package`` (names of folders) imports when it runs; ``known``: all of them."""
    found: set[str] = set()
    for node in run_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("llm_quantize.") for alias in node.names if "llm_quantize." in alias.name}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*package[: len(package) - node.level + 1], *module]
            elif module[:1] != ["llm_quantize"]:
                continue
            else:
                module = module[1:]
            for alias in node.names:
                inner = ".".join((*module, alias.name))
                extension = any(PACKAGE.joinpath(*module).glob(f"{alias.name}.*.so"))
                if not extension:  # native code imports nothing of ours
                    found.add(inner if inner in known else ".".join(module) or DOOR)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """{module: modules of ours that it imports}."""
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    workers = "runtimes.workers."  # they run in another interpreter and know nothing of ours
    return {
        name: imported_modules(path.read_text("utf-8"), path.relative_to(PACKAGE).parent.parts, files) - {name}
        for name, path in files.items()
        if not name.startswith(workers)
    }


def room(module: str) -> str:
    return module.partition(".")[0]


def circles(arrows: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The strongly connected parts with more than one member: each reaches, and is reached by, the others."""
    reach: dict[str, set[str]] = {}
    for start in arrows:
        seen, ahead = set(), list(arrows[start])
        while ahead:
            if (name := ahead.pop()) not in seen:
                seen.add(name)
                ahead += arrows.get(name, ())
        reach[start] = seen
    parts = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in arrows if a in reach[a]}
    return sorted(sorted(part) for part in parts if len(part) > 1)


def test_every_room_has_one_layer(graph: dict[str, set[str]]) -> None:
    rooms = [name for layer in LAYERS for name in layer]
    assert sorted(rooms) == sorted({room(name) for name in graph})


def test_nothing_imports_upwards(graph: dict[str, set[str]]) -> None:
    level = {name: height for height, layer in enumerate(LAYERS) for name in layer}
    upwards = {(name, other) for name in graph for other in graph[name] if level[room(other)] > level[room(name)]}
    assert not sorted(upwards), "imports from a higher layer"


def test_no_circle_of_folders(graph: dict[str, set[str]]) -> None:
    arrows: dict[str, set[str]] = {}
    for name, others in graph.items():
        arrows.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    assert circles(arrows) == []


def test_hardly_a_circle_within_a_folder(graph: dict[str, set[str]]) -> None:
    inside = {name: {other for other in others if room(other) == room(name)} for name, others in graph.items()}
    found = circles(inside)
    assert len(found) <= MOST_CIRCLES, found


def test_the_rules_see_what_they_are_for() -> None:
    """Imports of a function count, those for types do not; native code is none of ours; circles are found whole."""
    text = """
if TYPE_CHECKING:
    from llm_quantize.cli import group
else:
    from ..errors import LlmQuantizeError
import llm_quantize.data
from llm_quantize import __version__, memory
from llm_quantize.kernels import _native
from . import llama
def late():
    from llm_quantize.io.paths import inside
"""
    known = {"errors", "memory", "io.paths", "architectures.llama", "data", "cli"}
    found = imported_modules(text, ("architectures",), known)
    assert found == {"errors", "data", DOOR, "memory", "architectures.llama", "io.paths"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}) == [
        ["a", "b", "c"],
        ["d", "e"],
    ]


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_do_not_import_torch(part: str) -> None:
    for path in modules(part):
        if path.name not in LAZY:
            assert not {name.split(".")[0] for name in imports(path, types=False)} & {"torch", "transformers"}, path


def test_only_cli_prints() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).parts[0]
        if place == "cli":
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

"""docs/reference/python.md: every public name of the package, from signatures and docstrings (generate_docs.py)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import llm_quantize

SECTIONS = {
    "Functions": (
        "info",
        "plan",
        "quantize",
        "convert",
        "verify",
        "evaluate",
        "compare",
        "recommend",
        "calibrate",
        "run",
    ),
    "Options": (
        "Options",
        "CalibrationOptions",
        "MethodOptions",
        "GptqOptions",
        "MeasurementOptions",
        "Overrides",
        "Recipe",
        "read_recipe",
        "recipe_from",
        "fit",
    ),
    "Results": (
        "Results",
        "ModelInfo",
        "ArtifactPlan",
        "ArtifactResult",
        "Verification",
        "Assessment",
        "ComparisonResult",
        "Advice",
        "Calibration",
        "Generation",
    ),
    "Errors and events": ("LlmQuantizeError", "errors", "events"),
}

PROMISED = {
    "ArtifactPlan": (
        "level", "format", "name", "size", "weights", "bits_per_weight", "files", "tensors", "warnings", "type_counts",
        "rows", "to_dict",
    ),
    "Recipe": ("name", "level", "tensors", "fit"),
}  # fmt: skip
"""Of classes that the library itself works with: what callers may rely on. Of the others: everything."""

FIELDS_ONLY = {"Options", "CalibrationOptions", "MethodOptions", "GptqOptions", "MeasurementOptions", "Overrides"}

INTRODUCTION = """\
# Python

The names of `llm_quantize`, generated from the code by scripts/generate_docs.py. These are public; other modules may
change at any time. [python.ipynb](../examples/python.ipynb) is a notebook that uses them.

```python
import llm_quantize

made = llm_quantize.quantize("./Llama-3.2-1B", levels=["Q4_K_M", "Q8_0"], output_dir="out")
lost = llm_quantize.evaluate([one.path for one in made], source="./Llama-3.2-1B")
for row in lost.rows():
    print(row["artifact"], row["size"], row["kld"])
```

Importing the package costs nothing; what a function needs is imported when it is called. Every result has a short
`repr`, a table in notebooks, and `to_dict()`, which is ready for JSON. `rows()` is what of it makes a table:
`pandas.DataFrame(result.rows())` has a row for each tensor, artifact, level or variant. The list that `quantize`
returns, pandas takes as it is: `pandas.DataFrame(made)`.

A call without `on_event` shows progress in a notebook. Elsewhere it is silent but for warnings, which go to the logger
`llm_quantize` of `logging`; stages and notes have the level INFO there. `on_event=print` shows what is to be heard.

Sizes are in bytes, times in seconds, KL divergences in nats per token, shares from 0 to 1."""


def python_page() -> str:
    """The page. SystemExit where a public name is not on it."""
    listed = {name for names in SECTIONS.values() for name in names} | {"__version__"}
    if listed != set(llm_quantize.__all__):
        raise SystemExit(f"python.md: not on the page, or not public: {sorted(listed ^ set(llm_quantize.__all__))}")
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts += ["", f"## {title}"]
        for name in names:
            parts += ["", f"### {name}", "", *_described(name, getattr(llm_quantize, name))]
    return "\n".join(parts) + "\n"


def _described(name: str, value: Any) -> list[str]:
    if inspect.ismodule(value):
        members = [one for one in vars(value).values() if inspect.isclass(one) and one.__module__ == value.__name__]
        return [_text(value), "", *(f"- `{one.__name__}`: {_first(one)}" for one in members)]
    if inspect.isfunction(value):
        return ["```python", *_signature(name, value), "```", "", _text(value)]
    promised = PROMISED.get(name)
    lines = [_text(value) if promised is None else _first(value)]
    fields = [
        _field(item)
        for item in (dataclasses.fields(value) if dataclasses.is_dataclass(value) else ())
        if promised is None or item.name in promised
    ]
    lines += ["", "```python", *fields, "```"] if fields else []
    own = [member for member in _own(value) if promised is None or member in promised]
    return [*lines, *(["", *(_member(value, one) for one in own)] if own and name not in FIELDS_ONLY else [])]


def _own(value: type) -> list[str]:
    """Methods and properties that the package's own classes give it."""
    ours = [kind for kind in value.__mro__ if kind.__module__.startswith("llm_quantize")]
    names = sorted({name for kind in ours for name in vars(kind) if not name.startswith("_")} - {"summary"})
    members = [(name, inspect.getattr_static(value, name)) for name in names]
    return [name for name, member in members if inspect.isfunction(member) or isinstance(member, property)]


def _member(value: type, name: str) -> str:
    member = inspect.getattr_static(value, name)
    parameters = "" if isinstance(member, property) else f"({', '.join([*inspect.signature(member).parameters][1:])})"
    return f"- `{name}{parameters}`: {_first(member)}"


def _signature(name: str, value: Any) -> list[str]:
    """A function as it is called, a parameter on each line."""
    signature = inspect.signature(value)
    lines, keyword = [f"{name}("], False
    for one in signature.parameters.values():
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            lines.append("    *,")
            keyword = True
        default = "" if one.default is inspect.Parameter.empty else f" = {_value(one.default)}"
        lines.append(f"    {one.name}: {one.annotation}{default},")
    return [*lines, f") -> {signature.return_annotation}"]


def _field(item: dataclasses.Field[Any]) -> str:
    default = item.default
    if item.default_factory is not dataclasses.MISSING:
        default = item.default_factory()
    return f"{item.name}: {item.type}" + ("" if default is dataclasses.MISSING else f" = {_value(default)}")


def _value(value: Any) -> str:
    """As one writes it in Python, with the quotation marks of this project."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if abs(value) >= 100_000 else str(value)
    return repr(value).replace("'", '"')


def _text(value: Any) -> str:
    return (inspect.getdoc(value) or "").replace("``", "`")


def _first(value: Any) -> str:
    """The first paragraph of what it says of itself, on one line."""
    said = _text(value)
    if not said:
        raise SystemExit(f"python.md: {value} says nothing of itself")
    return " ".join(said.split("\n\n")[0].split())

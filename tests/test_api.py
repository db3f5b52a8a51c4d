"""The library as Python calls it: its names stay what they are, its results are short to look at and whole as data."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import logging
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas
import pytest

import llm_quantize
from llm_quantize import events
from llm_quantize.reports.listening import heard
from llm_quantize.results import Results, Shown, Tabled, html_table

PACKAGE = Path(llm_quantize.__file__).parent
PUBLIC = [name for name in llm_quantize.__all__ if name != "__version__"]
MODULES = ("errors", "events")
SHORT = llm_quantize.Options(
    measurement=llm_quantize.MeasurementOptions(windows=2, context=64, speed=False), threads=1, calibrate=False
)

ALL_MODULES = """
import importlib, pkgutil
for found in pkgutil.walk_packages(llm_quantize.__path__, "llm_quantize."):
    if ".workers" not in found.name and not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert not error.name.startswith("llm_quantize"), error
"""


def results(demo_model: Path, folder: Path) -> dict[str, Any]:
    """A result of every public function on the built-in model."""
    model = str(demo_model)
    made = llm_quantize.quantize(model, levels=["Q8_0", "Q4_0"], output_dir=folder, options=SHORT)
    return {
        "info": llm_quantize.info(model),
        "info of GGUF": llm_quantize.info(made[0].path),
        "plan": llm_quantize.plan(model, levels="Q4_K_M")[0],
        "quantize": made[0],
        "convert": llm_quantize.convert(model, "safetensors", output_dir=folder, options=SHORT),
        "verify": llm_quantize.verify(made[0].path, source=model),
        "evaluate": llm_quantize.evaluate([one.path for one in made], source=model, options=SHORT),
        "compare": llm_quantize.compare(model, folder / "report", artifacts=[one.path for one in made], options=SHORT),
        "recommend": llm_quantize.recommend(model, ram=16 << 30, device="cpu"),
        "calibrate": llm_quantize.calibrate(
            model, options=llm_quantize.CalibrationOptions(samples=2, length=32, threads=1)
        ),
        "run": llm_quantize.run(made[0].path, "The old man", max_tokens=4, threads=1),
    }


@pytest.fixture(scope="module")
def found(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(demo_model, tmp_path_factory.mktemp("api"))


def test_a_function_of_every_name_can_be_called_twice(demo_model: Path, tmp_path: Path) -> None:
    """As it was reported: the second call met a module."""
    for _ in range(2):
        assert llm_quantize.plan(str(demo_model), levels=["Q8_0"])[0].level == "Q8_0"
        made = llm_quantize.quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path)
        assert llm_quantize.verify(made[0].path).ok
    assert made[0].status == "already complete"


def test_every_name_stays_after_every_module_is_imported() -> None:
    """Each is looked up, all modules are imported, each is looked up again, twice."""
    script = f"""
import llm_quantize
def all_names():
    return {{name: getattr(llm_quantize, name) for name in llm_quantize.__all__}}
first = all_names()
{ALL_MODULES}
second, third = all_names(), all_names()
for name in llm_quantize.__all__:
    assert first[name] is second[name] is third[name], name
print(sum(callable(value) for value in third.values()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) == len(PUBLIC) - len(MODULES)


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys, llm_quantize; print(sorted(name for name in sys.modules if name.startswith('llm_quantize')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['llm_quantize']"


def test_a_module_does_not_take_the_place_of_a_name() -> None:
    """``plan`` and ``compare`` are modules, too: they are imported as such, and the package has the functions."""
    inside = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert inside & set(PUBLIC) >= {"plan", "compare", *MODULES}
    for name in inside & set(PUBLIC):
        module = importlib.import_module(f"llm_quantize.{name}")
        assert module is sys.modules[f"llm_quantize.{name}"]
        assert isinstance(getattr(llm_quantize, name), ModuleType) == (name in MODULES), name
    from llm_quantize.plan import ArtifactPlan

    assert ArtifactPlan is llm_quantize.ArtifactPlan
    assert llm_quantize.kernels is sys.modules["llm_quantize.kernels"]  # type: ignore[attr-defined]


def test_the_names_of_the_door_are_one_list() -> None:
    """What type checkers see, what is found, what ``*`` and ``dir`` give."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(llm_quantize._PUBLIC) == set(PUBLIC)
    assert list(llm_quantize.__all__) == sorted(llm_quantize.__all__) == dir(llm_quantize)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = llm_quantize.quantise  # type: ignore[attr-defined]


def test_everything_public_is_typed_and_documented() -> None:
    assert (PACKAGE / "py.typed").is_file()
    for name in PUBLIC:
        value = getattr(llm_quantize, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values()), name
            assert "Raises" in (value.__doc__ or "") or name == "read_recipe", name
            assert "on_event" in signature.parameters or name == "read_recipe", name
    public_results = [value for name in PUBLIC if isinstance(value := getattr(llm_quantize, name), type)]
    for kind in public_results:
        if issubclass(kind, Shown) and kind is not llm_quantize.Recipe:
            assert callable(getattr(kind, "to_dict", None)), kind


def test_results_are_json_ready(found: Mapping[str, Any]) -> None:
    for name, result in found.items():
        written = json.dumps(result.to_dict(), allow_nan=False)
        assert len(written) > 50, name
        for row in result.rows() if isinstance(result, Tabled) else ():
            json.dumps(row, allow_nan=False)


def test_results_are_short_to_look_at(found: Mapping[str, Any]) -> None:
    for name, result in found.items():
        assert 20 < len(repr(result)) < 400, name
        page = result._repr_html_()
        assert page.startswith("<table>"), name
        assert page.endswith("</table>"), name
        assert len(page) < 20_000, name


def parts(value: Any) -> Iterator[Any]:
    """Every dataclass within a result."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Mapping):
        yield from parts(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield value
        yield from parts([getattr(value, item.name) for item in dataclasses.fields(value)])


def test_nothing_within_a_result_is_long_to_look_at(found: Mapping[str, Any]) -> None:
    """The bytes at the front of a planned file were most of a repr of 257,140 characters."""
    longest = {type(part).__name__: len(repr(part)) for part in parts([*found.values(), found["quantize"].plan])}
    assert len(longest) > 15
    assert max(longest.values()) < 1000, longest


def test_options_name_what_is_not_the_default() -> None:
    options = llm_quantize.Options
    assert repr(options()) == "Options()"
    asked = options(calibrate=True, method=llm_quantize.MethodOptions(gptq=llm_quantize.GptqOptions(damp=0.02)))
    assert repr(asked) == "Options(calibrate=True, method=MethodOptions(gptq=GptqOptions(damp=0.02)))"
    assert eval(repr(asked), vars(llm_quantize) | {n: getattr(llm_quantize, n) for n in PUBLIC}) == asked


def test_pandas_takes_results(demo_model: Path, tmp_path: Path, found: Mapping[str, Any]) -> None:
    made = llm_quantize.quantize(str(demo_model), levels=["Q8_0", "Q4_0"], output_dir=tmp_path, options=SHORT)
    for frame in (pandas.DataFrame(made), pandas.DataFrame([one.to_dict() for one in made])):
        assert list(frame["level"]) == ["Q8_0", "Q4_0"]
        assert list(frame["size"]) == [one.path.stat().st_size for one in made]
        assert frame["bits_per_weight"].is_monotonic_decreasing
    assert list(pandas.DataFrame(found["evaluate"].rows()).kld) == [
        one.divergence.kld for one in found["evaluate"].quality.artifacts
    ]
    compared = pandas.DataFrame(found["compare"].rows()).set_index("level")
    assert compared.loc["Q8_0", "kld"] < compared.loc["Q4_0", "kld"]
    assert pandas.DataFrame(found["recommend"].rows())["take"].sum() == 1
    assert len(pandas.DataFrame(found["verify"].rows())) == len(found["verify"].tensors)


def test_a_list_of_results_is_a_list_and_a_table(found: Mapping[str, Any]) -> None:
    some = Results([found["quantize"], found["quantize"]])
    assert some == [found["quantize"]] * 2
    assert some._repr_html_().count("<tr>") == 3
    assert Results([1, 2])._repr_html_() == "<pre>[1, 2]</pre>"


def test_a_table_shows_no_markup_of_a_model() -> None:
    page = html_table([{"name": "<script>", "n": 1234567, "x": None, "ok": True}] * 60, caption="<b>")
    assert "<script>" not in page
    assert "<b>" not in page
    assert all(text in page for text in ("&lt;script&gt;", "1,234,567", "–", "yes", "and 10 more"))


def test_results_say_the_same_as_what_they_hold(found: Mapping[str, Any]) -> None:
    result = found["quantize"]
    assert (result.level, result.size, result.format) == (result.plan.level, result.plan.size, "gguf")
    assert found["info"]["parameters"] == found["info"].to_dict()["parameters"] > 1_000_000
    assert str(found["run"]) == found["run"].text != ""
    assert (found["compare"].to_dict()["variants"][0])["level"] == "Q8_0"


def test_statistics_are_written_where_they_are_asked_for(demo_model: Path, tmp_path: Path) -> None:
    asked = llm_quantize.CalibrationOptions(samples=2, length=32, threads=1)
    for file in ("a.gguf", "a.json"):
        result = llm_quantize.calibrate(str(demo_model), tmp_path / file, options=asked)
        assert (tmp_path / file).stat().st_size > 1000
    assert result.path.is_file()
    with pytest.raises(llm_quantize.errors.UsageError, match="no such format"):
        llm_quantize.calibrate(str(demo_model), tmp_path / "b", format="npz", options=asked)


def test_a_caller_hears_the_pieces_and_the_events(demo_model: Path, tmp_path: Path) -> None:
    heard_events: list[events.Event] = []
    made = llm_quantize.quantize(str(demo_model), levels="Q8_0", output_dir=tmp_path, on_event=heard_events.append)
    assert {events.Start, events.Progress, events.Finished} <= {type(event) for event in heard_events}
    pieces: list[str] = []
    said = llm_quantize.run(made[0].path, "The old man", max_tokens=8, threads=1, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == said.text


def test_elsewhere_only_warnings_are_told_and_to_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING, "llm_quantize"), heard(None, "work") as sink:
        for event in (events.Progress(1, 2), events.Stage("a"), events.Note("b"), events.Caution("c\x1b[31m")):
            sink(event)
    assert [record.getMessage() for record in caplog.records] == ["c\\x1b[31m"]
    assert capfd.readouterr() == ("", "")


class Display:
    """IPython's display: what was shown, and how often it was drawn again."""

    def __init__(self) -> None:
        self.shown: list[Any] = []
        self.updates = 0

    def __call__(self, value: Any, *, display_id: bool = False) -> Any:
        self.shown.append(value)
        return SimpleNamespace(update=self.update) if display_id else None

    def update(self, _value: Any) -> None:
        self.updates += 1


def test_a_notebook_shows_progress(monkeypatch: pytest.MonkeyPatch, demo_model: Path, tmp_path: Path) -> None:
    display = Display()
    notebook, terminal = SimpleNamespace(kernel=object()), SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: notebook))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    llm_quantize.quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path)
    assert len(display.shown) == 1
    assert display.updates >= 1
    assert display.shown[0].finished
    with heard(None, "work") as sink:
        sink(events.Stage("read"))
        sink(events.Measure(1, 2))
        sink(events.Caution("careful"))
        sink(events.Check("parts", 1, 1))
    bars = display.shown[1]
    assert [(task.description, task.completed) for task in bars.tasks] == [("read", 1), ("check parts", 1)]
    assert "careful" in str(display.shown[2])
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: terminal))
    llm_quantize.verify(tmp_path / "demo-llama-Q8_0.gguf")
    assert len(display.shown) == 3

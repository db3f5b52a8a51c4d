"""What a manifest says of how its artifact was made: all of it, nothing of where, and read as a stranger's."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

from llm_quantize import made as record
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Origin, Recipe
from llm_quantize.made import Given, inputs_of, made_of, recorded, with_inputs
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.options import CalibrationOptions, MethodOptions, Options

RECIPE = Recipe("mine", "Q4_0", {"blk.0.attn_v.weight": "q8_0"}, sha256="a" * 64, origin=Origin("f", "b", "llama", 2))
EVERYTHING = Options(
    overrides=Overrides("q8_0", "q6_k", (("ffn", "q5_k"), ("v", "q4_0")), True, RECIPE, "best"),
    split_max_size=1000,
    calibrate=True,
    calibration=CalibrationOptions(("chat=0.5",), 3, 64, True, 5, ("imatrix", "hessian"), 0, "cuda"),
    method=MethodOptions(
        *("gptq", "awq", "block", GptqOptions(0.5, False, "natural", False, False, 1, False, 2, 0.5, False)),
        *(24, 32, False, True, "float16", "fp8", ("head",), 77, ("*.py",)),
    ),
    nonfinite="zero",
    judged=True,
    exact=True,
)
TARGET: Any = SimpleNamespace(plan=SimpleNamespace(asked="4bit", matrices=()), output=SimpleNamespace(notes={}))
TEXT: Any = SimpleNamespace()


def made(options: Options, importance: Any = TEXT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(made_of(TARGET, options, "tiny", inputs_of(options, importance))))
    return found


def settings(kind: Any = Options, at: str = "") -> list[tuple[str, Any]]:
    """[(name, type)] of every option, those within others too."""
    found = []
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        found += settings(hint, f"{at}{field.name}.") if is_dataclass(hint) else [(at + field.name, hint)]
    return found


def test_every_option_is_recorded_or_known_to_decide_no_byte() -> None:
    """Whoever adds an option finds it here: it is recorded by itself, or named among the others."""
    apart = record.OF_THE_RUN | record.APART
    assert apart <= {name.rpartition(".")[2] for name, _ in settings()} | {"measurement"}
    found, plain = EVERYTHING, Options()
    for name, _ in settings():
        parts = name.split(".")
        if set(parts) & apart:
            continue
        one, other = found, plain
        for part in parts:
            one, other = getattr(one, part), getattr(other, part)
        assert one != other, f"{name} is not in this test: give it a value above that is not the default"


def test_what_is_recorded_is_read_back() -> None:
    found = recorded(made(EVERYTHING), Path("m.json"))
    assert (found.level, found.name) == ("4bit", "tiny")
    assert with_inputs(found, Given()).calibration.data == ("chat=0.5",)
    assert found.options == Options(
        **{
            **{field.name: getattr(EVERYTHING, field.name) for field in fields(Options)},
            "calibration": CalibrationOptions((), *list(EVERYTHING.calibration.__dict__.values())[1:]),
        }
    )


def test_nothing_is_recorded_of_the_run_or_of_what_is_usual(tmp_path: Path) -> None:
    options = Options(threads=3, max_ram=10**10, checkpoint_dir=tmp_path, overwrite=True, engine="processes")
    assert made(options, None) == {"level": "4bit", "name": "tiny"}


def test_files_are_recorded_by_name_and_hash_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "m.dat").write_bytes(b"1234")
    texts = Options(calibration=CalibrationOptions((f"{tmp_path / 'notes.txt'}=0.25", "code")))
    found = made(texts)
    assert [(one["name"], one.get("built_in"), one["weight"]) for one in found["texts"]] == [
        ("notes.txt", None, 0.25),
        ("code", True, 1.0),
    ]
    files = made(Options(imatrix=tmp_path / "m.dat"))
    assert files["files"]["imatrix"]["name"] == "m.dat"
    assert str(tmp_path) not in json.dumps([found, files])


@pytest.fixture
def found(tmp_path: Path) -> Any:
    (tmp_path / "notes.txt").write_text("some words")
    return recorded(made(Options(calibration=CalibrationOptions((f"{tmp_path}/notes.txt=0.25", "code")))), Path("m"))


def test_texts_are_given_again_and_proved(found: Any, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "notes.txt"
    other.parent.mkdir()
    other.write_text("some words")
    assert with_inputs(found, Given((str(other),))).calibration.data == (f"{other}=0.25", "code=1.0")
    with pytest.raises(UsageError, match="needed") as caught:
        with_inputs(found, Given())
    assert "notes.txt" in str(caught.value.expected)
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(UsageError, match="no part"):
        with_inputs(found, Given((str(other), str(tmp_path / "more.txt"))))
    with pytest.raises(UsageError, match="--imatrix has no part"):
        with_inputs(found, Given((str(other),), imatrix=tmp_path / "more.txt"))
    other.write_text("some other words")
    with pytest.raises(IntegrityError, match="not the file"):
        with_inputs(found, Given((str(other),)))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"level": 4}, MalformedInputError),
        ({"name": None}, MalformedInputError),
        ({"texts": "general"}, MalformedInputError),
        ({"texts": [{"name": "/etc/passwd", "weight": 1}]}, MalformedInputError),
        ({"texts": [{"name": "a", "weight": "1", "sha256": "0"}]}, MalformedInputError),
        ({"files": {"imatrix": "/etc/passwd"}}, MalformedInputError),
        ({"files": {"checkpoint_dir": {"name": "x", "sha256": "y"}}}, MalformedInputError),
        ({"versions": {"torch": 2}}, MalformedInputError),
        ({"source": "/etc"}, UnsupportedError),
        ({"options": []}, MalformedInputError),
        ({"options": {"overwrite": True}}, UnsupportedError),
        ({"options": {"checkpoint_dir": "/tmp"}}, UnsupportedError),
        ({"options": {"imatrix": "/etc/passwd"}}, UnsupportedError),
        ({"options": {"statistics": "/etc/passwd"}}, UnsupportedError),
        ({"options": {"modelfile": True}}, UnsupportedError),
        ({"options": {"threads": 10**6}}, UnsupportedError),
        ({"options": {"calibration": {"data": ["/etc/passwd"]}}}, UnsupportedError),
        ({"options": {"measurement": {"texts": ["/etc/passwd"]}}}, UnsupportedError),
        ({"options": {"split_max_size": True}}, MalformedInputError),
        ({"options": {"split_max_size": 1e9}}, MalformedInputError),
        ({"options": {"split_max_size": 1 << 60}}, MalformedInputError),
        ({"options": {"method": {"gptq": {"sweeps": 10**9}}}}, MalformedInputError),
        ({"options": {"method": {"gptq": {"damp": float("inf")}}}}, UsageError),
        ({"options": {"method": {"method": "magic"}}}, UsageError),
        ({"options": {"method": {"ignore": "all"}}}, MalformedInputError),
        ({"options": {"overrides": {"tensor_types": [["a"]]}}}, MalformedInputError),
        ({"options": {"overrides": {"tensor_types": [["a", 1]]}}}, MalformedInputError),
        ({"options": {"nonfinite": "ask"}}, UsageError),
        ({"recipe": {"name": "x"}}, MalformedInputError),
        ({"recipe": {"sha256": "0"}}, MalformedInputError),
    ],
    ids=str,
)
def test_hostile_records_are_refused(changes: dict[str, Any], error: type[LlmQuantizeError]) -> None:
    with pytest.raises(error):
        recorded({"level": "Q4_0", "name": "x", **changes}, Path("m.json"))


def test_a_built_in_text_that_there_is_not_is_refused() -> None:
    texts = [{"name": "../../etc", "built_in": True, "sha256": "0", "weight": 1.0}]
    with pytest.raises(UnsupportedError, match="does not know"):
        with_inputs(recorded({"level": "Q4_0", "name": "x", "texts": texts}, Path("m")), Given())

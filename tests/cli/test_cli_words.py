"""Names as people write them: any case, bits alone, words of other tools; a wrong one is answered with the nearest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quantize import pipeline
from llm_quantize.cli import run
from llm_quantize.cli.words import HINTS, OURS
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.gguf.levels import LEVELS, parse_level
from llm_quantize.formats.table import FORMATS, format_name


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (("GGUF", "-q", "q4_k_m"), "Q4_K_M"),
        (("gguf", "-q", "4"), "Q4_K_M"),
        (("gguf", "-q", "8-bit"), "Q8_0"),
        (("gguf", "-q", "fp16"), "F16"),
        (("Gptq",), "GPTQ-4bit"),
        (("awq",), "AWQ-4bit"),
        (("awq", "-q", "4"), "AWQ-4bit"),
        (("gptq", "--w_bit", "8", "--q-group-size", "64"), "GPTQ-8bit-g64"),
        (("compressed_tensors", "-q", "w4a16-asym"), "W4A16_ASYM"),
        (("compressed-tensors", "--bits", "4", "--group_size", "64"), "W4A16-g64"),
        (("safetensors", "-q", "bfloat16"), "BF16"),
        (("CTranslate2",), "CT2-int8"),
        (("ctranslate2", "-q", "INT8-Float16"), "CT2-int8_float16"),
    ],
)
def test_what_people_write(
    words: tuple[str, ...], level: str, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "plan", demo_model, *words, "--json")
    assert code == 0, err or out
    assert json.loads(out)["artifacts"][0]["level"] == level


@pytest.mark.parametrize("form", FORMATS)
def test_every_level_in_any_case_and_what_a_wrong_one_is_told(form: str, demo_model: Path) -> None:
    for level in FORMATS[form].levels if form != "gguf" else ("F16", "Q2_K", "IQ4_XS"):
        for written in (level, level.lower(), level.upper(), level.replace("_", "-")):
            assert pipeline.plan(str(demo_model), form, levels=[written])[0].level.startswith(
                ("GPTQ", "AWQ", "BNB", "CT2", "MLX", level)
            )
    with pytest.raises(UsageError) as caught:
        pipeline.plan(str(demo_model), form, levels=[FORMATS[form].example + "x"])
    assert all(level in str(caught.value) for level in FORMATS[form].levels)
    assert f"did you mean {FORMATS[form].example}" in str(caught.value)


def test_bits_mean_a_level_of_so_many_bits() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        assert parse_level(str(bits)) is parse_level(f"{bits}bit")
        assert parse_level(str(bits)).base.startswith(f"q{bits}")
    for level in LEVELS:
        assert parse_level(level.lower()).name == level
    for word in ("7", "", "-", "99999999999999999999", "é", "q" * 1000):
        with pytest.raises(UsageError):
            parse_level(word)
    with pytest.raises(UnsupportedError, match="write gptq"):
        format_name("gptqq")
    with pytest.raises(UnsupportedError, match="MODEL gguf -q Q4_K_S"):
        format_name("q4_k_s")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("quantise", "x"), "Did you mean 'quantize'?"),
        (("analyze", "importnce"), "Did you mean 'importance'?"),
        (("zzzz",), "No such command 'zzzz'."),
        (("plan", "x", "--levell", "4"), "--level"),
        (("plan", "x", "--format", "json"), "--json"),
        (("quantize", "x", "gptq", "--desc-act"), "Leave it out"),
        (("quantize", "x", "--resume"), "every run resumes by itself"),
    ],
)
def test_unknown_words_are_answered_with_ours(
    words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert text in err
    code, out, _ = call(capsys, *words, "--json")
    assert code == 2
    assert text in json.loads(out)["what"]


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_help_lists_every_level(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    listed = out.partition("Levels (-q")[2].replace(",", " ").split()
    assert all(level in listed for form in FORMATS.values() for level in (form.name, *form.levels))


def test_every_foreign_word_is_answered(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, own in OURS.items():
        err = call(capsys, "plan", demo_model, f"--{word}")[2]
        assert f"--{own}" in err
        assert "requires an argument" in err
    for word, hint in HINTS.items():
        assert hint in call(capsys, "quantize", demo_model, word)[2].replace("\n", " ")

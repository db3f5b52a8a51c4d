"""The page and the Markdown: whole, self-contained, and deaf to what models and files are called."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import string
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_quantize.errors import AccessError, UsageError
from llm_quantize.formats.table import FORMATS
from llm_quantize.measures.grades import GRADES
from llm_quantize.reports import labels as words
from llm_quantize.reports.findings import ComparisonResult, Needs, Sample
from llm_quantize.reports.hardware import hardware_rows
from llm_quantize.reports.machines import machine_rows
from llm_quantize.reports.markdown import markdown
from llm_quantize.reports.notes import translated
from llm_quantize.reports.numbers import rough_percent
from llm_quantize.reports.page import common_length, page, write_page
from tests.reports.examples import comparison, usual, variant

HOSTILE = "</style></title><script>alert(1)</script><img src=http://x.y/z onerror=alert(1)>{{ 7*7 }}\"'&|`"


class Seen(HTMLParser):
    """Elements, attributes and text of a page; refuses tags that do not close in order."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.said: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return "".join(self.said)


def hostile() -> ComparisonResult:
    result = usual()
    first = dataclasses.replace(
        result.variants[0],
        level=HOSTILE,
        file=HOSTILE,
        grade=HOSTILE,
        samples=(Sample(HOSTILE, f" was very {HOSTILE}", HOSTILE),),
        tensor_errors=tuple(
            dataclasses.replace(error, role=HOSTILE, name=HOSTILE) for error in result.variants[0].tensor_errors
        ),
    )
    return dataclasses.replace(
        result,
        model=dataclasses.replace(result.model, name=HOSTILE, source=HOSTILE, architecture=HOSTILE, dtype=HOSTILE),
        text=dataclasses.replace(result.text, names=(HOSTILE,)),
        machine=dataclasses.replace(result.machine, cpu=HOSTILE, system=HOSTILE),
        variants=(first, *result.variants[1:]),
        versions={HOSTILE: HOSTILE},
        commands=(HOSTILE,),
        notes=(HOSTILE,),
    )


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_page_is_self_contained(lang: str) -> None:
    text = page(usual(), lang)
    seen = Seen(text)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form", "a"} & set(seen.tags)
    assert not re.search(r"(?:https?:)?//[\w.]", text)
    assert not re.search(r"@import|url\(|@font-face", text)
    links = [value for name, value in seen.attributes if name in ("href", "src", "action")]
    assert links == ["data:,"]
    assert f'<html lang="{lang}">' in text
    assert "default-src 'none'" in text
    assert text.startswith("<!doctype html>")


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_page_says_every_figure(lang: str) -> None:
    result = usual()
    seen = Seen(page(result, lang))
    for wanted in (
        "Q4_K_M",
        "3.58 MB",
        "0.0192",
        "± 0.0005",
        "93.1 %",
        "demo-llama",
        result.commands[0],
        "attn_output",
    ):
        assert wanted in seen.text, wanted
    for paragraph in ("plot_lead", "heat_lead", "samples_lead", "method_kld", "reproduce_lead"):
        assert words.labels(lang)[paragraph] in seen.text


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_hostile_names_and_texts_are_only_text(lang: str) -> None:
    text = page(hostile(), lang)
    seen = Seen(text)
    assert not {"script", "img"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.tags.count("style") == 1
    assert "{{ 7*7 }}" in seen.text
    assert seen.text.count("alert(1)") > 10


def test_hostile_names_are_only_text_in_markdown() -> None:
    text = markdown(hostile())
    prose = text.split("\n```")[0]
    assert "alert(1)" in prose
    assert not re.search(r"(?<!\\)[<`]", prose)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 2  # a name cannot add a column


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_markdown_has_the_table_and_the_command(lang: str) -> None:
    text = markdown(usual(), lang)
    assert "| **Q6_K** | 4.81 MB |" in text
    assert "```sh\nllm-quantize compare demo-llama --variants gguf:Q4_K_M\n```" in text
    assert "<" not in text
    assert words.labels(lang)["method_kld"].split("。")[0].split("(")[0] in text


def test_a_fence_in_a_command_does_not_end_the_block() -> None:
    result = dataclasses.replace(usual(), commands=("echo '```'",))
    assert markdown(result).endswith("````sh\necho '```'\n````\n")


def test_speed_that_was_not_measured_is_said() -> None:
    result = comparison(variant("Q8_0", 6_000_000, 0.001, timed=False), variant("Q4_0", 3_000_000, 0.1, timed=False))
    result = dataclasses.replace(result, machine=dataclasses.replace(result.machine, runtime="no runtime here"))
    for lang in words.LANGUAGES:
        text = Seen(page(result, lang)).text
        assert "no runtime here" in text
        assert words.labels(lang)["prompt"] not in text
    assert "no runtime here" in markdown(result)


def test_one_variant_and_none() -> None:
    alone = Seen(page(comparison(variant("Q8_0", 6_000_000, 0.001)))).text
    assert "Q8_0 was measured." in alone
    assert "Take" not in alone
    assert words.labels("en")["plot"] not in alone  # a plot of one point says nothing
    assert words.labels("en")["figures"] in alone
    assert Seen(page(comparison())).text


def test_verdict_follows_from_the_figures() -> None:
    text = Seen(page(usual())).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Take Q6_K. 4.81 MB, 42 % of the source" in text
    assert "the smallest that fits this machine and is indistinguishable" in text
    assert "Q8_0 is 29 % larger and divides the divergence by 7.6" in text
    assert "Q5_K_M is 13 % smaller and multiplies it by 3.8" in text


def test_a_small_difference_is_not_shown_as_none() -> None:
    close = comparison(variant("A", 5_000_000, 0.01), variant("B", 5_010_000, 0.0099), variant("C", 5_030_000, 0.009))
    assert close.advice().take == 2
    text = Seen(page(close)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "B is 0.4 % smaller and multiplies it by 1.1" in text
    alike = comparison(variant("A", 5_000_000, 0.0101), variant("B", 5_020_000, 0.01))
    assert "A is 0.4 % smaller and loses as much" in Seen(page(alike)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert (rough_percent(0.42), rough_percent(0.0), rough_percent(0.0036), rough_percent(0.00996)) == (
        "42", "0", "0.4", "1",
    )  # fmt: skip


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_page_and_markdown_say_which_file_for_which_machine(lang: str) -> None:
    result = usual()
    rows = machine_rows(result, lang)
    assert [row.label for row in rows] == ["", "Q8_0", "Q2_K"]
    assert ["8 GB" in row.machine for row in rows] == [False, True, True]
    seen, text = Seen(page(result, lang)).text, markdown(result, lang)
    make = "llm-quantize quantize demo-llama gguf -q Q8_0 -o out"
    for shown in (seen, text):
        assert make in shown
        assert words.labels(lang)["rule_quality"][:40] in shown
    for row in rows:
        assert row.machine in seen
        assert row.grade in seen
    taken = dataclasses.replace(result.variants[0], make=None)
    alone = dataclasses.replace(result, variants=(taken, *result.variants[1:]))
    assert "llm-quantize run report/artifacts/model-Q8_0.gguf" in markdown(alone, lang)


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_markdown_has_no_escaped_blanks(lang: str) -> None:
    result = dataclasses.replace(
        usual(), commands=("llm-quantize compare m --prompt むかし\N{IDEOGRAPHIC SPACE}むかし",)
    )
    text = markdown(result, lang)
    assert "\\x" not in text
    assert "むかし\N{IDEOGRAPHIC SPACE}むかし" in text
    assert "\N{NO-BREAK SPACE}" not in text


def test_what_fits_nowhere_is_said() -> None:
    result = usual()
    lost = [dataclasses.replace(one, needs=dataclasses.replace(one.needs, here="")) for one in result.variants]
    result = dataclasses.replace(result, variants=tuple(lost))
    assert words.labels("en")["verdict_none"] in Seen(page(result)).text
    assert words.labels("en")["verdict_none"] in markdown(result)
    assert result.to_dict()["recommended"] is None


def test_directories_have_a_choice_of_their_own() -> None:
    result = usual()
    directory = dataclasses.replace(
        variant("GPTQ-4bit", 4_000_000, 0.0001), format="gptq", runs_in="Transformers", needs=Needs()
    )
    result = dataclasses.replace(result, variants=(directory, *result.variants))
    assert result.runtimes() == ["llama.cpp", "Transformers"]
    assert result.variants[result.advice().take or 0].label == "Q6_K"
    assert "For Transformers, take GPTQ-4bit." in Seen(page(result)).text


NOTES = (
    "quantized with an importance matrix (general, code): every file",
    "quantized with an importance matrix: a.gguf, b.gguf",
    "the machine was busy while the speed of these was measured, which says little: Q8_0",
    "GPTQ-4bit was not run: torch",
    "a.gguf: llama.rope.freq_base is 1.0 in the artifact, 2.0 in the reference",
    "a.gguf: 3 tokens of the artifact's vocabulary are spelled otherwise than the reference's",
    "a: 12 biases that this model does not have are left out, all zeros",
    "a: 12 biases that the reference has not are in the artifact, all zeros",
    "a: lm_head is in the artifact, but its configuration ties the head to the embedding",
    "a.gguf, after “Once”: does not end within the limit, the source does after 12",
    "a.gguf, after “Once”: 80% of the answer is one phrase over and over, 3% in the source",
    "a.gguf in llama.cpp: KLD 0.1, +0.2 ± 0.3 from the streamed 0.4; the two are KLD 0.5 apart, as its rounding of "
    "activations explains",
)


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_formats_beside_each_other_have_their_hardware(lang: str) -> None:
    """Every format that there is has words for it; one format alone needs none."""
    said = words.labels(lang)
    one = variant("one", 900_000, 0.1)
    rows = [
        dataclasses.replace(one, format=format, level=f"level{i}", file=f"f{i}") for i, format in enumerate(FORMATS)
    ]
    rows += [
        dataclasses.replace(one, format="gguf", level="second", file="g"),
        dataclasses.replace(one, format="exl9", level="x", file="x"),
    ]
    found = hardware_rows(comparison(*rows), lang)
    assert [row.runs for row in found] == [said[f"runs_{format}"] for format in FORMATS]
    assert found[0].variants == f"level0{said['comma']}second"
    for text in (page(comparison(*rows), lang), markdown(comparison(*rows), lang)):
        plain = html.unescape(text).replace("\\", "")
        for row in found:
            assert row.hardware in plain
    assert hardware_rows(comparison(one, dataclasses.replace(one, level="two", file="b")), lang) == []
    assert said["hardware"] not in page(comparison(one), lang)


@pytest.mark.parametrize("note", NOTES)
def test_notes_are_translated(note: str) -> None:
    assert translated(note, "en") == note
    found = translated(note, "ja")
    assert re.search(r"[\u3040-\u30ff]", found)
    assert not re.search(r"[a-z]+ [a-z]+ [a-z]+", found)
    assert found in Seen(page(dataclasses.replace(usual(), notes=(note,)), "ja")).text
    assert set(re.findall(r"\d+", note)) == set(re.findall(r"\d+", found))


def test_what_no_pattern_knows_stays_as_it_is() -> None:
    assert translated("something that a runtime said", "ja") == "something that a runtime said"


def test_note_patterns_have_the_same_places() -> None:
    english, japanese = words.note_patterns("en"), words.note_patterns("ja")
    assert list(english) == list(japanese)
    for key, text in english.items():
        places = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        assert places == {name for _, name, _, _ in string.Formatter().parse(japanese[key]) if name}, key


@pytest.mark.parametrize(
    ("source", "text", "same"),
    [
        ("one two three", "one two four", "one two "),
        ("one two", "one two", "one two"),
        ("one two", "one twofold", "one "),
        ("one twofold", "one two", "one "),
        ("walked", "warm", ""),
        ("トイトル", "トイイイ", "トイ"),
        ("", "x", ""),
    ],
)
def test_texts_part_at_words(source: str, text: str, same: str) -> None:
    assert text[: common_length(source, text)] == same


def test_both_languages_say_the_same_things() -> None:
    english, japanese = words.labels("en"), words.labels("ja")
    assert english.keys() == japanese.keys()
    for key, text in english.items():
        places = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        assert places == {name for _, name, _, _ in string.Formatter().parse(japanese[key]) if name}, key
        if key != "space":
            assert text.strip()
            assert japanese[key].strip()
    for name, _ in GRADES:
        assert words.grade_name(name, "ja") != name
        assert words.grade_name(name, "en") == name


def test_unknown_language_is_refused() -> None:
    with pytest.raises(UsageError, match="no report in this language"):
        page(usual(), "tlh")


def test_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_page(usual(), tmp_path / "new" / "page.html", "ja")
    assert path.read_text(encoding="utf-8") == page(usual(), "ja")
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(AccessError):
        write_page(usual(), tmp_path / "taken")


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path: Path) -> None:
    path = write_page(comparison(variant("Q8_0", 6_000_000, 0.001), name="a\udc80b"), tmp_path / "page.html")
    assert "a?b" in path.read_text(encoding="utf-8")


def test_only_a_file_is_replaced_by_the_page(tmp_path: Path) -> None:
    (tmp_path / "kept.html").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept.html")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "x" * 300):
        with pytest.raises(AccessError):
            write_page(comparison(), tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.html", "link", "pipe"]

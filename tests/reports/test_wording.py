"""The command line in Japanese: one table, sentences found whole, JSON and everything unknown as they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llm_quantize.cli import run
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.reports.labels import LANGUAGES
from llm_quantize.reports.wording import error_text, language_of, said, sections, speaking, spoken, values_between

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import list_words  # noqa: E402

FLOOR = {"error": 0.6, "remedy": 0.6, "fact": 0.25, "event": 0.7, "shown": 0.7}
"""How much of each kind is translated at least (scripts/list_words.py says how much it is, and lists what is not)."""

ROWS = {text: other for section in sections("ja").values() for text, other in section.items()}
PLACE = re.compile(r"\{(\d+)(?::[ta])?\}")
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


@pytest.fixture
def japanese() -> Iterator[None]:
    with speaking("ja"):
        yield


def test_how_much_is_translated() -> None:
    for kind, found in list_words.every_sentence().items():
        share = sum(text in ROWS for text in found) / len(found)
        assert share >= FLOOR[kind], f"{kind}: only {share:.0%} are translated: python scripts/list_words.py --missing"


def test_sentences_are_seen_where_they_are_said() -> None:
    source = """
def fail(what: str) -> MalformedInputError: ...
raise fail(f"{meaning} is too long", expected=f"at most {limit}", remedy="a" if b else "c" + d)
raise ValueError("not ours")
on_event(events.Note("told"))
"""
    assert list_words.error_makers(source) == {"fail"}
    assert list(list_words.sentences(source, {"fail"})) == [
        ("error", "{0} is too long"),
        ("remedy", "a"),
        ("remedy", "c{0}"),
        ("fact", "at most {0}"),
        ("event", "told"),
    ]


def test_no_row_is_for_a_sentence_that_is_not_said() -> None:
    assert list_words.stale() == [], "adapt or remove these rows of messages.ja.json"


def test_each_row_has_the_values_of_its_sentence() -> None:
    for text, other in ROWS.items():
        numbers = [int(number) for number in re.findall(r"\{(\d+)\}", text)]
        assert numbers == list(range(len(numbers))), text
        assert {int(number) for number in PLACE.findall(other)} <= set(numbers), text
        assert not numbers or not re.search(r"[{}]", PLACE.sub("", other)), text
        if numbers:
            assert sum(map(str.isalpha, PLACE.sub("", text))) >= 2, f"too little to be known by: {text}"


def test_each_sentence_is_found_by_its_own_row(japanese: None) -> None:
    for text, other in ROWS.items():
        values = [f"{7 + number}" for number in range(len(PLACE.findall(text)))]
        finished, expected = (
            PLACE.sub(lambda found, values=values: values[int(found[1])], one) for one in (text, other)
        )
        assert said(finished) == expected


def test_values_keep_their_places_and_what_is_unknown_stays() -> None:
    text = "there is no gguf level 'Q9'"
    assert said(text) == text
    with speaking("ja"):
        assert said(text) == "gguf にレベル 'Q9' はありません"
        assert said("warning: a tale of no importance") == "警告: a tale of no importance"
        assert said("a tale of no importance") == "a tale of no importance"
    assert spoken() == "en"


def test_a_sentence_within_a_sentence(japanese: None) -> None:
    assert said("warning: x is shorter than one window of 5: left out").startswith("警告: x は窓 1 つ（5 トークン）")
    shown = said("Error: Invalid value for '--max-ram': '1x' is not a size; write for example 512M, 4G or 4GiB")
    assert shown.startswith("エラー: '--max-ram' の値が正しくありません: '1x' はサイズではありません。")


def test_a_short_sentence_is_not_found_in_a_longer_one(japanese: None) -> None:
    assert said("download model.safetensors") == "model.safetensors のダウンロード"
    for text in ("download or mend the file again", "at most one of a kind", "unknown to the world"):
        assert said(text) == text
    told = said("Running a model in vLLM needs an optional dependency that is not installed")
    assert told == "vLLM でのモデルの実行に必要な追加パッケージが入っていません"
    assert said("one of F32, BF16") == "F32, BF16 のどれか"


@pytest.mark.timeout(10)
def test_long_values_take_no_time(japanese: None) -> None:
    said("x: , : , bits per weight, " * 20_000)
    assert values_between(("", ": ", ", ", ""), "a: b, c") == ["a", "b", "c"]
    assert values_between(("a", "a"), "a") is None


def test_an_error_in_japanese(japanese: None) -> None:
    error = UsageError("no such model directory", file="x", expected="1 bytes", remedy="check the path")
    assert error_text(error).splitlines() == [
        "モデルのディレクトリがありません",
        "  ファイル: x",
        "  期待した値: 1 バイト",
        "  対処: パスを確認してください",
    ]
    assert str(error).startswith("no such model directory")
    missing = error_text(MissingExtraError("running a GGUF file", "llamacpp"))
    assert "GGUF ファイルの実行に必要な追加パッケージが入っていません" in missing
    assert "pip install '.[llamacpp]'" in missing


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "ja"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "ja_JP.eucJP"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": ""}, "ja"),
        ({"LANG": "de_DE.UTF-8", "LANGUAGE": "fr:ja:en"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LANGUAGE": "en"}, "en"),
        ({"LANG": "C", "LANGUAGE": "ja"}, "en"),
        ({"LANGUAGE": "ja"}, "en"),
        ({"LANG": "jam_JM.UTF-8"}, "en"),
    ],
)
def test_the_locale_decides_as_for_gettext(environment: dict[str, str], language: str) -> None:
    assert language_of(environment) == language


@pytest.mark.parametrize("words", [["--lang", "ja", "info"], ["info", "--lang", "ja"], ["info", "--lang=ja"]])
def test_the_option_stands_before_or_after_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    at = words.index("info") + 1
    assert run([*words[:at], "./nothing-here", *words[at:]]) == 2
    assert "モデルのディレクトリがありません" in capsys.readouterr().err
    assert spoken() == "en"


def test_the_option_wins_over_the_locale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], demo_model: Path
) -> None:
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    assert run(["plan", str(demo_model), "-q", "Q4_K_M"]) == 0
    assert "必要なもの: ディスク" in capsys.readouterr().out
    assert run(["--lang", "en", "plan", str(demo_model), "-q", "Q4_K_M"]) == 0
    assert "of disk, about" in capsys.readouterr().out
    assert run(["--lang", "fr", "plan", str(demo_model)]) == 2


def test_a_terminal_without_the_characters_is_spoken_to_in_english() -> None:
    words = [sys.executable, "-m", "llm_quantize", "info", "./nothing-here"]
    given = {"LC_ALL": "ja_JP.UTF-8", "PYTHONUTF8": "0"}
    for encoding, sentence in (("ascii", "no such model directory"), ("euc_jp", "モデルのディレクトリがありません")):
        environment = {**subprocess.os.environ, **given, "PYTHONIOENCODING": encoding}  # type: ignore[attr-defined]
        done = subprocess.run(words, capture_output=True, env=environment, check=False)
        assert sentence in done.stderr.decode(encoding)


@pytest.mark.parametrize(
    "words",
    [["info"], ["plan", "-q", "IQ2_M"], ["quantize", "-q", "Q9"], ["recommend", "--ram", "16G"]],
    ids=lambda words: words[0],
)
def test_json_is_the_same_in_every_language(
    words: list[str], demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said_so = []
    for language in LANGUAGES:
        code = run(["--json", "--lang", language, words[0], str(demo_model), *words[1:]])
        out, err = capsys.readouterr()
        assert not JAPANESE.search(out + err)
        facts = json.loads(out)
        facts.pop("memory_needed", None)  # counts what this process holds already
        for artifact in facts.get("artifacts", []):
            artifact.pop("notes", None)  # as does the memory that they tell
            artifact.get("cost", {}).pop("memory", None)
        said_so.append((code, json.dumps(facts)))
    assert said_so[0] == said_so[1]


@pytest.mark.parametrize(
    "words",
    [
        "quantize",
        "quantize x --nope",
        "nope",
        "plan x --threads a",
        "plan x --threads 0",
        "plan x --max-ram 1x",
        "plan x --nonfinite a",
        "plan x --threadz 1",
        "info a b",
        "info a --revision",
        "run x y --temperature a",
    ],
)
def test_mistakes_on_the_command_line_are_told_in_japanese(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "ja", *words.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    if len(lines) > 1:
        assert lines[0].startswith("書式: llm-quantize")
        assert lines[1].startswith("使い方は 'llm-quantize")
    assert lines[-1].startswith("エラー: ")
    assert len(JAPANESE.findall(lines[-1])) > 5


def test_every_command_has_the_option() -> None:
    from llm_quantize.cli import COMMANDS, group
    from llm_quantize.cli.analyze import COMMANDS as INNER

    context = click.Context(group, info_name="llm-quantize")
    found = [group.get_command(context, name) for name in COMMANDS]
    analyze = next(one for one in found if isinstance(one, click.Group))
    found += [analyze.get_command(context, name) for name in INNER]
    for one in found:
        assert one is not None
        if not isinstance(one, click.Group):
            assert [option.name for option in one.params].count("lang") == 1

"""--help in both languages: whole, in columns, and in English as click writes it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llm_quantize.cli import COMMANDS, group, run
from llm_quantize.cli.analyze import COMMANDS as INNER
from llm_quantize.cli.help import Context, described
from llm_quantize.reports.columns import width
from llm_quantize.reports.wording import speaking

JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
PAGES = [[], *([name] for name in COMMANDS), *(["analyze", name] for name in INNER)]


def page(words: list[str], capsys: pytest.CaptureFixture[str], lang: str = "ja") -> str:
    assert run(["--lang", lang, *words, "--help"]) == 0
    return capsys.readouterr().out


def command_of(words: list[str]) -> click.Command:
    found: click.Command = group
    for word in words:
        assert isinstance(found, click.Group)
        inner = found.get_command(click.Context(found), word)
        assert inner is not None
        found = inner
    return found


@pytest.fixture(params=["60", "80", "120"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", request.param)
    return int(request.param)


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_no_english_is_left_on_a_page(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Beside names, commands and levels: every paragraph and what is said of every option is Japanese."""
    text = page(words, capsys)
    assert text.startswith("書式: llm-quantize")
    assert "\nオプション:\n" in text
    blocks = re.split(r"\n(?=  \S)", re.sub(r"\n {4,}", " ", text))
    for block in blocks[1:]:
        names_levels = re.match(r"  [\w-]+ +[\w, ]+(（|$)", block)  # a format and its levels
        assert JAPANESE.search(block) or names_levels, block
    assert not re.search(r"\b(default|required|Options|Usage|Commands|the|of|for)\b", re.sub('".*?"', "", text)), text


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_a_page_keeps_to_its_columns(words: list[str], columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    limit = min(columns, 100) - 2
    text = page(words, capsys)
    starts = set()
    for line in text.splitlines():
        whole = re.fullmatch(r"  --[\w-]+ \[\S+\]", line)  # an option and its choices
        assert width(line) <= max(limit, 50) or " " not in line.strip() or "llm-quantize" in line or whole, line
        assert line == line.rstrip()
        assert line.lstrip()[:1] not in tuple("。、）」"), line
        if found := re.match(r"  -[^ ].*?  +(?=\S)", line):
            starts.add(found.end())
    assert len(starts) <= 1  # what is said of the options stands in one column


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_an_english_page_is_clicks_own(words: list[str]) -> None:
    command = command_of(words)
    ours = Context(command, info_name="x", terminal_width=90)
    theirs = click.Context(command, info_name="x", terminal_width=90)
    assert ours.get_help() == theirs.get_help()


@pytest.mark.parametrize("words", [["--help"], ["quantize", "--help"], ["analyze", "quality", "-h"]])
def test_the_locale_decides(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    assert run(words) == 0
    assert "このヘルプを表示して終わります。" in capsys.readouterr().out
    assert run(["--lang", "en", *words]) == 0
    assert not JAPANESE.search(capsys.readouterr().out)


@pytest.fixture
def japanese() -> Iterator[None]:
    with speaking("ja"):
        yield


def test_what_click_adds_to_an_option(japanese: None) -> None:
    assert described("Tokens in a window, at most the model's context.  [default: 2048; x>=2]") == (
        "窓のトークン数。モデルのコンテキストを超えません。[既定値: 2048、x>=2]"
    )
    assert described("The model that the artifacts were made from.  [required]").endswith("モデル。[必須]")
    assert described("[default: all CPUs]  [1<=x<=1024]") == "[既定値: すべての CPU] [1<=x<=1024]"
    assert described("[default: .]") == "[既定値: .]"
    assert described("a tale of no importance  [default: x]") == "a tale of no importance[既定値: x]"


def test_a_command_that_needs_another_word_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "ja", "analyze"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("書式: llm-quantize analyze")
    assert "エラー" not in shown
    said_so = []
    for lang in ("en", "ja"):
        assert run(["--json", "--lang", lang, "analyze"]) == 2
        said_so.append(capsys.readouterr().out)
    assert said_so[0] == said_so[1]
    assert not JAPANESE.search(said_so[0])


def test_an_unknown_language_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--lang", "fr", "info", "x"], ["info", "--lang=fr", "x"]):
        monkeypatch.setenv("LC_ALL", "C.UTF-8")
        assert run(words) == 2
        assert "'fr' is not one of 'en', 'ja'" in capsys.readouterr().err
        monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
        assert run(words) == 2
        assert "'fr' は 'en', 'ja' のどれでもありません" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "start"),
    [("ascii", "Usage: "), ("latin-1", "Usage: "), ("cp932", "書式: "), ("euc_jp", "書式: "), ("utf-8", "書式: ")],
)
def test_a_narrow_terminal_is_spoken_to_in_what_it_can_show(encoding: str, start: str, tmp_path: Path) -> None:
    """Asked for by name or by the locale, and without a crash in either."""
    given = {"LC_ALL": "ja_JP.UTF-8", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    environment = {**subprocess.os.environ, **given}  # type: ignore[attr-defined]
    for words in (["plan", "--help"], ["--lang", "ja", "plan", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm_quantize", *words], capture_output=True, env=environment, check=False
        )
        assert done.returncode == 0
        assert done.stderr == b""
        assert done.stdout.decode(encoding).startswith(start)

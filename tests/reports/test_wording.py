"""The command line in Japanese: one table, sentences found whole, JSON and everything unknown as they are."""

from __future__ import annotations

import ast
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

ROWS = {text: other for section in sections("ja").values() for text, other in section.items()}
PLACE = re.compile(r"\{(\d+)(?::[ta])?\}")
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


@pytest.fixture
def japanese() -> Iterator[None]:
    with speaking("ja"):
        yield


def test_every_sentence_is_translated() -> None:
    found = [f"{one.where}: {one.text}" for one in list_words.missing()]
    assert found == [], (
        "python scripts/list_words.py --missing > new.json; fill it in; --fill new.json (or, where no terminal shows a "
        "text, name it in scripts/english_only.json)"
    )


def test_each_text_that_stays_english_is_there_for_a_reason() -> None:
    said_texts, seen = list_words.every_text(), set()
    for reason, what in list_words.english_only().items():
        assert len(reason.split()) > 2
        for text in what.get("texts", []):
            assert text in said_texts, f"no sentence of the program any more: {text}"
            assert text not in ROWS, f"both translated and said to stay English: {text}"
            assert text not in seen
            seen.add(text)
        for name in what.get("files", []):
            assert (list_words.PACKAGE / name).exists(), name


SOURCE = """
def fail(what: str) -> MalformedInputError: ...
COMMANDS: dict[str, str] = {"run": "Run it."}
raise fail(f"{meaning} is too long", expected=f"at most {limit}", remedy="a" if b else "c" + d)
raise ValueError("it is not ours")
on_event(events.Note("told"))
text = f"{name} of {'two words' if many else 'one'}" + more
pattern = "{count} of {all} are lost"
shape = {"one": 1}
console.print(counted(3, "matrix", "matrices"))
table = _aligned(("level", "size"), rows)
for word in ("tensor",):
    add_column(said(word))

@click.command("x")
@click.option("--y", help="Why.")
def command() -> int:
    \"\"\"Do it
    all.

    \\b
    Examples:
      llm-quantize x

    Then go.
    \"\"\"
"""


def test_sentences_are_seen_where_they_are_said() -> None:
    assert list_words.error_makers(SOURCE) == {"fail"}
    found = {(one.kind, one.text): one.values for one in list_words.sentences(SOURCE, {"fail"})}
    assert found == {
        ("error", "{0} is too long"): ("meaning",),
        ("remedy", "a"): (),
        ("remedy", "c{0}"): ("d",),
        ("fact", "at most {0}"): ("limit",),
        ("event", "told"): (),
        ("help", "Run it."): (),
        ("help", "Why."): (),
        ("help", "Do it all."): (),
        ("help", "Examples:"): (),
        ("help", "Then go."): (),
        ("piece", "two words"): (),
        ("piece", "{0} of {1} are lost"): ("count", "all"),
        ("piece", "{0} matrix"): (),
        ("piece", "{0} matrices"): (),
        ("shown", "level"): (),
        ("shown", "size"): (),
        ("shown", "tensor"): (),
    }


def test_what_is_missing_is_filled_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list that --missing prints is the file that --fill reads."""
    table = {"ours": {"written": "作成"}, "click": {"required": "必須"}}
    one = list_words.Sentence("remedy", "check the path", ("x",), "a.py:1")
    monkeypatch.setattr(list_words, "missing", lambda: [one])
    monkeypatch.setattr(list_words, "sections", lambda _: table)
    monkeypatch.setattr(list_words, "TABLE", tmp_path / "table.json")
    list_words.print_missing()
    printed = capsys.readouterr().out
    assert "// remedy, a.py:1: {0} = x" in printed
    filled = tmp_path / "filled.json"
    filled.write_text(printed.replace('"check the path": ""', '"check the path": "パスを確認"'), encoding="utf-8")
    assert list_words.fill(filled) == 1
    assert json.loads(list_words.TABLE.read_text(encoding="utf-8"))["ours"]["check the path"] == "パスを確認"
    filled.write_text('{"no such sentence here": "x"}', encoding="utf-8")
    with pytest.raises(ValueError, match="no such sentence here"):
        list_words.fill(filled)


NOT_HERE = {
    "Aborted!": "cli.run says that it was stopped",
    "Choose from:": "no choice is required",
    "Choice(": "a representation",
    "deprecat": "nothing is deprecated",
    "Value must be an iterable": "an error of the program",
    "Takes ": "every option takes one value",
    " values are required": "every option takes one value",
    " takes ": "every argument takes one value or all",
    " arguments.": "every option takes one value",
    "(dynamic)": "no default is computed",
    "UUID": "no option is a UUID",
    "valid boolean": "no option takes a boolean",
    "the format": "no option is a date",
    "path": "a metavariable",
    "is not {1}.": "every choice is among several",
    "does not exist": "no option must exist already: errors of ours say so",
    "not writable": "not asked of any path",
    "not executable": "not asked of any path",
    "Invalid start character": "an error of the program",
    "defined twice": "an error of the program",
    "cannot use the": "an error of the program",
    "Could not determine name": "an error of the program",
    "No options defined": "an error of the program",
    "Arguments take exactly": "an error of the program",
    "Missing parameter": "a parameter is an option or an argument",
    "Missing {0}": "a parameter is an option or an argument",
    "Could not open file": "no option is an open file",
    "unknown error": "no option is an open file",
    "Did you mean {0}?": "part of a sentence that has its own row",
    "(Did you mean one of": "part of a sentence that has its own row",
}
"""Messages of click that this command line never says, by a part of them, and why."""

WITH_VALUES = {
    "Missing argument": "Missing argument {0}.",
    "Missing option": "Missing option {0}.",
    "{0} {1} is a file.": "Directory {0} is a file.",
    "{0} {1} is a directory.": "File {0} is a directory.",
    "{0} {1} is not readable.": "File {0} is not readable.",
    "{0} is not a valid {1}.": "{0} is not a valid integer.",
    "Try '{0} {1}' for help.": "Try '{0} --help' for help.",
    "No such option {0}.": "No such option '{0}'.",
    "No such command {0}.": "No such command '{0}'.",
    "Option {0} requires an argument.": "Option '{0}' requires an argument.",
    "Option {0} does not take a value.": "Option '{0}' does not take a value.",
}
"""{a message of click: as the table has it, where click puts words together or quotes a name}."""


def test_every_message_of_click_is_translated() -> None:
    """Read from the click that is installed, so that a new one says what is new."""
    asked: set[str] = set()
    for module in ("core", "exceptions", "formatting", "parser", "types"):
        tree = ast.parse((Path(click.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("_", "ngettext"):
                texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
                asked.update(text.replace("!r}", "}") for text in texts if isinstance(text, str))
    numbered = {text for one in asked for text in list_words.templates(ast.Constant(one))}
    assert len(numbered) > 40
    unknown = {text for text in numbered if not any(part in text for part in NOT_HERE)}
    assert {text for text in unknown if WITH_VALUES.get(text, text) not in ROWS} == set()


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


def test_a_sentence_that_is_put_together(japanese: None) -> None:
    assert said("x.gguf: no window was compared") == "x.gguf: 比べた窓がありません"
    assert said("no window was compared (blk.0)") == "比べた窓がありません（blk.0）"
    assert said("RAM: of this computer; GPU: none seen") == "RAM: このマシンの値。GPU: 見つかりません"
    assert said("3 q4_k became q8_0, 1,204 iq2_s became q6_k") == "q4_k の 3 個が q8_0 に、iq2_s の 1,204 個が q6_k に"
    rows = "0 行目から 64 行目の符号が 2 ビットの範囲にありません"
    assert said("x: codes of rows 0 to 64 are not in 2 bits (and 1,300 more)") == f"x: {rows}（ほか 1,300 件）"
    shape = "the shape of a weight disagrees with the configuration (q, embd) (blk.0)"
    assert said(shape) == "重みの形が設定と合いません（q, embd）（blk.0）"
    for text in ("a tale of no importance; written", "a tale (blk.0)", "x: a tale of no importance"):
        assert said(text) == text, "half a translation"
    told = (
        "Q8_0: the rows of 2 of 16 matrices, 49.2 kB, do not divide into the blocks of this level's types: 2 q8_0 "
        "became f16; the file is 23.0 kB larger for it (8.61 bits per weight, not 8.50), and no less precise (-v lists "
        "them)"
    )
    assert said(told).startswith("Q8_0: 行列 16 個のうち 2 個（49.2 kB）は")
    assert said(told).endswith(
        "2 個が f16 に。ファイルはそのぶん 23.0 kB 大きくなり（重みあたり 8.50 ビットではなく 8.61 ビット）、精度は"
        "下がりません（一覧は -v）"
    )


def test_a_value_of_several_words_is_looked_up_too(japanese: None) -> None:
    assert said("the file ends inside the number of keys") == "ファイルがキーの数の途中で終わっています"
    assert said("cannot open this file (Permission denied)") == "このファイルを開けません（許可がありません）"
    assert said("the configuration has no a or b or c") == "設定に a か b か c がありません"
    assert said("After “written” they write:") == "「written」の続きを書かせると:"


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

"""Text in the columns of a terminal."""

from __future__ import annotations

import random
import re

import pytest

from llm_quantize.reports.columns import width, wrapped


def test_wide_characters_take_two_columns() -> None:
    assert width("abc") == 3
    assert width("量子化") == 6
    assert width("ｶﾅ") == 2
    assert width("（は）") == 6
    assert width("e\u0301") == 1
    assert width("±1") == 2
    rich = pytest.importorskip("rich.cells")
    for text in ("モデルの実行: 3.58 MB、重みあたり 4.959 ビット", "ﾊﾝｶｸと全角", "ｆｕｌｌ"):
        assert width(text) == rich.cell_len(text)


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("量子化します。", 6, ["量子化", "しま", "す。"]),
        ("（例: 4G）を指定", 6, ["（例:", "4G）を", "指定"]),
        ("モデルの実行", 6, ["モデル", "の実行"]),
        ("a lot of words", 6, ["a lot", "of", "words"]),
        ("キャリブレーション", 4, ["キャリブレーション"]),
        ("値は .txt、.json です", 9, ["値は", ".txt、", ".json で", "す"]),
        ("", 5, [""]),
        ("  a ", 5, ["a"]),
    ],
)
def test_lines_are_broken_as_japanese_is(text: str, columns: int, lines: list[str]) -> None:
    assert wrapped(text, columns) == lines


def test_nothing_is_lost_and_no_line_begins_with_a_stop() -> None:
    draw = random.Random(3)
    pieces = [
        "量子化",
        "します",
        "。",
        "、",
        "（",
        "）",
        "モデル",
        "GGUF",
        "--max-ram",
        " ",
        "は",
        "を",
        "ー",
        "[",
        "]",
    ]
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=40)).strip()
        columns = draw.randint(8, 60)
        lines = wrapped(text, columns)
        assert "".join("".join(lines).split()) == "".join(text.split())
        for line in lines:
            assert line == line.rstrip()
            assert width(line) <= columns or not re.search(r" [^。、）\]]", line)
        for line in lines[1:]:
            assert line[0] not in "。、）"

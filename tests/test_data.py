"""The built-in texts: what they hold, whose they are, and that nobody is measured on what it was calibrated with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_quantize.calibration.text import BUILT_IN, load_texts
from llm_quantize.data import calibration_file, evaluation_text, evaluation_texts


def pieces(text: str, length: int) -> set[str]:
    """A text without white space, cut every ``length`` characters."""
    bare = "".join(text.split())
    return {bare[i : i + length] for i in range(0, len(bare) - length, length)}


def contents(name: str) -> Iterator[tuple[str, str]]:
    for index, document in enumerate(load_texts([name]).datasets[0].documents):
        words = "\n".join(message["content"] for message in document.messages if message["role"] != "system")
        yield f"{name} {index}", document.text or words


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_passage_is_in_the_evaluation_texts_or_twice(name: str) -> None:
    measured = "".join(evaluation_text().split())
    every = {label: "".join(text.split()) for other in BUILT_IN for label, text in contents(other)}
    for label, text in contents(name):
        for piece in pieces(text, 40):
            assert piece not in measured, label
        others = "\0".join(words for other, words in every.items() if other != label)
        for piece in sorted(pieces(text, 100))[::3]:
            assert piece not in others, label


def test_the_overlap_test_can_fail() -> None:
    assert any(piece in "".join(evaluation_text().split()) for piece in pieces(evaluation_text()[5000:9000], 40))


def test_sizes_and_languages() -> None:
    sizes = {name: calibration_file(name).stat().st_size for name in BUILT_IN}
    assert 0.8e6 < sum(sizes.values()) < 1.3e6
    japanese = "".join(text for _, text in contents("japanese"))
    assert sum("\u3040" <= c <= "\u9fff" for c in japanese) > 0.8 * len(japanese)


def test_every_source_is_in_the_card() -> None:
    card = (calibration_file("general").parent / "README.md").read_text(encoding="utf-8")
    for name in BUILT_IN:
        for line in calibration_file(name).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            for key in ("author", "title", "year"):
                assert str(item.get(key, "")) in card, item.get("title")
            if "file" in item:
                assert f"`{Path(item['file']).name.removesuffix('.py')}`" in card
                assert item["licence"] in ("PSF-2.0", "Apache-2.0")
    assert "Edogawa" in card
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (
        calibration_file("code").parent / "LICENSE.CPython.txt"
    ).read_text(encoding="utf-8")


def test_conversations_are_well_formed_and_varied() -> None:
    documents = load_texts(["chat"]).datasets[0].documents
    own = [document for document in documents if document.metadata["source"] == "llm-quantize"]
    assert len(own) >= 60
    assert {document.metadata["language"] for document in own} >= {"en", "ja"}
    assert sum(document.messages[0]["role"] == "system" for document in own) >= 10
    for document in documents:
        roles = [message["role"] for message in document.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in document.messages)
    answers = [document.messages[-1]["content"] for document in own]
    assert len(set(answers)) == len(answers)


def test_evaluation_texts_by_name() -> None:
    texts = evaluation_texts()
    assert "\n".join(texts.values()) == evaluation_text()
    assert texts["pride_and_prejudice"].count("Bennet") > 20
    assert "吾輩は猫である" in texts["wagahai_wa_neko_de_aru"]

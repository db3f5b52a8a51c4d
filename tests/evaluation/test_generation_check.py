"""Loops, empty and endless answers are found; a source that loops itself is no reproach to its artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize import data
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import UsageError
from llm_quantize.evaluation.generation_check import (
    PROMPTS,
    Answer,
    answers,
    check_answers,
    check_generation,
    judge,
    loop_share,
    repetition,
    source_answers,
)
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes.base import retokenized


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([7, 7, 7, 7], 1.0),
        ([7, 7], 0.0),
        ([1, 2, 9, 9, 9, 9], 4 / 6),
        ([5, 1, 2, 3, 1, 2, 3, 1, 2, 3], 9 / 10),
        ([5, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], 11 / 12),  # the last time cut off
        ([1, 2, 3, 1, 2, 3], 0.0),  # twice is no loop
        (list(range(25)) * 4, 0.0),  # longer than a phrase
        (list(range(24)) * 4, 1.0),
    ],
)
def test_loops(ids: list[int], expected: float) -> None:
    assert loop_share(ids) == pytest.approx(expected)


def test_repetition() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1] * 20) == pytest.approx(16 / 17)


GOOD = "the quick brown fox jumps over a lazy dog"


def told(*texts: str) -> tuple[Answer, ...]:
    """A model that says ``texts``, in tokens of one letter."""
    written = [retokenized(text[:64], lambda one: [ord(letter) for letter in one], 64) for text in texts]
    return answers(written, [str(index) for index in range(len(texts))])


def test_findings() -> None:
    source = told(GOOD, GOOD, GOOD, GOOD, GOOD)
    found = told(GOOD, "", "abcabcabcabcabcabcabc", "x" * 64, GOOD * 2)
    findings = [(finding.prompt, finding.kind) for finding in judge(found, source)]
    assert findings == [
        ("1", "empty"),
        ("2", "loop"),
        ("3", "loop"),
        ("3", "endless"),
        ("4", "repetition"),
        ("4", "endless"),
    ]
    assert judge(source, source) == ()


def test_without_a_source_only_what_is_bad_alone() -> None:
    findings = judge(told(GOOD, " \n", "abcabcabcabcabc", GOOD * 2))
    assert [(finding.prompt, finding.kind) for finding in findings] == [("1", "empty"), ("2", "loop")]


def test_a_source_that_loops_too() -> None:
    source = told("x" * 64, "", "abcabcabcabcabc")
    assert judge(told("y" * 64, "", "xyxyxyxyxyxyxy"), source) == ()
    with pytest.raises(UsageError, match="different prompts"):
        judge(source, [replace(source[0], prompt="other"), *source[1:]])


def test_one_bad_answer_is_no_failure_and_three_are() -> None:
    source = told(GOOD, GOOD, GOOD, "x" * 30)
    assert check_answers(told(GOOD, GOOD, "y" * 30, GOOD), source).ok
    assert check_answers(told(GOOD, "y" * 30, "y" * 30, GOOD), source).better == 1
    assert check_answers(told("y" * 30, "y" * 30, "y" * 30, GOOD), source).ok
    failed = check_answers(told("y" * 30, "", "y" * 30, "x" * 30), source)
    assert not failed.ok
    assert (failed.worse, failed.better) == (3, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_built_in_model(tmp_path: Path) -> None:
    """Its F32 file writes what transformers writes, and Q8_0 passes; one whose head always says the same does not."""
    model = data.demo_model()
    results = quantize(str(model), "gguf", levels=["F32", "Q8_0"], output_dir=tmp_path, options=Options(threads=1))
    f32, q8 = (result.path for result in results)
    source = open_source(str(model))
    with source.checkpoint:
        own = source_answers(model, TextTokenizer(source).encode, max_tokens=40, threads=1)
    exact = check_generation(f32, reference=own, max_tokens=40, threads=1)
    assert exact.ok
    same = [one.text.strip().startswith(two.text.strip()[:20]) for one, two in zip(exact.answers, own, strict=True)]
    assert sum(same) > len(PROMPTS) // 2
    assert check_generation(q8, reference=exact.answers, max_tokens=40, threads=1).ok
    entry = next(one for one in read_gguf(f32).tensors if one.name == "output_norm.weight")
    with f32.open("r+b") as file:
        file.seek(entry.offset)
        file.write(np.zeros(entry.nbytes // 4, np.float32).tobytes())
    broken = check_generation(f32, reference=own, max_tokens=40, threads=1)
    assert not broken.ok
    assert {finding.kind for finding in broken.findings} <= {"loop", "empty", "endless"}
    assert not broken.to_dict()["ok"]

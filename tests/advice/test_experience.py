"""Figures of an earlier comparison: read with tolerance for gaps, and with none for what is not a report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.advice.experience import PUBLISHED, Experience, Loss, Measured, Wanted, published_loss, read_report
from llm_quantize.errors import AccessError, IntegrityError, MalformedInputError, UsageError
from llm_quantize.formats.gguf.levels import LEVELS
from llm_quantize.reports.findings import VERSION

CONTENT, HEADERS = "a" * 64, "b" * 64
OURS = Wanted(HEADERS, lambda: CONTENT)


def model(fingerprint: object = CONTENT, **facts: object) -> dict[str, object]:
    return {"fingerprint": fingerprint, "headers": HEADERS, "revision": None, **facts}


def report(
    path: Path, variants: object, fingerprint: object = CONTENT, version: int = VERSION, **facts: object
) -> Path:
    path.write_text(json.dumps({"version": version, "model": model(fingerprint, **facts), "variants": variants}))
    return path


def variant(level: str, **facts: Any) -> dict[str, Any]:
    return {"format": "gguf", "level": level, **facts}


def test_measured_figures_come_first_and_scale_the_published(tmp_path: Path) -> None:
    known = {"Q8_0": published_loss("Q8_0"), "Q4_K_M": published_loss("Q4_K_M"), "Q2_K": published_loss("Q2_K")}
    factors = {"Q8_0": 0.2, "Q4_K_M": 0.25, "Q2_K": 3.0}
    variants = [variant(level, kld=known[level] * factors[level], size=level.count("_")) for level in known]
    variants[0] |= {"generation_tokens_per_second": 12.5, "cpu_share": 0.97}
    variants[2] |= {"generation_tokens_per_second": 0.5, "cpu_share": 0.3}  # on a busy machine: not believed
    found = read_report(report(tmp_path / "r.json", variants), OURS)
    assert found.loss("gguf", "Q4_K_M") == Loss(pytest.approx(0.028152 * 0.25), "measured")
    assert found.loss("gguf", "Q6_K") == Loss(
        pytest.approx(0.005452 * 0.25), "estimated"
    )  # the median of the three ratios
    assert (
        found.speed("gguf", "Q8_0", "llama.cpp"),
        found.speed("gguf", "Q2_K", "llama.cpp"),
        found.speed("gguf", "Q6_K", "llama.cpp"),
    ) == (12.5, None, None)
    assert found.loss("gguf", "BF16", exact=True) == Loss(0.0, "exact")
    assert found.loss("gguf", "MXFP4_MOE") is None
    assert Experience().loss("gguf", "Q6_K") == Loss(0.005452, "published")


def test_gaps_are_not_measured(tmp_path: Path) -> None:
    variants = [
        variant("Q8_0"),
        variant("q6_k", kld=None, size="large", generation_tokens_per_second=True),
        variant("Q5_K_M", kld=-1.0, size=10**400, generation_tokens_per_second=10**400),
        {"format": "exl9", "level": "Q4_K_M", "kld": 1.0},
        {"format": "gguf", "level": 7},
        "nothing",
        variant("Q4_K_S", kld=0.5, size=9),
        variant("Q4_K_S", kld=0.1),
    ]
    text = json.dumps({"version": VERSION, "model": model(), "variants": variants})
    (tmp_path / "comparison.json").write_text(text.replace("1" + "0" * 400, "1e308"))
    found = read_report(tmp_path, OURS)
    empty = Measured(None, None, None)
    assert found.measured == {
        ("gguf", level): figures
        for level, figures in {"Q8_0": empty, "Q6_K": empty, "Q5_K_M": empty, "Q4_K_S": Measured(0.5, None, 9)}.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"model": {}, "variants": []}',
        '{"model": {"fingerprint": 5}, "variants": []}',
        '{"model": [], "variants": []}',
        '{"model": {"fingerprint": "a"}, "variants": {}}',
        '{"model": {"fingerprint": "a"}, "variants": NaN}',
        "[" * 100_000,
    ],
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(MalformedInputError) as refused:
        read_report(tmp_path / "r.json", OURS)
    assert refused.value.file == str(tmp_path / "r.json")


def test_a_report_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such report"):
        read_report(tmp_path / "absent.json", OURS)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AccessError):
        read_report(tmp_path / "pipe", OURS)


def test_another_model_is_refused_naming_both(tmp_path: Path) -> None:
    path = report(tmp_path / "r.json", [variant("Q8_0", kld=0.1)], "c" * 64)
    with pytest.raises(IntegrityError) as refused:
        read_report(path, OURS)
    assert "c" * 64 in str(refused.value.found)
    assert read_report(path, OURS, given=False) == Experience()


def test_content_is_read_only_where_headers_agree(tmp_path: Path) -> None:
    def never() -> str:
        raise AssertionError("read")

    variants = [variant("Q8_0", kld=0.1)]
    path = report(tmp_path / "r.json", variants, headers="d" * 64)
    assert read_report(path, Wanted(HEADERS, never), given=False) == Experience()
    path = report(tmp_path / "r.json", variants, revision="e" * 40)  # a commit of the hub never changes
    assert read_report(path, Wanted(HEADERS, never, "e" * 40)).measured
    with pytest.raises(IntegrityError, match="not here to compare"):
        read_report(path, Wanted(HEADERS, None, "f" * 40))


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    path = report(tmp_path / "r.json", [variant("Q8_0", kld=0.1)], version=VERSION - 1)
    with pytest.raises(MalformedInputError, match="another version"):
        read_report(path, OURS)
    assert read_report(path, OURS, given=False) == Experience()


def test_the_published_table_knows_levels_and_falls_with_bits() -> None:
    assert set(PUBLISHED) <= set(LEVELS)
    ordered = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_M", "IQ3_XXS", "IQ2_M", "IQ1_S"]
    losses = [published_loss(level) for level in ordered]
    assert losses == sorted(losses)
    for level, (without, weighted) in PUBLISHED.items():
        assert without is not None or weighted is not None, level
        assert without is None or weighted is None or weighted < without, level


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (["gguf", "-q", "Q8_0"], True),
        (["gguf", "-q", "Q8_0", "--calibration-data", "a b; rm -rf /", "--chat"], True),  # one word for the shell
        (["gguf", "-q", "Q4_0"], False),
        (["gguf", "-q", "Q8_0", "--overwrite"], False),
        (["gguf", "-q", "Q8_0", "-o", "/etc"], False),
        (["gguf", "-q", "Q8_0", "--imatrix", "a\x1b[2J"], False),
        (["gguf", "-q", "Q8_0", 7], False),
        ("gguf -q Q8_0", False),
        (None, False),
    ],
)
def test_only_words_that_make_the_file_are_taken_from_a_report(make: Any, kept: bool, tmp_path: Path) -> None:
    found = read_report(report(tmp_path / "r.json", [variant("Q8_0", kld=0.1, make=make)]), OURS)
    assert found.make("gguf", "Q8_0") == (tuple(make) if kept else None)


def test_adapters_of_a_report_are_those_that_are_asked_for(tmp_path: Path) -> None:
    """A report may come from anybody: which adapter is merged says the user."""
    words = ["gguf", "-q", "Q8_0", "--lora", "/etc", "--chat", "--lora", "-o"]
    found = read_report(report(tmp_path / "r.json", [variant("Q8_0", kld=0.1, make=words)]), OURS)
    assert found.make("gguf", "Q8_0") == ("gguf", "-q", "Q8_0", "--chat")

"""``comparison.json``: there and back again, and refused where it is something else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from llm_quantize.errors import MalformedInputError
from llm_quantize.formats.card import fill_card, room
from llm_quantize.reports.findings import ComparisonResult, from_dict, read_comparison
from llm_quantize.reports.numbers import bytes_text, count_text, percent, rate_text, significant, tick_text, with_error
from llm_quantize.reports.page import method, page
from tests.reports.examples import comparison, usual, variant


def through_json(result: ComparisonResult) -> ComparisonResult:
    return from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


def test_json_round_trip() -> None:
    assert through_json(usual()) == usual()


def test_round_trip_of_what_was_not_measured() -> None:
    bare = variant("Q8_0", 6_000_000, 0.001, timed=False, text=None)
    lost = dataclasses.replace(bare.divergence, kld_sem=math.nan)
    found = through_json(comparison(dataclasses.replace(bare, divergence=lost, quantize_cpu_seconds=None))).variants[0]
    assert found.speed is None
    assert found.quantize_cpu_seconds is None
    assert math.isnan(found.divergence.kld_sem)


def test_a_comparison_of_an_earlier_version() -> None:
    """It knew no clusters and no acceptance: its errors take tokens for independent, and the page says so."""
    facts = usual().to_dict()
    for entry in facts["variants"]:
        del entry["clusters"], entry["acceptance"], entry["acceptance_sem"]
    old = from_dict(facts)
    assert {one.divergence.clusters for one in old.variants} == {0}
    assert all(math.isnan(one.divergence.acceptance) for one in old.variants)
    assert "treat the places as independent" in " ".join(method(old, "en"))
    assert "drafts accepted" in page(old, "en").lower()


def test_the_page_says_what_errors_are_of() -> None:
    found = usual()
    told = " ".join(method(found, "en"))
    assert f"the {found.text.windows} windows count as independent" in told
    assert f"{100 * found.variants[0].divergence.acceptance:.2f} %" in page(found, "en")
    assert f"{found.text.windows} 個の窓" in " ".join(method(found, "ja"))
    alone = [
        dataclasses.replace(one, divergence=dataclasses.replace(one.divergence, clusters=1)) for one in found.variants
    ]
    assert "One window tells no standard errors" in " ".join(method(comparison(*alone), "en"))


def test_a_card_of_one_window() -> None:
    measured = {"kld": 0.25, "kld_sem": None, "same_top": 0.5, "tokens": 255, "dtype": "float32"}
    text = fill_card("\n".join(room().values()).encode(), measured).decode()
    assert "0.250000" in text
    assert "not known" in text
    assert "<" not in text


def test_json_says_what_recommend_needs() -> None:
    facts = usual().to_dict()
    one = next(entry for entry in facts["variants"] if entry["level"] == "Q4_K_M")
    assert one["format"] == "gguf"
    assert one["size"] == 3_576_832
    assert one["kld"] == 0.0192
    assert one["generation_tokens_per_second"] > 0
    assert facts["recommended"] == "model-Q6_K.gguf"
    assert facts["pareto_front"][0] == "model-Q2_K.gguf"
    assert facts["grades"][-1] == {"name": "damaged", "max_kld": None}


@pytest.mark.parametrize("change", [{"kind": "other"}, {"version": 99}, {"variants": 3}, {"model": {}}, {"text": None}])
def test_another_file_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(MalformedInputError):
        from_dict({**usual().to_dict(), **change})


def test_a_missing_figure_is_refused() -> None:
    facts = usual().to_dict()
    del facts["variants"][0]["kld"]
    with pytest.raises(MalformedInputError, match="lacks a field"):
        from_dict(facts)


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(usual().to_dict()), encoding="utf-8")
    assert read_comparison(path) == usual()
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(MalformedInputError):
        read_comparison(path)


def test_numbers_have_the_digits_that_were_measured() -> None:
    assert with_error(0.0043, 0.000066) == ("0.00430", "0.00007")
    assert with_error(0.2013, 0.0014) == ("0.2013", "0.0014")
    assert with_error(-0.5, 0.2) == ("−0.5", "0.2")
    assert with_error(1.5, math.nan) == ("1.50", "")
    assert with_error(math.nan, 1.0) == ("–", "")
    assert [significant(value) for value in (0.0, 1234.5, 0.00012345, 9.999, 1.1e-12)] == [
        "0", "1230", "0.000123", "10.0", "1.10e-12",
    ]  # fmt: skip
    assert [bytes_text(count) for count in (12, 999_600, 3_576_832, 7.1e9, 2e12)] == [
        "12 B", "1.00 MB", "3.58 MB", "7.10 GB", "2.00 TB",
    ]  # fmt: skip
    assert (tick_text(3_000_000), tick_text(2_500_000_000), tick_text(500_000_000)) == ("3 MB", "2.5 GB", "500 MB")
    assert (count_text(5_770_496), rate_text(1234.4), rate_text(38.31), percent(0.8914)) == (
        "5.77 M", "1,234", "38.3", "89.1",
    )  # fmt: skip

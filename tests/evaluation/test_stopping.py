"""A signal ends what measures: at once, with exit code 75, and nothing half-written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import memory
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.compare.comparison import compare
from llm_quantize.errors import StoppedError
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.tensor_errors import tensor_errors
from llm_quantize.events import Event
from llm_quantize.models.opening import open_source
from llm_quantize.options import MeasurementOptions
from llm_quantize.pipeline import Options, quantize

from ..tiny_models import VOCABULARY, make_tiny

WINDOWS = np.random.default_rng(4).integers(0, VOCABULARY // 2, (6, 16)).astype(np.int32)


class Signalling:
    """Hears events; after the first of ``kind`` this process gets a signal, once."""

    def __init__(self, kind: str, number: int) -> None:
        self.kind, self.number = kind, number
        self.heard: list[dict[str, Any]] = []
        self.after = 0

    def __call__(self, event: Event) -> None:
        self.heard.append(event.to_dict())
        if event.kind == self.kind:
            self.after += 1
            if self.after == 1:
                os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (made,) = quantize(
        str(model), levels=["Q4_0"], output_dir=tmp_path_factory.mktemp("made"), options=Options(threads=1)
    )
    return made.path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_quality(number: int, model: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    before = signal.getsignal(number)
    told = Signalling("measure", number)
    source = open_source(str(model))
    with source.checkpoint, pytest.raises(StoppedError, match="not kept") as caught:
        measure_quality(source, [artifact], WINDOWS, threads=2, scratch=tmp_path, on_event=told)
    assert caught.value.exit_code == 75
    # No window goes through another block: the source's six, and four of them once more, were on their way.
    assert told.after <= 10
    assert signal.getsignal(number) is before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("estimated", [False, True])
def test_a_profile_goes_on_from_what_is_kept(model: Path, tmp_path: Path, estimated: bool) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, WINDOWS, ("q4_0",), None, threads=2, estimated=estimated)
        whole = measure_profile(plan)
        told = Signalling("measure", signal.SIGTERM)
        with pytest.raises(StoppedError, match="are kept"):
            measure_profile(plan, journal=tmp_path / "journal", on_event=told)
        assert told.after < 20
        again = plan_profile(
            source, WINDOWS, ("q4_0",), None, threads=2, journal=tmp_path / "journal", estimated=estimated
        )
        assert measure_profile(again, journal=tmp_path / "journal") == whole


def test_errors_of_tensors(model: Path, artifact: Path) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        decoded = open_decoded(source, artifact)
        told = Signalling("measure", signal.SIGINT)
        with pytest.raises(StoppedError, match="not kept"):
            tensor_errors(source, decoded, threads=1, on_event=told)
        assert told.after <= 3
        decoded.close()


def test_a_comparison_keeps_what_was_made_and_ends_the_same(model: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("the cat sat on a mat by the river, and the dog ran 12 miles; " * 40)
    options = Options(
        threads=1, measurement=MeasurementOptions(texts=(str(words),), context=16, windows=4, speed=False)
    )
    told = Signalling("measure", signal.SIGTERM)
    with pytest.raises(StoppedError):
        compare(str(model), tmp_path / "out", variants=[("gguf", "Q4_0")], options=options, on_event=told)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in left if not name.startswith("measured")] == ["artifacts"]
    result = compare(str(model), tmp_path / "out", variants=[("gguf", "Q4_0")], options=options)
    fresh = compare(str(model), tmp_path / "fresh", variants=[("gguf", "Q4_0")], options=options)
    assert [row.divergence for row in result.variants] == [row.divergence for row in fresh.variants]

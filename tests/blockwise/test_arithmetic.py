"""Feedback runs text through the model in a type that the processor suggests: it is part of what is made, and a run
that is continued elsewhere keeps to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize import events, memory
from llm_quantize.calibration import collect
from llm_quantize.errors import UsageError
from llm_quantize.options import Options
from llm_quantize.pipeline import quantize

from ..faults.forking import hashes
from ..tiny_models import make_tiny
from .tiny import options, run, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("arithmetic") / "tiny")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return options(write_text(tmp_path_factory.mktemp("text")), group_size=32)


class _StoppedError(Exception):
    pass


def _on(patch: pytest.MonkeyPatch, dtype: str) -> None:
    """As on a processor that suggests this type."""
    patch.setattr(collect, "compute_dtype", lambda source, device: dtype)


def _stopped(model: Path, out: Path, chosen: Options) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, events.Progress) and event.unit == "tokens" and 3 * event.done > event.total:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        quantize(str(model), "gptq", levels=["4bit"], output_dir=out, options=chosen, on_event=stop)


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_run_that_goes_on_elsewhere_computes_as_it_began(
    model: Path,
    chosen: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
    on_disk: bool,
) -> None:
    if on_disk:
        monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    _on(monkeypatch, second)
    _, other = run(model, tmp_path / "elsewhere", chosen, "gptq", "4bit")
    assert other["identity"]["compute_dtype"] == second
    _on(monkeypatch, first)
    run(model, tmp_path / "whole", chosen, "gptq", "4bit")
    _stopped(model, tmp_path / "stopped", chosen)
    _on(monkeypatch, second)
    told: list[dict[str, Any]] = []
    result, manifest = run(model, tmp_path / "stopped", chosen, "gptq", "4bit", told)
    assert result.status == "written"
    assert manifest["identity"]["compute_dtype"] == manifest["measured"]["dtype"] == first
    assert any(first in event.get("text", "") for event in told)
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole") != hashes(tmp_path / "elsewhere")
    result, _ = run(model, tmp_path / "stopped", chosen, "gptq", "4bit")
    assert result.status == "already complete"


def test_other_arguments_are_still_refused_and_what_is_replaced_is_made_as_the_machine_suggests(
    model: Path, chosen: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on(monkeypatch, "float32")
    _stopped(model, tmp_path, chosen)
    _on(monkeypatch, "bfloat16")
    other = options(Path(chosen.calibration.data[0]), group_size=32, damp=0.03)
    with pytest.raises(UsageError, match="another damp"):
        run(model, tmp_path, other, "gptq", "4bit")
    shutil.rmtree(next(tmp_path.glob("*.partial")))
    for path in tmp_path.glob("*.journal"):
        path.unlink()
    run(model, tmp_path, chosen, "gptq", "4bit")
    _on(monkeypatch, "float32")
    replaced = options(Path(chosen.calibration.data[0]), group_size=32, overwrite=True)
    assert run(model, tmp_path, replaced, "gptq", "4bit")[1]["identity"]["compute_dtype"] == "float32"


def test_another_processor_is_named(
    model: Path, chosen: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stopped(model, tmp_path, chosen)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    told: list[dict[str, Any]] = []
    run(model, tmp_path, chosen, "gptq", "4bit", told)
    assert any("ANOTHER" in event.get("text", "") and event["event"] == "warning" for event in told)

"""Which measured file for which machine: the rule asked for each size of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llm_quantize import memory
from llm_quantize.advice.footprint import context_of, footprint, shape_of, weights_of
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.machines import BOUNDLESS, GB, GPU, RAM, choices, needs_of, this_machine
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import quantize
from llm_quantize.reports.findings import Needs, Variant
from llm_quantize.reports.machines import machine_rows
from tests.reports.examples import comparison, speed, variant


def large(level: str, size: float, kld: float, runtime: str = "llama.cpp") -> Variant:
    one = variant(level, int(size * GB), kld)
    return replace(one, runs_in=runtime, needs=Needs(int((size + 1.6) * GB), int((size + 2.0) * GB)))


def test_each_machine_has_the_file_that_the_rule_names() -> None:
    """The sizes and losses of Llama 3 8B."""
    rows = [large("BF16", 16.1, 0.0), large("Q8_0", 8.54, 0.0014), large("Q5_K_M", 5.73, 0.011)]
    rows += [large("Q4_K_M", 4.92, 0.028), large("Q2_K", 3.17, 0.33)]
    rows.append(large("GPTQ-4bit", 5.0, 0.0001, "transformers"))  # has no say where a GGUF file runs
    result = comparison(*rows)
    found = {(one.kind, one.memory // GB): one.file for one in choices(result)}
    assert set(found) == {*(("ram", size) for size in RAM), *(("gpu", size) for size in GPU)}
    assert [found["ram", size] for size in (4, 8, 16, 24, 512)] == [
        None, "model-Q4_K_M.gguf", "model-Q8_0.gguf", "model-Q8_0.gguf", "model-Q8_0.gguf"
    ]  # fmt: skip
    assert [found["gpu", size] for size in (4, 6, 8, 12)] == [
        None, "model-Q2_K.gguf", "model-Q5_K_M.gguf", "model-Q8_0.gguf"
    ]  # fmt: skip
    shown = machine_rows(replace(result, machines=choices(result)), "en")
    assert [(row.machine, row.label) for row in shown] == [
        ("4 GB of RAM", ""), ("8 GB of RAM", "Q4_K_M"), ("16 GB or more of RAM", "Q8_0"),
        ("GPU with 4 GB", ""), ("GPU with 6 GB", "Q2_K"), ("GPU with 8 GB", "Q5_K_M"),
        ("GPU with 12 GB or more", "Q8_0"),
    ]  # fmt: skip


def test_sizes_at_which_nothing_fits_are_left_out_but_for_one() -> None:
    result = comparison(large("Q4_K_M", 40, 0.02))
    assert [(one.kind, one.memory // GB, one.file) for one in choices(result)][:2] == [
        ("ram", 32, None), ("ram", 48, "model-Q4_K_M.gguf")
    ]  # fmt: skip
    huge = comparison(large("Q4_K_M", 900, 0.02))
    assert choices(huge) == ()
    assert choices(comparison()) == ()


def test_what_a_file_needs_is_what_recommend_counts(demo_model: Path, tmp_path: Path) -> None:
    (made,) = quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path)
    with (source := open_source(str(demo_model))).checkpoint:
        context, shape = context_of(source), shape_of(source)
        weights = weights_of({one.name: one.nbytes for one in read_gguf(made.path).tensors}, shape.n_layer)
        total = footprint(weights, shape, context).total
        roomy, cramped = Machine("cpu", 2 * total), Machine("cpu", total)
        assert needs_of(source, made.path, roomy, context, None).ram == total
        assert needs_of(source, made.path, roomy, context, None).here == "cpu"
        assert needs_of(source, made.path, cramped, context, None).here == ""
        gpu = needs_of(source, made.path, Machine("cuda", GB, GB), context, None)
        assert gpu.here == "gpu"
        assert gpu.gpu is not None
        measured = speed(10.0, 300_000_000)
        assert needs_of(source, demo_model, Machine("cpu", GB), context, measured) == Needs(ram=300_000_000)
        assert needs_of(source, demo_model, Machine("cpu", 300_000_000), context, measured).here == ""
        assert needs_of(source, demo_model, roomy, context, None) == Needs()


def test_a_machine_that_does_not_tell_its_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < this_machine().ram < BOUNDLESS
    monkeypatch.setattr(memory, "memory_limit", lambda _given: None)
    assert this_machine().ram == BOUNDLESS

"""Threads and processes make the same files and manifests, whatever is killed on the way, and each goes on from what
the other left."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from llm_quantize import kernels, memory, pipeline
from llm_quantize.architectures import rows
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.output import open_output
from llm_quantize.cli import run
from llm_quantize.engine import ENGINES
from llm_quantize.errors import BusyError, IntegrityError, NumericPolicyError, UsageError
from llm_quantize.events import Event, Progress
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.artifact_paths import partial_path
from llm_quantize.models.opening import open_source
from llm_quantize.models.shared import SharedModel
from llm_quantize.options import MethodOptions, Options
from tests.hearing import into

from .faults.forking import hashes
from .faults.tiny_llama import write_fp8_llama, write_tiny_llama
from .test_pipeline import broken_copy
from .tiny_models import make_tiny

OTHER = {"threads": "processes", "processes": "threads"}
LEVELS = ["Q4_K_M", "Q8_0"]


@pytest.fixture(scope="module", params=["demo", "mixture", "fp8", "quantized"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "demo":
        return "builtin:demo-llama"
    directory = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "fp8":
        return str(write_fp8_llama(directory))
    if request.param == "quantized":
        options = Options(method=MethodOptions(method="rtn", transform="none", group_size=64))
        model = write_tiny_llama(directory)
        (made,) = pipeline.quantize(
            str(model), "gptq", levels=["4bit"], output_dir=directory.parent / "made", options=options
        )
        return str(made.path)
    return str(make_tiny("mixtral", directory, hidden_size=256, intermediate_size=512))


@pytest.fixture(scope="module")
def demo_hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the built-in model at LEVELS, made undisturbed by threads."""
    directory = tmp_path_factory.mktemp("demo")
    pipeline.quantize("builtin:demo-llama", levels=LEVELS, output_dir=directory)
    return hashes(directory)


def test_same_files_and_manifests(model: str, tmp_path: Path) -> None:
    for engine in ENGINES:
        options = Options(engine=engine, threads=2)
        results = pipeline.quantize(model, levels=LEVELS, output_dir=tmp_path / engine, options=options)
        assert all(result.seconds > 0 for result in results)
    assert hashes(tmp_path / "threads") == hashes(tmp_path / "processes")
    assert len(hashes(tmp_path / "threads")) == 4


def test_several_files(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    kinds = {
        "gguf": (["Q8_0", "Q4_0"], Options(threads=2, split_max_size=400_000)),
        "safetensors": (["F16"], Options(threads=2, method=MethodOptions(shard_size=500_000))),
        "ctranslate2": (["int8", "float16"], Options(threads=2, method=MethodOptions(method="rtn"))),
    }
    for engine in ENGINES:
        for format, (levels, options) in kinds.items():
            place = tmp_path / engine / format
            own = replace(options, engine=engine)
            results = pipeline.quantize(str(model), format, levels=levels, output_dir=place, options=own)
            assert all(len(result.plan.files) > 1 for result in results)
    assert hashes(tmp_path / "threads") == hashes(tmp_path / "processes")


@pytest.mark.parametrize("experts", [4, 2, 1])
def test_importance_reaches_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int) -> None:
    """Each unit, here of so many ``experts``, takes its own part of the importance along."""
    monkeypatch.setattr(rows, "UNIT_WEIGHTS", experts * 256 * 512)
    model = make_tiny("mixtral", tmp_path / "model", hidden_size=256, intermediate_size=512)
    source = open_source(str(model))
    random = np.random.default_rng(5)
    arrays = {}
    with source.checkpoint:
        for output in source.tensors.outputs:
            if len(output.shape) > 1:
                matrices = int(np.prod(output.shape[:-2], dtype=int))
                arrays[output.name] = random.random((matrices, output.shape[-1]), np.float32)
        stack = next(output for output in source.tensors.outputs if output.name == "blk.1.ffn_gate_exps.weight")
        weights = rows.read_output_rows(source.checkpoint, stack, 0, 4 * 512)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", arrays)
    for engine in ENGINES:
        options = Options(engine=engine, threads=2, imatrix=imatrix, overrides=Overrides(pure=True))
        (made,) = pipeline.quantize(str(model), levels=["IQ2_XS"], output_dir=tmp_path / engine, options=options)
        (stored,) = [tensor for tensor in GGUFReader(made.path).tensors if tensor.name == stack.name]
        for expert in range(4):
            own = weights[expert * 512 : (expert + 1) * 512]
            expected = kernels.quantize("iq2_xs", own, arrays[stack.name][expert])
            np.testing.assert_array_equal(stored.data[expert].reshape(512, -1), expected)
    assert hashes(tmp_path / "threads") == hashes(tmp_path / "processes")


def write_imatrix(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in arrays.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", np.ones((len(values), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_worker_killed_in_the_middle(demo_hashes: dict[str, str], tmp_path: Path) -> None:
    killed = []

    def kill(event: Event) -> None:
        if isinstance(event, Progress) and len(killed) < 3:
            # The oldest: a younger one may take the place of one that was killed, and not be ready yet.
            worker = int(Path("/proc/thread-self/children").read_text().split()[0])
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    options = Options(engine="processes", threads=2)
    pipeline.quantize("builtin:demo-llama", levels=LEVELS, output_dir=tmp_path, options=options, on_event=kill)
    assert len(killed) == 3
    assert hashes(tmp_path) == demo_hashes


@pytest.mark.parametrize("first", ENGINES)
def test_a_driver_killed_in_the_middle(demo_hashes: dict[str, str], tmp_path: Path, first: str) -> None:
    """The same command goes on with the other engine."""
    words = ["--json", "quantize", "builtin:demo-llama", "-q", LEVELS[0], "-q", LEVELS[1], "-o", str(tmp_path)]
    words += ["--threads", "2", "--engine"]
    code = "import sys; from llm_quantize.cli import run; sys.exit(run(sys.argv[1:]))"
    for stop_after in (4, 12):
        with subprocess.Popen([sys.executable, "-c", code, *words, first], stderr=subprocess.PIPE) as driver:
            assert driver.stderr is not None
            for line in driver.stderr:
                stop_after -= b'"progress"' in line
                if not stop_after:
                    driver.kill()
            assert driver.wait() == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-c", code, *words, OTHER[first]], capture_output=True, text=True, check=True
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    (start,) = [event for event in events if event["event"] == "start"]
    assert start["resumed_units"] >= 2 * 15
    assert not [event for event in events if event["event"] == "warning" and "again" in event["text"]]
    assert hashes(tmp_path) == demo_hashes


@pytest.mark.parametrize("engine", ENGINES)
def test_damage_found_again_by_either(demo_hashes: dict[str, str], tmp_path: Path, engine: str) -> None:
    def leave(event: Event) -> None:
        if isinstance(event, Progress) and event.done > 0.7 * event.total:
            raise KeyboardInterrupt

    options = Options(engine=engine, threads=2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize("builtin:demo-llama", levels=LEVELS, output_dir=tmp_path, options=options, on_event=leave)
    for path in tmp_path.glob("*.partial"):
        with path.open("r+b") as file:
            file.seek(-5000, os.SEEK_END)
            file.write(b"damage")
            file.seek(path.stat().st_size // 2)
            file.write(b"damage")
    events: list[Mapping[str, Any]] = []
    pipeline.quantize("builtin:demo-llama", levels=LEVELS, output_dir=tmp_path, options=options, on_event=into(events))
    assert [event for event in events if event["event"] == "warning" and "doing it again" in event["text"]]
    assert hashes(tmp_path) == demo_hashes


def test_an_error_of_the_policy_is_the_same(demo_model: Path, tmp_path: Path) -> None:
    model, told = broken_copy(demo_model, tmp_path, np.inf), []
    for engine in ENGINES:
        with pytest.raises(NumericPolicyError) as caught:
            pipeline.quantize(
                str(model), levels=["Q8_0"], output_dir=tmp_path / engine, options=Options(engine=engine, threads=2)
            )
        told.append(caught.value.to_dict())
    assert told[0] == told[1]
    assert "2 such values" in str(told[0]["found"])


def test_what_is_opened_in_another_process_is_the_same_or_refused(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path / "model")
    source = open_source(str(directory))
    (plan,) = pipeline.plan(str(directory), levels=["Q8_0"])
    path = tmp_path / plan.files[0].name
    with source.checkpoint, open_output(plan, path, Options(), lambda event: None) as output:
        shared, opened = pickle.dumps(SharedModel(source.checkpoint)), pickle.dumps(output.opened)
        name = next(iter(source.checkpoint.tensors))
        np.testing.assert_array_equal(
            pickle.loads(shared).read_rows(name, 0, 1), source.checkpoint.read_rows(name, 0, 1)
        )
        assert pickle.loads(shared) is pickle.loads(shared)
        assert pickle.loads(opened) is pickle.loads(opened)
        span = next(iter(output.spans.values()))
        pickle.loads(opened).write(span, 0, b"\x07" * span.nbytes)
        assert output.opened.read(span) == b"\x07" * span.nbytes
        other = tmp_path / "elsewhere"
        partial_path(path).rename(other)
        with pytest.raises(BusyError, match="taken away"):
            pickle.loads(_uncached(opened))
        partial_path(path).write_bytes(b"another")
        with pytest.raises(BusyError, match="something else was put in its place"):
            pickle.loads(_uncached(opened))
        partial_path(path).unlink()
        other.rename(partial_path(path))
        os.utime(directory / "model-00001-of-00002.safetensors")
        with pytest.raises(IntegrityError, match="changed while it was read"):
            pickle.loads(_uncached(shared))


def _uncached(data: bytes) -> bytes:
    from llm_quantize.io import files_at
    from llm_quantize.models import shared

    files_at._opened_here.cache_clear()
    shared._opened_here.cache_clear()
    return data


def test_processes_take_memory_of_their_own(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "before_libraries", lambda: 100 << 20)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 100 << 20)
    plans = pipeline.plan(str(demo_model), levels=LEVELS)
    threads, alone = preflight.fit(plans, threads=4, max_ram=None)
    workers, needed = preflight.fit(plans, threads=4, max_ram=None, engine="processes")
    assert (threads, workers, needed - alone) == (4, 4, 4 * (100 << 20))
    assert preflight.fit(plans, threads=4, max_ram=350 << 20)[0] == 4
    assert preflight.fit(plans, threads=4, max_ram=350 << 20, engine="processes")[0] == 2


def test_the_option(demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: 0)
    words = ["quantize", str(demo_model), "-q", "Q8_0", "--dry-run", "--json", "--threads", "2"]
    needed = []
    for engine in ENGINES:
        assert run([*words, "--engine", engine]) == 0
        needed.append(json.loads(capsys.readouterr().out)["memory_needed"])
    assert needed[1] > needed[0] + (60 << 20)
    assert run([*words, "--engine", "ray"]) == 2
    assert re.search("threads.*processes", capsys.readouterr().out)
    with pytest.raises(UsageError, match="--engine"):
        replace(Options(), engine="ray")

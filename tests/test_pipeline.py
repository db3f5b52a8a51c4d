"""The main path on the built-in model: plans are exact, several levels share one read, metadata is complete."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from llm_quantize import kernels, pipeline
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, to_float32
from llm_quantize.artifacts import clock
from llm_quantize.artifacts import rounding as work
from llm_quantize.cli import run
from llm_quantize.errors import NumericPolicyError, ResourceError, StoppedError, UnsupportedError, UsageError
from llm_quantize.events import Event, Progress
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models import safetensors as checkpoint_module
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.pipeline import Options


def test_plan_predicts_every_byte(demo_model: Path, tmp_path: Path) -> None:
    levels = ["F32", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS", "TQ1_0", "MXFP4_MOE"]
    plans = pipeline.plan(str(demo_model), levels=levels)
    results = pipeline.quantize(str(demo_model), levels=levels, output_dir=tmp_path)
    for planned, result in zip(plans, results, strict=True):
        assert result.path.stat().st_size == planned.size
        found = {tensor.name: tensor for tensor in read_gguf(result.path).tensors}
        assert len(found) == len(planned.tensors)
        for tensor in planned.tensors:
            entry = found[tensor.name]
            assert (entry.offset, entry.nbytes) == (tensor.offset, tensor.nbytes)
            assert entry.type.name.lower() == tensor.qtype
        owner = {tensor.name: tensor for tensor in GGUFReader(result.path).tensors}
        assert {name: int(tensor.n_bytes) for name, tensor in owner.items()} == {
            tensor.name: tensor.nbytes for tensor in planned.tensors
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for r in results for name in (r.path.name, r.path.name + ".manifest.json")
    )


def test_float_levels_hold_the_source(demo_model: Path, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(demo_model), levels=["F32"], output_dir=tmp_path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(result.path).tensors}
    with open_checkpoint(str(demo_model)) as checkpoint:
        rows, _ = checkpoint.matrix("model.layers.3.mlp.down_proj.weight")
        source = to_float32(checkpoint.read_rows("model.layers.3.mlp.down_proj.weight", 0, rows))
        norm = to_float32(checkpoint.read_rows("model.norm.weight", 0, 1))
    np.testing.assert_array_equal(tensors["blk.3.ffn_down.weight"].data, source)
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, norm[0])


def test_several_levels_read_the_source_once(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int, int]] = []
    original = checkpoint_module.Checkpoint.read_rows

    def counting(self: object, name: str, start: int, stop: int, **rest: object) -> object:
        reads.append((name, start, stop))
        return original(self, name, start, stop, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read_rows", counting)
    levels = ["Q8_0", "Q6_K", "Q4_K_M", "Q4_K_S"]
    together = pipeline.quantize(str(demo_model), levels=levels, output_dir=tmp_path / "together")
    assert len(reads) == len(set(reads))
    for level, result in zip(levels, together, strict=True):
        (alone,) = pipeline.quantize(str(demo_model), levels=[level], output_dir=tmp_path / "alone")
        assert alone.path.read_bytes() == result.path.read_bytes()


def test_the_same_command_again_does_nothing(demo_model: Path, tmp_path: Path) -> None:
    (first,) = pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path)
    before = first.path.stat().st_mtime_ns
    (second,) = pipeline.quantize(str(demo_model), levels=["q4_0", "Q4_0"], output_dir=tmp_path)
    assert (first.status, second.status) == ("written", "already complete")
    assert second.path.stat().st_mtime_ns == before


def test_an_existing_output_of_another_kind_is_refused(demo_model: Path, tmp_path: Path) -> None:
    (first,) = pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path)
    data = first.path.read_bytes()
    options = Options(overrides=Overrides(pure=True, output_type="q4_0"))
    with pytest.raises(UsageError, match="overwrite"):
        pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path, options=options)
    assert first.path.read_bytes() == data
    again = Options(overrides=options.overrides, overwrite=True)
    (second,) = pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path, options=again)
    assert second.status == "written"
    assert second.path.read_bytes() != data


def test_an_artifact_of_the_same_size_from_another_command_is_refused(demo_model: Path, tmp_path: Path) -> None:
    """Only the manifest tells the two apart: names and sizes are equal."""
    pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path, options=Options(nonfinite="zero"))
    with pytest.raises(UsageError, match="not made by this command"):
        pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path)


def test_too_small_a_disk_is_refused_before_work(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(f_bavail=3_458_000, f_frsize=1)
    monkeypatch.setattr("llm_quantize.memory.os.statvfs", lambda _path: facts)
    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path / "out")
    assert caught.value.found == "3.46 MB (3458000 bytes) free"
    assert not (tmp_path / "out").exists()
    anyway = Options(ignore_space=True)
    (result,) = pipeline.quantize(str(demo_model), levels=["Q4_0"], output_dir=tmp_path / "out", options=anyway)
    assert result.status == "written"


def test_split_files_hold_the_same_tensors(demo_model: Path, tmp_path: Path) -> None:
    (whole,) = pipeline.quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path)
    (split,) = pipeline.quantize(
        str(demo_model), levels=["Q8_0"], output_dir=tmp_path, options=Options(split_max_size=2_000_000)
    )
    parts = sorted(split.path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"demo-llama-Q8_0-{i:05d}-of-00004.gguf" for i in range(1, 5)]
    assert (split.path / "manifest.json").is_file()
    data = {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(whole.path).tensors}
    found = {tensor.name: tensor.data.tobytes() for part in parts for tensor in GGUFReader(part).tensors}
    assert found == data
    assert all(sum(t.nbytes for t in read_gguf(part).tensors) <= 2_000_000 for part in parts)


def test_metadata_says_what_it_is(demo_model: Path, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(demo_model), levels=["Q4_K_M"], output_dir=tmp_path, name="my model")
    assert result.path.name == "my-model-Q4_K_M.gguf"
    metadata = {key: value.value for key, value in read_gguf(result.path).metadata.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.license": "apache-2.0",
        "general.languages": ["en", "ja"],
        "general.size_label": "5.8M",
        "llama.block_count": 6,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 1024,
        "llm_quantize.level": "Q4_K_M",
        "tokenizer.ggml.bos_token_id": 0,
    }
    assert {key: metadata.get(key) for key in expected} == expected
    manifest = json.loads(result.path.with_name(result.path.name + ".manifest.json").read_bytes())
    assert manifest["left_out"] == {}
    used = {source for tensor in manifest["tensors"] for source in tensor["sources"]}
    with open_checkpoint(str(demo_model)) as checkpoint:
        assert used == set(checkpoint.tensors)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="nonfinite"):
        Options(nonfinite="sometimes")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"levels": []}, UsageError),
        ({"levels": ["Q9_Z"]}, UsageError),
        ({"levels": ["IQ2_XXS"], "options": Options(calibrate=False)}, UsageError),
        ({"levels": ["Q8_0"], "format": "exl9"}, UnsupportedError),
        ({"levels": ["Q8_0"], "name": "n" * 250}, UsageError),
        ({"levels": ["Q8_0"], "options": Options(max_ram=1 << 20)}, ResourceError),
    ],
)
def test_bad_arguments_are_refused_before_work(
    demo_model: Path, tmp_path: Path, arguments: dict, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pipeline.quantize(str(demo_model), output_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_nonfinite_weights_are_named(demo_model: Path, tmp_path: Path) -> None:
    model = broken_copy(demo_model, tmp_path, np.inf)
    with pytest.raises(NumericPolicyError, match=r"blk\.2\.ffn_up\.weight") as caught:
        pipeline.quantize(str(model), levels=["Q4_0"], output_dir=tmp_path / "out")
    assert "2 such values, the first at row 5, column 7" in str(caught.value)
    (zeroed,) = pipeline.quantize(
        str(model), levels=["F32"], output_dir=tmp_path / "zero", options=Options(nonfinite="zero")
    )
    assert zeroed.degraded == {"blk.2.ffn_up.weight": 2}
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(zeroed.path).tensors}
    assert tensors["blk.2.ffn_up.weight"][5, 7] == 0.0
    (kept,) = pipeline.quantize(
        str(model), levels=["F32"], output_dir=tmp_path / "keep", options=Options(nonfinite="keep")
    )
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(kept.path).tensors}
    assert np.isinf(tensors["blk.2.ffn_up.weight"][5, 7])
    assert kept.nonfinite["nonfinite_kept"] == {"blk.2.ffn_up.weight": 2}
    assert kept.degraded == {}


@pytest.mark.parametrize("policy", ["zero", "keep"])
def test_degraded_again_after_a_resume_and_a_rerun(demo_model: Path, tmp_path: Path, policy: str) -> None:
    """The refusal of the first run, an interruption and a second call end in one manifest and one answer."""
    model = broken_copy(demo_model, tmp_path, np.nan)
    levels = ["Q6_K", "BF16"]
    options = Options(nonfinite=policy, threads=1)
    whole = pipeline.quantize(str(model), levels=levels, output_dir=tmp_path / "whole", options=options)

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > 0.8 * event.total:
            raise StoppedError("test")

    with pytest.raises(StoppedError):
        pipeline.quantize(str(model), levels=levels, output_dir=tmp_path / "part", options=options, on_event=stop)
    resumed = pipeline.quantize(str(model), levels=levels, output_dir=tmp_path / "part", options=options)
    again = pipeline.quantize(str(model), levels=levels, output_dir=tmp_path / "part", options=options)
    assert all(result.resumed_units for result in resumed)
    assert {result.status for result in again} == {"already complete"}
    name = "blk.2.ffn_up.weight"
    lost = {"zero": "nonfinite_replaced", "keep": "nonfinite_lost"}[policy]
    kept = {"zero": "nonfinite_replaced", "keep": "nonfinite_kept"}[policy]
    for first, second, third, fact in zip(whole, resumed, again, (lost, kept), strict=True):
        assert first.nonfinite == second.nonfinite == third.nonfinite
        assert {key: value for key, value in first.nonfinite.items() if value} == {fact: {name: 2}}
        assert first.degraded == ({name: 2} if fact != "nonfinite_kept" else {})
        assert first.degradations() == second.degradations() == third.degradations()
        files = [result.path.with_name(result.path.name + ".manifest.json") for result in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert json.loads(files[0].read_bytes())[fact] == {name: 2}
    if policy == "keep":
        assert "q6_k cannot hold them" in whole[0].degradations()[0]


def test_kept_overflow_is_degraded(demo_model: Path, tmp_path: Path) -> None:
    model = broken_copy(demo_model, tmp_path, 1e30)
    levels = ["Q8_0", "F16", "BF16"]
    q8, f16, bf16 = pipeline.quantize(
        str(model), levels=levels, output_dir=tmp_path / "out", options=Options(nonfinite="keep")
    )
    assert q8.nonfinite["scales_overflowed"] == f16.nonfinite["scales_overflowed"] == {"blk.2.ffn_up.weight": 2}
    assert q8.degraded == f16.degraded == {"blk.2.ffn_up.weight": 2}
    assert bf16.degraded == {}


def test_exit_code_and_list_stay_the_same(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken_copy(demo_model, tmp_path, np.inf)
    words = ["quantize", str(model), "-q", "Q8_0", "-o", str(tmp_path / "out"), "--nonfinite=keep"]
    lists = []
    for _ in range(2):
        assert run([*words, "--json"]) == 20
        (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
        assert artifact["nonfinite_lost"] == {"blk.2.ffn_up.weight": 2}
        assert artifact["scales_overflowed"] == {}
        lists.append(artifact["degraded"])
    assert lists[0] == lists[1] != []
    assert run([*words, "--json", "--strict"]) == 9
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["error"], outcome["exit_code"]) == ("numeric-policy", 9)
    assert outcome["artifacts"][0]["degraded"] == lists[0]
    assert run(words) == 20
    assert "degraded: blk.2.ffn_up.weight: 2 NaN or infinite weights are lost" in capsys.readouterr().out
    assert run([*words, "--strict"]) == 9
    assert "--strict" in capsys.readouterr().err


def test_cpu_seconds_are_divided_by_use(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only reading (64 ticks a chunk) and quantizing (1 to 3 ticks) move."""
    ticks = [0]
    cost = {"q8_0": 1, "f32": 0, "q4_k": 3, "q5_k": 3, "q6_k": 2}
    read, quantize = work.read_output_rows, kernels.quantize

    def reading(*rest: Any, **named: Any) -> Any:
        ticks[0] += 64
        return read(*rest, **named)

    def quantizing(qtype: str, *rest: Any) -> Any:
        ticks[0] += cost[qtype]
        return quantize(qtype, *rest)

    monkeypatch.setattr(work, "read_output_rows", reading)
    monkeypatch.setattr(work, "kernels", SimpleNamespace(quantize=quantizing, scan_nonfinite=kernels.scan_nonfinite))

    def own_time() -> float:  # of a thread: only the worker reads and quantizes
        return 0.0 if threading.current_thread() is threading.main_thread() else float(ticks[0])

    for module in (work, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(thread_time=own_time))
    results = pipeline.quantize(
        str(demo_model), levels=["Q4_K_M", "Q8_0", "Q4_K_S"], output_dir=tmp_path, options=Options(threads=1)
    )
    assert sum(result.seconds for result in results) == pytest.approx(ticks[0])
    expected = [0.0, 0.0, 0.0]
    for tensors in zip(*(result.plan.tensors for result in results), strict=True):
        types = [tensor.qtype for tensor in tensors]
        shape = tensors[0].output.shape
        chunks = len(list(chunk_ranges(shape, 0, matrix_shape(shape)[0])))
        for place, qtype in enumerate(types):
            expected[place] += chunks * (64 / 3 + cost[qtype] / types.count(qtype))
    assert [result.seconds for result in results] == pytest.approx(expected)


def test_cpu_seconds_of_a_resumed_run_say_so(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done > 0.5 * event.total:
            raise StoppedError("test")

    with pytest.raises(StoppedError):
        pipeline.quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path, on_event=stop)
    assert run(["quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path)]) == 0
    assert "CPU-s in this run" in capsys.readouterr().out
    assert run(["quantize", str(demo_model), "-q", "Q4_0", "-o", str(tmp_path)]) == 0
    assert "in this run" not in capsys.readouterr().out


def test_an_overflowing_scale_is_named(demo_model: Path, tmp_path: Path) -> None:
    model = broken_copy(demo_model, tmp_path, 1e30)
    with pytest.raises(NumericPolicyError, match="float16 scale overflows") as caught:
        pipeline.quantize(str(model), levels=["Q4_K_M"], output_dir=tmp_path / "out")
    assert "1e+30 at row 5, column 7" in str(caught.value)
    options = Options(overrides=Overrides(tensor_types=(("blk.2.ffn_up", "bf16"),)))
    (result,) = pipeline.quantize(str(model), levels=["Q4_K_M"], output_dir=tmp_path / "bf16", options=options)
    assert result.status == "written"


def broken_copy(demo_model: Path, tmp_path: Path, value: float) -> Path:
    """The demo model in float32 with two bad weights in one matrix."""
    model = tmp_path / "broken"
    shutil.copytree(demo_model, model)
    (model / "model.safetensors").chmod(0o644)
    with open_checkpoint(str(demo_model)) as checkpoint:
        tensors = {}
        for name, info in checkpoint.tensors.items():
            rows, _ = checkpoint.matrix(name)
            tensors[name] = to_float32(checkpoint.read_rows(name, 0, rows)).reshape(info.shape).copy()
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = value
    tensors["model.layers.2.mlp.up_proj.weight"][300, 0] = -value
    save_file(tensors, model / "model.safetensors")
    assert not np.abs(load_file(model / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]).max() < value
    return model


def test_decoded_tensors_are_near_the_source(demo_model: Path, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(demo_model), levels=["Q6_K"], output_dir=tmp_path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(result.path).tensors}
    with open_checkpoint(str(demo_model)) as checkpoint:
        source = to_float32(checkpoint.read_rows("model.layers.0.mlp.gate_proj.weight", 0, 768))
    found = dequantize(tensors["blk.0.ffn_gate.weight"].data, tensors["blk.0.ffn_gate.weight"].tensor_type)
    assert np.linalg.norm(found - source) < 0.03 * np.linalg.norm(source)

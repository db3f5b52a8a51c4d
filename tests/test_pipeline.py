"""The main path on the built-in model: plans are exact, several levels share one read, metadata is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from llm_quantize import checkpoint as checkpoint_module
from llm_quantize import pipeline
from llm_quantize.assemble import to_float32
from llm_quantize.checkpoint import open_checkpoint
from llm_quantize.errors import NumericPolicyError, ResourceError, UnsupportedError, UsageError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.pipeline import Options
from llm_quantize.recipes import Overrides


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


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"levels": []}, UsageError),
        ({"levels": ["Q9_Z"]}, UsageError),
        ({"levels": ["IQ2_XXS"]}, UnsupportedError),
        ({"levels": ["Q8_0"], "format": "exl9"}, UnsupportedError),
        ({"levels": ["Q8_0"], "name": "n" * 250}, UsageError),
        ({"levels": ["Q8_0"], "options": Options(max_ram=1 << 20)}, ResourceError),
        ({"levels": ["Q8_0"], "options": Options(nonfinite="sometimes")}, UsageError),
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


def test_an_overflowing_scale_is_named(demo_model: Path, tmp_path: Path) -> None:
    model = broken_copy(demo_model, tmp_path, 1e30)
    with pytest.raises(NumericPolicyError, match="float16 scale overflows") as caught:
        pipeline.quantize(str(model), levels=["Q4_K_M"], output_dir=tmp_path / "out")
    assert "row 5" in str(caught.value)
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
    assert np.abs(load_file(model / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]).max() >= value
    return model


def test_decoded_tensors_are_near_the_source(demo_model: Path, tmp_path: Path) -> None:
    (result,) = pipeline.quantize(str(demo_model), levels=["Q6_K"], output_dir=tmp_path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(result.path).tensors}
    with open_checkpoint(str(demo_model)) as checkpoint:
        source = to_float32(checkpoint.read_rows("model.layers.0.mlp.gate_proj.weight", 0, 768))
    found = dequantize(tensors["blk.0.ffn_gate.weight"].data, tensors["blk.0.ffn_gate.weight"].tensor_type)
    assert np.linalg.norm(found - source) < 0.03 * np.linalg.norm(source)

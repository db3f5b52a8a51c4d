"""A merged model calibrated on, and measured against: as the same model written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import api
from llm_quantize.architectures.rows import to_float32
from llm_quantize.compare.comparison import compare
from llm_quantize.models.opening import open_model
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import CalibrationOptions, MeasurementOptions, Options
from llm_quantize.pipeline import quantize
from tests.models.adapters import factors, write_adapter
from tests.tiny_models import make_tiny

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96),
    "model.layers.1.self_attn.o_proj": (64, 64),
}  # fmt: skip
OPTIONS = Options(
    calibration=CalibrationOptions(samples=4, length=64),
    measurement=MeasurementOptions(windows=2, context=32, speed=False),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter that changes much of it, and the merged model written out in float32."""
    place = tmp_path_factory.mktemp("measured")
    make_tiny("llama", place / "model")
    write_adapter(place / "adapter", {key: value / 5 for key, value in factors(SHAPES).items()})
    quantize(str(place / "model"), "safetensors", levels=["F32"], lora=[str(place / "adapter")], output_dir=place)
    return place


def asked(place: Path) -> tuple[str, list[str]]:
    return str(place / "model"), [str(place / "adapter")]


def test_calibrated_codes_are_those_of_the_model_written_out(place: Path, tmp_path: Path) -> None:
    model, lora = asked(place)

    def codes(name: str, source: str, **more: Any) -> dict[str, np.ndarray]:
        (result,) = quantize(source, "gptq", levels=["4bit"], output_dir=tmp_path / name, options=OPTIONS, **more)
        with PackedDirectory(result.path) as packed:
            return {key: packed.rows(key, 0, matrix.rows) for key, matrix in packed.matrices.items()}

    found = codes("a", model, lora=lora)
    twin, plain = codes("b", str(place / "model-adapter-F32")), codes("c", model)
    assert found.keys() == twin.keys()
    assert all(np.array_equal(values, twin[key]) for key, values in found.items())
    assert not all(np.array_equal(values, plain[key]) for key, values in found.items())


def test_quality_is_measured_against_the_merged_model(place: Path, tmp_path: Path) -> None:
    model, lora = asked(place)
    (result,) = quantize(model, levels=["Q8_0"], output_dir=tmp_path, lora=lora)
    right = api.evaluate(result.path, source=model, lora=lora, options=OPTIONS)
    wrong = api.evaluate(result.path, source=model, options=OPTIONS)
    assert right.rows()[0]["kld"] < 0.01 < wrong.rows()[0]["kld"]


def test_a_comparison_of_the_merged_model(place: Path, tmp_path: Path) -> None:
    model, lora = asked(place)
    found = compare(model, tmp_path, variants=[("gguf", "Q8_0")], lora=lora, options=OPTIONS)
    (row,) = found.rows()
    assert row["kld"] < 0.01
    assert "--lora" in found.variants[0].make
    assert (tmp_path / "artifacts" / "model-adapter-Q8_0.gguf").is_file()


def test_importance_is_of_the_merged_model(place: Path) -> None:
    model, lora = asked(place)
    options = CalibrationOptions(samples=2, length=64)
    plain, merged = (api.calibrate(model, options=options, lora=one) for one in ((), lora))
    assert plain.path != merged.path
    assert api.calibrate(model, options=options, lora=lora).path == merged.path


def test_the_model_written_out_is_what_is_read(place: Path) -> None:
    model, lora = asked(place)
    with open_model(model, lora=lora) as merged, open_model(str(place / "model-adapter-F32")) as written:
        assert merged.tensors.keys() == written.tensors.keys()
        for name in merged.tensors:
            rows = merged.matrix(name)[0]
            assert to_float32(merged.read_rows(name, 0, rows)).tobytes() == written.read_rows(name, 0, rows).tobytes()

"""``convert`` of whole numbers with a scale for each row (LLM.int8, CTranslate2), of FP8 whose scales are powers of
two, and of ternary blocks: codes are kept, and scales as far as the target's type has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import api
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verify import verify
from llm_quantize.conversion import foresee
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.opening import open_model
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import MethodOptions, Options
from tests.oracles.peer_layouts import write_peer
from tests.tiny_models import make_tiny, row_lengths_of_256

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


@pytest.fixture(scope="module")
def sources(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantized")
    named = {"bitsandbytes": "INT8", "ctranslate2": "int8"}
    return {format: quantized(llama, place, format, level) for format, level in named.items()}


def quantized(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, calibrate=False, method=MethodOptions(method="rtn", **method))
    (result,) = api.quantize(model, format, levels=level, output_dir=place, options=options)
    return result.path


def converted(
    source: Path, place: Path, format: str, level: str | None = None, *, exact: bool = False
) -> ArtifactResult:
    options = Options(threads=1, calibrate=False, exact=exact, method=MethodOptions())
    return api.convert(source, format, level, output_dir=place, options=options)


def codes_of(source: Path) -> np.ndarray:
    """int8 (rows, columns) of UP, by the bytes of its file."""
    if (source / "model.safetensors").is_file():
        return load_file(source / "model.safetensors")[f"{UP}.weight"].numpy()
    with open_model(str(source)) as model:
        rows, columns = model.matrix(f"{UP}.weight")
        blocks = model.block_rows(f"{UP}.weight", 0, rows)
        return blocks[:, :columns].view(np.int8)


def codes_in(made: Path) -> np.ndarray:
    """What ``made`` has for them, counted from its zero."""
    if made.suffix == ".gguf":
        tensor = next(one for one in gguf.GGUFReader(made).tensors if one.name == "blk.0.ffn_up.weight")
        return tensor.data.reshape(len(tensor.data), -1, 34)[:, :, 2:].reshape(len(tensor.data), -1).view(np.int8)
    with PackedDirectory(made) as packed:
        matrix = packed.matrices[f"{UP}.weight"]
        fields = packed.fields(matrix)
        found = packed.format.codes(matrix, fields, 0, matrix.rows)
        zeros = packed.format.zeros(matrix, fields, 0, matrix.rows)
        if packed.method == "mlx":
            return found - 128
        return found if zeros is None else found - np.repeat(zeros, matrix.group, axis=1)


@pytest.mark.parametrize("source", ["bitsandbytes", "ctranslate2"])
@pytest.mark.parametrize(
    ("format", "level", "most"),
    [
        ("gguf", "Q8_0", 2.0**-11),
        ("gptq", "GPTQ-8bit-channel", 2.0**-11),
        ("compressed-tensors", "W8A16", 2.0**-8),
        ("mlx", "MLX-8bit", 2.0**-8),
    ],
)
def test_codes_are_kept_and_scales_rounded(
    sources: dict[str, Path], source: str, format: str, level: str, most: float, tmp_path: Path
) -> None:
    """Nobody names a level; the error is that of a scale in the target's type, and the plan says so."""
    place = sources[source]
    foreseen = foresee(str(place), format)
    assert foreseen.verdict == "rounded"
    assert foreseen.tensors.get(UP, foreseen.tensors.get("blk.0.ffn_up.weight")) == "rounded"
    made = converted(place, tmp_path, format)
    assert made.level.startswith(level)
    assert made.conversion is not None
    assert made.conversion["verdict"] == "rounded"
    assert 0 < made.conversion["worst"]["relative_error"] < most
    assert np.array_equal(codes_in(made.path), codes_of(place))
    outcome = verify(made.path, source=str(place))
    assert outcome.ok, outcome.all_problems()


def test_with_scales_in_float32_llm_int8_is_exact(sources: dict[str, Path], tmp_path: Path) -> None:
    place = sources["bitsandbytes"]
    assert foresee(str(place), "compressed-tensors", options=Options(exact=True)).verdict == "exact"
    made = converted(place, tmp_path, "compressed-tensors", exact=True)
    assert made.conversion is not None
    assert made.conversion["verdict"] == "exact"
    stored = load_file(made.path / "model.safetensors")
    codes, scales = codes_of(place), load_file(place / "model.safetensors")[f"{UP}.SCB"].numpy()
    assert stored[f"{UP}.weight_scale"].dtype == torch.float32
    wanted = codes.astype(np.float32) * (scales[:, None] * np.float32(1 / 127))
    with open_model(str(made.path)) as model:
        assert np.array_equal(model.read_rows(f"{UP}.weight", 0, len(codes)), wanted)


@pytest.mark.parametrize(
    ("source", "format"),
    [("bitsandbytes", "gptq"), ("bitsandbytes", "gguf"), ("bitsandbytes", "mlx"), ("ctranslate2", "bitsandbytes")],
)
def test_what_would_round_a_scale_is_refused_by_exact_before_any_work(
    sources: dict[str, Path], source: str, format: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="cannot hold this model exactly"):
        converted(sources[source], tmp_path / "out", format, exact=True)
    assert not (tmp_path / "out").exists()


def test_whole_numbers_keep_their_codes_between_the_two(sources: dict[str, Path], tmp_path: Path) -> None:
    made = converted(sources["ctranslate2"], tmp_path, "bitsandbytes")
    assert made.conversion is not None
    assert 0 < made.conversion["worst"]["relative_error"] < 2.0**-22
    assert np.array_equal(codes_of(made.path), codes_of(sources["ctranslate2"]))
    threads = api.convert(
        sources["ctranslate2"],
        "bitsandbytes",
        output_dir=tmp_path / "three",
        options=Options(threads=3, calibrate=False),
    )
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in (made.path, threads.path)]
    assert files[0] == files[1]
    back = converted(sources["bitsandbytes"], tmp_path / "back", "ctranslate2", "int8")
    assert np.array_equal(codes_of(back.path), codes_of(sources["bitsandbytes"]))


@pytest.mark.parametrize("level", ["int8", "int8_float32", "int16"])
def test_ctranslate2_comes_out_as_it_is(llama: Path, level: str, tmp_path: Path) -> None:
    """Byte for byte, whatever a division by a scale gives back, and ``exact`` knows before."""
    source = quantized(llama, tmp_path / "one", "ctranslate2", level)
    assert foresee(str(source), "ctranslate2", options=Options(exact=True)).verdict == "exact"
    made = converted(source, tmp_path / "two", "ctranslate2", exact=True)
    assert made.conversion is not None
    assert made.conversion["verdict"] == "exact"
    assert (made.path / "model.bin").read_bytes() == (source / "model.bin").read_bytes()


def test_ctranslate2_of_other_scales_comes_out_as_it_is(llama: Path, tmp_path: Path) -> None:
    """Scales of which 127 / (127 / s) is another: only copying gives them back."""
    source = quantized(llama, tmp_path / "one", "ctranslate2", "int8")
    with open_model(str(source)) as model:
        entry = model.stored.file.variables["decoder/layer_0/ffn/linear_0/weight_scale"]  # type: ignore[attr-defined]
    data = bytearray((source / "model.bin").read_bytes())
    scales = np.frombuffer(data, "<f4", entry.nbytes // 4, entry.offset).copy()
    odd = np.float32(127) / (np.float32(127) / scales)
    while np.array_equal(odd, scales):
        scales = np.nextafter(scales, np.float32(np.inf))
        odd = np.float32(127) / (np.float32(127) / scales)
    data[entry.offset : entry.offset + entry.nbytes] = scales.tobytes()
    (source / "model.bin").write_bytes(data)
    made = converted(source, tmp_path / "two", "ctranslate2", exact=True)
    assert (made.path / "model.bin").read_bytes() == bytes(data)


def test_a_row_of_zeros(sources: dict[str, Path], tmp_path: Path) -> None:
    """Of a scale of zero every code is zero, and stays it."""
    place = tmp_path / "zeros"
    place.mkdir()
    for file in sources["bitsandbytes"].iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (place / "llm-quantize.json").unlink(missing_ok=True)
    tensors = load_file(place / "model.safetensors")
    tensors[f"{UP}.SCB"][3] = 0
    tensors[f"{UP}.weight"][3] = 0
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for format in ("gguf", "gptq", "mlx", "compressed-tensors"):
        made = converted(place, tmp_path / format, format)
        outcome = verify(made.path, source=str(place))
        assert outcome.ok, (format, outcome.all_problems())


@pytest.mark.parametrize("wide", [False, True])
def test_fp8_with_powers_of_two_is_mxfp8(llama: Path, wide: bool, tmp_path: Path) -> None:
    """As F8_E8M0, and as DeepSeek-V3.1 has them: in float32, which its configuration says are powers of two."""
    source = tmp_path / "source"
    write_peer(llama, source, "FP8 powers")
    file = source / "model.safetensors"
    if wide:
        tensors = load_file(file)
        tensors |= {name: one.float() for name, one in tensors.items() if name.endswith("_scale_inv")}
        save_file(tensors, file, metadata={"format": "pt"})
    made = converted(source, tmp_path / "made", "mlx", exact=True)
    assert (made.level, made.conversion and made.conversion["verdict"]) == ("MLX-mxfp8-g32", "exact")
    stored, given = load_file(made.path / "model.safetensors"), load_file(file)
    codes = given[f"{UP}.weight"].view(torch.uint8)
    packed = stored[f"{UP}.weight"]
    found = packed.view(torch.uint8) if packed.dtype != torch.uint32 else packed.view(torch.int32).view(torch.uint8)
    assert torch.equal(found.reshape(codes.shape), codes)


def test_fp8_that_only_says_so_is_rounded(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_peer(llama, source, "FP8 blocks")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").write_text(json.dumps(config))
    made = converted(source, tmp_path / "made", "mlx")
    assert made.conversion is not None
    assert made.conversion["verdict"] == "rounded"


@pytest.mark.parametrize("level", ["TQ1_0", "TQ2_0", "Q2_0"])
@pytest.mark.parametrize(
    ("format", "named"),
    [("gguf", "Q2_0"), ("gptq", None), ("awq", None), ("compressed-tensors", None), ("mlx", "2bit")],
)
def test_ternary_blocks_are_two_bits(llama: Path, level: str, format: str, named: str | None, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path, "gguf", level)
    made = converted(source, tmp_path / "made", format, named)
    with open_model(str(source)) as one, open_model(str(made.path)) as other:
        assert np.array_equal(*(model.read_rows(f"{UP}.weight", 0, 32) for model in (one, other)))
    outcome = verify(made.path, source=str(source))
    assert outcome.ok, outcome.all_problems()

"""Conversions to and from GGUF: what is held exactly, by the decoders of the owners, and how it is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import matrix_shape, read_output_rows, to_float32
from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.verify import verify
from llm_quantize.blockwise import run as blockwise
from llm_quantize.cli import run
from llm_quantize.conversion import convert, foresee
from llm_quantize.errors import LlmQuantizeError, UnsupportedError, UsageError
from llm_quantize.events import Caution
from llm_quantize.formats.base import SchemeOptions
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.gguf.store import GgufStore
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.packed_store import DirectoryStore
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import layout_gguf, read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, quantize
from llm_quantize.plan import MatrixPlan
from llm_quantize.provenance.rederive import ready, rederive
from llm_quantize.qtypes import QTYPES
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.formats.test_gguf_scales import TOKENS, rewritten, scales_for
from tests.grids.test_ggml_held import fours
from tests.tiny_models import make_tiny, reference_logits, reference_model, row_lengths_of_256

FORMATS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gptq": ("gptq", "4bit", {}, "Q4_0"),
    "gptq g32": ("gptq", "4bit", {"group_size": 32}, "Q4_0"),
    "gptq asym": ("gptq", "4bit", {"symmetric": False}, "Q5_0"),
    "gptq 3 bit": ("gptq", "3bit", {"group_size": 64}, "Q4_0"),
    "gptq 2 bit": ("gptq", "2bit", {"group_size": 64}, "Q2_0"),
    "gptq 2 bit g32": ("gptq", "2bit", {"group_size": 32}, "Q4_0"),
    "gptq 8 bit": ("gptq", "8bit", {}, "Q8_0"),
    "awq": ("awq", "4bit", {}, "Q5_0"),
    "W4A16": ("compressed-tensors", "W4A16", {}, "Q4_0"),
    "W4A16_ASYM": ("compressed-tensors", "W4A16_ASYM", {}, "Q5_0"),
    "W8A16": ("compressed-tensors", "W8A16", {}, "Q8_0"),
    "W6A16": ("compressed-tensors", "W6A16", {"group_size": 32}, "Q8_0"),
    "MXFP4A16": ("compressed-tensors", "MXFP4A16", {}, "MXFP4"),
    "mlx 4 bit": ("mlx", "4bit", {}, "Q4_1"),
    "mlx 5 bit": ("mlx", "5bit", {"group_size": 32}, "Q5_1"),
    "mlx 2 bit": ("mlx", "2bit", {}, "Q4_1"),
    "mlx mxfp4": ("mlx", "mxfp4", {}, "MXFP4"),
    "mlx nvfp4": ("mlx", "nvfp4", {}, "NVFP4"),
}
PLAIN = MethodOptions(method="rtn", transform="none")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("net") / "net", **row_lengths_of_256("llama"))


def directory(net: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    """A tiny model quantized by rounding."""
    options = Options(threads=1, method=MethodOptions(method="rtn", transform="none", **method))
    return quantize(str(net), format, levels=[level], output_dir=place, name="m", options=options)[0].path


def gguf_of(net: Path, place: Path, level: str, **options: Any) -> Path:
    chosen = Options(threads=1, calibrate=False, **options)
    return quantize(str(net), "gguf", levels=[level], output_dir=place, name="m", options=chosen)[0].path


def judged(path: Path) -> dict[str, np.ndarray]:
    """{tensor: float32 rows}, by gguf-py's decoder; by ours, which is tested against ggml, where it has none."""
    found, data = {}, path.read_bytes()
    for tensor in read_gguf(path).tensors:
        packed = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], np.uint8)
        packed = packed.reshape(matrix_shape(tensor.shape)[0], -1)
        try:
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[tensor.type.name])
        except (KeyError, NotImplementedError):
            values = kernels.dequantize(tensor.type.name.lower(), packed, tensor.shape[-1])
        found[tensor.name] = values.astype(np.float32).reshape(-1, tensor.shape[-1])
    return found


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type.name for tensor in read_gguf(path).tensors}


def same_values(path: Path, source: Path) -> None:
    """Every tensor of a GGUF file, decoded by its owner, is what the source reads, value for value."""
    found, opened = judged(path), open_source(str(source))
    with opened.checkpoint as checkpoint:
        outputs = {output.name: output for output in opened.tensors.outputs}
        assert found.keys() == outputs.keys()
        for name, output in outputs.items():
            rows = read_output_rows(checkpoint, output, 0, matrix_shape(output.shape)[0])
            assert np.array_equal(found[name], to_float32(rows).reshape(found[name].shape)), name


def made(source: Path, place: Path, level: str | None = None, **options: Any) -> Any:
    return convert(str(source), "gguf", level, output_dir=place, options=Options(threads=1, **options))


@pytest.mark.parametrize("case", FORMATS)
def test_directories_are_held_exactly(case: str, net: Path, tmp_path: Path) -> None:
    """Without a level: the types that hold each tensor, floats as the source has them."""
    format, level, method, expected = FORMATS[case]
    source = directory(net, tmp_path / "in", format, level, **method)
    result = made(source, tmp_path / "out", exact=True)
    assert result.conversion is not None
    assert result.conversion["verdict"] == "exact"
    assert result.path.name.endswith(f"-{expected}.gguf")
    same_values(result.path, source)
    assert verify(result.path, source=str(source)).ok
    types = types_of(result.path)
    assert sum(name == expected for name in types.values()) >= 14
    if format != "mlx":  # which packs the embedding too
        assert types["token_embd.weight"] in ("F32", "F16", "BF16")


@pytest.mark.parametrize("variant", ["qwen3_moe", "gemma3", "phi3", "qwen2"])
def test_other_families_are_held_exactly(variant: str, tmp_path: Path) -> None:
    """Stacks of experts, norms with something added, fused and permuted matrices, biases."""
    model = make_tiny(variant, tmp_path / "net", **row_lengths_of_256(variant))
    source = directory(model, tmp_path / "in", "compressed-tensors", "W4A16")
    result = made(source, tmp_path / "out", exact=True)
    same_values(result.path, source)


def logits(path: Path) -> np.ndarray:
    with LlamaCpp(path, context=64, threads=1) as llama:
        return llama.logits(TOKENS)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to what the logits differ by among themselves."""
    return float(np.abs(found - expected).max() / np.ptp(expected))


def test_llama_cpp_computes_with_the_values_of_gptq(net: Path, tmp_path: Path) -> None:
    """Its logits are those of the decoded weights in transformers, but for its rounding of inputs to 8 bits: nearer by
    far than after rounding the same weights to Q4_0 once more."""
    source = directory(net, tmp_path / "in", "gptq", "4bit")
    exact = made(source, tmp_path / "out", exact=True).path
    floats = quantize(str(source), "safetensors", levels=["F32"], output_dir=tmp_path / "f", options=Options(threads=1))
    expected = reference_logits(reference_model(floats[0].path), TOKENS)
    wide = gguf_of(source, tmp_path / "wide", "F32")
    again = made(source, tmp_path / "again", "Q4_0", method=PLAIN).path
    assert np.ptp(expected) > 4, "flat logits prove nothing"
    assert distance(logits(wide), expected) < 1e-4
    assert distance(logits(exact), expected) < 0.02
    assert distance(logits(again), expected) > 3 * distance(logits(exact), expected)


def test_scales_that_float16_does_not_hold_keep_the_codes(net: Path, tmp_path: Path) -> None:
    """Nothing is rounded but the scales: the error is theirs, and the verdict says so."""
    source = directory(net, tmp_path / "in", "mlx", "4bit")
    file = source / "model.safetensors"
    data, name = bytearray(file.read_bytes()), "model.layers.1.mlp.up_proj.scales"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start, stop = (8 + int.from_bytes(data[:8], "little") + at for at in header[name]["data_offsets"])
    assert header[name]["dtype"] == "BF16"
    scales = np.frombuffer(data[start:stop], np.uint16).copy()
    scales[:7] = 0x3401  # about 1.2e-7, of which float16 has two bits
    data[start:stop] = scales.tobytes()
    file.write_bytes(data)
    result = made(source, tmp_path / "out")
    assert result.conversion["verdict"] == "rounded"
    assert result.conversion["worst"]["tensor"] == "blk.1.ffn_up.weight"
    assert 0 < result.conversion["worst"]["relative_error"] < 1e-4
    manifest = read_manifest(manifest_path(result.path))
    assert manifest is not None
    matrices = {entry["name"]: entry for entry in manifest["matrices"]}
    assert matrices["blk.1.ffn_up.weight"]["kept"]
    assert matrices["blk.1.ffn_up.weight"]["verdict"] == "rounded"
    assert matrices["blk.0.ffn_up.weight"]["verdict"] == "exact"
    with pytest.raises(LlmQuantizeError, match="not exact"):
        made(source, tmp_path / "exact", exact=True)
    assert not list((tmp_path / "exact").glob("*.gguf"))


def test_a_level_that_is_named_holds_what_fits_in_its_types(net: Path, tmp_path: Path) -> None:
    source = directory(net, tmp_path / "in", "gptq", "4bit")
    eight = made(source, tmp_path / "eight", "Q8_0")
    assert eight.conversion["worst"]["tensor"] in ("token_embd.weight", "output.weight")
    assert eight.conversion["tensors"]["exact"] >= 14
    mixed = made(source, tmp_path / "mixed", "Q4_K_M")
    assert mixed.conversion["verdict"] == "rounded"
    with pytest.raises(UnsupportedError, match="cannot hold this model exactly"):
        made(source, tmp_path / "no", "Q4_K_M", exact=True)


def test_what_no_type_holds_asks_for_a_level(net: Path, tmp_path: Path) -> None:
    for format, level in (("compressed-tensors", "FP8_DYNAMIC"), ("bitsandbytes", "NF4")):
        source = directory(net, tmp_path / format, format, level)
        with pytest.raises(UsageError, match="one must be named"):
            made(source, tmp_path / "out")
        assert made(source, tmp_path / "out", "Q8_0", overwrite=True).conversion["verdict"] == "rounded"


def test_a_plan_tells_before(net: Path, tmp_path: Path) -> None:
    source = directory(net, tmp_path / "in", "gptq", "4bit")
    told = foresee(str(source), "gguf", options=Options(threads=1))
    assert (told.verdict, told.plan.level, told.never) == ("exact", "Q4_0", ())
    assert foresee(str(source), "gguf", "Q4_K_M", options=Options(threads=1)).verdict == "rounded"
    result = made(source, tmp_path / "out")
    assert result.path.stat().st_size == told.plan.size


@pytest.mark.parametrize(("dtype", "level"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_floats_stay_floats(dtype: str, level: str, tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "net", dtype=dtype)
    result = made(source, tmp_path / "out", exact=True)
    assert result.path.name.endswith(f"-{level}.gguf")
    same_values(result.path, source)


LEVELS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K_M", "Q6_K", "IQ4_XS", "IQ3_S", "TQ2_0", "BF16")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_a_gguf_file_comes_out_as_it_is(variant: str, level: str, tmp_path: Path) -> None:
    """Every type, whether it is a number grid or not, and metadata; GPT-2's matrices lie the other way round."""
    model = make_tiny(variant, tmp_path / "net", **row_lengths_of_256(variant))
    source = gguf_of(model, tmp_path / "in", level)
    result = made(source, tmp_path / "out", exact=True)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(result.path)
    assert {t.name: bytes(t.data) for t in after.tensors} == {t.name: bytes(t.data) for t in before.tensors}
    assert {k: str(f.contents()) for k, f in after.fields.items()} == {
        k: str(f.contents()) for k, f in before.fields.items()
    }
    assert result.path.name == source.name


def retyped(path: Path, target: Path, name: str, qtype: str) -> Path:
    """A copy of a file with the tensor ``name`` in another type, rounded with an importance of ones."""
    file, data = read_gguf(path), path.read_bytes()
    entries = []
    for tensor in file.tensors:
        values, kind = data[tensor.offset : tensor.offset + tensor.nbytes], tensor.type
        if tensor.name == name:
            rows = judged(path)[name]
            values = kernels.quantize(qtype, rows, np.ones(rows.shape[1], np.float32)).tobytes()
            kind = QTYPES[qtype].ggml_type
        entries.append((tensor.name, tensor.shape, kind, values))
    layout = layout_gguf(file.metadata, [entry[:3] for entry in entries])
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for (*_, values), place in zip(entries, layout.tensors, strict=True):
        whole[place.offset : place.offset + place.nbytes] = values
    target.write_bytes(whole)
    return target


@pytest.mark.parametrize("qtype", ["iq2_xs", "iq1_s", "iq3_xxs"])
def test_a_type_that_needs_importance_is_copied_without_any(qtype: str, net: Path, tmp_path: Path) -> None:
    plain = gguf_of(net, tmp_path / "in", "Q8_0")
    source = retyped(plain, tmp_path / "m.gguf", "blk.0.ffn_up.weight", qtype)
    result = made(source, tmp_path / "out", exact=True, calibrate=False)
    ones, others = ({t.name: bytes(t.data) for t in gguf.GGUFReader(p).tensors} for p in (source, result.path))
    assert ones == others


def test_values_of_q8_0_that_ggml_never_writes_go_through(net: Path, tmp_path: Path) -> None:
    source = gguf_of(net, tmp_path / "in", "Q8_0")
    data = bytearray(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_down.weight")
    data[int(tensor.data_offset) + 2] = 128
    source.write_bytes(data)
    result = made(source, tmp_path / "out", exact=True)
    assert bytes(result.path.read_bytes()) != b""
    same_values(result.path, source)


def test_nvfp4_keeps_codes_scales_and_the_number_of_the_matrix(net: Path, tmp_path: Path) -> None:
    """compressed-tensors divides by its number, GGUF multiplies: the reciprocal is the only thing that is rounded."""
    source = directory(net, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    result = made(source, tmp_path / "out")
    assert result.path.name.endswith("-NVFP4.gguf")
    assert result.conversion["worst"]["relative_error"] < 2**-23
    file = gguf.GGUFReader(result.path)
    assert file.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_NVFP4
    assert verify(result.path, source=str(source)).ok
    tensors = {tensor.name: tensor for tensor in file.tensors}
    opened = open_source(str(source))
    with opened.checkpoint as checkpoint:
        for layer in range(2):
            module = f"model.layers.{layer}.mlp.up_proj"
            fields = checkpoint.packed.fields(checkpoint.packed.matrices[f"{module}.weight"])  # type: ignore[attr-defined]
            scale = tensors[f"blk.{layer}.ffn_up.scale"].data
            assert scale.shape == (1,)
            assert scale[0] == np.float32(1) / fields["weight_global_scale"].reshape(-1)[0]
            blocks = tensors[f"blk.{layer}.ffn_up.weight"].data.reshape(-1, 36)
            assert np.array_equal(blocks[:, :4].reshape(-1), fields["weight_scale"].reshape(-1))
        artifact = DecodedArtifact(opened, result.path)
        name = "model.layers.0.self_attn.q_proj.weight"
        rows = checkpoint.matrix(name)[0]
        assert np.allclose(artifact.decode(name), checkpoint.read_rows(name, 0, rows), rtol=2**-22, atol=0)


def test_nvfp4_is_a_level_that_may_be_named(net: Path, tmp_path: Path) -> None:
    """What a source has of it is kept with its numbers, its floats are put on 8 bits; of floats all is rounded, and
    llama.cpp loads either."""
    source = directory(net, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    result = made(source, tmp_path / "out", "NVFP4")
    plain = made(source, tmp_path / "plain")
    tensors, own = ({one.name: one for one in gguf.GGUFReader(path.path).tensors} for path in (result, plain))
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_up.scale", "blk.1.attn_q.weight"):
        assert np.array_equal(tensors[name].data, own[name].data)
    assert distance(logits(result.path), logits(gguf_of(source, tmp_path / "wide", "F32"))) < 0.05
    rounded = gguf_of(net, tmp_path / "rounded", "NVFP4")
    assert gguf.GGUFReader(rounded).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_NVFP4
    assert verify(rounded, source=str(net)).ok
    assert np.isfinite(logits(rounded)).all()


def test_llama_cpp_computes_with_nvfp4_of_a_directory(net: Path, tmp_path: Path) -> None:
    source = directory(net, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    result = made(source, tmp_path / "out")
    wide = gguf_of(source, tmp_path / "wide", "F32")
    assert distance(logits(result.path), logits(wide)) < 0.02
    without = rewritten(result.path, tmp_path / "x.gguf", None, {})
    assert np.array_equal(logits(without), logits(result.path))
    halved = {name: values / 2 for name, values in scales_for(result.path, number=1.0).items()}
    assert halved, "every matrix has a number beside it"


def test_a_number_that_is_a_power_of_two_is_exact(net: Path, tmp_path: Path) -> None:
    """And comes back: GGUF → GGUF with its numbers, bit for bit."""
    plain = gguf_of(net, tmp_path / "in", "Q8_0", overrides=Overrides(tensor_types=(("blk", "nvfp4"),)))
    file = rewritten(plain, tmp_path / "scaled.gguf", None, scales_for(plain))
    result = made(file, tmp_path / "out", exact=True)
    ones, others = ({t.name: bytes(t.data) for t in gguf.GGUFReader(p).tensors} for p in (file, result.path))
    assert ones == others
    assert sum(name.endswith(".scale") for name in others) == 14


def test_where_llama_cpp_ignores_the_number_nothing_is_written_that_it_would_misread(tmp_path: Path) -> None:
    model = make_tiny("gemma3", tmp_path / "net", **row_lengths_of_256("gemma3"))
    source = directory(model, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    told: list[str] = []
    result = convert(
        str(source),
        "gguf",
        output_dir=tmp_path / "out",
        options=Options(threads=1),
        on_event=lambda event: told.append(event.text) if isinstance(event, Caution) else None,
    )
    assert any("ignores the scales beside the feed-forward matrices of gemma3" in text for text in told)
    types = types_of(result.path)
    assert {name for name, kind in types.items() if kind == "NVFP4"} == {
        name
        for name in types
        if ".attn_" in name and name.endswith(("q.weight", "k.weight", "v.weight", "output.weight"))
    }
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert "blk.0.ffn_up.scale" not in types
    assert result.conversion is not None
    assert result.conversion["verdict"] == "rounded"


def test_without_a_place_for_its_number_nvfp4_holds_no_other_than_one() -> None:
    weight = OutputTensor("blk.0.ffn_up.weight", (4, 768), (Piece("up"),))
    places = {
        False: MatrixPlan(weight.name, weight, "nvfp4", (0,)),
        True: MatrixPlan(weight.name, weight, "nvfp4", (0, 1)),
    }
    for step, alone in ((0.01, False), (1.0, True)):
        found = {place: GgufStore().hold(matrix, *fours("e4m3", 16, step)) for place, matrix in places.items()}
        assert found[True] is not None
        assert (found[False] is not None) == alone


def test_a_stack_of_experts_has_a_number_for_each(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "net", **row_lengths_of_256("qwen3_moe"))
    source = directory(model, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    result = made(source, tmp_path / "out")
    assert result.conversion["worst"]["relative_error"] < 2**-23
    tensors = {t.name: t for t in gguf.GGUFReader(result.path).tensors}
    scale = tensors["blk.0.ffn_down_exps.scale"].data
    assert scale.shape == (4,)
    assert len(set(scale.tolist())) > 1
    wide = gguf_of(source, tmp_path / "wide", "F32")
    assert distance(logits(result.path), logits(wide)) < 0.05


BACK: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "Q4_0 to GPTQ": ("Q4_0", "gptq", "4bit", {"group_size": 32}),
    "Q4_0 to W4A16": ("Q4_0", "compressed-tensors", "W4A16", {"group_size": 32, "scale": "float16"}),
    "Q4_0 to MLX": ("Q4_0", "mlx", "4bit", {"group_size": 32, "scale": "float16"}),
    "Q5_0 to MLX": ("Q5_0", "mlx", "5bit", {"group_size": 32, "scale": "float16"}),
    "Q8_0 to MLX": ("Q8_0", "mlx", "8bit", {"group_size": 32, "scale": "float16"}),
    "Q8_0 to W8A16": ("Q8_0", "compressed-tensors", "W8A16", {"group_size": 32, "scale": "float16"}),
    "Q4_1 to MLX": ("Q4_1", "mlx", "4bit", {"group_size": 32, "scale": "float16"}),
    "Q5_1 to MLX": ("Q5_1", "mlx", "5bit", {"group_size": 32, "scale": "float16"}),
    "MXFP4 to MXFP4A16": ("mxfp4", "compressed-tensors", "MXFP4A16", {}),
    "MXFP4 to MLX": ("mxfp4", "mlx", "mxfp4", {}),
    "NVFP4 to NVFP4A16": ("nvfp4", "compressed-tensors", "NVFP4A16", {}),
    "NVFP4 to MLX": ("nvfp4", "mlx", "nvfp4", {}),
}


def test_exact_floats_are_asked_for_and_remembered(net: Path, tmp_path: Path) -> None:
    """--exact keeps a file's float32: another artifact than without, which the manifest says and a second run heeds."""
    source = str(gguf_of(net, tmp_path / "in", "Q4_0"))
    exact, plain = (Options(threads=1, exact=exact) for exact in (True, False))
    result = convert(source, "gptq", output_dir=tmp_path / "out", options=exact)
    assert (result.conversion or {})["verdict"] == "exact"
    assert rederive(ready(result.path, source=source), threads=1).verdict == "same"
    for taken, other in ((exact, plain), (plain, exact)):
        place = tmp_path / f"{taken.exact}"
        convert(source, "gptq", output_dir=place, options=taken)
        with pytest.raises(UsageError, match="was not made by this command"):
            convert(source, "gptq", output_dir=place, options=other)


@pytest.mark.parametrize("case", BACK)
def test_files_are_held_exactly_by_directories(case: str, net: Path, tmp_path: Path) -> None:
    """The grid that a file gives, through the store of the format, decoded as its runtime does."""
    level, format, target, asked = BACK[case]
    overrides = Overrides(tensor_types=((".*", level),)) if level in QTYPES else Overrides()
    source = gguf_of(net, tmp_path / "in", level if level not in QTYPES else "Q8_0", overrides=overrides)
    form = PACKED[format]
    scheme = form.scheme(target, SchemeOptions(**asked))
    store, opened = DirectoryStore(form, scheme), open_source(str(source))
    kept = 0
    with opened.checkpoint as checkpoint:
        for name in checkpoint.tensors:
            if not name.endswith("_proj.weight") or checkpoint.held(name) is None:
                continue
            rows, columns = checkpoint.matrix(name)
            output = next(o for o in opened.tensors.outputs if any(piece.source == name for piece in o.pieces))
            matrix = MatrixPlan(name, type(output)(name, (rows, columns)), scheme.qtype.name, (0,))
            given = checkpoint.held_grid(name, 0, rows)
            assert given is not None
            held = store.hold(matrix, *given)
            assert held is not None, name
            fields = store.join(matrix, [store.piece(matrix, *held)])
            assert np.array_equal(store.decode(matrix, fields), checkpoint.read_rows(name, 0, rows)), name
            kept += 1
    assert kept >= 8


@pytest.mark.parametrize(("level", "target"), [("Q4_K_S", "W4A16"), ("IQ4_NL", "W4A16"), ("Q4_1", "W4A16")])
def test_grids_of_ggml_alone_are_held_by_no_directory(level: str, target: str, net: Path, tmp_path: Path) -> None:
    source = gguf_of(net, tmp_path / "in", level)
    form = PACKED["compressed-tensors"]
    scheme = form.scheme(target, SchemeOptions(group_size=32, scale="float16"))
    store = DirectoryStore(form, scheme)
    with open_source(str(source)).checkpoint as checkpoint:
        name = "model.layers.0.mlp.gate_proj.weight"
        given = checkpoint.held_grid(name, 0, checkpoint.matrix(name)[0])
        assert given is not None
        output = open_source(str(source)).tensors.outputs[1]
        matrix = MatrixPlan(name, type(output)(name, checkpoint.matrix(name)), scheme.qtype.name, (0,))
        assert store.hold(matrix, *given) is None


def test_a_run_that_breaks_off_ends_in_the_same_bytes(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every third matrix; the numbers beside NVFP4 are units of their own."""
    source = directory(net, tmp_path / "in", "compressed-tensors", "NVFP4A16")
    whole = made(source, tmp_path / "whole").path.read_bytes()
    write, breaks = blockwise.Matrices.write, 0

    def breaking(self: blockwise.Matrices, *arguments: Any) -> None:
        nonlocal breaks
        write(self, *arguments)
        breaks += 1
        if breaks % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(blockwise.Matrices, "write", breaking)
    for _ in range(20):
        try:
            result = made(source, tmp_path / "parts")
        except KeyboardInterrupt:
            continue
        break
    assert breaks >= 14
    assert result.path.read_bytes() == whole


def test_the_command_line(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = directory(net, tmp_path / "in", "gptq", "4bit")
    assert run(["convert", str(source), "gguf", "-o", str(tmp_path / "out"), "--exact", "--threads", "1"]) == 0
    assert "exact" in capsys.readouterr().out
    made_file = next((tmp_path / "out").glob("*.gguf"))
    assert run(["verify", str(made_file), "--source", str(source)]) == 0

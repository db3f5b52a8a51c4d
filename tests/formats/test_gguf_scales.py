"""Scales beside the matrices of GGUF files: what they multiply, for whom, and what is no scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import MalformedInputError, NumericPolicyError, UnsupportedError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.gguf.scales import beside, decode, is_heeded
from llm_quantize.io.gguf_file import layout_gguf, read_gguf
from llm_quantize.models.identity import content_digest
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.qtypes.ggml_types import GgmlType
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.tiny_models import TINY, VOCABULARY, make_tiny, row_lengths_of_256

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
TOKENS = np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, 30).tolist()
Rewrite = Callable[[str, np.ndarray], np.ndarray]


def nvfp4_file(variant: str, place: Path, *, of: str = "blk.*") -> Path:
    """A tiny model with NVFP4 in its blocks, its scales of groups normal numbers."""
    net = make_tiny(variant, place / "net", **row_lengths_of_256(variant))
    options = Options(threads=1, overrides=Overrides(tensor_types=((of, "nvfp4"),)))
    made = quantize(str(net), "gguf", levels=["Q8_0"], output_dir=place / "out", options=options)[0].path
    return rewritten(made, place / f"{variant}.gguf", lambda _, scales: np.where(scales < 16, scales + 16, scales))


def rewritten(
    path: Path,
    target: Path,
    change: Rewrite | None = None,
    beside_them: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A copy whose NVFP4 scales of groups (uint8) are what ``change`` makes of them, with tensors ``beside_them``."""
    file, data = read_gguf(path), path.read_bytes()
    entries = []
    for tensor in file.tensors:
        values = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], np.uint8).copy()
        if tensor.type == GgmlType.NVFP4 and change is not None:
            blocks = values.reshape(-1, 36)
            blocks[:, :4] = change(tensor.name, blocks[:, :4])
        entries.append((tensor.name, tensor.shape, tensor.type, values.tobytes()))
    for name, found in (beside_them or {}).items():
        kind = {"float32": GgmlType.F32, "float16": GgmlType.F16}[str(found.dtype)]
        entries.append((name, found.shape, kind, found.tobytes()))
    layout = layout_gguf(file.metadata, [entry[:3] for entry in entries])
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for (*_, values_bytes), place in zip(entries, layout.tensors, strict=True):
        whole[place.offset : place.offset + place.nbytes] = values_bytes
    target.write_bytes(whole)
    return target


def scales_for(path: Path, *, number: float | None = None) -> dict[str, np.ndarray]:
    """A scale for every NVFP4 matrix of a file: ``number``, or one that is no power of two."""
    rng, found = np.random.default_rng(5), {}
    for tensor in read_gguf(path).tensors:
        if tensor.type == GgmlType.NVFP4:
            count = tensor.shape[0] if len(tensor.shape) == 3 else 1
            values = rng.uniform(0.3, 1.7, count) if number is None else np.full(count, number)
            found[beside(tensor.name)] = values.astype(np.float32)
    return found


def twin(path: Path) -> dict[str, np.ndarray]:
    """float32 values of the NVFP4 matrices of a file, slowly: level * (scale of the group * scale of the matrix)."""
    file, data, found = read_gguf(path), path.read_bytes(), {}
    held = {tensor.name: tensor for tensor in file.tensors}
    for tensor in file.tensors:
        if tensor.type != GgmlType.NVFP4:
            continue
        columns, scale = tensor.shape[-1], held.get(tensor.name.removesuffix("weight") + "scale")
        rows = tensor.nbytes // (columns // 64 * 36)
        whole = np.ones(1, np.float32)
        if scale is not None:
            whole = np.frombuffer(data[scale.offset : scale.offset + scale.nbytes], np.float32)
        values = np.empty((rows, columns), np.float32)
        for row in range(rows):
            for group in range(columns // 16):
                block = tensor.offset + (row * (columns // 64) + group // 4) * 36
                code = data[block + group % 4]
                exponent, mantissa = code >> 3 & 15, code & 7
                d = np.float32((8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa / 512)
                d = np.float32(d * whole[row * len(whole) // rows])
                for index in range(16):
                    byte = data[block + 4 + 8 * (group % 4) + index % 8]
                    nibble = byte >> 4 if index >= 8 else byte & 15
                    level = np.float32(E2M1[nibble & 7] * (-1 if nibble & 8 else 1))
                    values[row, 16 * group + index] = np.float32(level * d)
        found[tensor.name] = values
    return found


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_weights_are_blocks_times_their_scale(variant: str, tmp_path: Path) -> None:
    """As a source and as an artifact; gguf-py's decoder and the scale agree but for the last rounding."""
    plain = nvfp4_file(variant, tmp_path)
    path = rewritten(plain, tmp_path / "scaled.gguf", beside_them=scales_for(plain))
    expected, tensors = twin(path), {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(expected) > 10
    with open_source(str(path)).checkpoint as model:
        for name, values in expected.items():
            found = model.stored.read_rows(name, 0, len(values))
            assert np.array_equal(found, values), name
            assert np.array_equal(model.stored.read_rows(name, 3, 7), values[3:7]), name
            blocks = gguf.quants.dequantize(tensors[name].data, gguf.GGMLQuantizationType.NVFP4)
            each = tensors[name.removesuffix("weight") + "scale"].data.reshape(-1, 1)
            judged = blocks.reshape(len(each), -1) * each
            assert np.allclose(judged.reshape(values.shape), values, rtol=2**-22, atol=0), name
        assert len(model.folded) == len(expected)
        assert set(model.folded) == {name.removesuffix("weight") + "scale" for name in expected}
    source = open_source(str(tmp_path / "net"))
    with source.checkpoint:
        artifact = DecodedArtifact(source, path)
        for name, values in expected.items():
            rows = np.concatenate([rows for _, rows in artifact.stored_rows(name, 0, len(values))])
            assert np.array_equal(rows, values), name


def test_scales_reach_the_model_and_what_is_made_of_it(tmp_path: Path) -> None:
    plain = nvfp4_file("llama", tmp_path)
    inputs = {"blk.0.attn_q.input_scale": np.full(1, 3, np.float32)}
    path = rewritten(plain, tmp_path / "scaled.gguf", beside_them={**scales_for(plain, number=0.5), **inputs})
    half = rewritten(plain, tmp_path / "half.gguf", lambda _, scales: np.where(scales >= 16, scales - 8, 0))
    one, two = (open_source(str(where)).checkpoint for where in (path, half))
    with one, two:
        for name in one.tensors:
            rows = one.matrix(name)[0]
            assert np.array_equal(one.read_rows(name, 0, rows), two.read_rows(name, 0, rows)), name
        assert list(one.left_out) == ["blk.0.attn_q.input_scale"]
        assert content_digest(one) != content_digest(two)
    again = quantize(str(path), "gguf", levels=["Q8_0"], output_dir=tmp_path / "a", options=Options(threads=1))[0].path
    other = quantize(str(half), "gguf", levels=["Q8_0"], output_dir=tmp_path / "b", options=Options(threads=1))[0].path
    ones, others = ({t.name: bytes(t.data) for t in gguf.GGUFReader(where).tensors} for where in (again, other))
    assert ones == others


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_scales_beside_other_types_are_followed_too(dtype: str, tmp_path: Path) -> None:
    net = make_tiny("llama", tmp_path / "net", **row_lengths_of_256("llama"))
    plain = quantize(str(net), "gguf", levels=[dtype.upper()], output_dir=tmp_path / "out", options=Options(threads=1))[
        0
    ].path
    path = rewritten(plain, tmp_path / "x.gguf", beside_them={"blk.1.ffn_up.scale": np.full(1, 0.3, np.float32)})
    name = "model.layers.1.mlp.up_proj.weight"
    one, two = (open_source(str(where)).checkpoint for where in (path, plain))
    with one, two:
        assert one.stored_dtype(name) == np.float32
        rows = one.matrix(name)[0]
        before = two.read_rows(name, 0, rows).astype(np.float32)
        assert np.array_equal(one.read_rows(name, 0, rows), before * np.float32(0.3))


def test_verify_follows_scales(tmp_path: Path) -> None:
    plain = nvfp4_file("llama", tmp_path)
    source, number = str(plain), 0.5
    doubled = rewritten(plain, tmp_path / "doubled.gguf", lambda _, s: np.where(s >= 16, np.minimum(s + 8, 126), 0))
    path = rewritten(doubled, tmp_path / "scaled.gguf", beside_them=scales_for(plain, number=number))
    assert verify(path, source=source).ok
    off = scales_for(plain, number=number)
    off["blk.1.attn_k.scale"] = np.full(1, 0.9, np.float32)
    found = verify(rewritten(doubled, tmp_path / "off.gguf", beside_them=off), source=source)
    assert [check.name for check in found.tensors if check.problems] == ["blk.1.attn_k.weight"]
    off["blk.1.attn_k.scale"] = np.full(1, np.nan, np.float32)
    for known in (source, None):
        found = verify(rewritten(doubled, tmp_path / "nan.gguf", beside_them=off), source=known)
        assert "blk.1.attn_k.scale" in [check.name for check in found.tensors if check.problems]


@pytest.mark.parametrize(
    ("name", "values", "error", "words"),
    [
        ("blk.0.attn_q.scale", np.ones(2, np.float32), MalformedInputError, "wrong form"),
        ("blk.0.attn_q.scale", np.ones(1, np.float16), MalformedInputError, "wrong form"),
        ("blk.0.attn_q.input_scale", np.ones((2, 1), np.float32), MalformedInputError, "wrong form"),
        ("blk.0.attn_x.scale", np.ones(1, np.float32), UnsupportedError, "not as llama has it"),
        ("blk.9.attn_q.scale", np.ones(1, np.float32), UnsupportedError, "not as llama has it"),
        ("token_embd.scale", np.ones(1, np.float32), UnsupportedError, "not as llama has it"),
        ("output.scale", np.ones(3, np.float32), MalformedInputError, "wrong form"),
    ],
)
def test_what_is_no_scale_is_refused_by_name(
    name: str, values: np.ndarray, error: type[Exception], words: str, tmp_path: Path
) -> None:
    plain = nvfp4_file("llama", tmp_path)
    path = rewritten(plain, tmp_path / "x.gguf", beside_them={name: values})
    with pytest.raises(error, match=words) as caught:
        open_source(str(path))
    assert caught.value.tensor == name  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_no_positive_number_is_refused_where_rows_are_read(value: float, tmp_path: Path) -> None:
    plain = nvfp4_file("llama", tmp_path)
    path = rewritten(plain, tmp_path / "x.gguf", beside_them={"blk.0.attn_q.scale": np.full(1, value, np.float32)})
    with open_source(str(path)).checkpoint as model, pytest.raises(NumericPolicyError, match="of no sense") as caught:
        model.read_rows("model.layers.0.self_attn.q_proj.weight", 0, 4)
    assert caught.value.tensor == "blk.0.attn_q.scale"


def test_the_experts_of_a_stack_have_scales_of_their_own() -> None:
    packed = np.zeros((4, 36), np.uint8)
    packed[:, :4], packed[:, 4:] = 0x38, 0x22  # scales of 1, codes of 1
    scales = np.array([[2], [2], [3], [3]], np.float32)
    assert np.array_equal(decode("nvfp4", packed, 64, scales), np.repeat(scales, 64, axis=1))


def logits(path: Path) -> np.ndarray:
    with LlamaCpp(path, context=64, threads=1) as llama:
        return llama.logits(TOKENS)


def heeds(plain: Path, name: str, place: Path) -> bool | None:
    """Whether llama.cpp computes the same with half the scale beside a matrix as with half of its own scales; None
    where it computes the same with all of them, as a norm follows."""
    one = scales_for(plain, number=0.5)[beside(name)]
    scaled = rewritten(plain, place / "scaled.gguf", beside_them={beside(name): one})
    half = rewritten(plain, place / "half.gguf", lambda n, s: np.where(s >= 16, s - 8, 0) if n == name else s)
    before, expected = logits(plain), logits(half)
    if np.abs(expected - before).max() < 1e-2:
        return None
    return bool(np.abs(logits(scaled) - expected).max() < 1e-4)


FEW = ("llama", "qwen3_moe", "gpt2", "gemma3", "granitemoe")


@pytest.mark.parametrize(
    "variant", [*FEW, *(pytest.param(one, marks=pytest.mark.heavy) for one in TINY if one not in FEW)]
)
def test_llama_cpp_heeds_the_scales_that_the_table_says(variant: str, tmp_path: Path) -> None:
    plain = nvfp4_file(variant, tmp_path, of=r"blk\.0\.")
    file = read_gguf(plain)
    arch = str(file.metadata["general.architecture"].value)
    names = [tensor.name for tensor in file.tensors if tensor.type == GgmlType.NVFP4]
    found = {name: heeds(plain, name, tmp_path) for name in names}
    told = {name: one for name, one in found.items() if one is not None}
    assert any(".ffn_" in name for name in told), "no matrix of the feed-forward network matters"
    assert told == {name: is_heeded(name, arch) for name in told}


def test_llama_cpp_takes_scales_of_inputs_and_of_the_output_matrix(tmp_path: Path) -> None:
    plain = nvfp4_file("llama", tmp_path, of="output.weight|blk.0.attn_q")
    assert heeds(plain, "output.weight", tmp_path)
    inputs = {"blk.0.attn_q.input_scale": np.full(1, 3, np.float32)}
    assert np.array_equal(logits(rewritten(plain, tmp_path / "in.gguf", beside_them=inputs)), logits(plain))

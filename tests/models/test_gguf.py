"""A GGUF file as a model to start from: what it holds comes back under the checkpoint's names, in a configuration that
computes the same, and is quantized again as its values say; everything that is no such model is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.architectures.from_gguf import llama3_parameters
from llm_quantize.artifacts.verify import verify
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.cli import run
from llm_quantize.compare.assessment import assess
from llm_quantize.data import demo_model
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats.gguf.metadata import OF_THE_FILE
from llm_quantize.io.gguf_file import GgufFile, MetaValue, layout_gguf, read_gguf
from llm_quantize.models.identity import content_digest
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import CalibrationOptions, MeasurementOptions, MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.hearing import into
from tests.test_import_rules import loaded_after
from tests.tiny_models import VOCABULARY, make_tiny, row_lengths_of_256
from tests.tiny_tokenizers import nasty_texts

FAMILIES = (
    "llama",
    "llama3",
    "qwen2",
    "qwen3_moe",
    "gemma3",
    "gpt2",
    "phi3-longrope",
    "falcon",
    "mixtral",
    "granitemoe",
    "ministral3-yarn",
)
TOKENS = np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, 60).tolist()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(model: Path, place: Path, *levels: str, **options: Any) -> list[Path]:
    chosen = Options(threads=1, **options)
    return [r.path for r in quantize(str(model), "gguf", levels=levels, output_dir=place, options=chosen)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama at F32, in a directory of its own."""
    place = tmp_path_factory.mktemp("llama")
    return made(make_tiny("llama", place / "net", **row_lengths_of_256("llama")), place / "out", "F32")[0]


def decoded(path: Path) -> dict[str, np.ndarray]:
    """{tensor: float32 rows}, by the owner of the format."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(-1, int(t.shape[0]))
        for t in tensors
    }


def carried(file: GgufFile) -> dict[str, MetaValue]:
    return {key: value for key, value in file.metadata.items() if not key.startswith(OF_THE_FILE)}


def rewritten(
    path: Path,
    target: Path,
    *,
    changes: Mapping[str, MetaValue | None] | None = None,
    tensors: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """A copy with other metadata (None: without the key), and with tensors added (zeros) or left out (None)."""
    file, data = read_gguf(path), path.read_bytes()
    metadata = {k: v for k, v in {**file.metadata, **(changes or {})}.items() if v is not None}
    entries = [(t.name, t.shape, t.type, data[t.offset : t.offset + t.nbytes]) for t in file.tensors]
    for name, shape in (tensors or {}).items():
        entries = [entry for entry in entries if entry[0] != name]
        if shape is not None:
            entries.append((name, shape, gguf.GGMLQuantizationType.F32, bytes(4 * int(np.prod(shape)))))
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    layout = layout_gguf(metadata, [entry[:3] for entry in entries], alignment=alignment)
    whole = bytearray(layout.size)
    whole[: len(layout.header)] = layout.header
    for (_, _, _, values), place in zip(entries, layout.tensors, strict=True):
        whole[place.offset : place.offset + place.nbytes] = values
    target.write_bytes(whole)
    return target


def text(value: str) -> MetaValue:
    return MetaValue(gguf.GGUFValueType.STRING, value)


def number(value: int) -> MetaValue:
    return MetaValue(gguf.GGUFValueType.UINT32, value)


@pytest.mark.parametrize("variant", FAMILIES)
def test_it_is_quantized_again_as_its_values_say(variant: str, tmp_path: Path) -> None:
    net = make_tiny(variant, tmp_path / "net", dtype="float16", **row_lengths_of_256(variant))
    for origin in made(net, tmp_path / "out", "F32", "F16", "Q8_0"):
        values, before = decoded(origin), carried(read_gguf(origin))
        again = made(origin, tmp_path / origin.stem, "F32", "Q8_0", "Q4_0")
        for path in again:
            assert path.name.startswith("net-")
            assert carried(read_gguf(path)) == before
            found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
            assert list(found) == list(values)
            for name, rows in values.items():
                kind = found[name].tensor_type.name.lower()
                packed = kernels.quantize(kind, np.ascontiguousarray(rows), None)
                assert np.array_equal(found[name].data.view(np.uint8).reshape(packed.shape), packed), (name, kind)
            assert verify(path, source=str(origin)).ok
        assert read_gguf(again[0]).metadata["general.file_type"].value == 0
        assert "general.quantization_version" not in read_gguf(again[0]).metadata


@pytest.mark.parametrize("variant", ["llama3", "gemma3", "qwen3_moe", "gpt2"])
def test_llama_cpp_computes_the_same_from_f32_again(variant: str, tmp_path: Path) -> None:
    (origin,) = made(make_tiny(variant, tmp_path / "net"), tmp_path / "out", "F32")
    (again,) = made(origin, tmp_path / "again", "F32")
    with LlamaCpp(origin, context=64, threads=1) as one, LlamaCpp(again, context=64, threads=1) as other:
        assert np.array_equal(one.logits(TOKENS), other.logits(TOKENS))


def test_what_is_quantized_says_so(llama: Path, tmp_path: Path) -> None:
    (path,) = made(llama, tmp_path, "Q4_K_M")
    events: list[dict[str, Any]] = []
    with open_source(str(path), on_event=into(events)).checkpoint as model:
        assert model.kind == "GGUF Q4_K_M"
        assert any("already quantized (GGUF Q4_K_M)" in str(event.get("text")) for event in events)
        assert {info.dtype for info in model.tensors.values()} == {"F32", "q4_k", "q6_k"}
    manifest = json.loads(made(path, tmp_path, "Q8_0")[0].with_name("net-Q8_0.gguf.manifest.json").read_text())
    assert manifest["identity"]["source_kind"] == "GGUF Q4_K_M"
    odd = rewritten(path, tmp_path / "odd.gguf", changes={"general.file_type": number(0)})
    with open_model(str(odd)) as model:
        assert model.kind == "GGUF Q4_K"


def test_rows_of_any_range_are_rows_of_the_whole(tmp_path: Path) -> None:
    """Also transposed, of several types in one tensor, into a buffer, hashed."""
    for variant in ("gpt2", "granitemoe", "falcon"):
        net = make_tiny(variant, tmp_path / variant, dtype="float16", **row_lengths_of_256(variant))
        for path in made(net, tmp_path / f"{variant}-out", "F16", "Q4_K_M"):
            with open_model(str(path)) as model:
                for name in model.tensors:
                    rows, columns = model.matrix(name)
                    whole, kind = model.read_rows(name, 0, rows), model.stored_dtype(name)
                    assert (whole.shape, whole.dtype) == ((rows, columns), kind)
                    start, stop = rows // 3, rows - rows // 5
                    one, other = hashlib.sha256(), hashlib.sha256()
                    assert np.array_equal(model.read_rows(name, start, stop, digest=one), whole[start:stop])
                    model.read_rows(name, start, stop, digest=other)
                    assert one.digest() == other.digest()
                    buffer = bytearray(8 * rows * columns)
                    assert np.array_equal(model.read_rows(name, start, stop, buffer=buffer), whole[start:stop])
                    raw = model.raw_rows(name, 0, rows, buffer=buffer)
                    assert bytes(raw) == bytes(buffer[: len(raw)]) == whole.tobytes()
                    assert model.read_rows(name, 2, 2).shape == (0, columns)
                    if len(model.tensors[name].shape) > 1:
                        turned = whole.reshape(model.tensors[name].shape).swapaxes(-1, -2)
                        turned = turned.reshape(-1, turned.shape[-1])
                        found = model.read_rows(name, 1, columns, transpose=True)
                        assert np.array_equal(found, turned[1:columns])


def test_parts_a_directory_and_a_file_without_an_ending_are_one_model(llama: Path, tmp_path: Path) -> None:
    (split,) = made(llama, tmp_path / "parts", "Q8_0", split_max_size=1 << 17)
    parts = sorted(split.glob("*.gguf"))
    assert len(parts) > 2
    (whole,) = made(llama, tmp_path / "one", "Q8_0")
    expected = decoded(made(whole, tmp_path / "again", "F32")[0])
    for number, given in enumerate((split, parts[0], parts[2])):
        (path,) = made(given, tmp_path / str(number), "F32")
        assert path.name == "net-F32.gguf"
        found = decoded(path)
        assert all(np.array_equal(found[name], values) for name, values in expected.items())
        assert not [key for key in read_gguf(path).metadata if key.startswith("split.")]
    blob = tmp_path / "sha256-blob"
    shutil.copy(whole, blob)
    with open_model(str(blob)) as model:
        assert model.kind == "GGUF Q8_0"
    parts[1].unlink()
    with pytest.raises(UsageError, match="absent"):
        open_model(str(split))
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(MalformedInputError, match="missing or mixed"):
        open_model(str(tmp_path / "alone.gguf"))


def test_what_belongs_to_one_file_is_not_carried_over(llama: Path, tmp_path: Path) -> None:
    aligned = {
        "general.alignment": number(64),
        "quantize.imatrix.file": text("x"),
        "llm_quantize.level": text("old"),
        "general.author": text("somebody"),
    }
    path = rewritten(llama, tmp_path / "other.gguf", changes=aligned)
    metadata = read_gguf(made(path, tmp_path, "Q8_0")[0]).metadata
    assert not {"general.alignment", "quantize.imatrix.file"} & metadata.keys()
    assert (metadata["llm_quantize.level"].value, metadata["general.author"].value) == ("Q8_0", "somebody")


def test_what_other_writers_leave_out_or_write_otherwise_changes_nothing(llama: Path, tmp_path: Path) -> None:
    """Files of 2023: version 2, sizes that follow from others left out, one value for each layer, the older words."""
    keys = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    base = MetaValue(gguf.GGUFValueType.FLOAT32, 10000.0)
    plain = rewritten(llama, tmp_path / "plain.gguf", changes={"llama.rope.freq_base": base})
    per_layer = MetaValue(gguf.GGUFValueType.ARRAY, [2, 2], gguf.GGUFValueType.UINT32)
    changes = {**dict.fromkeys(f"llama.{key}" for key in keys), "llama.attention.head_count_kv": per_layer}
    old = rewritten(llama, tmp_path / "old.gguf", changes={**changes, "general.type": None})
    data = bytearray(old.read_bytes())
    struct.pack_into("<I", data, 4, 2)
    old.write_bytes(data)
    with open_model(str(old)) as model, open_model(str(plain)) as other:
        assert model.config == other.config
        assert {name: info.shape for name, info in model.tensors.items()} == {
            name: info.shape for name, info in other.tensors.items()
        }
    (path,) = made(old, tmp_path / "again", "F32")
    expected = decoded(llama)
    assert all(np.array_equal(values, expected[name]) for name, values in decoded(path).items())
    assert read_gguf(path).metadata["llama.attention.head_count_kv"] == per_layer
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        for said, kind in ((None, "linear"), ("linear", "linear"), ("yarn", "yarn"), ("none", "default")):
            factor = {f"llama.{key}": MetaValue(gguf.GGUFValueType.FLOAT32, 4.0)}
            named = {} if said is None else {"llama.rope.scaling.type": text(said)}
            path = rewritten(llama, tmp_path / "scaled.gguf", changes={**factor, **named})
            with open_model(str(path)) as model:
                scaling = model.config["rope_parameters"]
                assert (scaling["rope_type"], scaling.get("factor", 4.0)) == (kind, 4.0)


@pytest.mark.parametrize("variant", ["llama3", "qwen3_moe", "gemma3"])
def test_no_value_of_the_metadata_does_worse_than_be_refused(variant: str, tmp_path: Path) -> None:
    """Every key, each by values that break what follows from it: an error of ours, at once, or a model."""
    (path,) = made(make_tiny(variant, tmp_path / "net"), tmp_path / "out", "F32")
    kinds = gguf.GGUFValueType
    values = [
        *(MetaValue(kinds.UINT32, value) for value in (0, 1, 7, 4096, 4294967295)),
        *(MetaValue(kinds.UINT64, value) for value in (2**63,)),
        *(MetaValue(kinds.FLOAT32, value) for value in (0.0, -1.0, 1e38, float("nan"), float("inf"))),
        MetaValue(kinds.INT32, -5),
        MetaValue(kinds.BOOL, True),
        text("yarn"),
        MetaValue(kinds.ARRAY, [], kinds.UINT32),
        MetaValue(kinds.ARRAY, [1, 2], kinds.UINT32),
        MetaValue(kinds.ARRAY, [True], kinds.BOOL),
    ]
    keys = [key for key in read_gguf(path).metadata if not key.startswith(("tokenizer.", "llm_quantize"))]
    opened = 0
    for key in [*keys, f"{read_gguf(path).metadata['general.architecture'].value}.expert_count"]:
        for value in values:
            changes: dict[str, MetaValue | None] = {key: value}
            try:
                open_source(rewritten(path, tmp_path / "x.gguf", changes=changes).as_posix()).checkpoint.close()
                opened += 1
            except LlmQuantizeError:
                pass
    assert opened


def test_rotary_divisors_that_break_are_refused(tmp_path: Path) -> None:
    (path,) = made(make_tiny("llama3", tmp_path / "net"), tmp_path / "out", "F32")
    entry = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "rope_freqs.weight")
    data = bytearray(path.read_bytes())
    for values in (0.0, -1.0, float("nan"), float("inf"), 1.0):
        data[entry.offset : entry.offset + entry.nbytes] = np.full(entry.nbytes // 4, values, np.float32).tobytes()
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(LlmQuantizeError, match="rotary divisors"):
            open_model(str(tmp_path / "x.gguf"))


def test_planning_and_describing_load_no_torch(llama: Path) -> None:
    for command in (["plan", str(llama), "gguf", "-q", "Q4_K_M"], ["info", str(llama)]):
        loaded = loaded_after(f"from llm_quantize.cli import run; assert run({command!r}) == 0")
        assert not loaded & {"torch", "transformers", "xllamacpp"}, command
    (planned,) = plan(str(llama), "gguf", levels=["Q8_0"], options=Options())
    assert planned.name == "net-Q8_0"
    with open_model(str(llama), headers_only=True) as model:
        for read in (model.read_rows, model.raw_rows):
            with pytest.raises(UsageError, match="headers only"):
                read("model.norm.weight", 0, 1)


def test_the_digest_follows_the_weights_and_changes_are_noticed(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(llama, path)
    with open_model(str(path)) as model, open_model(str(llama)) as other:
        before = content_digest(model)
        entry = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "output.weight")
        assert other.tensors["lm_head.weight"].offset == entry.offset
        data = bytearray(path.read_bytes())
        data[entry.offset] ^= 1
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="changed"):
            model.read_rows("lm_head.weight", 0, 1)
    with open_model(str(path)) as model:
        assert content_digest(model) != before


def test_mistral_and_llama_are_told_by_their_tensors(tmp_path: Path) -> None:
    for variant, kind in (("llama-bias", "llama"), ("olmo2", "olmo2"), ("olmo3", "olmo3"), ("mixtral", "mixtral")):
        (path,) = made(make_tiny(variant, tmp_path / variant), tmp_path / f"{variant}-out", "F32")
        with open_model(str(path)) as model:
            assert model.config["model_type"] == kind
            assert model.config.get("attention_bias", False) == (variant == "llama-bias")


@pytest.mark.parametrize(("low", "high", "original", "factor"), [(1, 4, 8192, 8.0), (1, 4, 8192, 32.0), (2, 4, 500, 3)])
def test_parameters_of_llama3_are_found_in_its_divisors(low: int, high: int, original: int, factor: float) -> None:
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    found = llama3_parameters(divisors, 500000.0, 128, Path("x.gguf"))
    assert found["factor"] == factor
    assert found["original_max_position_embeddings"] == original
    assert found["low_freq_factor"] == pytest.approx(low, rel=1e-3)
    with pytest.raises(UnsupportedError, match="not those of Llama 3"):
        llama3_parameters(divisors[::-1].copy(), 500000.0, 128, Path("x.gguf"))


def refusal(path: Path, kind: type[LlmQuantizeError], words: str) -> LlmQuantizeError:
    """The error of opening ``path``, which the command line ends with too."""
    with pytest.raises(kind, match=words) as caught:
        open_source(str(path))
    assert run(["plan", str(path), "gguf", "-q", "Q8_0"]) == kind.exit_code
    return caught.value


def test_a_truncated_file_is_refused(llama: Path, tmp_path: Path) -> None:
    for size in (3, 100, llama.stat().st_size - 1):
        (tmp_path / "cut.gguf").write_bytes(llama.read_bytes()[:size])
        refusal(tmp_path / "cut.gguf", MalformedInputError, "ends inside|truncated|more tensors or keys")


@pytest.mark.parametrize("code", [4, 5, 31, 4711])
def test_removed_and_unknown_types_are_refused_by_name(llama: Path, tmp_path: Path, code: int) -> None:
    data, name = bytearray(llama.read_bytes()), b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", data, at) == (0,)
    struct.pack_into("<I", data, at, code)
    (tmp_path / "odd.gguf").write_bytes(data)
    error = refusal(tmp_path / "odd.gguf", MalformedInputError, "unknown or removed tensor type")
    assert (error.tensor, error.found) == ("token_embd.weight", str(code))


def test_types_that_hold_no_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    data, name = bytearray(llama.read_bytes()), b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    struct.pack_into("<I", data, at, int(gguf.GGMLQuantizationType.I32))
    (tmp_path / "odd.gguf").write_bytes(data)
    error = refusal(tmp_path / "odd.gguf", UnsupportedError, "type i32 cannot be decoded")
    assert error.tensor == "output_norm.weight"


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "mmproj", "vocab", "something"])
def test_what_is_no_model_is_refused_as_what_it_is(llama: Path, tmp_path: Path, kind: str) -> None:
    changes = {"general.type": text(kind), "general.base_model.0.name": text("The Base")}
    path = rewritten(llama, tmp_path / "x.gguf", changes=changes)
    assert "The Base" in (refusal(path, UnsupportedError, "not a model").remedy or "")


def test_architectures_tensors_and_values_that_are_not_known_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rewritten(llama, path, changes={"general.architecture": text("llama5")})
    assert "llama" in str(refusal(path, UnsupportedError, "'llama5' is not supported").expected)
    rewritten(llama, path, changes={"general.architecture": None})
    refusal(path, MalformedInputError, "does not say what kind")
    rewritten(llama, path, tensors={"blk.1.attn_sinks.weight": (4,)})
    assert refusal(path, UnsupportedError, "not as llama has it").tensor == "blk.1.attn_sinks.weight"
    rewritten(llama, path, tensors={"blk.1.ffn_up.weight": None})
    assert refusal(path, UnsupportedError, "not as llama has it").tensor == "blk.1.ffn_up.weight"
    rewritten(llama, path, changes={"llama.block_count": None})
    refusal(path, MalformedInputError, r"llama\.block_count is not in the metadata")
    per_layer = MetaValue(gguf.GGUFValueType.ARRAY, [4, 2], gguf.GGUFValueType.UINT32)
    rewritten(llama, path, changes={"llama.attention.head_count": per_layer})
    refusal(path, MalformedInputError, r"llama\.attention\.head_count is not usable")
    rewritten(llama, path, changes={"llama.rope.dimension_count": number(2)})
    refusal(path, UnsupportedError, "rotates whole heads")
    rewritten(llama, path, tensors={tensor.name: None for tensor in read_gguf(llama).tensors})
    refusal(path, MalformedInputError, "holds no tensors")


def test_without_a_tokenizer_no_gguf_is_made(llama: Path, tmp_path: Path) -> None:
    path = rewritten(llama, tmp_path / "x.gguf", changes={"tokenizer.ggml.model": None})
    with open_source(str(path)).checkpoint as model:
        assert model.tensors
    with pytest.raises(MalformedInputError, match="no tokenizer"):
        made(path, tmp_path / "out", "Q8_0")
    assert run(["quantize", str(path), "gguf", "-q", "Q8_0", "-o", str(tmp_path / "out")]) == 3
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_is_not_replaced_by_what_is_made_of_it(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "net-Q8_0.gguf"
    shutil.copy(llama, path)
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="would replace the model"):
            made(path, tmp_path, "Q8_0", overwrite=overwrite)
    assert path.read_bytes() == before


def test_a_directory_is_verified_against_a_file(llama: Path, tmp_path: Path) -> None:
    net = llama.parent.parent / "net"
    options = Options(threads=1, method=MethodOptions(method="rtn", group_size=32))
    (packed,) = quantize(str(net), "gptq", levels=["4bit"], output_dir=tmp_path, options=options)
    assert verify(packed.path, source=str(llama)).ok
    (artifact,) = made(net, tmp_path, "Q4_K_M")
    assert verify(artifact, source=str(llama)).ok


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at BF16: its very values."""
    return made(demo_model(), tmp_path_factory.mktemp("trained"), "BF16")[0]


def test_texts_have_the_ids_of_the_tokenizer_files(trained: Path) -> None:
    one, other = (TextTokenizer(open_source(str(model))) for model in (demo_model(), trained))
    assert (one.bos, one.eos, one.rows) == (other.bos, other.eos, other.rows)
    for words in nasty_texts():
        assert one.encode(words) == other.encode(words), words


@pytest.mark.parametrize(("model", "said"), [("llama", None), ("llama", False), ("gpt2", None), ("gpt2", True)])
def test_texts_begin_as_the_file_says(trained: Path, tmp_path: Path, model: str, said: bool | None) -> None:
    """Without a word, as in llama.cpp: with bos where the vocabulary is SentencePiece's."""
    net = make_tiny("llama", tmp_path / "net")
    (path,) = made(net, tmp_path / "out", "F32")
    key = "tokenizer.ggml.add_bos_token"
    changes: dict[str, MetaValue | None] = {
        key: None if said is None else MetaValue(gguf.GGUFValueType.BOOL, said),
        "tokenizer.ggml.model": text(model),
    }
    if model == "llama":
        count = len(read_gguf(path).metadata["tokenizer.ggml.tokens"].value)
        scores = MetaValue(gguf.GGUFValueType.ARRAY, [0.0] * count, gguf.GGUFValueType.FLOAT32)
        bytes_of = {f"<0x{value:02X}>": value for value in range(256)}
        words = [*bytes_of, *read_gguf(path).metadata["tokenizer.ggml.tokens"].value[len(bytes_of) :]]
        kinds = [6] * 256 + list(read_gguf(path).metadata["tokenizer.ggml.token_type"].value[256:])
        changes |= {
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": MetaValue(gguf.GGUFValueType.ARRAY, words, gguf.GGUFValueType.STRING),
            "tokenizer.ggml.token_type": MetaValue(gguf.GGUFValueType.ARRAY, kinds, gguf.GGUFValueType.INT32),
        }
    changed = rewritten(path, tmp_path / "changed.gguf", changes=changes)
    tokenizer = TextTokenizer(open_source(str(changed)))
    with LlamaCpp(changed, context=32, threads=1) as runtime:
        assert runtime.tokenize("", add_special=True) == ([] if tokenizer.bos is None else [tokenizer.bos])
    assert (tokenizer.bos is not None) == (model == "llama" if said is None else said)


def test_quality_against_a_file_is_quality_against_its_model(trained: Path, tmp_path: Path) -> None:
    (artifact,) = made(demo_model(), tmp_path, "Q4_0")
    found = []
    options = Options(threads=1, measurement=MeasurementOptions(windows=2, context=64))
    for reference in (trained, demo_model()):
        result = assess(str(reference), [artifact], options)
        found.append(result.quality.artifacts[0].divergence)
    assert found[0].kld == pytest.approx(found[1].kld, rel=1e-5)
    assert found[0].kld > 1e-3
    options = Options(threads=1, measurement=MeasurementOptions(windows=1, context=64, generate=True))
    same = assess(str(trained), [trained], options)
    assert same.quality.artifacts[0].divergence.kld == pytest.approx(0, abs=1e-9)


def test_importance_is_collected_from_a_file(trained: Path, tmp_path: Path) -> None:
    options = CalibrationOptions(samples=2, length=32)
    (path,) = made(trained, tmp_path, "IQ2_XS", calibration=options)
    assert read_gguf(path).metadata["quantize.imatrix.entries_count"].value > 0


def test_other_weights_beside_it_come_first(llama: Path, tmp_path: Path) -> None:
    net = make_tiny("llama", tmp_path / "net")
    shutil.copy(llama, net / "x.gguf")
    with open_model(str(net)) as model:
        assert {info.dtype for info in model.tensors.values()} == {"BF16"}
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UsageError, match="a GGUF file or a hub id"):
        open_model(str(tmp_path / "notes.txt"))

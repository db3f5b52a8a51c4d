"""The bytes of every tensor, against llama.cpp's own quantizer.

Two roads: random GGUF models (all levels, families and row lengths: recipe + importance + kernels, no checkpoint), and
tiny checkpoints through the whole pipeline. The full product is in test_byte_oracle_heavy.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from llm_quantize import kernels
from llm_quantize.errors import MalformedInputError
from llm_quantize.formats.gguf import levels as recipes
from llm_quantize.formats.gguf.levels import LEVELS, Overrides, TensorShape
from llm_quantize.io.imatrix_file import read_imatrix
from llm_quantize.pipeline import Options, quantize

from .oracles import ggml
from .oracles.legacy_imatrix import random_entry, slow_means, write_gguf_imatrix, write_legacy
from .oracles.llama_quantize import Job, Model, data_of, run, save_importance, types_of, write_model
from .tiny_models import make_tiny, row_lengths_of_256

# One variant of each family, and the row length its tensors are given: K-quants need 256, fallbacks show at others.
VARIANTS = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("gemma3", "phi3", "gpt2", "gpt_neox", "stablelm", "olmo2", "granite", "smollm3", "falcon", "falcon-new"),
    *("qwen3_5_text", "qwen3_5_moe_text", "ministral3", "mistral3", "gemma4_text", "gemma4_text-keys"),
)
# Levels that between them use every type and every rule that importance switches; the rest is in the heavy file.
GATE_LEVELS = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S"),
)
# llama.cpp takes seconds to make the tables of these, once in each process.
I_QUANTS = tuple(name for name in LEVELS if name.startswith(("IQ1", "IQ2", "IQ3")))
NEED_IMPORTANCE = frozenset(I_QUANTS) - {"IQ3_S", "IQ3_M"} | {"Q2_K_S"}
NEED_NONE = ("F16", "BF16", "TQ1_0", "TQ2_0", "Q1_0", "MXFP4_MOE", "Q6_K")


NEWER = ("Q2_0", "NVFP4")
"""What the quantizer at hand has no level for."""


def random_importance(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, np.ndarray]:
    """Writes an importance matrix for the weights of the layers; returns what it means, by the slow twin."""
    random = np.random.default_rng(11)
    entries = {}
    for name, shape in shapes.items():
        if name.startswith("blk.") and name.endswith("weight") and len(shape) > 1:
            entries[name] = random_entry(random, int(np.prod(shape[:-2], dtype=int)), shape[-1])
            if len(shape) == 3:
                entries[name][1][-1] = 0  # an expert that the text never reached
    write_gguf_imatrix(path, entries)
    return {name: slow_means(*entry) for name, entry in entries.items()}


def oracle_bytes(
    source: Path, levels: Sequence[str], directory: Path, importance: Mapping[str, np.ndarray] | None = None
) -> dict[str, dict[str, tuple[str, bytes]]]:
    """llama.cpp's tensors for each level, from a float GGUF file; nothing for a level that it cannot store because a
    row length fits no type."""
    stored = save_importance(directory / "importance.npz", importance) if importance else None
    jobs = [Job(str(source), str(directory / f"{n}.theirs"), LEVELS[n].file_type, stored) for n in levels]
    found = {}
    for level, job, outcome in zip(levels, jobs, run(jobs), strict=True):
        if "no tensor type fallback" in outcome.error:
            continue
        assert not outcome.error, f"{level}: {outcome.error}"
        found[level] = data_of(job.target)
        Path(job.target).unlink()
    return found


def unequal(ours: Mapping[str, tuple[str, bytes]], theirs: Mapping[str, tuple[str, bytes]]) -> list[str]:
    """Names of tensors that differ, with the reason."""
    names = [f"{name}: only in one file" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        (our_type, our_data), (their_type, their_data) = ours[name], theirs[name]
        if our_type != their_type:
            names.append(f"{name}: {our_type}, llama.cpp {their_type}")
        elif our_data != their_data:
            count = sum(a != b for a, b in zip(our_data, their_data, strict=True))
            names.append(f"{name}: {our_type}, {count} of {len(their_data)} bytes differ")
    return sorted(names)


def quantize_directly(
    source: Path, model: Model, level: str, importance: Mapping[str, np.ndarray] | None
) -> dict[str, tuple[str, bytes]]:
    """A GGUF file's tensors by our recipe and kernels, without the pipeline."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(source).tensors}
    shapes = [TensorShape(name, data.shape) for name, data in tensors.items()]
    found = recipes.assign(level, shapes, model, arch=model.arch, importance_names=importance)
    result = {}
    for (name, data), qtype in zip(tensors.items(), found.qtypes, strict=True):
        matrices = np.ascontiguousarray(data).reshape(int(np.prod(data.shape[:-2], dtype=int)), -1, data.shape[-1])
        rows = None if importance is None else importance.get(name)
        packed = [
            kernels.quantize(qtype, matrix, None if rows is None or qtype in ("f16", "f32") else rows[index])
            for index, matrix in enumerate(matrices)
        ]
        result[name] = (qtype, b"".join(piece.tobytes() for piece in packed))
    return result


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize(
    "model",
    [
        Model(n_layer=8, n_head=8, n_head_kv=2),
        Model(arch="qwen3moe", n_layer=3, n_expert=4, columns=288, ffn_columns=512),
        Model(n_layer=2, n_expert=8, tied=True),
        Model(arch="falcon", n_layer=16, n_head_kv=1, ffn_columns=160),
    ],
    ids=lambda model: model.arch,
)
def test_random_models(model: Model, with_importance: bool, tmp_path: Path) -> None:
    source = Path(write_model(tmp_path / "model.gguf", model))
    importance = None
    if with_importance:
        slow = random_importance({t.name: t.shape for t in model.tensors()}, tmp_path / "imatrix.gguf")
        importance = dict(read_imatrix(tmp_path / "imatrix.gguf").values)
        assert importance.keys() == slow.keys()
        assert all((importance[name] == slow[name]).all() for name in slow)
    skipped = set(I_QUANTS) - {"IQ2_XXS"} if with_importance else NEED_IMPORTANCE
    skipped = {*skipped, *NEWER}
    if any(columns % 128 for columns in (model.columns, model.ffn_columns)):
        skipped.add("Q1_0")  # llama.cpp has nothing for rows that its blocks do not divide
    levels = [level for level in LEVELS if level not in skipped]
    theirs = oracle_bytes(source, levels, tmp_path, importance)
    assert list(theirs) == levels
    for level in levels:
        assert unequal(quantize_directly(source, model, level, importance), theirs[level]) == [], level


def test_i_quants(tmp_path: Path) -> None:
    """Every level of the I-quants in one process of the oracle; rows of both widths, experts that were not reached."""
    model = Model(arch="qwen3moe", n_layer=8, n_head=8, n_head_kv=4, n_expert=3, columns=512, ffn_columns=288)
    source = Path(write_model(tmp_path / "model.gguf", model))
    random_importance({t.name: t.shape for t in model.tensors()}, tmp_path / "imatrix.gguf")
    importance = dict(read_imatrix(tmp_path / "imatrix.gguf").values)
    theirs = oracle_bytes(source, I_QUANTS, tmp_path, importance)
    used = {qtype for tensors in theirs.values() for qtype, _ in tensors.values()}
    assert used >= {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl"}
    for level in I_QUANTS:
        assert unequal(quantize_directly(source, model, level, importance), theirs[level]) == [], level


def pipeline_bytes(
    model: Path, levels: Iterable[str], directory: Path, options: Options | None = None
) -> dict[str, Path]:
    """Our files for each level."""
    results = quantize(str(model), "gguf", levels=list(levels), output_dir=directory, options=options)
    return {result.level: result.path for result in results}


def compare_pipeline(
    model: Path, levels: Sequence[str], directory: Path, *, importance: bool, base: str = "F32"
) -> None:
    """Our artifacts of a checkpoint against llama.cpp's quantizer on our own float artifact."""
    directory.mkdir(exist_ok=True)
    source = pipeline_bytes(model, [base], directory)[base]
    before = gguf.GGUFReader(source)
    options, values = Options(), None
    if importance:
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in before.tensors}
        values = random_importance(shapes, directory / "imatrix.gguf")
        options = Options(imatrix=directory / "imatrix.gguf")
    ours = pipeline_bytes(model, levels, directory / "ours", options)
    theirs = oracle_bytes(source, levels, directory, values)
    for level in theirs:
        written = gguf.GGUFReader(ours[level])
        found = data_of(written)
        differing = unequal(found, theirs[level])
        assert [text for text in differing if not builds_disagree(text, found, before, values)] == [], level
        assert_metadata(written, before, level)
    return list(theirs)


def builds_disagree(
    text: str,
    ours: Mapping[str, tuple[str, bytes]],
    source: gguf.GGUFReader,
    importance: Mapping[str, np.ndarray] | None,
) -> bool:
    """Whether a difference is one between builds of ggml: of iq1_m, cyllama's build chooses another of two codes with
    nearly equal errors in about one block of a thousand. Ours are then the bytes of xllamacpp's build."""
    name = text.partition(":")[0]
    qtype, data = ours[name]
    if qtype != "iq1_m" or importance is None:
        return False
    weights = next(np.asarray(tensor.data, np.float32) for tensor in source.tensors if tensor.name == name)
    matrices = weights.reshape(int(np.prod(weights.shape[:-2], dtype=int)), -1, weights.shape[-1])
    rows = importance[name].reshape(len(matrices), -1)
    other = [ggml.quantize(qtype, matrix, row) for matrix, row in zip(matrices, rows, strict=True)]
    return b"".join(packed.tobytes() for packed in other) == data


def assert_metadata(written: gguf.GGUFReader, source: gguf.GGUFReader, level: str) -> None:
    """What a runtime reads is the float file's, and the file type is the level's."""
    fields, before = written.fields, source.fields
    assert fields["general.file_type"].contents() == LEVELS[level].file_type
    if level not in ("F32", "F16", "BF16"):
        assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    architecture = before["general.architecture"].contents()
    for key, field in before.items():
        if key.startswith((f"{architecture}.", "tokenizer.")):
            assert fields[key].contents() == field.contents(), key


def wide_model(variant: str, directory: Path) -> Path:
    """A tiny model whose rows are multiples of 256 long."""
    wide = row_lengths_of_256(variant)
    if variant.startswith(("gemma2", "gemma3")):
        wide["query_pre_attn_scalar"] = wide["head_dim"]
    return make_tiny(variant, directory, **wide)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_checkpoints(variant: str, tmp_path: Path) -> None:
    model = wide_model(variant, tmp_path / "model")
    spread = VARIANTS.index(variant)
    # Every variant takes some levels, each others, so that families and levels are all met.
    with_importance, without = ("IQ2_XXS", *GATE_LEVELS)[spread % 3 :: 3], (NEED_NONE + GATE_LEVELS)[spread % 4 :: 4]
    # What no level quantizes keeps the type of its source; the fixture's is BF16.
    base = "BF16" if variant.startswith("gemma4") else "F32"
    if variant.startswith("gemma4"):  # what it never quantizes, llama.cpp's quantizer leaves in the type of its source
        without = tuple(level for level in without if level != "F16")
    compared = compare_pipeline(model, with_importance, tmp_path / "with", importance=True, base=base)
    compared += compare_pipeline(model, without, tmp_path / "without", importance=False, base=base)
    assert compared == [*with_importance, *without]


@pytest.mark.parametrize("variant", ["qwen3_5_text", "qwen3_5_moe_text", "gpt_oss", "lfm2", "glm4_moe"])
def test_layers_of_two_kinds(variant: str, tmp_path: Path) -> None:
    """Rules that count the tensors of a role count those of both kinds of layers."""
    levels = ("Q4_K_M", "Q2_K", "Q3_K_M", "Q5_K_M")
    model = wide_model(variant, tmp_path / "model")
    for importance in (True, False):
        folder = tmp_path / str(importance)
        assert compare_pipeline(model, levels, folder, importance=importance) == list(levels)


def test_odd_row_lengths(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", hidden_size=96, intermediate_size=160)
    assert len(compare_pipeline(model, ("Q4_K_M", "IQ2_M", "IQ4_XS", "TQ1_0"), tmp_path / "out", importance=True)) == 4


def test_from_bf16_as_from_f32(tmp_path: Path) -> None:
    model = wide_model("qwen3", tmp_path / "model")
    compare_pipeline(model, ("Q4_K_M", "Q6_K"), tmp_path / "out", importance=True, base="BF16")


def test_nvfp4(tmp_path: Path) -> None:
    """By ggml's own rounding, asked for as the type of the tensors in blocks."""
    model = wide_model("llama", tmp_path / "model")
    source = pipeline_bytes(model, ["F32"], tmp_path)["F32"]
    ours = pipeline_bytes(model, ["NVFP4"], tmp_path / "ours")["NVFP4"]
    job = Job(str(source), str(tmp_path / "theirs"), LEVELS["Q8_0"].file_type, tensor_types=(("blk", 40),))
    assert run([job])[0].error == ""
    assert {qtype for qtype, _ in data_of(ours).values()} == {"f32", "q8_0", "nvfp4"}
    assert unequal(data_of(ours), data_of(job.target)) == []


def test_overrides_reach_the_file(tmp_path: Path) -> None:
    model = wide_model("llama", tmp_path / "model")
    chosen = (("attn_v", "q8_0"), (r"blk\.0\.", "q5_1"))
    overrides = Overrides(output_type="q5_k", embedding_type="iq4_nl", tensor_types=chosen)
    source = pipeline_bytes(model, ["F32"], tmp_path)["F32"]
    ours = pipeline_bytes(model, ["Q4_K_M"], tmp_path / "ours", Options(overrides=overrides))["Q4_K_M"]
    numbers = {name: int(gguf.GGMLQuantizationType[name.upper()]) for name in ("q5_k", "iq4_nl", "q8_0", "q5_1")}
    job = Job(
        str(source),
        str(tmp_path / "theirs"),
        LEVELS["Q4_K_M"].file_type,
        output_type=numbers["q5_k"],
        embedding_type=numbers["iq4_nl"],
        tensor_types=tuple((text, numbers[qtype]) for text, qtype in chosen),
    )
    assert run([job])[0].error == ""
    assert types_of(ours) == types_of(job.target)
    assert unequal(data_of(ours), data_of(job.target)) == []


def test_legacy_importance_of_some_tensors(tmp_path: Path) -> None:
    """A legacy file that covers every other tensor, the output matrix, and the embedding in a wrong size."""
    model = wide_model("mixtral", tmp_path / "model")
    source = pipeline_bytes(model, ["F32"], tmp_path)["F32"]
    random = np.random.default_rng(12)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in gguf.GGUFReader(source).tensors}
    names = sorted(name for name in shapes if name.startswith("blk.") and name.endswith("weight"))[::2]
    sizes = {name: int(np.prod(shapes[name][:-2], dtype=int)) * shapes[name][-1] for name in [*names, "output.weight"]}
    sizes["token_embd.weight"] = 100
    entries = [(name, 3, random.lognormal(0, 2, size).astype(np.float32)) for name, size in sizes.items()]
    write_legacy(tmp_path / "old.dat", entries, chunks=3, dataset="text.txt")
    levels = ["Q4_K_M", "Q4_0", "IQ4_XS"]
    ours = pipeline_bytes(model, levels, tmp_path / "ours", Options(imatrix=tmp_path / "old.dat"))
    theirs = oracle_bytes(source, levels, tmp_path, {name: values / np.float32(3) for name, _, values in entries})
    for level in levels:
        written = gguf.GGUFReader(ours[level])
        assert unequal(data_of(written), theirs[level]) == [], level
        assert written.fields["quantize.imatrix.dataset"].contents() == "text.txt"
        assert written.fields["quantize.imatrix.chunks_count"].contents() == 3


def test_importance_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    write_gguf_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": random_entry(np.random.default_rng(1), 1, 32)})
    with pytest.raises(MalformedInputError, match=r"blk\.0\.attn_q\.weight") as refused:
        pipeline_bytes(model, ["Q4_K_M"], tmp_path / "out", Options(imatrix=tmp_path / "i.gguf"))
    assert refused.value.exit_code == 3
    assert not list((tmp_path / "out").glob("*.gguf"))

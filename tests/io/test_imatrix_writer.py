"""Importance matrices written for llama.cpp: read back by ours, by the gguf package, and used by its quantizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.calibration.imatrix import TensorStatistics, importance, tensor_statistics
from llm_quantize.errors import MalformedInputError, NumericPolicyError, UsageError
from llm_quantize.io.imatrix_file import read_imatrix
from llm_quantize.io.imatrix_writer import write_imatrix_dat, write_imatrix_gguf
from llm_quantize.io.statistics_file import (
    StatisticsFile,
    StatisticsIdentity,
    StoredTap,
    layout_statistics,
    read_statistics,
)
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source, open_source
from llm_quantize.pipeline import Options, quantize

from ..oracles.legacy_imatrix import random_entry, slow_means, write_gguf_imatrix
from ..oracles.llama_quantize import Job, data_of, run, save_importance
from ..tiny_models import make_tiny, row_lengths_of_256

TEXT = {"sha256": "t", "datasets": ["general", "code"], "windows": 6, "tokens": 3072, "length": 512}


def entries_of(seed: int = 1) -> dict[str, TensorStatistics]:
    random = np.random.default_rng(seed)
    entries = {
        "blk.1.ffn_down_exps.weight": TensorStatistics(*random_entry(random, 5, 64)),
        "blk.0.attn_q.weight": TensorStatistics(*random_entry(random, 1, 96)),
        "blk.0.attn_k.weight": TensorStatistics(*random_entry(random, 1, 7)),
    }
    entries["blk.1.ffn_down_exps.weight"].counts[3] = 0
    return entries


def write(path: Path, entries: dict[str, TensorStatistics]) -> int:
    return write_imatrix_gguf(path, entries, datasets=["general", "日本語"], chunks=6, chunk_size=512)


def test_read_back_to_the_bit(tmp_path: Path) -> None:
    entries = entries_of()
    size = write(tmp_path / "i.gguf", entries)
    assert size == (tmp_path / "i.gguf").stat().st_size
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.datasets, found.chunks) == (("general", "日本語"), 6)
    assert found.values.keys() == entries.keys()
    for name, entry in entries.items():
        np.testing.assert_array_equal(found.values[name], entry.importance)
        np.testing.assert_array_equal(found.values[name], slow_means(entry.sums, entry.counts))


def test_the_same_file_as_the_formats_owner_writes(tmp_path: Path) -> None:
    """Metadata and tensors as the gguf package reads them; only the order of entries is ours."""
    entries = entries_of()
    write(tmp_path / "ours", entries)
    theirs = {name: (entry.sums, entry.counts) for name, entry in entries.items()}
    write_gguf_imatrix(tmp_path / "theirs", theirs, datasets=["general", "日本語"], chunks=6)
    ours, other = gguf.GGUFReader(tmp_path / "ours"), gguf.GGUFReader(tmp_path / "theirs")
    contents = [{key: field.contents() for key, field in reader.fields.items()} for reader in (ours, other)]
    assert contents[0] == contents[1]
    assert contents[0]["general.type"] == "imatrix"
    tensors = [{t.name: (t.shape.tolist(), t.data.tobytes()) for t in reader.tensors} for reader in (ours, other)]
    assert tensors[0] == tensors[1]
    assert list(tensors[0]) == sorted(tensors[0], key=lambda name: (name.rsplit(".", 1)[0], name.endswith("counts")))


def test_the_order_of_entries_does_not_matter(tmp_path: Path) -> None:
    entries = entries_of()
    write(tmp_path / "one", entries)
    write(tmp_path / "two", dict(reversed(entries.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_legacy_read_back_to_the_bit(tmp_path: Path) -> None:
    entries = entries_of()
    size = write_imatrix_dat(tmp_path / "i.dat", entries, dataset="general", chunks=6)
    assert size == (tmp_path / "i.dat").stat().st_size
    found = read_imatrix(tmp_path / "i.dat")
    assert (found.datasets, found.chunks) == (("general",), 6)
    for name, entry in entries.items():
        np.testing.assert_array_equal(found.values[name].ravel(), entry.importance.ravel())


def test_what_stands_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        write(tmp_path / "i.gguf", entries_of())
    with pytest.raises(UsageError, match="longer than llama"):
        write(tmp_path / "new.gguf", {"x" * 64: entries_of()["blk.0.attn_q.weight"]})
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1e30, width=64), st.integers(1, 1 << 40))
def test_importance_is_what_a_written_file_gives(total: float, count: int) -> None:
    entry = TensorStatistics(np.full((1, 3), total, np.float32), np.full(1, count, np.float32))
    np.testing.assert_array_equal(entry.importance, slow_means(entry.sums, entry.counts))


# statistics of a model


def statistics_of(source: Source, path: Path, *, seed: int = 5) -> StatisticsFile:
    """Random statistics for every matrix of the layers: expert tensors share gate and up, one expert saw nothing."""
    random = np.random.default_rng(seed)
    taps = []
    for output in source.tensors.outputs:
        if not output.name.startswith("blk.") or len(output.shape) < 2 or not output.pieces:
            continue
        matrices = int(np.prod(output.shape[:-2], dtype=int))
        names = list(dict.fromkeys(piece.source for piece in output.pieces))
        if any(names[0] in tap.tensors for tap in taps):
            continue
        tensors = {names[0]: None} if len(names) == 1 else {name: i for i, name in enumerate(names)}
        taps.append(StoredTap(output.name, 0, output.shape[-1], matrices, tensors))
    layout = layout_statistics(StatisticsIdentity({"sha256": "m"}, TEXT), [taps], ("imatrix",))
    arrays = {}
    for tap in taps:
        counts = random.integers(1, 5000, tap.matrices)
        if tap.matrices > 1:
            counts[-1] = 0
        arrays[f"{tap.name}.counts"] = counts
        spread = random.lognormal(0.0, 2.0, (tap.matrices, tap.columns))
        arrays[f"{tap.name}.sum_squares"] = spread * counts[:, None]
    write_file(path, layout.whole(arrays.__getitem__))
    return read_statistics(path)


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "phi3", "gpt2"])
def test_llama_cpp_quantizes_with_it_as_we_do(variant: str, tmp_path: Path) -> None:
    """Statistics, to a GGUF imatrix, to llama.cpp's quantizer: the bytes of our own pipeline with that file."""
    wide = row_lengths_of_256(variant)
    model = str(make_tiny(variant, tmp_path / "model", **wide))
    levels = ["Q4_K_M", "Q2_K", "IQ4_XS"]
    source = open_source(model)
    with source.checkpoint, statistics_of(source, tmp_path / "s") as statistics:
        values = importance(statistics, source.tensors.outputs)
        entries = tensor_statistics(statistics, source.tensors.outputs)
    path = tmp_path / "imatrix.gguf"
    write_imatrix_gguf(path, entries, datasets=TEXT["datasets"], chunks=6, chunk_size=512)
    found = read_imatrix(path)
    assert found.values.keys() == values.keys()
    for name, rows in values.items():
        np.testing.assert_array_equal(found.values[name], rows)
    # What llama-quantize would take from the file, by the owner's reader.
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    theirs = {name: slow_means(tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].ravel()) for name in values}
    stored = save_importance(tmp_path / "importance.npz", theirs)
    floats = quantize(model, levels=["F32"], output_dir=tmp_path, name="float")[0].path
    ours = quantize(model, levels=levels, output_dir=tmp_path, name="ours", options=Options(imatrix=path))
    numbers = [int(gguf.LlamaFileType[f"MOSTLY_{level}"]) for level in levels]
    jobs = [
        Job(str(floats), str(tmp_path / f"{level}.theirs"), number, stored)
        for level, number in zip(levels, numbers, strict=True)
    ]
    for job, outcome, result in zip(jobs, run(jobs), ours, strict=True):
        assert outcome.error == ""
        assert data_of(result.path) == data_of(job.target), result.level
    plain = quantize(model, levels=["Q4_K_M"], output_dir=tmp_path, name="plain")[0].path
    assert data_of(plain) != data_of(ours[0].path), "the importance changes something"


def test_statistics_of_another_shape_are_refused(tmp_path: Path) -> None:
    source = open_source(str(make_tiny("llama", tmp_path / "model")))
    other = open_source(str(make_tiny("llama", tmp_path / "other", hidden_size=96)))
    with (
        source.checkpoint,
        other.checkpoint,
        statistics_of(source, tmp_path / "s") as statistics,
        pytest.raises(MalformedInputError, match="do not belong to this model") as refused,
    ):
        importance(statistics, other.tensors.outputs)
    assert refused.value.tensor == "blk.0.attn_q.weight"


def test_sums_beyond_float32_are_refused(tmp_path: Path) -> None:
    tap = StoredTap("t", 0, 2, 1, {"w": None})
    layout = layout_statistics(StatisticsIdentity({"sha256": "m"}, TEXT), [[tap]], ("imatrix",))
    arrays = {"t.counts": np.ones(1, np.int64), "t.sum_squares": np.array([[1.0, 1e39]])}
    write_file(tmp_path / "s", layout.whole(arrays.__getitem__))
    source = open_source(str(make_tiny("llama", tmp_path / "model")))
    output = next(o for o in source.tensors.outputs if o.name == "blk.0.attn_q.weight")
    with source.checkpoint, read_statistics(tmp_path / "s") as found:
        renamed = type(output)("x", (4, 2), tuple(type(p)("w") for p in output.pieces[:1]))
        with pytest.raises(NumericPolicyError, match="beyond float32"):
            importance(found, [renamed])

"""Statistics of a streamed forward, through the file, against a whole model with hooks, for every tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from llm_quantize.calibration.imatrix import coverage, importance, summary
from llm_quantize.calibration.statistics import BlockSums
from llm_quantize.formats.gguf.levels import TensorShape, is_quantizable
from llm_quantize.io.statistics_file import (
    KINDS,
    StatisticsFile,
    StatisticsIdentity,
    layout_statistics,
    read_statistics,
)
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source, open_source
from llm_quantize.streams.network import open_network
from llm_quantize.streams.weights import CheckpointWeights

from ..oracles.dense_statistics import Dense, dense_statistics
from ..tiny_models import VOCABULARY, make_tiny

TEXT = {"sha256": "t", "datasets": ["general"], "windows": 5, "tokens": 60, "length": 12}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
}


def windows_of(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY // 2, (count, length), generator=torch.Generator().manual_seed(3))


def stream(source: Source, windows: torch.Tensor, path: Path) -> StatisticsFile:
    """All kinds of statistics of ``windows`` written to ``path``, head included, two threads."""
    weights = CheckpointWeights(source.checkpoint)
    network = open_network(source, dtype="float32")
    states = list(network.embed(weights, windows))
    taps = [network.taps(index) for index in range(network.n_blocks)]
    layout = layout_statistics(StatisticsIdentity({"sha256": "m"}, TEXT), [*taps, [network.head_tap()]], KINDS)
    data, digests = [layout.header], list[bytes]()
    for index in range(network.n_blocks):
        sums = BlockSums(taps[index], KINDS)
        with network.block(index, weights) as block, ThreadPoolExecutor(2) as pool:

            def run(number: int, block=block, sums=sums, states=states) -> torch.Tensor:
                with sums.window(number) as sink, block.observe(sink):
                    return block(states[number])

            states = list(pool.map(run, range(len(states))))
        data += [piece.tobytes() for _, piece in layout.block_pieces(index, sums.arrays().__getitem__, digests)]
    sums = BlockSums([network.head_tap()], KINDS)
    with network.head(weights) as head:
        for number, state in enumerate(states):
            with sums.window(number) as sink, head.observe(sink):
                head(state)
    arrays = sums.arrays().__getitem__
    data += [piece.tobytes() for _, piece in layout.block_pieces(network.n_blocks, arrays, digests)]
    data.append(layout.content_bytes(digests))
    assert write_file(path, data) == layout.size
    return read_statistics(path)


@pytest.mark.parametrize("variant", sorted(ARCHITECTURES))
def test_streamed_statistics_equal_the_whole_model(variant: str, tmp_path: Path) -> None:
    directory = make_tiny(variant, tmp_path / "model")
    windows = windows_of(5, 12)
    expected = dense_statistics(directory, windows, ARCHITECTURES[variant])
    with open_source(str(directory)).checkpoint as checkpoint:
        source = open_source(str(directory))
        with source.checkpoint, stream(source, windows, tmp_path / "s.safetensors") as statistics:
            found = importance(statistics, source.tensors.outputs)
            wanted = [o.name for o in source.tensors.outputs if is_quantizable(TensorShape(o.name, o.shape))]
            assert set(wanted) - found.keys() <= {"token_embd.weight", "output.weight"}, "every matrix has its inputs"
            outputs = {output.name: output for output in source.tensors.outputs}
            for name in wanted:
                if name in expected:
                    order = outputs[name].pieces[0].columns  # the artifact's columns; the twin knows the source's
                    rows = found[name] if order is None else found[name][:, np.argsort(order)]
                    assert order is None or not np.array_equal(rows, found[name])
                    compare_importance(rows, expected[name])
            compare_arrays(statistics, expected, source)
        assert checkpoint.tensors


def compare_importance(found: np.ndarray, dense: Dense) -> None:
    assert found.dtype == np.float32
    seen = dense.counts > 0
    means = dense.sum_squares[seen] / dense.counts[seen, None]
    np.testing.assert_allclose(found[seen], means, rtol=3e-5, atol=1e-9)
    np.testing.assert_array_equal(found[~seen], 1.0)


def compare_arrays(statistics: StatisticsFile, expected: dict[str, Dense], source: Source) -> None:
    """All kinds, for the tensors whose tap has one matrix or as many as they have."""
    sources = {o.name: o.pieces[0].source for o in source.tensors.outputs if o.pieces and len(o.shape) > 1}
    compared = 0
    for name, dense in expected.items():
        tap = next((t for t in statistics.taps.values() if sources.get(name) in t.tensors), None)
        if tap is None:
            continue
        compared += 1
        np.testing.assert_array_equal(statistics.counts(tap.name), dense.counts)
        scale = np.sqrt(dense.sum_squares.max())
        np.testing.assert_allclose(statistics.sum_squares(tap.name), dense.sum_squares, rtol=3e-5, atol=1e-9)
        np.testing.assert_allclose(statistics.sums(tap.name), dense.sums, rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(statistics.absmax(tap.name), dense.absmax, rtol=1e-4, atol=1e-6)
        for matrix in range(tap.matrices):
            np.testing.assert_allclose(
                statistics.hessian(tap.name, matrix), dense.hessian[matrix], rtol=1e-3, atol=2e-6 * scale**2
            )
    assert compared >= 8


def test_experts_without_tokens_are_named(tmp_path: Path) -> None:
    """One window of three tokens cannot reach four experts twice each in every layer."""
    directory = make_tiny("qwen3_moe", tmp_path / "model")
    source = open_source(str(directory))
    with source.checkpoint, stream(source, windows_of(1, 3), tmp_path / "s.safetensors") as statistics:
        table = coverage(statistics, 2)
        experts = [row for row in table if statistics.taps[row.tap].matrices > 1]
        assert len(experts) == sum(tap.matrices > 1 for tap in statistics.taps.values())
        assert all(sum(row.tokens) == 3 * 2 for row in experts)
        assert any(row.short for row in experts)
        for row in experts:
            assert row.short == tuple(e for e, tokens in enumerate(row.tokens) if tokens < 2)
        found = {entry["name"]: entry for entry in summary(statistics, source.tensors.outputs, 2)["tensors"]}
        down = found["blk.0.ffn_down_exps.weight"]
        assert tuple(down["short_matrices"]) == next(r.short for r in experts if r.block == 0)
        assert down["tokens"] == 6
        assert 0 < down["top_1_percent_share"] < 1


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    source = open_source(str(make_tiny("llama", tmp_path / "model")))
    with source.checkpoint, stream(source, windows_of(1, 3), tmp_path / "s.safetensors") as statistics:
        assert coverage(statistics, 16) == []

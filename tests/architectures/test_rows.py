"""Units cover every row once, never cross a matrix when they are cut, and rows come out as the pieces say."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize.architectures import open_architecture
from llm_quantize.architectures import rows as assemble
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import (
    Arrays,
    chunk_ranges,
    inverse,
    matrix_shape,
    placed,
    read_output_rows,
    scatter,
    to_float32,
    unit_ranges,
)
from llm_quantize.models.safetensors import open_checkpoint
from tests.tiny_models import TINY, make_tiny


class Memory:
    """A row source over arrays."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.reads: list[tuple[str, int, int]] = []

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        return self._view(name, transpose).shape

    def _view(self, name: str, transpose: bool) -> Any:
        array = self.arrays[name]
        if transpose:
            array = np.swapaxes(array, -1, -2)
        return array.reshape(-1, array.shape[-1])

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Any:
        self.reads.append((name, start, stop))
        rows = np.ascontiguousarray(self._view(name, transpose)[start:stop])
        if buffer is not None:
            view = np.frombuffer(buffer, rows.dtype, rows.size).reshape(rows.shape)
            view[...] = rows
            rows = view
        if digest is not None:
            digest.update(rows.tobytes())
        return rows


shapes = st.one_of(
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.integers(1, 9), st.integers(1, 300), st.integers(1, 300)),
)


@given(shape=shapes, unit=st.integers(100, 1 << 20), chunk=st.integers(10, 1 << 16))
def test_units_and_chunks_cover_every_row_once(shape: tuple[int, ...], unit: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "UNIT_WEIGHTS", unit)
        patch.setattr(assemble, "CHUNK_WEIGHTS", chunk)
        rows, _ = matrix_shape(shape)
        per_matrix = shape[-2] if len(shape) > 1 else 1
        edges = [0]
        for start, stop in unit_ranges(shape):
            assert start == edges[-1] < stop
            whole = start % per_matrix == 0 and stop % per_matrix == 0
            assert whole or start // per_matrix == (stop - 1) // per_matrix
            position = start
            for matrix, first, last in chunk_ranges(shape, start, stop):
                assert first == position < last
                assert matrix == first // per_matrix == (last - 1) // per_matrix
                position = last
            assert position == stop
            edges.append(stop)
        assert edges[-1] == rows


def test_unit_ranges_do_not_depend_on_threads_and_stay_small() -> None:
    for start, stop in unit_ranges((128256, 8192)):
        assert (stop - start) * 8192 <= assemble.UNIT_WEIGHTS


@given(data=st.data())
def test_rows_follow_order_and_offset(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    left = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    right = -left - 1
    order = np.array(data.draw(st.permutations(range(rows))), dtype=np.int64)
    start = data.draw(st.integers(0, rows - 1))
    pieces = (
        Piece("left", order=order),
        Piece("right", start=start, add=1.0),
    )
    tensor = OutputTensor("x.weight", (2 * rows - start, columns), pieces)
    expected = np.concatenate([left[order], right[start:] + 1.0])
    first = data.draw(st.integers(0, len(expected) - 1))
    last = data.draw(st.integers(first + 1, len(expected)))
    memory = np.full(data.draw(st.sampled_from([0, 64, 1 << 14])), 0xFF, np.uint8)
    found = read_output_rows(Memory(left=left, right=right), tensor, first, last, buffer=memory)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected[first:last])


def test_transposed_rows_are_source_columns() -> None:
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = OutputTensor("x.weight", (4, 3), (Piece("w", count=4, transpose=True),))
    np.testing.assert_array_equal(read_output_rows(Memory(w=weight), tensor, 1, 3), weight.T[1:3])


def test_scattered_rows_are_read_in_runs_and_hashed() -> None:
    weight = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    order = np.concatenate([np.arange(900, 950), np.arange(10, 60)])
    source = Memory(w=weight)
    digest = hashlib.sha256()
    tensor = OutputTensor("x.weight", (100, 4), (Piece("w", count=100, order=order),))
    np.testing.assert_array_equal(read_output_rows(source, tensor, 0, 100, digest=digest), weight[order])
    assert source.reads == [("w", 900, 950), ("w", 10, 60)]
    assert digest.hexdigest() == hashlib.sha256(weight[order].tobytes()).hexdigest()


def test_mixed_dtypes_become_float32() -> None:
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    tensor = OutputTensor("x.weight", (2, 2), (Piece("a"), Piece("b")))
    found = read_output_rows(Memory(a=bits, b=np.array([[1, 2]], np.float16)), tensor, 0, 2)
    np.testing.assert_array_equal(found, np.array([[1.0, -2.0], [1.0, 2.0]], np.float32))
    assert found.dtype == np.float32
    assert to_float32(bits).dtype == np.float32


def test_constants_are_rows_too() -> None:
    tensor = OutputTensor("rope_freqs.weight", (3,), constant=np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(read_output_rows(Memory(), tensor, 0, 1), [[1, 2, 3]])


def some_values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("variant", TINY)
def test_scatter_undoes_the_map_of_every_family(variant: str, tmp_path: Path) -> None:
    with open_checkpoint(str(make_tiny(variant, tmp_path / "model"))) as checkpoint:
        outputs = open_architecture(checkpoint.config).map_tensors(checkpoint.tensors).outputs
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    values = {name: some_values(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    source = Arrays(values.__getitem__)
    mapped = [output for output in outputs if output.pieces]
    found = {piece.source: np.full_like(values[piece.source], np.nan) for o in mapped for piece in o.pieces}
    for output in mapped:
        rows, columns = matrix_shape(output.shape)
        whole = np.asarray(read_output_rows(source, output, 0, rows), np.float32)
        assert whole.shape == (rows, columns)
        ends = sorted({0, rows, *(int(cut) for cut in np.random.default_rng(rows).integers(0, rows + 1, 3))})
        for start, stop in itertools.pairwise(ends):
            scatter(source, output, start, whole[start:stop], found)
    offset = {piece.source for output in mapped for piece in output.pieces if piece.add}
    bent = {piece.source for output in mapped for piece in output.pieces if piece.curve}
    for name, back in found.items():
        if name in bent:
            np.testing.assert_allclose(back, values[name], atol=3e-7, err_msg=name)
        elif name not in offset:
            np.testing.assert_array_equal(back, values[name], err_msg=name)
    again = Arrays(found.__getitem__)
    for output in mapped:
        rows = matrix_shape(output.shape)[0]
        expected, near = read_output_rows(source, output, 0, rows), any(piece.curve for piece in output.pieces)
        found_again = read_output_rows(again, output, 0, rows)
        np.testing.assert_allclose(found_again, expected, rtol=3e-7 if near else 0, err_msg=output.name)


@pytest.mark.parametrize("variant", TINY)
def test_the_inverse_reads_any_rows_of_the_source_out_of_the_outputs(variant: str, tmp_path: Path) -> None:
    """Of every family: exactly, but for what a constant that is added rounds off."""
    with open_checkpoint(str(make_tiny(variant, tmp_path / "model"))) as checkpoint:
        found = open_architecture(checkpoint.config).map_tensors(checkpoint.tensors)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name not in found.left_out}
    values = {name: some_values(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    source = Arrays(values.__getitem__)
    outputs = {output.name: output for output in found.outputs}
    whole = {
        name: to_float32(read_output_rows(source, output, 0, matrix_shape(output.shape)[0])).reshape(output.shape)
        for name, output in outputs.items()
    }
    shifted = {piece.source for output in found.outputs for piece in output.pieces if piece.add}
    bent = {piece.source for output in found.outputs for piece in output.pieces if piece.curve}
    back = inverse(shapes, [output for output in found.outputs if output.pieces])
    assert back.keys() == shapes.keys()
    for name, tensor in back.items():
        rows = matrix_shape(shapes[name])[0]
        start, stop = rows // 3, rows - rows // 4
        read = read_output_rows(Arrays(whole.__getitem__), tensor, start, stop)
        expected = values[name].reshape(rows, -1)[start:stop]
        if name in bent:
            np.testing.assert_allclose(read, expected, atol=3e-7)
            continue
        if name in shifted:
            np.testing.assert_allclose(read, expected, atol=3e-7)
            read, expected = to_float32(read) + np.float32(1), expected + np.float32(1)
        np.testing.assert_array_equal(read, expected, err_msg=name)


def test_what_no_output_holds_has_no_inverse() -> None:
    shapes = {"w": (4, 3)}
    with pytest.raises(ValueError, match="2 rows of w"):
        inverse(shapes, [OutputTensor("x.weight", (2, 3), (Piece("w", 1, 2),))])
    with pytest.raises(ValueError, match="transposed"):
        inverse(shapes, [OutputTensor("x.weight", (2, 4), (Piece("w", 1, transpose=True),))])


@given(data=st.data())
def test_scatter_undoes_any_piece(data: st.DataObject) -> None:
    matrices, rows, columns = (data.draw(st.integers(1, 6)) for _ in range(3))
    stacked, transpose = data.draw(st.booleans()), data.draw(st.booleans())
    shape = (matrices, rows, columns) if stacked else (matrices * rows, columns)
    seen = (matrices, columns, rows) if transpose and stacked else shape[::-1] if transpose else shape
    height, width = matrix_shape(seen)
    edges = sorted({0, height, *data.draw(st.lists(st.integers(0, height), max_size=3))})
    pieces = []
    for start, stop in itertools.pairwise(edges):
        order = data.draw(st.none() | st.permutations(range(stop - start)).map(np.array))
        swapped = data.draw(st.none() | st.permutations(range(width)).map(np.array))
        count = None if stop == height and data.draw(st.booleans()) else stop - start
        pieces.append(Piece("w", start, count, order, transpose, swapped, data.draw(st.sampled_from([0.0, 1.0]))))
    output = OutputTensor("x.weight", (height, width), tuple(pieces))
    values = 1 + np.arange(matrices * rows * columns, dtype=np.float32).reshape(shape)
    source, found = Arrays({"w": values}.__getitem__), {"w": np.zeros_like(values)}
    gathered = to_float32(read_output_rows(source, output, 0, height))
    middle = data.draw(st.integers(0, height))
    scatter(source, output, 0, gathered[:middle], found)
    scatter(source, output, middle, gathered[middle:], found)
    np.testing.assert_array_equal(found["w"], values)


def test_pieces_follow_one_another() -> None:
    source = Arrays({"a": some_values((5, 3), 0), "b": some_values((3, 4), 1)}.__getitem__)
    pieces = (Piece("a", 1), Piece("b", 1, 2, transpose=True))
    found = list(placed(source, OutputTensor("x.weight", (6, 3), pieces)))
    assert found == [(0, 4, pieces[0]), (4, 2, pieces[1])]


def test_values_in_pieces_are_refused() -> None:
    values = np.zeros((4, 4), np.float32).T[:2]
    output = OutputTensor("x.weight", (2, 4), (Piece("w"),))
    with pytest.raises(ValueError, match="one block"):
        scatter(Arrays(lambda _: values), output, 0, np.ones((2, 4), np.float32), {"w": values})

"""Importance matrices written as llama.cpp writes them, and the slow, obvious twin of their reader."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np


def write_legacy(
    path: Path,
    entries: Sequence[tuple[str, int, np.ndarray]],
    *,
    chunks: int | None = None,
    dataset: str = "",
) -> Path:
    """``entries``: (name, calls, float32 values already multiplied by calls). ``chunks`` None: no trailer."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        data = name.encode()
        parts += [struct.pack("<i", len(data)), data, struct.pack("<ii", calls, values.size)]
        parts.append(np.ascontiguousarray(values, "<f4").tobytes())
    if chunks is not None:
        parts += [struct.pack("<ii", chunks, len(dataset.encode())), dataset.encode()]
    path.write_bytes(b"".join(parts))
    return path


def write_gguf_imatrix(
    path: Path,
    entries: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    datasets: Sequence[str] = ("text.txt",),
    chunks: int = 7,
    kind: str = "imatrix",
) -> Path:
    """``entries``: name to (sums of squares float32 (matrices, columns), counts float32 (matrices,))."""
    writer = gguf.GGUFWriter(str(path), "")
    # The owner's files carry no architecture; the writer starts with one.
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def slow_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One float32 division at a time, as llama-quantize's loader does; ones for what was never seen."""
    means = np.empty_like(sums, dtype=np.float32)
    for matrix, count in enumerate(counts):
        for column, total in enumerate(sums[matrix]):
            means[matrix, column] = np.float32(total) / np.float32(count) if count > 0 else np.float32(1)
    return means


def random_entry(random: np.random.Generator, matrices: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts as a run over text leaves them: uneven channels, uneven experts."""
    counts = random.integers(1, 5000, matrices).astype(np.float32)
    sums = (random.lognormal(0.0, 2.0, (matrices, columns)) * counts[:, None]).astype(np.float32)
    return sums, counts

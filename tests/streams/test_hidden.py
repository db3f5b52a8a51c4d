"""Hidden states come back as they were put in, from memory and from disk."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llm_quantize.errors import ResourceError
from llm_quantize.streams.hidden import Activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["memory", "directory", "file"])
def test_what_is_written_is_read(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn((5, 7, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    places = {"directory": {"directory": tmp_path}, "file": {"file": tmp_path / "new" / "states"}}
    with Activations(5, 7, 3, dtype, **places.get(where, {})) as states:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda index: states.write(index, values[index]), [4, 2, 0, 1, 3]))
        for index in (3, 0, 4, 1, 2):
            assert torch.equal(states.read(index), values[index])
            assert states.read(index).dtype == dtype
        states.write(2, values[0])
        assert torch.equal(states.read(2), values[0])
        assert torch.equal(states.read(1), values[1])
        assert torch.equal(states.read(3), values[3])
        assert states.nbytes == values.numel() * dtype.itemsize
        digest = states.digest()
    with pytest.raises(ValueError, match="closed"):
        states.read(0)
    if where == "directory":
        assert list(tmp_path.iterdir()) == []
    if where == "file":
        with Activations(5, 7, 3, dtype, file=tmp_path / "new" / "states") as again:
            assert again.digest() == digest
            assert torch.equal(again.read(4), values[4])


def test_views_and_inference_tensors_can_be_written(tmp_path: Path) -> None:
    with torch.inference_mode():
        value = torch.arange(12.0).reshape(3, 4).T
    for directory in (None, tmp_path):
        with Activations(1, 4, 3, torch.float32, directory=directory) as states:
            states.write(0, value)
            assert torch.equal(states.read(0), value)


def test_wrong_slots_and_shapes_are_refused(tmp_path: Path) -> None:
    with Activations(2, 4, 3, torch.float32, directory=tmp_path) as states:
        for index in (-1, 2):
            with pytest.raises(IndexError):
                states.read(index)
            with pytest.raises(IndexError):
                states.write(index, torch.zeros(4, 3))
        for value in (torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.bfloat16)):
            with pytest.raises(ValueError, match="does not fit"):
                states.write(0, value)


def test_a_full_disk_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="disk is full"):
        Activations(2, 4, 3, torch.float32, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_too_little_memory_is_told() -> None:
    with pytest.raises(ResourceError, match="memory"):
        Activations(1 << 20, 1 << 20, 1 << 15, torch.float32)

"""Files of torch.save: every type as torch reads it, and nothing that is pickled is ever run."""

from __future__ import annotations

import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.io import state_dict_pickle
from llm_quantize.io.safetensors_file import DTYPE_BITS
from llm_quantize.io.torch_file import TorchFile, read_torch_file
from tests.io.torch_by_hand import name, number, numbers, state_dict, storage, tensor, text, write_zip

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
LEGACY = DTYPES[:11]


def bits(file: TorchFile, key: str) -> bytes:
    """The bytes of a tensor as ``contiguous()`` gives them, taken from the file by its strides."""
    info = file.header.tensors[key]
    width = DTYPE_BITS[info.dtype] // 8
    data = np.frombuffer(info.file.read_bytes(), np.uint8)[info.offset :]
    view = file.views.get(key)
    if view is None:
        return data[: info.nbytes].tobytes()
    strides = (*(stride * width for stride in view.strides), 1)
    return np.lib.stride_tricks.as_strided(data, (*info.shape, width), strides).tobytes()


def plain(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type_is_read_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    tensors = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in DTYPES}
    path = tmp_path / "a.bin"
    torch.save(tensors, path, pickle_protocol=protocol)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        twin = torch.load(path, weights_only=protocol == 2)  # torch's own reader of data knows protocol 2
    file = read_torch_file(path)
    assert file.header.tensors.keys() == twin.keys()
    for key, value in twin.items():
        assert file.header.tensors[key].shape == tuple(value.shape)
        assert bits(file, key) == plain(value), key


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_shared_memory(tmp_path: Path, legacy: bool) -> None:
    w = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    tensors: dict[str, torch.Tensor] = {
        **{"w": w, "tied": w, "turned": w.T, "rows": w[2:4], "columns": w[:, 1:3], "every other": w[::2, ::2]},
        **{"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "line": w[1], "column": w[:, 2]},
        **{"parameter": torch.nn.Parameter(w.clone()), "deep": w.reshape(2, 3, 8).transpose(1, 2)},
        **{str(dtype): torch.arange(5).to(dtype) for dtype in LEGACY},
    }
    path = tmp_path / "a.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    twin, file = torch.load(path, weights_only=True), read_torch_file(path)
    for key, value in twin.items():
        assert bits(file, key) == plain(value), key
    assert set(file.views) == {"turned", "columns", "every other", "column", "deep"}
    assert file.header.tensors["w"].offset == file.header.tensors["tied"].offset


@pytest.mark.parametrize(
    "view", [torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj().imag]
)
def test_views_that_negate_are_not_read_as_what_is_stored(tmp_path: Path, view: torch.Tensor) -> None:
    assert view.is_neg() or view.is_conj()
    torch.save({"w": view}, tmp_path / "a.bin")
    with pytest.raises(UnsupportedError, match="not the numbers that are stored"):
        read_torch_file(tmp_path / "a.bin")
    torch.save({"w": view.resolve_neg().resolve_conj()}, tmp_path / "a.bin")
    assert bits(read_torch_file(tmp_path / "a.bin"), "w") == plain(view.resolve_neg().resolve_conj())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_files_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    torch.save({"w": w}, tmp_path / "a.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert bits(read_torch_file(tmp_path / "a.bin"), "w") == plain(w)


def test_what_modules_write(tmp_path: Path) -> None:
    """The attribute _metadata of a state dict, and its order."""
    path = tmp_path / "a.bin"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict(), path)
    assert set(read_torch_file(path).header.tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def attacks(marker: Path) -> dict[str, bytes]:
    command = text(f"touch {marker}")
    short = b"\x8c" + bytes([5]) + b"posix" + b"\x8c" + bytes([6]) + b"system"
    return {
        "reduce": state_dict(a=pickle.dumps(Evil(marker), 2)[2:-1]),
        "global": state_dict(a=name("os", "system") + command + b"\x85R"),
        "stack global": b"\x80\x04" + short + b"\x93" + command + b"\x85R.",
        "inst": b"(" + b"S'true'\n" + b"ios\nsystem\n.",
        "obj": b"\x80\x02(" + name("os", "system") + command + b"o.",
        "newobj": b"\x80\x02" + name("os", "system") + command + b"\x85\x81.",
        "newobj ex": b"\x80\x04" + name("os", "system") + command + b"\x85}\x92.",
        "ext1": b"\x80\x02\x82\x01.",
        "ext2": b"\x80\x02\x83\x01\x00.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "build of a tensor": state_dict(a=tensor() + b"}b"),
        "build with slots": b"\x80\x02}" + b"}}\x86b.",
        "hooks that are called": state_dict(
            a=name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage() + number(0) + numbers(2, 3)
            + numbers(3, 1) + b"\x89" + name("os", "system") + command + b"\x85R" + b"tR"
        ),
        "getattr": state_dict(a=name("builtins", "getattr") + b")R"),
        "eval": state_dict(a=name("builtins", "eval") + text("1") + b"\x85R"),
        "a storage of another kind": state_dict(
            a=tensor(b"(" + text("storage") + name("os", "system") + text("0") + text("cpu") + number(6) + b"tQ")
        ),
        "a name of torch that is not a state dict's": state_dict(a=name("torch", "load") + text("x") + b"\x85R"),
        "a dotted name": b"\x80\x04" + b"\x8c\x05torch" + b"\x8c\x0bhub.os.path" + b"\x93.",
        "a call of a type": state_dict(a=name("torch", "FloatStorage") + b")R"),
        "a class of numpy": state_dict(a=name("numpy.core.multiarray", "scalar") + b")R"),
        "persistent text": b"Pstorage\n.",
        "bytes": b"\x80\x03C\x01a.",
        "a buffer": b"\x80\x05\x97.",
        "a set": b"\x80\x04\x8f.",
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(attacks(Path())))
def test_nothing_is_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    for module in (pickle, os):
        monkeypatch.setattr(module, "loads" if module is pickle else "system", _not_called)
    for path in (
        write_zip(tmp_path / "a.bin", attacks(marker)[kind]),
        _written(tmp_path / "b.bin", attacks(marker)[kind]),
    ):
        with pytest.raises((UnsupportedError, MalformedInputError)) as caught:
            read_torch_file(path)
        assert caught.value.file == str(path)
        assert caught.value.remedy
    assert not marker.exists()


def _not_called(*_: object) -> None:
    raise AssertionError("something was unpickled or run")


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data if data.startswith(b"\x80\x02") else b"\x80\x02" + data)
    return path


def test_a_refusal_names_what_and_where(tmp_path: Path) -> None:
    data = state_dict(a=name("posix", "system") + text("true") + b"\x85R")
    path = write_zip(tmp_path / "a.bin", data)
    with pytest.raises(UnsupportedError) as caught:
        read_torch_file(path)
    assert caught.value.found == "posix.system"
    assert path.read_bytes()[caught.value.offset or 0 :].startswith(b"cposix\nsystem\n")
    assert "nothing of it was run" in caught.value.what
    assert "weights_only=True" in str(caught.value.remedy)


DAMAGE: dict[str, tuple[Callable[[Path], Path], type[LlmQuantizeError], str]] = {
    "right": (lambda path: write_zip(path, state_dict(w=tensor())), AssertionError, ""),  # type: ignore[dict-item]
    "a storage that is missing": (
        lambda path: write_zip(path, state_dict(w=tensor(storage("7")))), MalformedInputError, "missing"),
    "a storage that is short": (
        lambda path: write_zip(path, state_dict(w=tensor(storage(count=7)))), MalformedInputError, "shorter"),
    "a huge storage": (
        lambda path: write_zip(path, state_dict(w=tensor(storage(count=1 << 100)))), MalformedInputError, "shorter"),
    "an offset beyond": (
        lambda path: write_zip(path, state_dict(w=tensor(offset=number(1)))), MalformedInputError, "beyond"),
    "a negative offset": (
        lambda path: write_zip(path, state_dict(w=tensor(offset=number(-1)))), MalformedInputError, "described"),
    "a negative shape": (
        lambda path: write_zip(path, state_dict(w=tensor(shape=numbers(-2, -3)))), MalformedInputError, "described"),
    "a huge shape": (
        lambda path: write_zip(path, state_dict(w=tensor(shape=numbers(1 << 62, 1 << 62)))),
        MalformedInputError, "beyond"),
    "a shape of 33": (
        lambda path: write_zip(path, state_dict(w=tensor(shape=numbers(*[1] * 33), strides=numbers(*[1] * 33)))),
        MalformedInputError, "do not fit"),
    "fewer strides": (
        lambda path: write_zip(path, state_dict(w=tensor(strides=numbers(1)))), MalformedInputError, "do not fit"),
    "huge strides": (
        lambda path: write_zip(path, state_dict(w=tensor(strides=numbers(1 << 120, 1)))),
        MalformedInputError, "beyond"),
    "a list": (lambda path: write_zip(path, b"\x80\x02]."), UnsupportedError, "no state dict"),
    "a number among tensors": (
        lambda path: write_zip(path, state_dict(epoch=number(3))), UnsupportedError, "else than a tensor"),
    "a dictionary in it": (
        lambda path: write_zip(path, state_dict(model=b"}")), UnsupportedError, "else than a tensor"),
    "a storage among tensors": (
        lambda path: write_zip(path, state_dict(w=storage())), UnsupportedError, "else than a tensor"),
    "a key that is a tuple": (
        lambda path: write_zip(path, b"\x80\x02}" + numbers(1) + tensor() + b"s."), MalformedInputError, "a key"),
    "compressed": (
        lambda path: write_zip(path, state_dict(w=tensor()), method=zipfile.ZIP_DEFLATED),
        UnsupportedError, "compressed"),
    "a bomb": (
        lambda path: write_zip(path, bytes(40 << 20), method=zipfile.ZIP_DEFLATED), UnsupportedError, "compressed"),
    "a long pickle": (lambda path: write_zip(path, bytes(33 << 20)), MalformedInputError, "too large"),
    "many opcodes": (
        lambda path: write_zip(path, b"\x80\x02" + b"}" * 2_100_000 + b"."), MalformedInputError, "too long"),
    "doubled by reference": (
        lambda path: write_zip(path, b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 10_000 + b"."),
        MalformedInputError, "more than one value"),
    "nested": (lambda path: write_zip(path, b"\x80\x02)" + b"\x85" * 200_000 + b"."), UnsupportedError, "no state"),
    "two pickles": (lambda path: _twice(path), MalformedInputError, "one data.pkl"),
    "no pickle": (lambda path: _empty(path), MalformedInputError, "one data.pkl"),
    "empty": (lambda path: _bytes(path, b""), MalformedInputError, "not a file of torch.save"),
    "text": (lambda path: _bytes(path, b"version https://git-lfs"), MalformedInputError, "not a file of torch.save"),
    "an old tar": (lambda path: _bytes(path, b"./storages" + bytes(500)), MalformedInputError, "not a file"),
    "another pickle": (lambda path: _bytes(path, pickle.dumps([1], 2)), MalformedInputError, ""),
    "an old file cut short": (lambda path: _old(path, -5), MalformedInputError, "truncated"),
    "an old file with more": (lambda path: _old(path, 5), MalformedInputError, "bytes follow"),
    "a file cut short": (
        lambda path: _bytes(path, write_zip(path, state_dict(w=tensor())).read_bytes()[:-30]),
        MalformedInputError, ""),
    "a file with more": (
        lambda path: _bytes(path, write_zip(path, state_dict(w=tensor())).read_bytes() + b"x"),
        MalformedInputError, "bytes follow"),
    "overlapping members": (lambda path: _overlapping(path), MalformedInputError, "over each other"),
    "another byte order": (lambda path: _big(path), UnsupportedError, "byte order"),
    "a damaged pickle": (lambda path: _flipped(path), MalformedInputError, "checksum"),
    "more members than bytes": (lambda path: _counted(path), MalformedInputError, "lies about its size"),
    "a directory": (lambda path: (path.mkdir(), path)[1], MalformedInputError, "regular file"),
    "a FIFO": (lambda path: (os.mkfifo(path), path)[1], MalformedInputError, "regular file"),
}  # fmt: skip


def _bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _twice(path: Path) -> Path:
    write_zip(path, state_dict(w=tensor()))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", b"x")
    return path


def _empty(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"x")
    return path


def _old(path: Path, change: int) -> Path:
    torch.save({"w": torch.zeros(8)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    return _bytes(path, data[:change] if change < 0 else data + bytes(change))


def _overlapping(path: Path) -> Path:
    data = bytearray(write_zip(path, state_dict(w=tensor())).read_bytes())
    first = data.find(b"PK\x01\x02")
    second = data.find(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return _bytes(path, bytes(data))


def _big(path: Path) -> Path:
    write_zip(path, state_dict(w=tensor()))
    data = path.read_bytes().replace(b"little", b"biggie")
    return _bytes(path, data)


def _flipped(path: Path) -> Path:
    data = write_zip(path, state_dict(w=tensor())).read_bytes()
    return _bytes(path, data.replace(b"storage", b"storagf", 1))


def _counted(path: Path) -> Path:
    data = bytearray(write_zip(path, state_dict(w=tensor())).read_bytes())
    struct.pack_into("<HH", data, len(data) - 14, 60000, 60000)
    return _bytes(path, bytes(data))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(tmp_path: Path, kind: str) -> None:
    make, error, says = DAMAGE[kind]
    path = make(tmp_path / "a.bin")
    if error is AssertionError:
        assert read_torch_file(path).header.tensors["w"].shape == (2, 3)
        return
    with pytest.raises(error) as caught:
        read_torch_file(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.remedy  # type: ignore[attr-defined]


def _mutated(source: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them replaced, taken away, doubled, or opcodes put between them."""
    out = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(out) + 1)
        pieces = (b"", b"\xff" * 4, source.randbytes(3), bytes(out[at : at + 9]), tensor(), storage(), number(1 << 70))
        piece = source.choice([*state_dict_pickle._OPCODES, *pieces])
        out[at : at + source.choice([0, 1, 4, len(piece)])] = piece
        if not out:
            out += b"."
    return bytes(out)


def _fuzz(folder: Path, seed: int, count: int) -> int:
    """How many of ``count`` damaged files were read all the same."""
    source, path, read = random.Random(seed), folder / "a.bin", 0
    torch.save({"a": torch.zeros(3, 4), "b": torch.zeros(5).to(torch.float8_e4m3fn)}, path)
    whole = path.read_bytes()
    torch.save({"a": torch.zeros(3, 4)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    right = state_dict(w=tensor(), v=tensor(storage(kind="HalfStorage"), numbers(1, 3)))
    for turn in range(count):
        if turn % 3 == 0:
            write_zip(path, _mutated(source, right))
        else:
            path.write_bytes(_mutated(source, whole if turn % 3 == 1 else old))
        read += _survives(path)
    return read


def _survives(path: Path) -> bool:
    """Whether a damaged file is read all the same; its tensors are then inside it. Else the error is one of ours."""
    try:
        found = read_torch_file(path)
    except LlmQuantizeError as error:
        told = error
    else:
        size = path.stat().st_size
        plain = [info for key, info in found.header.tensors.items() if key not in found.views]
        assert all(info.offset + info.nbytes <= size for info in plain)
        return True
    assert told.file == str(path)
    assert told.remedy
    return False


def test_fuzz(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, 0, 900) > 20


@pytest.mark.heavy
def test_fuzz_many(tmp_path: Path) -> None:
    assert _fuzz(tmp_path, 1, 300_000) > 1000

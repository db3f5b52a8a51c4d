"""Files of torch.save written by hand: the zip container and pickles of single opcodes, right ones and others."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path


def text(value: str) -> bytes:
    """The opcode of a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """The opcode of a name."""
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    """The opcode of a whole number."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    """A tuple."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    """A storage outside the pickle."""
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    held: bytes | None = None,
    offset: bytes | None = None,
    shape: bytes | None = None,
    strides: bytes | None = None,
) -> bytes:
    """A float tensor of 2 x 3, or as told."""
    return (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + (held or storage())
        + (offset or number(0)) + (shape or numbers(2, 3)) + (strides or numbers(3, 1))
        + b"\x89" + name("collections", "OrderedDict") + b")R" + b"tR"
    )  # fmt: skip


def state_dict(**tensors: bytes) -> bytes:
    """The pickle of a dictionary of tensors."""
    items = b"".join(text(key.replace("__", ".")) + value for key, value in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def write_zip(
    path: Path, pickle: bytes, storages: Mapping[str, bytes] | None = None, *, method: int = 0, root: str = "archive"
) -> Path:
    """A file of torch.save around ``pickle``; storage 0 holds six floats."""
    held = {"0": struct.pack("<6f", *range(6))} if storages is None else storages
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(f"{root}/data.pkl", pickle)
        file.writestr(f"{root}/byteorder", b"little")
        for key, data in held.items():
            file.writestr(f"{root}/data/{key}", data)
        file.writestr(f"{root}/version", b"3\n")
    return path

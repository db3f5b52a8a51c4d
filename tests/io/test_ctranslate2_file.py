"""CTranslate2's container: laid out as its own writer does, read as data from strangers."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from ctranslate2.specs import common_spec, model_spec

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.io.ctranslate2_file import MODEL_FILE, Layout, Variable, layout_model, read_model_file

DATA = {"b/weight": np.arange(12, dtype=np.int8).reshape(3, 4), "b/weight_scale": np.arange(1, 4, dtype=np.float32)}
VARIABLES = (
    Variable("b/weight", "int8", (3, 4)),
    Variable("b/weight_scale", "float32", (3,)),
    Variable("a", "int16", (), struct.pack("<h", -5)),
    Variable("c", "float32", (), struct.pack("<f", 1.5)),
)


class Spec(model_spec.ModelSpec):  # type: ignore[misc]
    """The same, for the owner's writer."""

    name = "Kind"
    revision = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d = np.int16(-5), np.float32(1.5), "b/weight"
        self.b = common_spec.LinearSpec()
        self.b.weight, self.b.weight_scale = DATA["b/weight"], DATA["b/weight_scale"]


def filled(layout: Layout) -> bytes:
    body = bytearray(layout.size)
    for at, piece in ((0, layout.header), *layout.between):
        body[at : at + len(piece)] = piece
    for name, at in layout.offsets.items():
        body[at : at + DATA[name].nbytes] = DATA[name].tobytes()
    return bytes(body)


def sound() -> bytes:
    return filled(layout_model("Kind", 3, VARIABLES, {"d": "b/weight"}))


def test_the_owners_writer_makes_the_same_bytes(tmp_path: Path) -> None:
    spec = Spec()
    spec.validate()
    spec.d = "b/weight"
    spec._serialize(tmp_path / MODEL_FILE)
    assert (tmp_path / MODEL_FILE).read_bytes() == sound()


def test_what_was_laid_out_is_read(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    path.write_bytes(sound())
    found = read_model_file(path)
    assert (found.kind, found.revision, found.aliases) == ("Kind", 3, {"d": "b/weight"})
    assert {name: (one.dtype, one.shape) for name, one in found.variables.items()} == {
        one.name: (one.dtype, one.shape) for one in VARIABLES
    }
    assert found.find("d") == found.variables["b/weight"]
    layout = layout_model("Kind", 3, VARIABLES, {"d": "b/weight"})
    assert found.known == tuple((at, len(piece)) for at, piece in ((0, layout.header), *layout.between))


def test_a_variable_of_four_gigabytes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="too large for CTranslate2"):
        layout_model("Kind", 3, [Variable("w", "float32", (1 << 15, 1 << 15))], {})


def change(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"\x05" + data[1:], "version"),
        (lambda data: data[:-3], "cut off"),
        (lambda data: data + b"\0", "left over"),
        (lambda data: data[:60], "cut off"),
        (lambda data: data.replace(b"b/weight\0", b"b/wei\0ht\0"), "no text"),
        (lambda data: data.replace(b"\x02\0c\0", b"\x02\0a\0"), "twice"),
        (lambda data: data.replace(struct.pack("<II", 3, 4), struct.pack("<II", 3, 5), 1), "size is not its shape"),
        (lambda data: data.replace(struct.pack("<B2I", 2, 3, 4), struct.pack("<B2I", 9, 3, 4)), "too many dimensions"),
        (lambda data: change(data, struct.pack("<B2IB", 2, 3, 4, 1), struct.pack("<B2IB", 2, 3, 4, 7)), "element type"),
        (lambda data: data[:-1] + b"d", "no text"),
        (lambda data: data[:-2] + b"d\0", "stands for nothing"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, what: str) -> None:
    path = tmp_path / MODEL_FILE
    path.write_bytes(damage(sound()))  # type: ignore[operator]
    with pytest.raises((MalformedInputError, UnsupportedError), match=what) as caught:
        read_model_file(path)
    assert caught.value.file == str(path)


def test_nothing_random_is_a_bug(tmp_path: Path) -> None:
    chance, path = random.Random(5), tmp_path / MODEL_FILE
    for _ in range(400):
        data = bytearray(sound())
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data[: chance.randrange(len(data) // 2, len(data) + 1)]))
        with contextlib.suppress(LlmQuantizeError):
            read_model_file(path)

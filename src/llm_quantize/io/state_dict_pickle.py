"""The pickle of a state dict, read as data: a loop over the opcodes that one needs, and a closed table of names.

A pickle is a program (Python, Lib/pickletools.py, says what each opcode does); run as Python runs it, it can call
whatever it names. Here names are looked up in a table of this module and never imported, a call makes one of the few
records below, and every other opcode and name is refused with its offset. What a pickle may take is bounded: its
opcodes are counted, nothing is copied by a reference, and nothing is followed recursively.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError, printable
from llm_quantize.io.safetensors_file import DTYPE_BITS

MAX_STEPS = 2_000_000
"""Opcodes of one file: a tensor takes about 30."""

SAVE_AGAIN = (
    'if you trust whoever wrote it, save it again: python -c "import torch, sys; from safetensors.torch import '
    "save_file; save_file({n: t.contiguous().clone() for n, t in torch.load(sys.argv[1], weights_only=True)"
    '.items()}, sys.argv[2])" IN model.safetensors'
)
_AGAIN = "fetch this file again; it is damaged or was not written by torch.save"

_TYPES = {
    **{"double": "F64", "float": "F32", "half": "F16", "bfloat16": "BF16", "float64": "F64", "float32": "F32"},
    **{"float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
    **{"uint16": "U16", "uint32": "U32", "uint64": "U64"},
}
"""Element types of torch by safetensors' words."""

_STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    **{"BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": ""},
}
"""Classes of storages by the type of their elements; "": bytes."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors share: ``elements`` of ``dtype`` ("": bytes) under ``key``."""

    key: str
    dtype: str
    elements: int

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return DTYPE_BITS[self.dtype] // 8 if self.dtype else 1

    @property
    def nbytes(self) -> int:
        return self.elements * self.width


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor: ``offset`` and ``strides`` in elements; ``at``: where in the file the pickle makes it."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    at: int


@dataclass(frozen=True, slots=True)
class Pickle:
    """``value``: what was pickled, of dict, list, tuple, str, int, float, bool, None, Storage and Tensor. ``end``:
    where the pickle ends in its data; ``steps``: opcodes up to there."""

    value: Any
    end: int
    steps: int


@dataclass(frozen=True, slots=True)
class _Name:
    """A name of the closed table: what calling it makes (None: it is only handed on), and its element type."""

    text: str
    call: Callable[[_Reader, tuple[Any, ...]], Any] | None = None
    dtype: str | None = None


def read_pickle(data: bytes, file: Path, base: int, *, start: int = 0, steps: int = 0) -> Pickle:
    """The pickle that begins at ``start`` of ``data``, which begins at ``base`` of ``file``. ``steps``: opcodes that
    were read of this file before.

    Raises MalformedInputError (no right pickle) and UnsupportedError (an opcode, a name or a call that no state dict
    needs); nothing is run.
    """
    return _Reader(data, file, base, start, steps).read()


class _Reader:
    def __init__(self, data: bytes, file: Path, base: int, start: int, steps: int) -> None:
        self._data, self._file, self._base, self._at, self._steps = data, file, base, start, steps
        self._opcode = start
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Pickle:
        while True:
            self._opcode = self._at
            self._steps += 1
            if self._steps > MAX_STEPS:
                self.refuse("the pickle is too long for a state dict", f"{MAX_STEPS:,} opcodes at most", "more")
            code = self._take(1)
            if code == b".":
                value = self._pop()
                if self._stack or self._marks:
                    self.refuse("the pickle ends with more than one value", "one", len(self._stack) + 1)
                return Pickle(value, self._at, self._steps)
            step = _OPCODES.get(code)
            if step is None:
                self.unsupported("the pickle has an opcode that no state dict needs", repr(code))
            step(self)

    def refuse(self, what: str, expected: Any, found: Any) -> NoReturn:
        raise self._error(MalformedInputError, what, expected, found, _AGAIN)

    def unsupported(self, what: str, found: Any, remedy: str = SAVE_AGAIN) -> NoReturn:
        """Refuse what is pickled right, but is not part of a state dict."""
        raise self._error(UnsupportedError, f"{what}; nothing of it was run", "a state dict of tensors", found, remedy)

    def _error(self, kind: type[LlmQuantizeError], what: str, expected: Any, found: Any, remedy: str) -> Exception:
        where = self._base + self._opcode
        return kind(what, file=self._file, offset=where, expected=expected, found=found, remedy=remedy)

    @property
    def at(self) -> int:
        """Where in the file the opcode at hand stands."""
        return self._base + self._opcode

    def _take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) < count:
            self.refuse("the pickle is cut short", f"{count:,} more bytes", f"{len(piece):,}")
        self._at += count
        return piece

    def number(self, form: str) -> int:
        """The argument of an opcode."""
        value: int
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self.refuse("the pickle takes a value that is not there", "a value", "an empty stack")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self.refuse("the pickle takes a value that is not there", "a value", "an empty stack")
        value = self._stack[-1]
        if type(value) is not kind:
            self.refuse("the pickle fills something that cannot be filled", kind.__name__, type(value).__name__)
        return value

    def _marked(self) -> list[Any]:
        if not self._marks:
            self.refuse("the pickle ends a group that has no beginning", "a mark", "none")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def protocol(self) -> None:
        version = self.number("<B")
        if version > 5:
            self.unsupported("the pickle is of a protocol that is not known here", f"protocol {version}")

    def frame(self) -> None:
        self.number("<Q")

    def constant(self, value: Any) -> None:
        self.push(value)

    def integer(self, form: str) -> None:
        self.push(self.number(form))

    def long(self) -> None:
        count = self.number("<B")
        if count > 16:
            self.refuse("a number of the pickle is too large", "16 bytes at most", count)
        self.push(int.from_bytes(self._take(count), "little", signed=True))

    def text(self, form: str) -> None:
        count = self.number(form)
        try:
            self.push(self._take(count).decode())
        except UnicodeDecodeError as error:
            raise self._error(
                MalformedInputError, "a text of the pickle is not UTF-8", "UTF-8", error.reason, _AGAIN
            ) from error

    def put(self, form: str) -> None:
        key = self.number(form)
        if not self._stack:
            self.refuse("the pickle takes a value that is not there", "a value", "an empty stack")
        self._memo[key] = self._stack[-1]

    def memoize(self) -> None:
        if not self._stack:
            self.refuse("the pickle takes a value that is not there", "a value", "an empty stack")
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, form: str) -> None:
        key = self.number(form)
        if key not in self._memo:
            self.refuse("the pickle refers to a value that it has not kept", "a kept value", key)
        self.push(self._memo[key])

    def tuple_of(self, count: int) -> None:
        if len(self._stack) - count < (self._marks[-1] if self._marks else 0):
            self.refuse("the pickle takes a value that is not there", "a value", "an empty stack")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        self.push(values)

    def tuple_marked(self) -> None:
        self.push(tuple(self._marked()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._marked()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set(self._top(dict), key, value)

    def set_items(self) -> None:
        values = self._marked()
        target = self._top(dict)
        if len(values) % 2:
            self.refuse("the pickle has a key without a value", "pairs", f"{len(values)} values")
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._set(target, key, value)

    def _set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            self.refuse("a key of the pickle is neither a text nor a number", "a name", type(key).__name__)
        target[key] = value

    def global_name(self) -> None:
        """A name in two lines of text."""
        end = self._data.find(b"\n", self._at)
        last = self._data.find(b"\n", end + 1) if end >= 0 else -1
        if last < 0 or last - self._at > 1000:
            self.refuse("a name of the pickle has no end", "two lines", "none")
        module, name = (self._data[first:stop] for first, stop in ((self._at, end), (end + 1, last)))
        self._at = last + 1
        self._push_name(f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}")

    def stack_name(self) -> None:
        """A name of which both halves are on the stack."""
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("a name of the pickle is no text", "text", type(name).__name__)
        self._push_name(f"{module}.{name}")

    def _push_name(self, text: str) -> None:
        known = _NAMES.get(text)
        if known is None:
            self.unsupported("the pickle asks for something that no state dict needs", printable(text, 200), _NOT_OURS)
        self.push(known)

    def reduce(self) -> None:
        """A call: of a name of the table, with a tuple."""
        arguments, name = self._pop(), self._pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            self.refuse("the pickle calls what cannot be called", "a name and a tuple", type(name).__name__)
        if name.call is None:
            self.unsupported("the pickle calls what no state dict calls", name.text)
        self.push(name.call(self, arguments))

    def build(self) -> None:
        """Attributes of a dictionary (a state dict has _metadata): not kept."""
        state = self._pop()
        self._top(dict)
        if type(state) is not dict:
            self.unsupported("the pickle sets the state of something that has none", type(state).__name__)

    def storage(self) -> None:
        """What lies outside the pickle."""
        match self._pop():
            case ("storage", _Name(dtype=str(dtype)) as name, str(key), str(), int(count)) | (
                "storage",
                _Name(dtype=str(dtype)) as name,
                str(key),
                str(),
                int(count),
                None,
            ) if name.text.endswith("Storage") and type(count) is int and count >= 0:
                self.push(Storage(key, dtype, count))
            case _:
                self.refuse(
                    "a storage of the pickle is not described as torch.save does",
                    "(storage, type, key, location, count)",
                    "something else",
                )


_NOT_OURS = "do not load this file with anything that unpickles; " + SAVE_AGAIN


def _whole(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and value >= 0 for value in values)


def _tensor(reader: _Reader, arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v2: storage, offset, size, strides, requires_grad, hooks[, metadata]."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest) if (
            type(offset) is int and offset >= 0 and _whole(shape) and _whole(strides)
        ):
            _refuse_marks(reader, rest)
            if not storage.dtype:
                reader.refuse("a tensor has no element type", "a type", "bytes")
            return Tensor(storage, storage.dtype, offset, shape, strides, reader.at)
    reader.refuse("a tensor of the pickle is not described as torch.save does", "storage, offset, size", "other values")


def _typed_tensor(reader: _Reader, arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_tensor_v3: storage, offset, size, strides, requires_grad, hooks, type[, metadata]."""
    match arguments:
        case (
            Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            bool(),
            dict(),
            _Name() as name,
            *rest,
        ) if type(offset) is int and offset >= 0 and _whole(shape) and _whole(strides) and name.dtype:
            _refuse_marks(reader, rest)
            return Tensor(storage, name.dtype, offset, shape, strides, reader.at)
    reader.refuse("a tensor of the pickle is not described as torch.save does", "storage, offset, size", "other values")


def _refuse_marks(reader: _Reader, rest: list[Any]) -> None:
    """torch._utils.get_tensor_metadata: whether the numbers that are stored mean their negatives or conjugates."""
    marks = rest[0] if rest else None
    if len(rest) > 1 or not (marks is None or (type(marks) is dict and all(on is False for on in marks.values()))):
        reader.unsupported("a tensor of the pickle is not the numbers that are stored", "a negative or conjugate view")


def _parameter(reader: _Reader, arguments: tuple[Any, ...]) -> Tensor:
    """torch._utils._rebuild_parameter: tensor, requires_grad, hooks."""
    match arguments:
        case (Tensor() as tensor, bool(), dict()):
            return tensor
    reader.refuse("a parameter of the pickle is not described as torch.save does", "a tensor", "other values")


def _dictionary(reader: _Reader, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        reader.unsupported("a dictionary of the pickle is made of other values", f"{len(arguments)} arguments")
    return {}


def _size(reader: _Reader, arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """torch.Size: one tuple."""
    if len(arguments) == 1 and _whole(arguments[0]):
        shape: tuple[int, ...] = arguments[0]
        return shape
    reader.refuse("a size of the pickle is no tuple of whole numbers", "a tuple", "other values")


_NAMES: dict[str, _Name] = {
    name.text: name
    for name in (
        _Name("collections.OrderedDict", _dictionary),
        _Name("torch._utils._rebuild_tensor_v2", _tensor),
        _Name("torch._utils._rebuild_tensor_v3", _typed_tensor),
        _Name("torch._utils._rebuild_parameter", _parameter),
        _Name("torch.Size", _size),
        *(_Name(f"torch.{storage}", dtype=dtype) for storage, dtype in _STORAGES.items()),
        _Name("torch.storage.UntypedStorage", dtype=""),
        *(_Name(f"torch.{name}", dtype=dtype) for name, dtype in _TYPES.items()),
    )
}

_OPCODES: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": _Reader.protocol,
    b"\x95": _Reader.frame,
    b"(": _Reader.mark,
    b"N": lambda reader: reader.constant(None),
    b"\x88": lambda reader: reader.constant(True),
    b"\x89": lambda reader: reader.constant(False),
    b"J": lambda reader: reader.integer("<i"),
    b"K": lambda reader: reader.integer("<B"),
    b"M": lambda reader: reader.integer("<H"),
    b"\x8a": _Reader.long,
    b"G": lambda reader: reader.integer(">d"),
    b"X": lambda reader: reader.text("<I"),
    b"\x8c": lambda reader: reader.text("<B"),
    b"\x8d": lambda reader: reader.text("<Q"),
    b"q": lambda reader: reader.put("<B"),
    b"r": lambda reader: reader.put("<I"),
    b"\x94": _Reader.memoize,
    b"h": lambda reader: reader.get("<B"),
    b"j": lambda reader: reader.get("<I"),
    b")": lambda reader: reader.constant(()),
    b"]": lambda reader: reader.constant([]),
    b"}": lambda reader: reader.constant({}),
    b"t": _Reader.tuple_marked,
    b"\x85": lambda reader: reader.tuple_of(1),
    b"\x86": lambda reader: reader.tuple_of(2),
    b"\x87": lambda reader: reader.tuple_of(3),
    b"a": _Reader.append,
    b"e": _Reader.appends,
    b"s": _Reader.set_item,
    b"u": _Reader.set_items,
    b"c": _Reader.global_name,
    b"\x93": _Reader.stack_name,
    b"R": _Reader.reduce,
    b"b": _Reader.build,
    b"Q": _Reader.storage,
}
"""What a pickler writes for a state dict, protocols 2 to 5. Not among them: everything that makes other objects
(INST, OBJ, NEWOBJ, EXT), sets, bytes and buffers, and the text forms of protocol 0."""

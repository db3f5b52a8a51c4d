"""Sources of no sense, by structure: what is written down of a right source is changed, one to four things at a time.

    PYTHONPATH=src python -m tests.conversions.fuzz COUNT [SOURCE ...]

tries COUNT inputs for each kind of source and prints how many were tried in a second, and how many could be opened.
Data is not written (files are sparse) but for what is small, as shapes are, so a value that is read is zero; what is
looked at are names, counts, shapes, types, places and settings.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_MAGIC, GGUFValueType

from llm_quantize.conversion import foresee
from llm_quantize.errors import LlmQuantizeError
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.ctranslate2_file import MODEL_FILE, TYPES, VERSION, read_model_file
from llm_quantize.io.gguf_file import MetaValue, read_gguf
from llm_quantize.models.opening import open_source
from tests.conversions.sources import SIZES, SOURCES
from tests.tiny_models import make_tiny

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 128, 255, 10**12, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "名\0"),
    *([], {}, [0], [[1]], [None], {"a": 1}, "gptq", "awq", "fp8", "int", "group", "I32", "F8_E4M3", "U4", "BF16"),
)
SIZES_OF_NO_SENSE = (0, 1, 2, 3, 15, 16, 31, 32, 64, 127, 255, 256, 257, 512, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40,
                     (1 << 63) - 1, (1 << 64) - 1)  # fmt: skip
DTYPES = ("BF16", "F16", "F32", "F64", "I8", "U8", "I16", "I32", "U32", "I64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL")
WORDS = (
    *("weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "biases"),
    *("weight_zero_point", "weight_shape", "weight_global_scale", "weight.absmax", "bias", "SCB"),
)
READ_EVERY = 8
SMALL = 1024
"""Bytes of a tensor whose values are written."""
MEMORY = 3 << 30
"""Address space beyond what the process has, in bytes: whoever asks for more meets MemoryError, which is no error of
ours."""

Write = Callable[[random.Random], None]


def changed(choice: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it changed, wherever it is."""
    value = copy.deepcopy(value)
    place, key = choice.choice(list(_places(value)))
    match choice.randrange(4):
        case 0 if isinstance(place, dict):
            place[choice.choice([*WORDS, "x", *map(str, place)])] = place.pop(key)
        case 1:
            del place[key]
        case 2 if isinstance(place[key], int) and not isinstance(place[key], bool):
            place[key] = choice.choice([place[key] + 1, place[key] - 1, 2 * place[key], -place[key], 0])
        case _:
            place[key] = copy.deepcopy(choice.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list) and value[key]:
            yield from _places(value[key])


def directory(place: Path) -> Write:
    """config.json and the header of model.safetensors."""
    config = json.loads((place / "config.json").read_text())
    file = place / "model.safetensors"
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    data = max(header[name]["data_offsets"][1] for name in names)
    whole, small = file.read_bytes()[-data:], [header[name]["data_offsets"] for name in names]
    small = [(start, whole[start:stop]) for start, stop in small if stop - start <= SMALL]

    def tensor(choice: random.Random, told: dict[str, Any]) -> None:
        name = choice.choice(names)
        entry = told.get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            return
        match choice.randrange(8):
            case 0:
                entry["dtype"] = choice.choice(DTYPES)
            case 1:
                entry["shape"] = [choice.choice(SIZES_OF_NO_SENSE) for _ in range(choice.randrange(5))]
            case 2 if entry["shape"]:
                entry["shape"][choice.randrange(len(entry["shape"]))] = choice.choice(SIZES_OF_NO_SENSE)
            case 3:
                entry["data_offsets"] = [choice.choice([0, data, data + 1, -1, 1 << 63]) for _ in range(2)]
            case 4:
                told[choice.choice(names)] = told.pop(name)
            case 5:
                told[f"{name.rpartition('.')[0]}.{choice.choice(WORDS)}"] = dict(entry)
            case 6:
                entry["shape"] = entry["shape"][::-1]
            case _:
                del told[name]

    def write(choice: random.Random) -> None:
        settings, told = config, copy.deepcopy(header)
        for _ in range(choice.randrange(1, 5)):
            match choice.randrange(5):
                case 0:
                    settings = changed(choice, settings)
                case 1 if isinstance(settings.get("quantization_config"), dict) and settings["quantization_config"]:
                    settings = {**settings, "quantization_config": changed(choice, settings["quantization_config"])}
                case 2:
                    told = changed(choice, told) or dict(header)
                case _:
                    tensor(choice, told)
        text = json.dumps(told).encode()
        if choice.random() < 0.02:
            text = text[:-1] + b"," + text[1:]  # every name twice
        length = len(text) if choice.random() < 0.98 else choice.choice(SIZES_OF_NO_SENSE)
        (place / "config.json").write_text(json.dumps(settings))
        front = 8 + len(text)
        parts = [(0, struct.pack("<Q", length) + text), *((front + start, content) for start, content in small)]
        _sparse(file, parts, front + data - (choice.random() < 0.02))

    return write


def _sparse(path: Path, parts: Sequence[tuple[int, bytes]], size: int) -> None:
    with path.open("wb") as stream:
        for offset, content in parts:
            stream.seek(offset)
            stream.write(content)
        stream.truncate(max(0, size))


_PACKED = {GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
           GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
           GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d"}  # fmt: skip


def _text(text: str) -> list[bytes]:
    return [struct.pack("<Q", len(text.encode())), text.encode()]


def _meta(value: MetaValue) -> list[bytes]:
    """A value of GGUF in parts, counts by themselves."""
    head = [struct.pack("<I", value.type)]
    if value.type == GGUFValueType.STRING:
        return [*head, *_text(value.value)]
    if value.type != GGUFValueType.ARRAY:
        return [*head, struct.pack("<" + _PACKED[value.type], value.value)]
    assert value.item is not None
    head += [struct.pack("<I", value.item), struct.pack("<Q", len(value.value))]
    if value.item == GGUFValueType.STRING:
        return [*head, b"".join(part for text in value.value for part in _text(text))]
    return [*head, struct.pack(f"<{len(value.value)}{_PACKED[value.item]}", *value.value)]


def file_of_gguf(place: Path) -> Write:
    """The whole front of a GGUF file: keys, values and tensors, and the numbers that say how many and how long."""
    whole = read_gguf(place)
    keys = {key: [*_text(key), *_meta(value)] for key, value in whole.metadata.items()}
    vocabulary = [key for key in keys if key.startswith("tokenizer.")]
    tensors = [
        (*_text(one.name), struct.pack("<I", len(one.shape)), *(struct.pack("<Q", n) for n in reversed(one.shape)),
         struct.pack("<I", one.type), struct.pack("<Q", one.offset - whole.data_start))
        for one in whole.tensors
    ]  # fmt: skip
    data = whole.file_size - whole.data_start

    def number(choice: random.Random, part: bytes) -> bytes:
        """Another number in the place of one of 4 or 8 bytes; another byte in the place of any other."""
        if len(part) in (4, 8) and choice.random() < 0.8:
            own = int.from_bytes(part, "little")
            least = [own + 1, max(0, own - 1), own * 2, own // 2, own ^ 1, choice.randrange(45)]
            return (choice.choice([*least, *SIZES_OF_NO_SENSE]) % (1 << 8 * len(part))).to_bytes(len(part), "little")
        found = bytearray(part)
        if found:
            found[choice.randrange(len(found))] = choice.randrange(256)
        return bytes(found)

    def write(choice: random.Random) -> None:
        told, listed = dict(keys), [list(one) for one in tensors]
        counts = [len(listed), len(told)]
        for _ in range(choice.randrange(1, 5)):
            key = choice.choice(vocabulary if vocabulary and choice.random() < 0.3 else list(keys))
            match choice.randrange(7):
                case 0:
                    told.pop(key, None)
                case 1 | 2 if key in told:
                    parts = list(told[key])
                    at = choice.randrange(2 if choice.random() < 0.8 and len(parts) > 2 else 0, len(parts))
                    parts[at] = number(choice, parts[at])
                    told[key] = parts
                case 3 if key in told:
                    told[key] = [*told[key][:2], *told[choice.choice(list(told))][2:]]
                case 4:
                    listed[choice.randrange(len(listed))][:2] = listed[choice.randrange(len(listed))][:2]
                case 5:
                    del listed[choice.randrange(len(listed))]
                case _:
                    one = listed[choice.randrange(len(listed))]
                    at = choice.randrange(len(one))
                    one[at] = number(choice, one[at])
            if not listed:
                break
        if choice.random() < 0.9:
            counts = [len(listed), len(told)]
        head = struct.pack("<IIQQ", GGUF_MAGIC, choice.choice([3] * 40 + [0, 2, 4]), *counts)
        front = head + b"".join(part for parts in (*told.values(), *listed) for part in parts)
        front += bytes(-len(front) % 32)
        _sparse(place, [(0, front)], len(front) + data - (choice.random() < 0.05) * choice.randrange(1, data))

    return write


def file_of_ctranslate2(place: Path) -> Write:
    """model.bin: its variables, their shapes and types, numbers and aliases; config.json and the vocabulary."""
    file = place / MODEL_FILE
    whole = read_model_file(file)
    content = file.read_bytes()
    config = json.loads((place / "config.json").read_text())
    words = json.loads((place / "vocabulary.json").read_text())
    variables = [[one.name, one.dtype, one.shape, one.nbytes, None if whole.is_data(one)
                  else content[one.offset : one.offset + one.nbytes]] for one in whole.variables.values()]  # fmt: skip
    aliases = dict(whole.aliases)

    def write(choice: random.Random) -> None:
        told, also, settings = [list(one) for one in variables], dict(aliases), config
        for _ in range(choice.randrange(1, 5)):
            one = choice.choice(told)
            match choice.randrange(8):
                case 0:
                    one[0] = choice.choice([choice.choice(told)[0], one[0] + "x", ""])
                case 1:
                    one[1] = choice.choice(list(TYPES))
                case 2:
                    one[2] = tuple(choice.choice(SIZES_OF_NO_SENSE) % (1 << 32) for _ in range(choice.randrange(4)))
                case 3:
                    one[3] = choice.choice([one[3] + 1, max(0, one[3] - 1), 2 * one[3] % (1 << 32)])
                case 4 if one[4]:
                    one[4] = bytes(choice.randrange(256) for _ in one[4])
                case 5 if len(told) > 1:
                    told.remove(one)
                case 6:
                    settings = changed(choice, config) if config else config
                case _:
                    also[choice.choice(told)[0] + choice.choice(["", "x"])] = choice.choice(told)[0]
        kind = b"TransformerDecoderSpec" if choice.random() < 0.97 else b"x"
        front = struct.pack("<IH", VERSION, len(kind) + 1) + kind + b"\0" + struct.pack("<II", 8, len(told))
        parts, at = [], 0
        for name, dtype, shape, nbytes, value in told:
            text = name.encode() + b"\0"
            front += struct.pack("<H", len(text)) + text + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
            front += struct.pack("<BI", list(TYPES).index(dtype), nbytes)
            if value is not None:
                front += value
            else:
                parts.append((at, front))
                at, front = at + len(front) + nbytes, b""
        front += struct.pack("<I", len(also))
        for name, other in also.items():
            front += b"".join(struct.pack("<H", len(one) + 1) + one + b"\0" for one in (name.encode(), other.encode()))
        parts.append((at, front))
        if at + len(front) < 1 << 33:
            _sparse(file, parts, at + len(front) - (choice.random() < 0.05))
        (place / "config.json").write_text(json.dumps(settings))
        vocabulary = words if choice.random() < 0.9 else words[: choice.randrange(len(words))]
        (place / "vocabulary.json").write_text(json.dumps(vocabulary))

    return write


def writer(place: Path) -> Write:
    """What damages the source at ``place``."""
    if place.is_file():
        return file_of_gguf(place)
    return file_of_ctranslate2(place) if (place / MODEL_FILE).is_file() else directory(place)


def survives(place: Path, format: str, *, read: bool) -> bool:
    """Whether it is opened and a conversion foreseen; everything else ends in our tree."""
    try:
        with open_source(str(place)).checkpoint as model:
            for name in list(model.tensors)[:3] if read else ():
                if model.is_readable(name) and model.matrix(name)[1] < 1 << 20:
                    np.asarray(model.read_rows(name, 0, min(2, model.matrix(name)[0])))
        foresee(str(place), format, FORMATS[format].example)
    except LlmQuantizeError as error:
        json.dumps(error.to_dict())
        assert error.exit_code in (2, 3, 4, 5, 6, 8, 9, 10), repr(error)  # noqa: PT017
        return False
    return True


@contextmanager
def bounded() -> Iterator[None]:
    """With no more than MEMORY of address space beyond what there is."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attack(source: Path, count: int, *, seed: int) -> int:
    """Damage the source ``count`` times and look at it; how many could still be converted. Raises AssertionError that
    names seed and number for whatever is no error of ours."""
    write, formats, fine = writer(source), list(FORMATS), 0
    with bounded():
        for number in range(count):
            choice = random.Random(f"{seed}/{number}")
            write(choice)
            format = choice.choice(formats)
            try:
                fine += survives(source, format, read=number % READ_EVERY == 0)
            except Exception as error:
                raise AssertionError(f"input {number} of seed {seed}, {source.name} to {format}: {error!r}") from error
    return fine


def made(name: str, model: Path, place: Path) -> Path:
    """A source to damage, by itself in ``place``."""
    found = SOURCES[name].make(model, place / "made")
    target = place / ("source.gguf" if found.is_file() else "source")
    shutil.move(found, target)
    return target


def main() -> None:
    count, names = int(sys.argv[1]), sys.argv[2:] or list(SOURCES)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny("llama", Path(folder) / "model", **SIZES)
        for number, name in enumerate(names):
            place = Path(folder) / str(number)
            place.mkdir()
            source = made(name, model, place)
            start, wall = time.process_time(), time.monotonic()
            fine = attack(source, count, seed=number)
            seconds, wall = time.process_time() - start, time.monotonic() - wall
            rate = f"{count / seconds:.0f}/CPU s, {count / wall:.0f}/s"
            sys.stdout.write(f"{name}: {count} inputs, {rate}, {fine} opened\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Sources of no sense, by structure: what is written down of a right source is changed, one to four things at a time.

    PYTHONPATH=src python -m tests.conversions.fuzz COUNT [SOURCE ...]

tries COUNT inputs for each kind of source and prints how many were tried in a second, how many could be converted, and
in how many ways the others were refused. In most inputs the places of tensors are laid out again for the types and
shapes that were changed, so that the container is right and what is wrong is met further in. Data is not written (files
are sparse) but for what is small, as shapes are, so a value that is read is zero; what is looked at are names, counts,
shapes, types, places and settings. Of a source with an adapter the adapter is changed.
"""

from __future__ import annotations

import copy
import json
import math
import pickletools
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from llm_quantize.io.safetensors_file import DTYPE_BITS
from llm_quantize.models.opening import open_source
from llm_quantize.qtypes.ggml_types import BLOCK_SIZES
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
BITS = {name: bits for name, bits in DTYPE_BITS.items() if bits >= 8}
READ_EVERY = 8
SHOWN = 5000
"""Up to so many inputs the commonest refusals are listed."""
SMALL = 1024
"""Bytes of a tensor whose values are written."""
MEMORY = 3 << 30
"""Address space beyond what the process has, in bytes: whoever asks for more meets MemoryError, which is no error of
ours."""

Write = Callable[[random.Random], None]


LAID_OUT = 0.8
"""Of so many inputs the places of tensors fit what is said of them."""


def few(choice: random.Random) -> int:
    """How many things are changed: mostly one, so that it is the only reason for a refusal."""
    return choice.choice((1, 1, 1, 2, 2, 3, 4))


def changed(choice: random.Random, value: Any) -> Any:
    """A JSON value with one thing in it changed, wherever it is."""
    value = json.loads(json.dumps(value))
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


def directory(place: Path, config_name: str = "config.json", weights: str = "model.safetensors") -> Write:
    """A configuration and the header of a file of safetensors."""
    config = json.loads((place / config_name).read_text())
    file = place / weights
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    names = [name for name in header if name != "__metadata__"]
    data = max(header[name]["data_offsets"][1] for name in names)
    whole, small = file.read_bytes()[-data:], [header[name]["data_offsets"] for name in names]
    small = [(start, whole[start:stop]) for start, stop in small if stop - start <= SMALL]
    right = json.dumps(header)
    contents = {name: whole[slice(*header[name]["data_offsets"])] for name in names}
    contents = {name: content for name, content in contents.items() if len(content) <= SMALL}

    def laid_out(told: dict[str, Any]) -> tuple[list[tuple[int, bytes]], int]:
        """Offsets for what is said of each tensor, where that makes sense: small data, and where all ends."""
        at, parts = 0, []
        for name, entry in told.items():
            if not isinstance(entry, dict) or name == "__metadata__":
                continue
            shape, dtype = entry.get("shape"), entry.get("dtype")
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
                continue
            nbytes = math.prod(shape) * BITS.get(dtype, 8) // 8 if isinstance(dtype, str) else 0
            if nbytes >= 1 << 40:
                continue
            entry["data_offsets"] = [at, at + nbytes]
            parts.append((at, contents.get(name, b"")[:nbytes]))
            at += nbytes
        return parts, at

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
        settings, told = config, json.loads(right)
        for _ in range(few(choice)):
            match choice.randrange(5):
                case 0:
                    settings = changed(choice, settings)
                case 1 if isinstance(settings.get("quantization_config"), dict) and settings["quantization_config"]:
                    settings = {**settings, "quantization_config": changed(choice, settings["quantization_config"])}
                case 2:
                    told = changed(choice, told) or dict(header)
                case _:
                    tensor(choice, told)
        parts, end = small, data
        if choice.random() < LAID_OUT:
            parts, end = laid_out(told)
        text = json.dumps(told).encode()
        if choice.random() < 0.02:
            text = text[:-1] + b"," + text[1:]  # every name twice
        length = len(text) if choice.random() < 0.98 else choice.choice(SIZES_OF_NO_SENSE)
        (place / config_name).write_text(json.dumps(settings))
        front = 8 + len(text)
        parts = [(0, struct.pack("<Q", length) + text), *((front + start, content) for start, content in parts)]
        _sparse(file, parts, front + end - (choice.random() < 0.02))

    return write


def adapter(place: Path) -> Write:
    """adapter_config.json and the header of its weights."""
    return directory(place, "adapter_config.json", "adapter_model.safetensors")


def pickles(place: Path) -> Write:
    """config.json, and the pickle in the archive that ``torch.save`` wrote: its opcodes, one by one."""
    config = json.loads((place / "config.json").read_text())
    file = place / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        stored = {name: archive.read(name) for name in archive.namelist()}
    own = next(name for name in stored if name.endswith("data.pkl"))
    starts = [position for _, _, position in pickletools.genops(stored[own]) if position is not None]
    ends = [*starts[1:], len(stored[own])]
    codes = [stored[own][start:end] for start, end in zip(starts, ends, strict=True)]

    def write(choice: random.Random) -> None:
        told, settings, names = list(codes), config, {name: data for name, data in stored.items() if name != own}
        for _ in range(few(choice)):
            at = choice.randrange(len(told))
            match choice.randrange(8):
                case 0:
                    del told[at]
                case 1:
                    told[at] = choice.choice(codes)
                case 2:
                    told.insert(at, choice.choice(codes))
                case 3 if len(told[at]) > 1:
                    data = bytearray(told[at])
                    data[choice.randrange(1, len(data))] = choice.randrange(256)
                    told[at] = bytes(data)
                case 4:
                    told[at] = bytes([choice.randrange(256)]) + told[at][1:]
                case 5:
                    settings = changed(choice, settings)
                case 6:
                    names.pop(choice.choice(list(names)))
                case _:
                    name = choice.choice(list(names))
                    names[name] = names[name][: choice.randrange(1 + len(names[name]))]
            if not told or not names:
                break
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in {own: b"".join(told), **names}.items():
                archive.writestr(name, data)
        (place / "config.json").write_text(json.dumps(settings))

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

    def laid_out(listed: list[list[bytes]]) -> int:
        """Offsets for what is said of each tensor, where that makes sense; where all ends."""
        at = 0
        for one in listed:
            *sizes, kind = (int.from_bytes(part, "little") for part in one[3:-1])
            block, nbytes = BLOCK_SIZES.get(kind, (1, 4))
            weights = math.prod(sizes)
            if len(one[-1]) != 8 or weights >= 1 << 40:
                continue
            one[-1] = struct.pack("<Q", at)
            at += -(-weights // block * nbytes // 32) * 32
        return at

    def write(choice: random.Random) -> None:
        told, listed = dict(keys), [list(one) for one in tensors]
        counts, end = [len(listed), len(told)], data
        for _ in range(few(choice)):
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
        if choice.random() < LAID_OUT:
            end = laid_out(listed)
        head = struct.pack("<IIQQ", GGUF_MAGIC, choice.choice([3] * 200 + [0, 2, 4]), *counts)
        front = head + b"".join(part for parts in (*told.values(), *listed) for part in parts)
        front += bytes(-len(front) % 32)
        _sparse(place, [(0, front)], len(front) + end - (choice.random() < 0.05) * choice.randrange(1, 1 + end))

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
        for _ in range(few(choice)):
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
        for one in told if choice.random() < LAID_OUT else ():
            nbytes = math.prod(one[2]) * TYPES[one[1]]
            if one[4] is None and nbytes < 1 << 32:
                one[3] = nbytes
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


KINDS: Mapping[str, Callable[[Path], Write]] = {
    MODEL_FILE: file_of_ctranslate2,
    "pytorch_model.bin": pickles,
    "adapter_config.json": adapter,
}
"""{a file that only such sources have: what damages one}."""


def writer(place: Path) -> Write:
    """What damages the source or the adapter at ``place``."""
    if place.is_file():
        return file_of_gguf(place)
    return next((kind for name, kind in KINDS.items() if (place / name).is_file()), directory)(place)


def refusal(place: Path, format: str, *, lora: Sequence[str] = (), read: bool) -> str:
    """Why it is not opened and no conversion foreseen, "" where it is; everything else than our errors is raised."""
    try:
        if read:
            with open_source(str(place), lora=lora).checkpoint as model:
                for name in list(model.tensors)[:3]:
                    if model.is_readable(name) and model.matrix(name)[1] < 1 << 20:
                        np.asarray(model.read_rows(name, 0, min(2, model.matrix(name)[0])))
        foresee(str(place), format, FORMATS[format].example, lora=lora)
    except LlmQuantizeError as error:
        json.dumps(error.to_dict())
        assert error.exit_code in (2, 3, 4, 5, 6, 8, 9, 10), repr(error)  # noqa: PT017
        return re.sub(r"[0-9]+|'[^']*'", "#", error.what)
    return ""


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


def attack(source: Path, count: int, *, seed: int, lora: Path | None = None) -> Counter[str]:
    """Damage the source, or the adapter ``lora`` for it, ``count`` times and look at it: {why it was refused, "" where
    it could be converted: how often}. Raises AssertionError that names seed and number for whatever is no error of
    ours."""
    write, formats, found = writer(lora or source), list(FORMATS), Counter[str]()
    adapters = () if lora is None else (str(lora),)
    with bounded():
        for number in range(count):
            choice = random.Random(f"{seed}/{number}")
            write(choice)
            format = choice.choice(formats)
            try:
                found[refusal(source, format, lora=adapters, read=number % READ_EVERY == 0)] += 1
            except Exception as error:
                raise AssertionError(f"input {number} of seed {seed}, {source.name} to {format}: {error!r}") from error
    return found


def made(name: str, model: Path, place: Path) -> tuple[Path, Path | None]:
    """A source by itself in ``place``, and the adapter that goes with it: what is to be damaged."""
    found = SOURCES[name].make(model, place / "made")
    adapters = SOURCES[name].given(found).lora
    target = place / ("source.gguf" if found.is_file() else "source")
    shutil.move(found, target)
    return target, Path(adapters[0]) if adapters else None


def main() -> None:
    count, names = int(sys.argv[1]), sys.argv[2:] or list(SOURCES)
    memory = Path("/dev/shm")  # to truncate a file on a disk takes longer than all that is done with it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        model = make_tiny("llama", Path(folder) / "model", **SIZES)
        for number, name in enumerate(names):
            place = Path(folder) / str(number)
            place.mkdir()
            source, lora = made(name, model, place)
            start, wall = time.process_time(), time.monotonic()
            ends = attack(source, count, seed=number, lora=lora)
            seconds, wall = time.process_time() - start, time.monotonic() - wall
            rate = f"{count / seconds:.0f}/CPU s, {count / wall:.0f}/s"
            sys.stdout.write(f"{name}: {count} inputs, {rate}, {ends['']} converted, {len(ends) - 1} refusals\n")
            for why, often in ends.most_common(8) if count <= SHOWN else ():
                sys.stdout.write(f"    {often:6d} {why or 'converted'}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Hostile model directories: each kind of the catalogue gives its exit code, names file and remedy, at once, in
bounded memory, without reading outside the directory or running anything from it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.errors import LlmQuantizeError
from llm_quantize.models.files import conversion_command
from llm_quantize.models.safetensors import open_checkpoint
from tests.safetensors_by_hand import entries, write_model, write_raw, write_tensors

W = np.arange(6, dtype=np.float32).reshape(2, 3)
INDEX = "model.safetensors.index.json"
GOOD_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@dataclass(frozen=True)
class Case:
    """``make`` fills the directory; then opening it must fail as told. ``offset``: the message must hold one."""

    make: Callable[[Path], object]
    exit_code: int
    file: str
    says: str
    tensor: str | None = None
    offset: bool = False


def one(place: Path, **changes: Any) -> Path:
    """A right model of one shard."""
    return write_model(place, {"model.safetensors": {"w": W}}, config={**GOOD_CONFIG, **changes})


def two(place: Path, weight_map: Mapping[str, Any] | None = None) -> Path:
    """A model of two shards: x in a, y in b."""
    shards = {"a.safetensors": {"x": W}, "b.safetensors": {"y": W}}
    return write_model(place, shards, weight_map=weight_map, config=GOOD_CONFIG)


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """A right model in which ``name`` holds ``content``."""
    data = content if isinstance(content, bytes) else content.encode()

    def make(place: Path) -> None:
        one(place)
        (place / name).write_bytes(data)

    return make


def index(content: str | bytes) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        two(place)
        (place / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def named(name: str) -> Callable[[Path], object]:
    """The index places y in the file ``name``."""
    return lambda place: two(place, {"x": "a.safetensors", "y": name})


def special(name: str, kind: str) -> Callable[[Path], object]:
    """A right model of two shards in which ``name`` is something else than a file."""

    def make(place: Path) -> None:
        two(place)
        (place / name).unlink()
        secret = place.parent / "secret.safetensors"
        write_tensors(secret, {"y": W})
        if kind == "fifo":
            os.mkfifo(place / name)
        elif kind == "directory":
            (place / name).mkdir()
        elif kind == "outside":
            (place / name).symlink_to(secret)
        elif kind == "climbing":
            (place / name).symlink_to("../secret.safetensors")
        elif kind == "through a directory":
            (place / "d").symlink_to(place.parent)
            (place / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "d/secret.safetensors"}}))
        elif kind == "dangling":
            (place / name).symlink_to("nowhere.safetensors")
        elif kind == "loop":
            (place / name).symlink_to(name)
        elif kind == "device":
            (place / name).symlink_to("/dev/zero")

    return make


def without(*names: str, maker: Callable[[Path], Path] = two) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        maker(place)
        for name in names:
            (place / name).unlink()

    return make


def files(**contents: bytes) -> Callable[[Path], object]:
    """A directory of just these files (``__`` in a name stands for a dot)."""

    def make(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            (place / name.replace("__", ".")).write_bytes(data)

    return make


def raw(header: bytes | Mapping[str, Any], data: bytes = b"", **options: Any) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        one(place)
        write_raw(place / "model.safetensors", header, data, **options)

    return make


def extra_in_shard(place: Path) -> None:
    two(place)
    write_tensors(place / "b.safetensors", {"y": W, "z": W})


def same_in_both(place: Path) -> None:
    two(place)
    write_tensors(place / "b.safetensors", {"y": W, "x": W})


def same_in_both_claimed_by_the_second(place: Path) -> None:
    same_in_both(place)
    (place / INDEX).write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}))
    (place / INDEX).write_text(
        json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors", "q": "a.safetensors"}})
    )


def truncated(place: Path) -> None:
    two(place)
    with (place / "b.safetensors").open("rb+") as stream:
        stream.truncate((place / "b.safetensors").stat().st_size - 5)


def packed(name: str) -> Callable[[Path], object]:
    return lambda place: write_model(
        place, {"model.safetensors": {name: np.ones((2, 2), np.uint8)}}, config=GOOD_CONFIG
    )


SAFE = "model.safetensors"
CONFIG = "config.json"
DEEP = b'{"a":' * 200_000
CASES: dict[str, Case] = {
    # safetensors
    "empty file": Case(text(SAFE, b""), 3, SAFE, "too short", offset=True),
    "seven bytes": Case(text(SAFE, b"1234567"), 3, SAFE, "too short", offset=True),
    "length 0": Case(raw(b"", length=0), 3, SAFE, "empty", offset=True),
    "length beyond the file": Case(raw(b"{}", length=5000), 3, SAFE, "missing", offset=True),
    "length 2^63": Case(raw(b"{}", length=1 << 63), 3, SAFE, "beyond", offset=True),
    "header not UTF-8": Case(raw(b'{"\xff": 1}'), 3, SAFE, "UTF-8", offset=True),
    "header not JSON": Case(raw(b"{oops}"), 3, SAFE, "not JSON", offset=True),
    "header a list": Case(raw(b"[]"), 3, SAFE, "begin with", offset=True),
    "header deep": Case(raw(DEEP), 3, SAFE, "deeply", offset=True),
    "header leading space": Case(raw(b" {}"), 3, SAFE, "begin with", offset=True),
    "header duplicate": Case(raw(b'{"w": 1, "w": 2}'), 3, SAFE, "twice", offset=True),
    "trailing bytes": Case(raw(entries({"w": ("F32", (1,))}), bytes(5)), 3, SAFE, "belong to none", offset=True),
    "truncated": Case(truncated, 3, "b.safetensors", "5 bytes are missing; 0 of 1", "y", True),
    "shape disagrees": Case(
        raw({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, bytes(4)),
        3,
        SAFE,
        "number of bytes",
        "w",
        True,
    ),
    "unknown dtype": Case(
        raw({"w": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), 4, SAFE, "element type", "w", True
    ),
    "no tensors": Case(raw(b"{}"), 3, SAFE, "no tensors"),
    "pickle called safetensors": Case(text(SAFE, b"\x80\x04cos\nsystem\n(S'x'\ntR."), 3, SAFE, "beyond", offset=True),
    "html called safetensors": Case(text(SAFE, b"<html><body>404</body></html>"), 3, SAFE, "beyond", offset=True),
    "git lfs pointer": Case(text(SAFE, b"version https://git-lfs.github.com/spec/v1\n"), 3, SAFE, "LFS"),
    # index
    "index not JSON": Case(index("{"), 3, INDEX, "not JSON", offset=True),
    "index a list": Case(index("[]"), 3, INDEX, "object", offset=True),
    "index deep": Case(index(DEEP), 3, INDEX, "deeply", offset=True),
    "index BOM": Case(index(b"\xef\xbb\xbf{}"), 3, INDEX, "byte order mark", offset=True),
    "index without map": Case(index('{"metadata": {}}'), 3, INDEX, "weight_map"),
    "index empty map": Case(index('{"weight_map": {}}'), 3, INDEX, "weight_map"),
    "index map of numbers": Case(index('{"weight_map": {"x": 5}}'), 3, INDEX, "weight_map"),
    "index duplicate": Case(
        index('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'), 3, INDEX, "twice", offset=True
    ),
    "index names pickles": Case(named("pytorch_model.bin"), 4, INDEX, "not safetensors", "y"),
    "shard missing": Case(without("b.safetensors"), 3, "b.safetensors", "missing", "y"),
    "shard absolute": Case(named("/etc/x.safetensors"), 6, INDEX, "outside"),
    "shard climbing": Case(named("../secret.safetensors"), 6, INDEX, "outside"),
    "shard climbing inside": Case(named("sub/../../secret.safetensors"), 6, INDEX, "outside"),
    "shard with backslash": Case(named("..\\secret.safetensors"), 6, INDEX, "outside"),
    "shard with NUL": Case(named("b\0.safetensors"), 6, INDEX, "outside"),
    "shard with newline": Case(named("b\n.safetensors"), 6, INDEX, "outside"),
    "shard with empty part": Case(named("sub//b.safetensors"), 6, INDEX, "outside"),
    "shard with other script": Case(named("ｂ.safetensors"), 6, INDEX, "outside"),
    "shard with long name": Case(named("b" * 5000 + ".safetensors"), 6, INDEX, "outside"),
    "shard only a suffix": Case(named(".safetensors"), 3, ".safetensors", "missing", "y"),
    "shard a FIFO": Case(special("b.safetensors", "fifo"), 3, "b.safetensors", "not a regular file"),
    "shard a directory": Case(special("b.safetensors", "directory"), 3, "b.safetensors", "not a regular file"),
    "shard a link outside": Case(special("b.safetensors", "outside"), 6, "b.safetensors", "outside"),
    "shard a climbing link": Case(special("b.safetensors", "climbing"), 6, "b.safetensors", "outside"),
    "shard through a linked directory": Case(
        special("b.safetensors", "through a directory"), 6, "d/secret.safetensors", "outside"
    ),
    "shard a dangling link": Case(special("b.safetensors", "dangling"), 3, "b.safetensors", "cannot open"),
    "shard a loop": Case(special("b.safetensors", "loop"), 3, "b.safetensors", "cannot open"),
    "shard a device": Case(special("b.safetensors", "device"), 6, "b.safetensors", "outside"),
    "index a FIFO": Case(special(INDEX, "fifo"), 3, INDEX, "not a regular file"),
    "index a link outside": Case(special(INDEX, "outside"), 6, INDEX, "outside"),
    "tensor in two shards": Case(same_in_both, 3, "b.safetensors", "two shards", "x", True),
    "tensor in two shards, the later claimed": Case(
        same_in_both_claimed_by_the_second, 3, "a.safetensors", "elsewhere", "x", True
    ),
    "tensor in index only": Case(
        lambda place: two(place, {"x": "a.safetensors", "y": "b.safetensors", "q": "b.safetensors"}),
        3,
        "b.safetensors",
        "does not hold",
        "q",
    ),
    "tensor in shard only": Case(extra_in_shard, 3, "b.safetensors", "does not know", "z", True),
    "tensors exchanged": Case(
        lambda place: two(place, {"x": "b.safetensors", "y": "a.safetensors"}),
        3,
        "a.safetensors",
        "elsewhere",
        "x",
        True,
    ),
    "shards without index": Case(without(INDEX), 3, INDEX, "index of the shards is missing"),
    # config
    "config absent": Case(without(CONFIG), 3, CONFIG, "absent"),
    "config BOM": Case(text(CONFIG, b"\xef\xbb\xbf{}"), 3, CONFIG, "byte order mark", offset=True),
    "config NaN": Case(text(CONFIG, '{"eps": NaN}'), 3, CONFIG, "NaN", offset=True),
    "config Infinity": Case(text(CONFIG, '{"eps": Infinity}'), 3, CONFIG, "Infinity", offset=True),
    "config huge integer": Case(text(CONFIG, '{"n": ' + "9" * 5000 + "}"), 3, CONFIG, "too long", offset=True),
    "config huge float": Case(text(CONFIG, '{"n": 1e999}'), 3, CONFIG, "too large", offset=True),
    "config deep": Case(text(CONFIG, DEEP), 3, CONFIG, "deeply", offset=True),
    "config empty": Case(text(CONFIG, ""), 3, CONFIG, "not JSON", offset=True),
    "config a list": Case(text(CONFIG, "[1]"), 3, CONFIG, "object", offset=True),
    "config UTF-16": Case(text(CONFIG, '{"a": 1}'.encode("utf-16")), 3, CONFIG, "UTF-8", offset=True),
    "config half a surrogate": Case(text(CONFIG, '{"a": "\\ud800"}'), 3, CONFIG, "surrogate"),
    "config a FIFO": Case(special(CONFIG, "fifo"), 3, CONFIG, "not a regular file"),
    "config a link outside": Case(special(CONFIG, "outside"), 6, CONFIG, "outside"),
    "config dangling": Case(special(CONFIG, "dangling"), 3, CONFIG, "cannot open"),
    "generation_config bad": Case(
        text("generation_config.json", "{,}"), 3, "generation_config.json", "not JSON", offset=True
    ),
    "generation_config dangling": Case(
        lambda place: (one(place), (place / "generation_config.json").symlink_to("/nowhere")),
        6,
        "generation_config.json",
        "outside",
    ),
    # what the model is
    "empty directory": Case(files(), 3, CONFIG, "absent"),
    "no weights": Case(files(config__json=b"{}"), 3, INDEX, "no weights"),
    "weights of another name": Case(
        lambda place: (one(place), (place / SAFE).rename(place / "gptq_model-4bit-128g.safetensors")),
        3,
        "gptq_model-4bit-128g.safetensors",
        "no runtime looks",
    ),
    "one shard of two": Case(
        lambda place: (one(place), (place / SAFE).rename(place / "model-00001-of-00002.safetensors")),
        3,
        INDEX,
        "index of the shards is missing",
    ),
    "MLX in numpy's form": Case(files(config__json=b"{}", weights__npz=b"PK"), 4, "weights.npz", "MLX"),
    "pickled weights": Case(
        files(config__json=b"{}", pytorch_model__bin=b"\x80\x02cos\nsystem\n."), 4, "pytorch_model.bin", "pickle"
    ),
    "adapter": Case(
        files(adapter_config__json=b"{}", adapter_model__safetensors=b""), 4, "adapter_config.json", "adapter"
    ),
    "adapter of a named model": Case(
        files(adapter_config__json=b'{"base_model_name_or_path": "org/Base-1B"}', adapter_model__safetensors=b""),
        4,
        "adapter_config.json",
        "org/Base-1B",
    ),
    "adapter that is no JSON": Case(files(adapter_config__json=b"{"), 3, "adapter_config.json", "JSON"),
    "adapter with config": Case(
        files(config__json=b"{}", adapter_config__json=b"{}", adapter_model__safetensors=b""),
        4,
        "adapter_config.json",
        "adapter",
    ),
    **{
        f"already {method}": Case(
            lambda place, method=method: one(place, quantization_config={"quant_method": method}),
            4,
            CONFIG,
            "already quantized",
        )
        for method in ("gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors", None, 5, "\x1b[2J")
    },
    "already quantized, inner": Case(
        lambda place: one(place, text_config={"quantization_config": {"quant_method": "awq"}}),
        4,
        CONFIG,
        "already quantized",
    ),
    "quantization_config a list": Case(lambda place: one(place, quantization_config=[1]), 3, CONFIG, "object"),
    "packed without config": Case(packed("l.qweight"), 4, SAFE, "packed", "l.qweight", True),
    "packed blocks": Case(packed("l.gate_up_proj_blocks"), 4, SAFE, "packed", "l.gate_up_proj_blocks", True),
}


@pytest.mark.parametrize("kind", CASES)
def test_kind(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    place = tmp_path / "model"
    case.make(place)
    began = time.process_time()
    with pytest.raises(LlmQuantizeError) as caught:
        open_checkpoint(str(place))
    assert time.process_time() - began < 1
    error = caught.value
    assert (error.exit_code, error.file) == (case.exit_code, str(place / case.file)), str(error)
    assert case.says in error.what
    if case.tensor is not None:
        assert error.tensor == case.tensor
    if case.offset:
        assert error.offset is not None
    assert error.remedy
    message = str(error)
    assert "\x1b" not in message
    assert len(message) < 2500
    json.dumps(error.to_dict())


def test_the_right_models_open(tmp_path: Path) -> None:
    """The makers of the cases are themselves right: what is refused is the one thing that a case changes."""
    with open_checkpoint(str(one(tmp_path / "one"))) as a, open_checkpoint(str(two(tmp_path / "two"))) as b:
        assert list(a.tensors) == ["w"]
        assert list(b.tensors) == ["x", "y"]


GUARD = """
    import resource, sys
    root = sys.argv[1]
    from llm_quantize.models.safetensors import open_checkpoint
    from llm_quantize.errors import LlmQuantizeError
    import llm_quantize.models.hub.fetch, numpy.random, encodings.idna, encodings.utf_16  # allowed before the watch
    import os
    FORBIDDEN = ("exec", "compile", "import", "subprocess.Popen", "os.system", "socket.connect", "pickle.find_class")
    touched, place = [], root
    def watch(event, facts):
        if event in ("open", "os.listdir", "os.scandir") and isinstance(facts[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(facts[0]))
            if not path.startswith(place + os.sep) and path != place:
                touched.append((event, path))
        elif event in FORBIDDEN:
            touched.append((event, str(facts)[:100]))
    limit = int(sys.argv[2])
    if limit:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    sys.addaudithook(watch)
    for name in sys.argv[3:]:
        try:
            place = os.path.join(root, name, "model")
            with open_checkpoint(place) as checkpoint:
                for tensor in checkpoint.tensors:
                    checkpoint.read_rows(tensor, 0, 1)
        except LlmQuantizeError as error:
            print(error.exit_code, flush=True)
        else:
            print(0, flush=True)
    assert not touched, touched
"""


def guarded(place: Path, names: list[str], limit: int = 0) -> list[int]:
    """Exit codes of opening each of the models in a process that dies if anything outside ``place`` is opened, code is
    compiled or imported, or more than ``limit`` bytes are taken beyond what the imports took."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GUARD), str(place), str(limit), *names],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]


def test_nothing_outside_is_touched_and_nothing_is_run(tmp_path: Path) -> None:
    makers: list[Callable[[Path], object]] = [case.make for case in CASES.values()]
    for number, make in enumerate([*makers, one, two]):
        place = tmp_path / f"m{number}" / "model"
        make(place)
        (place / "modeling_evil.py").write_text("raise SystemExit(99)")
        (place / "sitecustomize.py").write_text("raise SystemExit(99)")
    names = [f"m{number}" for number in range(len(CASES) + 2)]
    assert guarded(tmp_path, names) == [*(case.exit_code for case in CASES.values()), 0, 0]


def test_the_guard_itself_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose config leads outside the fence, with the fence drawn too narrow, must be noticed."""
    one(tmp_path / "m" / "model")
    monkeypatch.setattr(
        sys.modules[__name__],
        "GUARD",
        GUARD.replace('place = os.path.join(root, name, "model")', "pass")
        .replace("open_checkpoint(place)", 'open_checkpoint(os.path.join(root, name, "model"))')
        .replace("place = [], root", "place = [], '/nowhere'"),
    )
    with pytest.raises(AssertionError, match=r"config\.json"):
        guarded(tmp_path, ["m"])


@pytest.mark.parametrize(
    "make",
    [
        raw(b"{" + b'"k":[],' * 10_000_000 + b'"z":0}'),
        raw(b'{"k":"' + b"x" * 90_000_000 + b'"}'),
        raw(b'{"k":"' + "あ".encode() * 30_000_000 + b'"}'),
        raw(b'{"k":[' + b"0," * 3_900_000 + b"0]}"),
        raw(DEEP * 80),
    ],
    ids=["lists", "long string", "long wide string", "numbers", "deep"],
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's address space limit")
def test_memory_is_bounded(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "m" / "model")
    assert guarded(tmp_path, ["m"], 512 << 20) == [3]


def test_the_conversion_command_quotes_the_directory() -> None:
    words = shlex.split(conversion_command("/a dir/it's; rm -rf"))
    assert words[0:2] == ["python", "-c"]
    assert words[3:] == ["/a dir/it's; rm -rf", "it's; rm -rf-safetensors"]
    compile(words[2], "command", "exec")


@pytest.mark.heavy
def test_the_conversion_command_works(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from tests.tiny_models import make_tiny

    source = make_tiny("llama", tmp_path / "pickled model")
    tensors = load_file(source / SAFE)
    (source / SAFE).unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(LlmQuantizeError) as caught:
        open_checkpoint(str(source))
    words = shlex.split(str(caught.value.remedy))
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    with open_checkpoint(str(tmp_path / "pickled model-safetensors")) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }

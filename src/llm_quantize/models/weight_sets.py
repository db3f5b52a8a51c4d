"""Which of the weight files in one directory are the model: an index decides, and what it leaves lying is named.

Runtimes do not agree where there are two sets (transformers takes model.safetensors, vLLM the files of the index, and
both put an adapter on top), so what cannot be known is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import read_range
from llm_quantize.io.safetensors_file import Header, TensorInfo, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SAME_MODEL = ("consolidated",)
"""Beginnings of names under which repositories hold the same weights again, for programs of their own."""
_NO_WEIGHTS = ("training_", "optim", "scheduler", "adapter_", "rng_", "random_states")
"""Beginnings of names of what a training leaves beside the weights."""
INDEX_LIMIT = 100_000_000
_SAMPLE = 4096
_NAMED = 3


def index_counts(shards: Iterable[str], present: Callable[[str], bool]) -> bool:
    """Whether, beside a model.safetensors, an index over ``shards`` says what the model is: it does unless none of
    them is there (``present``)."""
    return any(map(present, set(shards)))


def refuse_adapter(directory: Path, present: Callable[[str], bool]) -> None:
    """Raise UnsupportedError where an adapter lies beside whole weights: whether it belongs to them, or is already
    merged into them, no file says. ``present``: whether there is a file of a name."""
    weights = next(filter(present, ADAPTER_WEIGHTS), None)
    if weights is None or not present(ADAPTER):
        return
    raise UnsupportedError(
        "whole weights and an adapter (LoRA) lie in one place; whether the adapter belongs on top cannot be known",
        file=directory / weights,
        expected="one of the two",
        found=f"weights of a whole model, {ADAPTER} and {weights}",
        remedy=f"for the weights without it: move {ADAPTER} and {weights} away (from the hub: hf download MODEL "
        "--exclude 'adapter_*' --local-dir DIR, then give DIR). With it: move them to a directory of "
        "their own, and give that as --lora",
    )


def check_single(tensors: Mapping[str, TensorInfo], index: Path, owners: Mapping[str, str]) -> None:
    """Raise MalformedInputError unless model.safetensors holds what an index names whose own shards are absent."""
    if tensors.keys() == owners.keys():
        return
    raise MalformedInputError(
        f"the shards that the index names are missing, and {SINGLE} holds other tensors than they should",
        file=index,
        expected=", ".join(sorted(set(owners.values()))[:_NAMED]),
        found=f"{SINGLE} with {len(tensors):,} tensors; the index names {len(owners):,}",
        remedy=f"fetch the shards; or remove {index.name} if {SINGLE} is the whole model",
    )


def refuse_twin(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise MalformedInputError where model.safetensors (``path``), which an index leaves out, is another whole model
    of the same tensors as ``tensors``: the same names, types and shapes, but other values."""
    header = read_header(path)
    other = header.tensors
    if {name: (info.dtype, info.shape) for name, info in other.items()} != {
        name: (info.dtype, info.shape) for name, info in tensors.items()
    }:
        return
    changed = next((name for name, info in tensors.items() if _sample(info) != _sample(other[name])), None)
    if changed is None:
        return
    raise MalformedInputError(
        "two whole models lie in this directory, and runtimes do not agree which of them is meant",
        file=path,
        tensor=changed,
        expected="one set of weights",
        found=f"{SINGLE}, and the shards of {INDEX} with other values",
        remedy=f"move one away: {SINGLE} (transformers reads it), or {INDEX} and its shards (vLLM reads them)",
    )


def _sample(info: TensorInfo) -> tuple[bytes, bytes]:
    """The first and the last bytes of a tensor."""
    size = min(_SAMPLE, info.nbytes)
    return read_range(info.file, info.offset, size), read_range(info.file, info.offset + info.nbytes - size, size)


def left_lying(directory: Path, headers: Iterable[Header]) -> tuple[str, ...]:
    """What a user should know of the weight files directly in ``directory`` that were not read."""
    read = {header.path.name for header in headers}
    names = sorted(entry.name for entry in directory.iterdir())
    stray = [
        name
        for name in names
        if name.endswith(".safetensors") and name not in read and not name.startswith((".", *_SAME_MODEL))
    ]
    notes = []
    if stray:
        more = f" and {len(stray) - _NAMED} more" if len(stray) > _NAMED else ""
        named = ", ".join(ascii(name)[1:-1][:80] for name in stray[:_NAMED])
        why = f"the model is {SINGLE}" if read == {SINGLE} else f"{INDEX} names other files"
        notes.append(f"{named}{more}: not read, as {why}; move it away if it does not belong to the model")
    if INDEX in names and read == {SINGLE} and SINGLE not in weight_map(directory / INDEX).values():
        notes.append(f"{INDEX} is not used: none of the shards that it names is there, and {SINGLE} has all tensors")
    return tuple(notes)


def pickled_set(names: Iterable[str]) -> str | None:
    """Of the ``names`` of files in one directory, the one that says which pickled weights are the model: an index, the
    usual single file, or the only one that may be it; None where safetensors are there, or nothing is certain."""
    found = set(names)
    if found & {SINGLE, INDEX}:
        return None
    usual = next((name for name in (PICKLED_INDEX, PICKLED) if name in found), None)
    others = [name for name in found if name.endswith((".bin", ".pt", ".pth")) and not name.startswith(_NO_WEIGHTS)]
    return usual or (others[0] if len(others) == 1 else None)


def weight_map(index: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """{tensor: file name} as the index says; the names end in ``suffix``, and are not yet proved harmless
    (``paths.inside`` does)."""
    value = read_json_object(index, limit_bytes=INDEX_LIMIT).get("weight_map")
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value.values()):
        raise MalformedInputError(
            "weight_map must map tensor names to file names",
            file=index,
            expected='{"weight_map": {"tensor": "file.safetensors", ...}}',
            found="nothing" if not value else type(value).__name__,
            remedy="fetch the index again",
        )
    for tensor, name in value.items():
        if not name.endswith(suffix):
            kind = suffix.removeprefix(".")
            raise UnsupportedError(
                f"the index names a file that is not {kind}",
                file=index,
                tensor=tensor,
                expected=f"NAME{suffix}",
                found=name,
                remedy=f"fetch the model's {kind} files and their index",
            )
    return value

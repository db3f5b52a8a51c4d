"""The files of a model directory: which they are, what they may be called, and whether they agree."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, TensorInfo, read_header
from llm_quantize.models.float8 import is_scaled_float8

CONFIG_LIMIT = 16 << 20
INDEX_LIMIT = 100_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PACKED_SUFFIXES = (".qweight", ".weight_packed", ".weight.absmax", ".SCB", "_proj_blocks")


def read_configuration(
    directory: Path, model: str
) -> tuple[dict[str, Any], dict[str, Any] | None, Mapping[str, Any] | None]:
    """(config.json, generation_config.json or None, quantization_config if it is an FP8 form that we decode)."""
    if not _present(directory, "config.json"):
        _refuse_without_config(directory, model)
    config = read_json_object(inside(directory, "config.json"), limit_bytes=CONFIG_LIMIT)
    return config, read_generation_config(directory), _quantization(config, directory / "config.json")


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json, or None where there is none."""
    if not _present(directory, "generation_config.json"):
        return None
    return read_json_object(inside(directory, "generation_config.json"), limit_bytes=CONFIG_LIMIT)


def _present(directory: Path, name: str) -> bool:
    """Whether the directory has an entry of this name, of whatever kind (a dangling link counts)."""
    return os.path.lexists(directory / name)


def _refuse_without_config(directory: Path, model: str) -> NoReturn:
    if _present(directory, "adapter_config.json"):
        file = inside(directory, "adapter_config.json")
        base = read_json_object(file, limit_bytes=CONFIG_LIMIT).get("base_model_name_or_path")
        named = isinstance(base, str) and base != ""
        of = f" of {printable(str(base), 120)}" if named else ""
        raise UnsupportedError(
            f"this is an adapter (LoRA){of}, not a model: it only holds changes to another model's weights",
            file=file,
            expected="a whole model with config.json",
            found="adapter_config.json",
            remedy="merge it first: peft's AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()"
            ".save_pretrained(OUT), then give OUT",
        )
    raise MalformedInputError(
        "config.json is absent, so the architecture is unknown",
        file=directory / "config.json",
        found=_listing(directory),
        remedy=f"fetch all files of the model: hf download {printable(model, 120)}"
        if not directory.exists()
        else "give the directory that holds config.json, or fetch it from where the weights came from",
    )


def _quantization(config: Mapping[str, Any], file: Path) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    candidates = [config.get("quantization_config"), config.get("compression_config")]
    if isinstance(text, dict):
        candidates += [text.get("quantization_config"), text.get("compression_config")]
    found = next((candidate for candidate in candidates if candidate is not None), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise MalformedInputError(
            "quantization_config must be an object", file=file, found=type(found).__name__, remedy="fetch it again"
        )
    if is_scaled_float8(found):
        return found
    raise UnsupportedError(
        "this checkpoint is already quantized; its original weights are gone",
        file=file,
        expected="no quantization_config, or FP8 weights",
        found=f"quant_method {printable(repr(found.get('quant_method')), 80)}",
        remedy="start from the model it was made from, in BF16 or F16 (its model card names it)",
    )


def read_headers(
    directory: Path, model: str, *, packed: bool = False
) -> tuple[tuple[Header, ...], dict[str, TensorInfo]]:
    """Every weight file's header, and all tensors in file order, proved to agree with the index. ``packed``: a model
    whose weights are packed codes is wanted, not refused."""
    if _present(directory, SINGLE):
        header = read_header(inside(directory, SINGLE))
        _check_weights(header.tensors, header.path, packed)
        return (header,), header.tensors
    if not _present(directory, INDEX):
        _refuse_without_weights(directory, model)
    index = inside(directory, INDEX)
    owners = weight_map(index)
    paths = {name: inside(directory, name, declared_in=index) for name in sorted(set(owners.values()))}
    headers: list[Header] = []
    tensors: dict[str, TensorInfo] = {}
    for name, path in paths.items():
        if not path.is_symlink() and not path.exists():
            owner = next(tensor for tensor, shard in owners.items() if shard == name)
            raise MalformedInputError(
                "a shard that the index names is missing",
                file=path,
                tensor=owner,
                expected=f"{len(paths)} shards",
                found="no such file",
                remedy="fetch this file; then run the same command again",
            )
        header = read_header(path)
        headers.append(header)
        for tensor in header.tensors.values():
            _check_owner(tensor, name, owners, tensors, index)
            tensors[tensor.name] = tensor
    if len(tensors) != len(owners):
        lost = next(name for name in owners if name not in tensors)
        raise MalformedInputError(
            "the index names a tensor that its shard does not hold",
            file=paths[owners[lost]],
            tensor=lost,
            expected=f"{len(owners):,} tensors",
            found=f"{len(tensors):,}",
            remedy="fetch this shard and the index again; they are of different versions",
        )
    _check_weights(tensors, index, packed)
    return tuple(headers), tensors


def weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} as the index says; the names are not yet proved harmless (``paths.inside`` does)."""
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
        if not name.endswith(".safetensors"):
            raise UnsupportedError(
                "the index names a file that is not safetensors",
                file=index,
                tensor=tensor,
                expected="NAME.safetensors",
                found=name,
                remedy="fetch the model's safetensors files and their index",
            )
    return value


def _check_owner(
    tensor: TensorInfo, shard: str, owners: Mapping[str, str], seen: Mapping[str, TensorInfo], index: Path
) -> None:
    if tensor.name in seen:
        raise MalformedInputError(
            "two shards hold a tensor of the same name",
            file=tensor.file,
            tensor=tensor.name,
            offset=tensor.offset,
            expected=f"only in {owners.get(tensor.name)}",
            found=f"also in {seen[tensor.name].file.name}",
            remedy="fetch the model again; shards of two versions are mixed",
        )
    owner = owners.get(tensor.name)
    if owner != shard:
        raise MalformedInputError(
            "a shard holds a tensor that the index does not know"
            if owner is None
            else "a shard holds a tensor that the index places elsewhere",
            file=tensor.file,
            tensor=tensor.name,
            offset=tensor.offset,
            expected=f"as {index.name} says: {owner or 'no such tensor'}",
            found=shard,
            remedy="fetch the index and this shard again; they are of different versions",
        )


def _check_weights(tensors: Mapping[str, TensorInfo], file: Path, packed: bool) -> None:
    if not tensors:
        raise MalformedInputError(
            "this model holds no tensors", file=file, expected="weights", found="none", remedy="fetch it again"
        )
    codes = None if packed else next((name for name in tensors if name.endswith(_PACKED_SUFFIXES)), None)
    if codes is not None:
        raise UnsupportedError(
            "this checkpoint is already quantized: its weights are packed codes",
            file=tensors[codes].file,
            tensor=codes,
            offset=tensors[codes].offset,
            expected="float weights",
            found=tensors[codes].dtype,
            remedy="start from the model it was made from, in BF16 or F16",
        )


def _refuse_without_weights(directory: Path, model: str) -> NoReturn:
    names = sorted(entry.name for entry in directory.iterdir())
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth")) and not n.startswith(("training_", "optim"))]
    if pickled:
        raise UnsupportedError(
            "the weights are pickled, which can run code when loaded; only safetensors are read",
            file=directory / pickled[0],
            expected=SINGLE,
            found=", ".join(pickled[:3]),
            remedy=conversion_command(str(directory)),
        )
    if "adapter_config.json" in names:
        _refuse_without_config(directory, model)
    shards = [name for name in names if name.endswith(".safetensors")]
    raise MalformedInputError(
        "the index of the shards is missing" if shards else "no weights here",
        file=directory / INDEX,
        expected=f"{SINGLE} or {INDEX}",
        found=_listing(directory),
        remedy="fetch the index from where the shards came from" if shards else "fetch the .safetensors files too",
    )


def conversion_command(source: str) -> str:
    """The shell command that writes a safetensors copy of a pickled model, with transformers."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "s, d = sys.argv[1:]; M.from_pretrained(s, dtype='auto').save_pretrained(d); "
        "T.from_pretrained(s).save_pretrained(d)"
    )
    target = source.rstrip("/").rsplit("/", 1)[-1] + "-safetensors"
    return f'python -c "{code}" {shlex.quote(source)} {shlex.quote(target)}'


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "an empty directory"

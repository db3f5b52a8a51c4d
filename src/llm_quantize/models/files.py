"""The files of a model directory: which they are, what they may be called, and whether they agree."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.foreign import check_config, check_tensors, has_side_file, refuse_settings, settings_beside
from llm_quantize.formats.packed_formats import said_of
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, TensorInfo, read_header
from llm_quantize.models.float8 import is_scaled_float8
from llm_quantize.models.weight_sets import (
    INDEX,
    SINGLE,
    check_single,
    index_counts,
    refuse_adapter,
    refuse_twin,
    weight_map,
)

_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
CONFIG_LIMIT = 16 << 20


def read_configuration(
    directory: Path, model: str
) -> tuple[dict[str, Any], dict[str, Any] | None, Mapping[str, Any] | None]:
    """(config.json, generation_config.json or None, quantization_config if it is an FP8 form that we decode)."""
    if not _present(directory, "config.json"):
        _refuse_without_config(directory, model)
    config = read_config(directory)
    return config, read_generation_config(directory), _quantization(config, directory / "config.json")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; where it says nothing of quantization and a file beside it does, which the weights bear out, with
    the quantization_config that this amounts to (``foreign.settings_beside``). Raises what reading raises."""
    config = read_json_object(inside(directory, "config.json"), limit_bytes=CONFIG_LIMIT)
    if said_of(config) is not None or not has_side_file(directory):
        return config
    beside = settings_beside(directory, read_headers(directory, str(directory), packed=True)[1])
    return config if beside is None else {**config, "quantization_config": beside}


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json, or None where there is none."""
    if not _present(directory, "generation_config.json"):
        return None
    return read_json_object(inside(directory, "generation_config.json"), limit_bytes=CONFIG_LIMIT)


def _present(directory: Path, name: str) -> bool:
    """Whether the directory has an entry of this name, of whatever kind (a dangling link counts)."""
    return os.path.lexists(directory / name)


def _declared(directory: Path, index: Path, name: str) -> bool:
    """Whether a file that the index names is there. Raises AccessError for a name that leads elsewhere."""
    return os.path.lexists(inside(directory, name, declared_in=index))


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
        check_config(config, file)
        return None
    if not isinstance(found, dict):
        raise MalformedInputError(
            "quantization_config must be an object", file=file, found=type(found).__name__, remedy="fetch it again"
        )
    if is_scaled_float8(found):
        return found
    raise refuse_settings(found, file)


def read_headers(
    directory: Path, model: str, *, packed: bool = False
) -> tuple[tuple[Header, ...], dict[str, TensorInfo]]:
    """Every weight file's header, and all tensors in file order, proved to agree with the index. ``packed``: a model
    whose weights are packed codes is wanted, not refused. Raises as well what ``weight_sets`` raises where more than
    one model lies there."""
    present = partial(_present, directory)
    if not present(SINGLE) and not present(INDEX):
        _refuse_without_weights(directory, model)
    refuse_adapter(directory, present)
    index = inside(directory, INDEX)
    owners = weight_map(index) if present(INDEX) else {}
    if not present(SINGLE) or index_counts(owners.values(), partial(_declared, directory, index)):
        headers, tensors = _read_indexed(directory, owners)
        if present(SINGLE) and SINGLE not in owners.values():
            refuse_twin(inside(directory, SINGLE), tensors)
    else:
        header = read_header(inside(directory, SINGLE))
        headers, tensors = (header,), header.tensors
        if owners:
            check_single(tensors, index, owners)
    _check_weights(tensors, headers[0].path if len(headers) == 1 else index, packed)
    return headers, tensors


def _read_indexed(directory: Path, owners: Mapping[str, str]) -> tuple[tuple[Header, ...], dict[str, TensorInfo]]:
    """The headers of the shards that the index places tensors in (``owners``), and all tensors in file order."""
    index = inside(directory, INDEX)
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
    return tuple(headers), tensors


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
    if not packed:
        check_tensors(tensors)


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
    if len(shards) == 1 and not _SHARD.fullmatch(shards[0]):
        raise MalformedInputError(
            "the weights are in a file of a name under which no runtime looks for them",
            file=directory / shards[0],
            expected=f"{SINGLE}, or shards and {INDEX}",
            found=printable(shards[0], 120),
            remedy=f"if it is the whole model, call it {SINGLE}",
        )
    if not shards and "weights.npz" in names:
        raise UnsupportedError(
            "these are weights of MLX in numpy's form, which is not read",
            file=directory / "weights.npz",
            expected=f"{SINGLE} or {INDEX}",
            remedy="start from the model it was made from (its model card names it)",
        )
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

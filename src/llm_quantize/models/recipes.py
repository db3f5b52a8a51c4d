"""Recipes as other people's models have them: a GGUF file of this machine or of the hub, of which headers are read, or
a directory of packed integers of this machine.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from llm_quantize.architectures import open_architecture
from llm_quantize.errors import UsageError, printable
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.compressed_levels import NAME as INTEGERS
from llm_quantize.formats.gguf.recipe_from import recipe_of
from llm_quantize.formats.mlx import NAME as MLX
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.recipe import Origin, Recipe
from llm_quantize.formats.recipe_file import recipe_bytes
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.io.paths import read_limited
from llm_quantize.models.files import CONFIG_LIMIT
from llm_quantize.models.gguf import sniff
from llm_quantize.models.hub.ollama import is_named, stored
from llm_quantize.models.hub.runnable import gguf_on_hub, is_hub_id
from llm_quantize.models.quantized import PackedDirectory, is_packed_directory
from llm_quantize.qtypes.affine import is_affine
from llm_quantize.qtypes.integer import is_integer


def recipe_from(file: str | Path, *, revision: str | None = None, on_event: EventSink = ignore) -> Recipe:
    """The tensor types of the model ``file``, for another of the same architecture and as many blocks.

    ``file``: a path of a GGUF file (of a split model its directory or any part), or a file of the hub, ORG/NAME:FILE at
    ``revision``, where FILE is a level or a part of the file's name, or ollama:NAME: a recipe for gguf. Or a model
    directory of integers (GPTQ, AWQ, compressed-tensors): a recipe for compressed-tensors. Reads headers only.

    Raises UsageError (no such file, none of these, types that are not written here), MalformedInputError,
    UnsupportedError, AccessError, NetworkError.
    """
    text = os.fspath(file)
    path = stored(text).path if is_named(text) else Path(text).expanduser()
    if os.path.lexists(path):
        if revision is not None:
            raise UsageError("a file has no revisions", file=path, remedy="leave --revision out")
        if path.is_dir() and is_packed_directory(path):
            with PackedDirectory(path) as packed:
                return _of_directory(packed)
        if not sniff(path):
            raise UsageError(
                "there are no types of tensors to be taken over from this",
                file=path,
                expected="a .gguf file, the directory of a split one, or a model directory of packed integers",
                remedy="name such a file, or take a level (-q)",
            )
        return recipe_of([read_gguf(part) for part in artifact_files(path)])
    if not is_hub_id(text):
        raise UsageError(
            "no such file", file=path, remedy="give an existing GGUF file, or ORG/NAME:FILE for one of the hub"
        )
    with gguf_on_hub(text, revision, on_event) as paths:
        if not paths:
            raise UsageError(
                "this repository holds no such GGUF file", file=text, remedy="name a repository of GGUF files"
            )
        return recipe_of([read_gguf(path) for path in paths])


def _of_directory(packed: PackedDirectory) -> Recipe:
    """The recipe of a directory of packed integers. Raises UsageError for other grids, and for rounded activations."""
    grids = {matrix.name: matrix.qtype for matrix in packed.matrices.values()}
    form = MLX if any(is_affine(qtype) for qtype in grids.values()) else INTEGERS
    mixes = PACKED[form].MIXES
    known = is_affine if form == MLX else is_integer
    odd = [one for one in packed.matrices.values() if not known(one.qtype) or one.inputs is not None]
    if mixes is None or odd or not grids:
        raise UsageError(
            "a recipe for a directory has integer weights with activations of 16 bits",
            file=packed.path,
            tensor=odd[0].name if odd else None,
            expected="matrices as GPTQ, AWQ, W4A16 or MLX's integers have them",
            found=odd[0].qtype if odd else "no packed matrices",
            remedy="take the level that it has with -q",
        )
    architecture = open_architecture(packed.config, file=packed.path / "config.json")
    digest = hashlib.sha256(read_limited(packed.path / "config.json", CONFIG_LIMIT))
    for header in packed.headers:
        digest.update(header.sha256.encode())
    usual, _ = Counter(grids.values()).most_common(1)[0]
    level, called = mixes.mixed_level([usual]), mixes.mixed_level(grids.values())
    name = os.fsencode(packed.path.resolve().name).decode("utf-8", "replace")
    origin = Origin(printable(name, 120), digest.hexdigest(), architecture.gguf_name, architecture.hyper.n_layer)
    recipe = Recipe(called, mixes.recipe_level(level), grids, form=form, origin=origin)
    return replace(recipe, sha256=hashlib.sha256(recipe_bytes(recipe)).hexdigest())

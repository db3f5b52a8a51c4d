"""Recipes as other people's files have them: a GGUF file of this machine or of the hub, of which headers are read."""

from __future__ import annotations

import os
from pathlib import Path

from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.gguf.recipe_from import recipe_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.gguf import sniff
from llm_quantize.models.hub.runnable import gguf_on_hub, is_hub_id


def recipe_from(file: str | Path, *, revision: str | None = None, on_event: EventSink = ignore) -> Recipe:
    """The tensor types of the GGUF model ``file``, for another model of the same architecture and as many blocks.

    ``file``: a path (of a split model its directory or any part), or a file of the hub, ORG/NAME:FILE at ``revision``,
    where FILE is a level or a part of the file's name. Reads headers only.

    Raises UsageError (no such file, none of GGUF, types that are not written here), MalformedInputError,
    UnsupportedError, AccessError, NetworkError.
    """
    text = os.fspath(file)
    path = Path(text).expanduser()
    if os.path.lexists(path):
        if revision is not None:
            raise UsageError("a file has no revisions", file=path, remedy="leave --revision out")
        if not sniff(path):
            raise UsageError(
                "a recipe is taken from GGUF files only",
                file=path,
                expected="a .gguf file, or the directory of a split one",
                remedy="name such a file; mixes of compressed-tensors are written by hand, or by analyze profile",
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

"""What a run promises of a matrix beyond nearness to the source: what comes out of its layer, and scales that moved.

Error feedback may move weights far where the layer's inputs hardly ask for them, further than any bound on weights: of
such a matrix the run noted what is lost at the layer's output, and of which bytes of the source it is. Where the source
is that source, this is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape, to_float32
from llm_quantize.architectures.scaling import Slice, scale_groups
from llm_quantize.artifacts.decoded import Decoded
from llm_quantize.artifacts.origin import alike, source_hash
from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.modules import select
from llm_quantize.models.opening import Source

_ROUNDING = 1e-9  # of sums in another order


class Promises:
    """Of the matrices of an artifact with this manifest (None: nothing is promised), made of ``source``."""

    def __init__(self, manifest: Mapping[str, Any] | None, source: Source | None) -> None:
        known = manifest or {}
        self._source = source
        self._last: tuple[tuple[str, int, int] | None, str] = (None, "")
        self._units = {entry["name"]: entry["units"] for entry in known.get("tensors", [])}
        self._matrices = {
            str(field): entry for entry in known.get("matrices", []) for field in entry["fields"] if _is_kept(entry)
        }

    def keeps(self, name: str) -> bool:
        """Whether the matrix that tensor ``name`` holds loses no more in its layer than plain rounding, as the run
        noted, and was made of the very bytes that the source has now."""
        entry = self._matrices.get(name)
        if entry is None or self._source is None:
            return False
        weight = self._weights.get(entry["name"])
        if weight is None:
            return False
        rows, direct = matrix_shape(weight.shape)[0], weight.name == name
        for unit in self._units.get(name, [{"rows": [0, rows], "source_sha256": ""}]):
            start, stop = unit["rows"] if direct else (0, rows)
            if not 0 <= start < stop <= rows:
                return False
            if self._hash(weight, start, stop, unit["source_sha256"]) != unit["source_sha256"]:
                return False
        return True

    def _hash(self, weight: OutputTensor, start: int, stop: int, recorded: str) -> str:
        """``source_hash``; that of a whole matrix, which several units share, is kept."""
        key = (weight.name, start, stop)
        if self._source is not None and (key != self._last[0] or not alike(self._last[1], recorded)):
            self._last = key, source_hash(self._source.checkpoint, weight, start, stop, like=recorded)
        return self._last[1]

    @cached_property
    def _weights(self) -> dict[str, OutputTensor]:
        """What each matrix is made of, under the name of a tensor of the map, or of a module."""
        if self._source is None:
            return {}
        found = {output.name: output for output in self._source.tensors.outputs}
        try:
            return found | {module.name: module.weight for module in select(self._source).modules}
        except UnsupportedError:  # no directory is made of this model
            return found


def _is_kept(entry: Mapping[str, Any]) -> bool:
    """Whether a manifest's entry says that a matrix loses no more in its layer than plain rounding; where the user did
    not let the two be compared, that it was chosen for what comes out of the layer."""
    loss, plain = entry.get("loss"), entry.get("plain_loss", math.inf)
    if not isinstance(loss, float | int) or not isinstance(plain, float | int):
        return False
    return math.isfinite(loss) and loss <= plain * (1 + _ROUNDING)


class MovedScales:
    """The scales that a transform took from norms, per input of what reads them, by the artifact's own norms."""

    def __init__(self, source: Source, artifact: Decoded) -> None:
        self._source, self._artifact = source, artifact

    def of(self, output: OutputTensor) -> npt.NDArray[np.float32] | None:
        """float32 (columns,): by what the columns of ``output`` were multiplied; None where no norm says so."""
        found = self._norms.get(output.pieces[0].source) if len(output.pieces) == 1 else None
        return None if found is None else self._scale(found)

    @cached_property
    def _norms(self) -> dict[str, Slice]:
        """The norm before each matrix that a transform may rescale for it."""
        return dict(self._pairs())

    def _pairs(self) -> Iterator[tuple[str, Slice]]:
        for layer in range(self._source.architecture.hyper.n_layer):
            for group in scale_groups(self._source, layer):
                norm = next((part for part in group.divided if part.float_stored and part.along == "columns"), None)
                if norm is not None and group.spread is None and all(part.float_stored for part in group.divided):
                    yield from ((part.name, norm) for part in group.multiplied)

    def _scale(self, norm: Slice) -> npt.NDArray[np.float32] | None:
        if norm.name not in self._artifact.names:
            return None
        before = to_float32(self._source.checkpoint.read_rows(norm.name, 0, 1)).reshape(-1) + np.float32(norm.add)
        after = self._artifact.decode(norm.name).reshape(-1) + np.float32(norm.add)
        sound = np.isfinite(before) & np.isfinite(after) & (before * after > 0)
        scale: npt.NDArray[np.float32] = np.divide(before, after, out=np.ones_like(before), where=sound)
        return scale

"""Where a scale per channel can move between weights without changing what the model computes.

Between two operations lies a vector x of n channels. Dividing what makes x by s and multiplying, channel by channel,
all that reads x changes nothing, provided that everything between is linear in each channel:

    norm -> q, k, v (and, in parallel blocks, the feed-forward block)   role "attention_in" (or "block_in")
    norm -> everything that a delta rule reads                            role "attention_in"
    v -> output projection; s is shared by the query heads of a key head  role "attention_out"
    norm -> gate, up, router, all experts, shared experts                role "feed_forward_in"
    up -> down; one group for each expert                                role "feed_forward_out"

An output gate multiplies each channel, so attention with one has its groups. There is none where that is not so:
norms without weights (OLMo), norms after a projection (OLMo 2) or after a delta rule, values that are clamped
(``clip_qkv``), GELU without a gate. relu(u)^2 is homogeneous of degree two: u is divided by the root of s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from .architecture import Architecture
from .base import OutputTensor, Piece, TensorMap
from .kinds import Kind as T

Role = Literal["attention_in", "attention_out", "feed_forward_in", "feed_forward_out", "block_in"]

_READERS: dict[str, tuple[T, ...]] = {
    "attention": (T.ATTN_QKV, T.ATTN_Q, T.ATTN_K, T.ATTN_V, T.ATTN_GATE, T.SSM_ALPHA, T.SSM_BETA),
    "feed_forward": (
        T.FFN_GATE,
        T.FFN_UP,
        T.FFN_GATE_INP,
        T.FFN_GATE_EXP,
        T.FFN_UP_EXP,
        T.FFN_GATE_INP_SHEXP,
        T.FFN_GATE_SHEXP,
        T.FFN_UP_SHEXP,
    ),
}
# (gate, up, down) of every kind of feed-forward block.
_BLOCKS = (
    (T.FFN_GATE, T.FFN_UP, T.FFN_DOWN),
    (T.FFN_GATE_EXP, T.FFN_UP_EXP, T.FFN_DOWN_EXP),
    (T.FFN_GATE_SHEXP, T.FFN_UP_SHEXP, T.FFN_DOWN_SHEXP),
)


@dataclass(frozen=True, eq=False)
class Slice:
    """The channels of a group in one tensor of the checkpoint, which is seen as a matrix (rows, columns): leading
    dimensions flattened, a vector one row.

    ``name``: the tensor. ``along``: whether a channel is a column or a row of it. ``index``: int64 (n,), which column
    (row) each channel is; None = all of them, in order. ``across``: (start, stop) of the rows (columns) concerned;
    None = all. ``add``: what the model adds to the stored value (norms stored minus one). ``power``: of s.
    ``float_stored``: the run stores this tensor as floats (norms, biases, routers), so its rounding is the storage's.
    """

    name: str
    along: Literal["columns", "rows"]
    index: npt.NDArray[np.int64] | None = None
    across: tuple[int, int] | None = None
    add: float = 0.0
    power: float = 1.0
    float_stored: bool = False


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Scales that move from ``divided`` to ``multiplied``.

    ``columns``: n, inputs of each matrix of ``multiplied``. ``spread``: int64 (n,), which of the ``channels`` scales
    each input has (query heads share those of their key head); None = its own. ``expert``: which expert's, or None.
    """

    layer: int
    role: Role
    columns: int
    channels: int
    divided: tuple[Slice, ...]
    multiplied: tuple[Slice, ...]
    spread: npt.NDArray[np.int64] | None = None
    expert: int | None = None

    @property
    def seen_at(self) -> str:
        """The reader whose input is the group's, of every token: the router of a mixture, else the first matrix."""
        whole = (part for part in self.multiplied if part.float_stored)
        return next(whole, self.multiplied[0]).name

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the group changes, each once."""
        return tuple(dict.fromkeys(part.name for part in (*self.divided, *self.multiplied)))


class Opened(Protocol):
    """What this module needs of an opened model (``source.Source`` is one)."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def tensors(self) -> TensorMap: ...


def scale_groups(source: Opened, layer: int) -> list[ScaleGroup]:
    """The groups of one layer, in the order in which the network runs. Each can be applied alone, or all together."""
    return _Layer(source, layer).groups()


def changed_floats(source: Opened) -> frozenset[str]:
    """Checkpoint tensors, stored as floats, that some group changes: norms, their biases, routers, biases of v and up.

    A run that scales must write them; it cannot copy them.
    """
    groups = [group for layer in range(source.architecture.hyper.n_layer) for group in scale_groups(source, layer)]
    return frozenset(p.name for group in groups for p in (*group.divided, *group.multiplied) if p.float_stored)


class _Layer:
    def __init__(self, source: Opened, layer: int) -> None:
        self.family, self.config = source.architecture.family, source.architecture.config
        self.hyper, self.layer = source.architecture.hyper, layer
        prefix = f"blk.{layer}."
        self.outputs = {output.name: output for output in source.tensors.outputs if output.name.startswith(prefix)}

    def output(self, tensor: T, suffix: str = ".weight") -> OutputTensor | None:
        return self.outputs.get(tensor.of(self.layer, suffix))

    def groups(self) -> list[ScaleGroup]:
        found = [*self._from_norms("attention"), *self._from_values(), *self._from_norms("feed_forward")]
        for kinds in _BLOCKS:
            found += self._from_up(*kinds)
        return found

    def _from_norms(self, first: str) -> Iterator[ScaleGroup]:
        """Groups of norms whose first reader is ``first``."""
        for feed in self.family.feeds:
            if feed.readers[0] != first or not self.config.holds(feed.when):
                continue
            divided = [_vector(output) for suffix in (".weight", ".bias") if (output := self.output(feed.norm, suffix))]
            multiplied = [
                part
                for reader in feed.readers
                for tensor in _READERS[reader]
                if (output := self.output(tensor)) is not None
                for part in self._inputs(output)
            ]
            if divided and multiplied:
                role: Role = "attention_in" if first == "attention" else "feed_forward_in"
                if len(feed.readers) > 1:
                    role = "block_in"
                width = self.hyper.embedding_length
                yield ScaleGroup(self.layer, role, width, width, tuple(divided), tuple(multiplied))

    def _from_values(self) -> Iterator[ScaleGroup]:
        """v -> the output projection."""
        hyper, out = self.hyper, self.output(T.ATTN_OUT)
        own, fused = self.output(T.ATTN_V), self.output(T.ATTN_QKV)
        values = own or fused
        if out is None or values is None or self.config.get("clip_qkv") is not None:
            return
        width = hyper.n_head_kv * hyper.head_dim
        start = 0 if own is not None else (hyper.n_head + hyper.n_head_kv) * hyper.head_dim
        bias = self.output(T.ATTN_V if own is not None else T.ATTN_QKV, ".bias")
        divided = [_rows(one, one.pieces[0], start, width) for one in (values, bias) if one is not None]
        heads = np.arange(width).reshape(hyper.n_head_kv, 1, hyper.head_dim)
        spread = np.repeat(heads, hyper.n_head // hyper.n_head_kv, axis=1).ravel()
        columns = hyper.n_head * hyper.head_dim
        multiplied = tuple(self._inputs(out))
        shared = None if columns == width else spread
        yield ScaleGroup(self.layer, "attention_out", columns, width, tuple(divided), multiplied, shared)

    def _from_up(self, gate: T, up: T, down: T) -> Iterator[ScaleGroup]:
        """up -> down, where what lies between is a product with the gate, or the square of a rectifier."""
        above, below = self.output(up), self.output(down)
        if above is None or below is None or not self.family.plain_gate:
            return
        power, start = 1.0, 0
        width = below.shape[-1]
        if self.output(gate) is None:
            if above.shape[-2] == 2 * width:
                start = width  # gate and up in one tensor, the gate first
            elif self.family.activations == ("relu2",):
                power = 0.5
            else:
                return
        bias = self.output(up, ".bias")
        inputs = self._inputs(below)
        for expert, piece in enumerate(_matrices(above)):
            divided = [_rows(above, piece, start, width, power)]
            if bias is not None:
                divided.append(_rows(bias, bias.pieces[0], start, width, power))
            which = expert if len(above.shape) == 3 else None
            multiplied = (inputs[expert],)
            yield ScaleGroup(self.layer, "feed_forward_out", width, width, tuple(divided), multiplied, expert=which)

    def _inputs(self, output: OutputTensor) -> list[Slice]:
        """The columns of every matrix of ``output``."""
        found = []
        for piece in _matrices(output):
            along: Literal["columns", "rows"] = "rows" if piece.transpose else "columns"
            across = None if piece.count is None else (piece.start, piece.start + piece.count)
            found.append(Slice(piece.source, along, across=across, float_stored=output.float32 or output.steers))
        return found


def _matrices(output: OutputTensor) -> list[Piece]:
    """Where each matrix of a tensor comes from; one stored whole with others is cut out by its rows."""
    if len(output.shape) < 3 or len(output.pieces) == output.shape[0]:
        return list(output.pieces)
    (whole,) = output.pieces
    rows = output.shape[1]
    return [Piece(whole.source, start=i * rows, count=rows) for i in range(output.shape[0])]


def _vector(output: OutputTensor) -> Slice:
    """A norm's weight or bias."""
    (piece,) = output.pieces
    return Slice(piece.source, "columns", add=piece.add, float_stored=True)


def _rows(output: OutputTensor, piece: Piece, start: int, count: int, power: float = 1.0) -> Slice:
    """Rows ``start``... of a matrix of ``output``, or those values of a bias; all of them need no index."""
    vector = len(output.shape) == 1
    order = piece.columns if vector else piece.order
    along: Literal["columns", "rows"] = "columns" if vector or piece.transpose else "rows"
    whole = start == 0 and piece.start == 0 and order is None and count == output.shape[-1 if vector else -2]
    index = None
    if not whole or (len(output.shape) == 3 and piece.count is not None):
        index = np.arange(start, start + count) if order is None else order[start : start + count]
        index = index + piece.start
    return Slice(piece.source, along, index=index, power=power, float_stored=vector)

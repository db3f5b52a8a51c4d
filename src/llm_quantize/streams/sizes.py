"""The streamed network as memory sees it: from headers alone, or from the network at hand. Nothing here needs torch.

Both give the same figures, but for what only the network knows: whether attention is computed for all heads at once,
and matrices that share an input under names that headers do not tie together (each then counts for itself).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_quantize.architectures.base import Hyper, OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import UnsupportedError
from llm_quantize.io.statistics_layout import TapLike
from llm_quantize.models.opening import Source

if TYPE_CHECKING:
    from llm_quantize.streams.network import Network

CHUNK = 64
"""Tokens that transformers' delta rule multiplies with one another."""

_QUICK_BFLOAT16 = {"avx512_bf16", "amx_tile"}

# Matrices that multiply one input, under the names that stand between "blk.N." and ".weight"; any other has its own.
_TOGETHER = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"), "attn"),
    **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_gate_inp"), "ffn"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"), "ffn"),
    **dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"), "experts"),
}


@dataclass(frozen=True)
class ForeseenTap:
    """A tap as headers tell it (see ``streams.taps.Tap``)."""

    name: str
    columns: int
    matrices: int
    tensors: Mapping[str, int | None]


@dataclass(frozen=True)
class NetworkSizes:
    """Bytes of the weights of the largest ``block``, of the ``embedding`` and of the ``head``, as they are computed
    with; ``itemsize``: bytes of one such weight and of one hidden state; ``eager``: whether the scores of all heads are
    computed at once; ``taps``: of every block; ``scratch``: of a thread that reads the source (``Model.scratch``)."""

    hyper: Hyper
    itemsize: int
    eager: bool
    block: int
    embedding: int
    head: int
    taps: Sequence[Sequence[TapLike]]
    scratch: int = 0

    def hidden(self, windows: int, length: int) -> int:
        """Bytes of the hidden states of ``windows`` of ``length`` tokens."""
        return windows * length * self.hyper.embedding_length * self.itemsize

    def workspace(self, length: int) -> int:
        """Temporary values while one window of ``length`` tokens goes through one block."""
        return workspace_bytes(self.hyper, length, self.itemsize, eager=self.eager)


def workspace_bytes(hyper: Hyper, length: int, itemsize: int, *, eager: bool) -> int:
    """Temporary values while one window of ``length`` tokens goes through one block.

    Counted: hidden states and norms (6 widths), queries, keys, values and their rotated copies, the three wide values
    of the feed-forward (of all experts a token uses), and the scores: of every head, raw, weighted and in float32,
    where attention computes them all at once (``eager``), of one head's tiles elsewhere. A delta rule holds more than
    attention, all in float32: a dozen values of every head, and four squares of CHUNK tokens for each.
    """
    heads = (4 * hyper.n_head + 3 * hyper.n_head_kv) * hyper.head_dim
    wide = hyper.feed_forward_length
    if hyper.n_expert:
        wide = max(wide, hyper.n_expert_used * hyper.expert_feed_forward_length + hyper.shared_feed_forward_length)
    scores = length * length * (hyper.n_head * (2 * itemsize + 4) if eager else 16)
    if hyper.recurrence is not None:
        states = hyper.recurrence
        values = states.value_heads * (2 * states.key_dim + states.value_dim)
        scores = max(scores, length * 4 * (states.channels + 6 * values + 4 * states.value_heads * CHUNK))
    return length * itemsize * (6 * hyper.embedding_length + heads + 3 * wide) + scores


def from_network(source: Source, network: Network, taps: Sequence[Sequence[TapLike]] = ()) -> NetworkSizes:
    """Of the network at hand. ``taps``: of every block, where they are wanted."""
    return NetworkSizes(
        hyper=source.architecture.hyper,
        itemsize=network.dtype.itemsize,
        eager=network.eager,
        block=max(network.bytes(index) for index in range(network.n_blocks)),
        embedding=network.bytes("embedding"),
        head=network.bytes("head"),
        taps=taps,
        scratch=source.checkpoint.scratch,
    )


def refuse_side_inputs(source: Source) -> None:
    """Raise UnsupportedError where blocks need more than the hidden states of those before: keys and values of earlier
    blocks, or rows of another embedding."""
    if source.architecture.hyper.uneven is not None:
        raise UnsupportedError(
            f"models of type {source.architecture.family.model_type} cannot be run block by block here",
            file=source.checkpoint.config_file,
            expected="blocks that need hidden states alone",
            found="keys and values shared between layers, or embeddings of layers",
            remedy="quantize with --no-calibration, or for GGUF with --imatrix FILE of llama.cpp",
        )


def from_headers(source: Source, device: str = "cpu") -> NetworkSizes:
    """Of the network that will be built. Raises UnsupportedError where there can be none (``refuse_side_inputs``)."""
    refuse_side_inputs(source)
    hyper, itemsize = source.architecture.hyper, _itemsize(source, device)
    blocks = [0] * hyper.n_layer
    embedding = head = 0
    for output in source.tensors.outputs:
        if output.constant is not None:
            continue
        nbytes, block = itemsize * weights_of(output.shape), block_of(output)
        if block is not None:
            blocks[block] += nbytes
        elif output.name.startswith("output"):
            head += nbytes
        else:
            embedding += nbytes
            head += nbytes if output.name == "token_embd.weight" and hyper.tied else 0
    taps = _taps(source.tensors.outputs, hyper.n_layer)
    scratch = source.checkpoint.scratch
    return NetworkSizes(hyper, itemsize, False, max(blocks, default=0), embedding, head, taps, scratch)


def block_of(output: OutputTensor) -> int | None:
    """The block that a tensor belongs to; None where it stands before or after them all."""
    first, _, rest = output.name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first == "blk" and number.isdecimal() else None


def block_matrices(outputs: Iterable[OutputTensor]) -> Iterable[OutputTensor]:
    """The matrices of the blocks, and stacks of them."""
    return (output for output in outputs if block_of(output) is not None and _is_matrix(output))


def _is_matrix(output: OutputTensor) -> bool:
    other = output.name.endswith(("_norm.weight", "ssm_conv1d.weight", "shortconv.conv.weight"))
    return len(output.shape) > 1 and output.constant is None and not other


def _taps(outputs: Iterable[OutputTensor], n_layer: int) -> tuple[tuple[TapLike, ...], ...]:
    """The inputs of every block: one for the matrices that share it. A router's comes before its experts'."""
    found: list[dict[tuple[str, int], ForeseenTap]] = [{} for _ in range(n_layer)]
    for output in block_matrices(outputs):
        index, stem = block_of(output) or 0, output.name.split(".")[2]
        key = (_TOGETHER.get(stem, stem), output.shape[-1])
        tensors: dict[str, int | None] = {piece.source: None for piece in output.pieces}
        if key in found[index]:
            tensors = {**found[index][key].tensors, **tensors}
        found[index][key] = ForeseenTap("/".join(map(str, key)), key[1], math.prod(output.shape[:-2]), tensors)
    return tuple(tuple(sorted(taps.values(), key=lambda tap: tap.matrices > 1)) for taps in found)


def _itemsize(source: Source, device: str) -> int:
    """Bytes of a value as ``calibration.collect.compute_dtype`` will choose it; 4 where that cannot be foreseen."""
    stored = {info.dtype for info in source.checkpoint.tensors.values()}
    quick = device != "cpu" or bool(_QUICK_BFLOAT16 & _cpu_flags())
    return 2 if quick and not stored & {"F32", "F64"} else 4


def _cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())

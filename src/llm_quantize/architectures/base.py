"""What a model family is to us: data that maps a checkpoint's tensors and configuration to a runtime's.

Weights are in Hugging Face orientation, W (out, in). An output tensor is a matrix of rows; every row comes from
one row (or, transposed, one column) of one source tensor, so any row range can be produced by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor that come from one source tensor.

    The source is seen as a matrix (rows, columns): leading dimensions flattened, 1-D = one row.
    ``start``/``count``: the block of source rows used (count None = to the end).
    ``order``: int64 (count,), which row of that block each output row is (None = as they stand).
    ``transpose``: the source is stored (in, out), as GPT-2's Conv1D: output row i is source column i. For a 3-D
    source the last two dimensions of each matrix are exchanged.
    ``add``: added to every value in float32 (Gemma stores norm weights minus one).
    """

    source: str
    start: int = 0
    count: int | None = None
    order: npt.NDArray[np.int64] | None = None
    transpose: bool = False
    add: float = 0.0


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the artifact: its name there, its row-major shape (out, in), and where its rows come from.

    ``pieces`` are concatenated along the flattened row axis. ``constant`` (float32) is used instead where the
    values follow from the configuration (rotary frequency factors). ``float32`` marks what a runtime wants in F32
    whatever the recipe says (norms, biases, routers: the recipe still sees them, and its never-quantized list rules
    in general; this flag only records what the format's owner stores as F32 even at F16/BF16/Q8_0).
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    constant: npt.NDArray[np.float32] | None = None
    float32: bool = False


@dataclass(frozen=True)
class TensorMap:
    """Every source tensor accounted for: used by ``outputs``, or in ``left_out`` with the reason."""

    outputs: tuple[OutputTensor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

"""What a method made of some rows, held against what it promises before it is written.

Codes that lie no further from the weights than rounding does are sound whatever they were chosen for. Those that lie
further must lose no more in their layer than plain rounding, told anew from codes and grid: ``verify --source`` will
believe the figure that the run notes (artifacts/promise.py).
"""

from __future__ import annotations

from torch import Tensor

from llm_quantize.artifacts.deviation import error_bound
from llm_quantize.errors import PromiseError
from llm_quantize.methods.gptq import Solution, losses
from llm_quantize.methods.hessian import Factor

_SLACK = 1e-2  # of sums in another order, in float32


def prove(name: str, qtype: str, start: int, weight: Tensor, factor: Factor, found: Solution) -> None:
    """``weight``: float32 (rows, n), rows ``start`` and on of matrix ``name``, which ``found`` holds in ``qtype``; its
    ``plain_loss`` was asked for.

    Raises PromiseError where the codes are neither near the weights nor better than plain rounding.
    """
    values = found.grid.decode(found.codes)
    norm = float(weight.double().norm())
    error = float((values.double() - weight).norm()) / (norm or 1.0)
    bound = error_bound(qtype, feedback=True)
    if error <= bound:
        return
    loss, plain = float(losses(weight, found.grid, found.codes, factor).sum()), float(found.plain_loss.sum())
    if loss <= plain * (1 + _SLACK):
        return
    raise PromiseError(
        "what the method made of a matrix is neither near its weights nor better than plain rounding",
        tensor=name,
        expected=f"a relative error of at most {bound:.3g}, or a loss in the layer of at most {plain:.4g}",
        found=f"{error:.4g} and {loss:.4g} in rows {start} to {start + len(weight) - 1}",
        remedy="run the same command again, which keeps what is finished; if it ends so again, the machine's memory or "
        "this version is at fault: report it, and round plainly meanwhile (--method rtn)",
    )

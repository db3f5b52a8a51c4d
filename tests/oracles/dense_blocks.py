"""A run through the blocks written out: whole forwards of transformers' model, all inputs in memory, float64.

For every matrix of a Llama the inputs that it is to be calibrated on are taken from a whole forward of the model in
which what comes before has its quantized values; the same of the source model; then ``dense_gptq`` chooses the codes.
Quantized values of earlier matrices are given (those of the artifact under test): what is compared is one matrix at a
time, so a choice that float32 decides otherwise does not move all that follows. The grid is fitted by the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_quantize.grids.grid import Grid

from ..tiny_models import reference_model
from . import dense_correction, dense_gptq

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Expected:
    """Of one matrix: ``values`` (rows, n) float32 of the codes that the twin chose on ``grid``, and for each row how
    close its closest choice was."""

    values: np.ndarray
    grid: Grid
    margins: np.ndarray

    def on_grid(self, values):
        """Which rows of ``values`` (rows, n) lie on the twin's grid, exactly: bool (rows,)."""
        given = torch.from_numpy(np.ascontiguousarray(values))
        return (self.grid.decode(self.grid.nearest(given)) == given).all(1).numpy()


def inputs_of(model, ids, name):
    """The input of module ``name`` in a whole forward: float64 (tokens, n), all windows."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double()))
    with torch.inference_mode():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    hook.remove()
    return torch.cat(seen).numpy()


def counted(own, full, held):
    """Inputs (tokens, n) times the root of how much their tokens count: one of a mean square above 4 medians counts as
    if it had that many. Tokens that are held back, the last ones, have a median of their own."""
    fit = len(own) - held
    roots = np.ones((len(own), 1))
    for part in (slice(0, fit), slice(fit, len(own))):
        squares = (own[part] ** 2).mean(axis=1)
        if len(squares):
            most = 4 * np.sort(squares)[(len(squares) - 1) // 2]
            weights = torch.from_numpy(np.minimum(1, most / squares)).bfloat16().double()
            roots[part, 0] = np.sqrt(weights.numpy())
    return own * roots, full * roots


def put(model, name, values):
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(torch.as_tensor(values))


def target_and_hessian(weight, own, full, options, how):
    """The corrected weight, the conditioned Hessian and mean squares of the inputs, all float64. ``how``: (share,
    ridge) of the correction, where the options do not say it."""
    tokens, n = own.shape
    hessian = own.T @ own
    squares = np.diag(hessian) / tokens
    lower_median = np.sort(squares)[(n - 1) // 2]
    ridge_base = np.minimum(squares, 100 * lower_median).mean()
    if options.correction is None:
        weight = dense_correction.corrected(weight, own, full, *how)
    elif options.correction > 0:
        cross = (full - own).T @ own
        weight = dense_gptq.corrected(
            weight, hessian, cross, tokens, damp=options.damp, ridge_base=ridge_base, alpha=options.correction
        )
    conditioned = dense_gptq.condition(hessian, tokens, damp=options.damp, shrink=options.shrink)
    return weight, conditioned, np.maximum(squares, 1e-3 * lower_median)


def quantize(weight, own, full, kind, options, how):
    """What becomes of ``weight`` (rows, n) whose inputs are ``own`` (tokens, n), the source model's ``full``."""
    target, hessian, squares = target_and_hessian(weight.astype(np.float64), own, full, options, how)
    grid = kind.fit(torch.from_numpy(target).float(), torch.from_numpy(squares).float(), refine=options.refine)
    scale = grid.scale().double().repeat_interleave(grid.group, 1)
    offset = grid.offset().double().repeat_interleave(grid.group, 1)
    table = (scale[:, :, None] * grid.levels.double() - offset[:, :, None]).numpy()
    order = np.argsort(-np.diag(own.T @ own), kind="stable")
    codes, margins = dense_gptq.feed_back(target, hessian, order, table)
    codes, more = dense_gptq.descend(target, hessian, codes, table, options.sweeps)
    values = grid.decode(torch.from_numpy(codes.astype(np.uint8))).numpy()
    return Expected(values, grid, np.minimum(margins, more))


def dense_run(directory: Path, ids, decoded, kind, options, inputs: str) -> Iterator[tuple[str, Expected]]:
    """(tensor, what is expected of it) for every matrix of the blocks of a float32 Llama.

    ``decoded``: {tensor of the checkpoint: float32 values in the artifact}; ``kind``: the number grid; ``inputs``:
    sequential, block or source.
    """
    source, model = reference_model(directory), reference_model(directory)
    if inputs != "source":
        put(model, "model.embed_tokens", decoded["model.embed_tokens.weight"])
    for index in range(len(model.model.layers)):
        front = f"model.layers.{index}."
        pending = []
        for stage in STAGES:
            own, full = (inputs_of(one, ids, front + stage[0]) for one in (model, source))
            weights = {name: source.get_submodule(front + name).weight.detach().numpy() for name in stage}
            together = np.concatenate(list(weights.values())).astype(np.float64)
            assert len(together) <= 256, "the product samples rows of more"
            held = len(ids) // 4 * len(ids[0])
            own, full = counted(own, full, held if options.correction is None and inputs != "source" else 0)
            how = dense_correction.decided(together, own, full, held)
            for name, weight in weights.items():
                yield f"{front}{name}.weight", quantize(weight, own, full, kind, options, how)
                pending.append(front + name)
            if inputs == "sequential":
                for name in pending:
                    put(model, name, decoded[f"{name}.weight"])
                pending = []
        if inputs == "block":
            for name in pending:
                put(model, name, decoded[f"{name}.weight"])

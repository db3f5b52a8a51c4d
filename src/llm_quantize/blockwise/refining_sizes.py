"""What the refinement of a block sees and takes. Nothing here needs torch."""

from __future__ import annotations

BATCH = 2048
"""Tokens in a step, about: whole windows, at least one."""

BACK = 8
"""One window of so many is held back."""

PACES = (1.0, 0.25, 0.0625, 0.015625)
"""How long steps may be: blocks differ in how far their codes can move before they lose more than they gain."""

TRIAL = 6
"""Steps after which a pace is judged."""

KEPT_FOR_BACK = 4
"""Times what a forward holds for a moment is kept of a block until its gradients are there."""

WEIGHT_BYTES = 28
"""For each weight of a block while it moves: its place, its value, its gradient, what Adam knows of it and the source's
tensors being filled, in float32; codes twice, and what has settled."""

HELD_BYTES = 2
"""For each weight of a block until all its matrices are there: its code, and its part of the fields."""


def refinement_held(windows: int) -> int:
    """How many of ``windows``, the last ones, are held back: at least 1."""
    return max(1, windows // BACK)


def batch_of(windows: int, length: int) -> int:
    """Windows in a step, of so many of ``length`` tokens."""
    return min(windows, max(1, BATCH // length))


def refinement_windows(windows: int, length: int, steps: int) -> int:
    """How many windows go through a block, there or back, where ``windows`` of ``length`` tokens are calibrated on; a
    way back counts as two."""
    held = refinement_held(windows)
    return 2 * held + (2 + 3 * steps) * batch_of(windows - held, length)

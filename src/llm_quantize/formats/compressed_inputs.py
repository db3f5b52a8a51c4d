"""What compressed-tensors' configurations say of the inputs of matrices.

That is ``input_activations``; the fields of those that were calibrated:

    input_scale          f16, bf16 or f32  (1,)   one scale for all inputs of the module: code * input_scale
    input_global_scale   f32               (1,)   what scales of groups were multiplied by before they became E4M3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_quantize.formats.compressed_groups import Group, Groups
from llm_quantize.formats.packed import FLOATS, Shapes
from llm_quantize.qtypes.inputs import InputGrid

FIELDS = ("input_scale", "input_global_scale")
SHAPES: Shapes = {"input_scale": (FLOATS, ((1,), ())), "input_global_scale": (("F32",), ((1,), ()))}

_FLOATS = {8: "e4m3", 4: "e2m1"}


def field_of(grid: InputGrid) -> str:
    """The field that a calibrated grid's number stands in."""
    return "input_global_scale" if grid.nested else "input_scale"


def read_inputs(args: Mapping[str, Any]) -> InputGrid | None:
    """The grid that ``input_activations`` describes, as the package (0.20) computes it; None: another one."""
    bits, kind, strategy, dynamic = (args.get(key) for key in ("num_bits", "type", "strategy", "dynamic"))
    if type(bits) is not int or args.get("symmetric", True) is not True:
        return None
    codes = _FLOATS.get(bits) if kind == "float" else f"int{bits}" if kind == "int" and 2 <= bits <= 8 else None
    size, scales = args.get("group_size"), str(args.get("scale_dtype")).removeprefix("torch.")
    if codes is None:
        return None
    if strategy == "token" and dynamic is True:
        return InputGrid(codes)
    if strategy == "tensor" and dynamic in (False, None):
        return InputGrid(codes, static=True)
    if type(size) is not int or size < 1:
        return None
    if strategy == "group" and dynamic is True:
        power_of_two = size == 32 and scales == "uint8" and kind == "float"
        return InputGrid(codes, size, "e8m0" if power_of_two else "")
    if strategy == "tensor_group" and dynamic == "local" and codes == "e2m1" and scales == "float8_e4m3fn":
        return InputGrid(codes, size, "e4m3", static=True)
    return None


class InputsOf:
    """What each module's inputs are rounded to, as ``groups`` say. ``unknown``: whether that of some modules is not
    followed here."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.unknown = any(group.get("input_activations") and _grid(group) is None for group in groups.all)

    def of(self, modules: Sequence[str]) -> Mapping[str, InputGrid | None]:
        """The grid of each of ``modules``, all quantized. Raises MalformedInputError for expressions that cannot be
        matched, or not soon enough."""
        grids = list(dict.fromkeys(_grid(group) for group in self._groups.all))
        if len(grids) < 2:
            return dict.fromkeys(modules, grids[0] if grids else None)
        named = self._groups.named(modules)
        found = ((module, named.get(module, self._groups.of_class)) for module in modules)
        return {module: None if group is None else _grid(group) for module, group in found}


def _grid(group: Group) -> InputGrid | None:
    args = group.get("input_activations")
    return read_inputs(args) if isinstance(args, dict) else None

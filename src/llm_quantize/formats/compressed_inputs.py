"""What compressed-tensors' configurations say of the inputs of matrices.

That is ``input_activations``; the fields of those that were calibrated:

    input_scale          f16, bf16 or f32  (1,)   one scale for all inputs of the module: code * input_scale
    input_global_scale   f32               (1,)   what scales of groups were multiplied by before they became E4M3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quantize.formats.expressions import compiled, first_meant
from llm_quantize.formats.packed import FLOATS, Settings, Shapes
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


@dataclass(frozen=True)
class _Group:
    """One of config_groups: which modules, whether their inputs are rounded, and to what that is known here."""

    targets: tuple[str, ...]
    asked: bool
    grid: InputGrid | None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> _Group:
        targets, args = said.get("targets"), said.get("input_activations")
        names = tuple(one for one in targets if isinstance(one, str)) if isinstance(targets, list) else ("Linear",)
        return cls(names, bool(args), read_inputs(args) if isinstance(args, dict) else None)


class InputsOf:
    """What each module's inputs are rounded to, as ``settings`` say. ``unknown``: whether that of some modules is not
    followed here."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.file
        said = settings.values.get("config_groups")
        groups = said.values() if isinstance(said, dict) else ()
        self._groups = [_Group.of(one) for one in groups if isinstance(one, dict)]
        self.unknown = any(group.asked and group.grid is None for group in self._groups)

    def of(self, modules: Sequence[str]) -> Mapping[str, InputGrid | None]:
        """The grid of each of ``modules``, all quantized: that of the group that names it, or whose expression finds
        it, or of the first that is for a class of modules. Raises MalformedInputError for expressions that cannot be
        matched, or not soon enough."""
        grids = list(dict.fromkeys(group.grid for group in self._groups))
        if len(grids) < 2:
            return dict.fromkeys(modules, grids[0] if grids else None)
        usual = [group.grid for group in self._groups if not all(map(_single, group.targets))]
        named = {target: group.grid for group in reversed(self._groups) for target in group.targets}
        rules = {target: grid for target, grid in named.items() if target.startswith("re:")}
        means = ((rule, compiled(rule[3:], self._file)) for rule in rules)
        found: dict[str, InputGrid | None] = {}
        for rule, module in first_meant(means, modules, self._file, every=True):
            found.setdefault(module, rules[rule])
        others = usual[0] if usual else None
        return {module: named.get(module, found.get(module, others)) for module in modules}


def _single(target: str) -> bool:
    """Whether a target means modules by their names, and not by their class."""
    return target.startswith("re:") or "." in target

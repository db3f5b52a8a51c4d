"""Keys and values that a runtime keeps in few bits: which tensors of a directory hold their scales, and whether those
make sense.

compressed-tensors (0.20) registers two parameters on every attention module that caches keys and values, k_scale and
v_scale, (1,), in the type of the module's weights: key ~ code * k_scale, of keys as they go into the cache, so after
the rotary positions. Its classes of attention are known by their projections. Older writers, and those of other
packages, have the names of SUFFIXES as well; vLLM reads all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llm_quantize.errors import UnsupportedError, UsageError, printable
from llm_quantize.formats.packed import FLOATS
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.inputs import InputGrid

if TYPE_CHECKING:
    from llm_quantize.formats.modules import Selection
    from llm_quantize.models.opening import Source

SCALES = ("k_scale", "v_scale")
SUFFIXES = (".k_scale", ".v_scale", ".q_scale", ".k_proj.output_scale", ".v_proj.output_scale")
"""How names of scales of keys, values and queries end, whoever wrote them."""

_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")
_OUT = re.compile(r"blk\.\d+\.attn_output\.weight")


def holders(source: Source, found: Selection) -> dict[str, tuple[str, ...]]:
    """{the module that multiplies what attention made: the names of its layer's scales, keys first}, of all layers.

    The scales are found when this module is quantized, as its inputs come after keys and values. Raises
    UnsupportedError for a family whose attention the package knows no cache of, UsageError where such a module is not
    quantized.
    """
    packed = {module.name for module in found.modules}
    names: dict[str, tuple[str, ...]] = {}
    for output in source.tensors.outputs:
        if _OUT.fullmatch(output.name) is None:
            continue
        name = output.pieces[0].source.removesuffix(".weight")
        parent = name.rpartition(".")[0]
        if not any(f"{parent}.{projection}.weight" in source.checkpoint.tensors for projection in _PROJECTIONS):
            raise UnsupportedError(
                f"the attention of {source.architecture.family.model_type} has no projections of keys and values that "
                "compressed-tensors knows, and runtimes would read no scales of them",
                tensor=name,
                expected=f"one of {', '.join(_PROJECTIONS)} beside it",
                found="none",
                remedy="leave --kv-cache out",
            )
        if name not in packed:
            raise UsageError(
                "scales of keys and values are found with the matrix that attention's output goes through, and this "
                "one is left as it is",
                tensor=name,
                expected="a matrix that is quantized in every layer",
                found="--ignore",
                remedy="leave --kv-cache out, or an --ignore that does not find it",
            )
        names[name] = tuple(f"{parent}.{scale}" for scale in SCALES)
    if not names:
        raise UnsupportedError(
            f"no attention is known of {source.architecture.family.model_type}", remedy="leave --kv-cache out"
        )
    return names


def stored_scales(tensors: Mapping[str, TensorInfo], taken: Collection[str]) -> dict[str, TensorInfo]:
    """The scales of keys, values and queries among ``tensors``, but for ``taken`` ones: floats named as SUFFIXES."""
    return {
        name: info
        for name, info in tensors.items()
        if name.endswith(SUFFIXES) and name not in taken and info.dtype in FLOATS and info.elements
    }


def contradictions(scheme: Any, scales: Collection[str], modules: Collection[str]) -> Iterator[str]:
    """Where the configuration's kv_cache_scheme (None: it has none) and the names of stored ``scales`` do not fit.
    ``modules``: names of all modules with a weight. A layer lacks one where others of its kind have it, as towers of
    pictures have attention without a cache."""
    if scales and scheme is None:
        yield f"{len(scales)} scales of keys and values are stored, but the configuration has no kv_cache_scheme"
    if not isinstance(scheme, dict) or scheme.get("dynamic") not in (None, False):
        return
    if not scales:
        yield "no scale of keys and values is stored, but kv_cache_scheme says that they were calibrated"
    kinds = {_kind(name) for name in scales}
    layers = dict.fromkeys(
        parent for parent, _, last in (name.rpartition(".") for name in modules) if last in _PROJECTIONS
    )
    for layer in layers:
        for letter in "kv":
            known = scale_names(layer, letter)
            if not kinds.isdisjoint(map(_kind, known)) and not any(name in scales for name in known):
                yield f"{printable(known[0], 200)} is absent, but kv_cache_scheme says that it was calibrated"


def scale_names(layer: str, letter: str) -> tuple[str, ...]:
    """What the scale of keys ("k") or values ("v") of the attention module ``layer`` is called, by any writer."""
    names = (f"{letter}_scale", f"{letter}_proj.{letter}_scale", f"{letter}_proj.output_scale")
    return tuple(f"{layer}.{name}" for name in names)


def grid_of(scheme: Any) -> InputGrid | None:
    """How keys and values are rounded by a kv_cache_scheme, but for their calibrated scales; None where there is none,
    or where it is of a kind that is not followed here: other than one scale of 8-bit floats for a tensor."""
    if not isinstance(scheme, dict) or scheme.get("strategy") not in (None, "tensor"):
        return None
    known = (scheme.get("num_bits"), scheme.get("type")) == (8, "float") and scheme.get("dynamic") in (None, False)
    return InputGrid("e4m3", static=True) if known else None


def _kind(name: str) -> str:
    """What names of the same tensor of other layers have in common."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def words(scheme: Mapping[str, Any]) -> str:
    """What a kv_cache_scheme says, for people: 8-bit floats, calibrated scales."""
    bits = printable(str(scheme.get("num_bits")), 8)
    kinds = {"float": f"{bits}-bit floats", "int": f"{bits}-bit integers"}
    kind = kinds.get(str(scheme.get("type")), f"numbers of {bits} bits")
    return f"{kind}, {'calibrated scales' if scheme.get('dynamic') in (None, False) else 'scales found as it runs'}"


def args_of(codes: str) -> dict[str, Any]:
    """The kv_cache_scheme of calibrated floats ("e4m3"), as the package writes quantization arguments."""
    bits = {"e4m3": 8}[codes]
    return {
        **{"num_bits": bits, "type": "float", "symmetric": True, "strategy": "tensor"},
        **{"group_size": None, "scale_dtype": None, "dynamic": False},
    }

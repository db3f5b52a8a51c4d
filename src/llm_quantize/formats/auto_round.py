"""AutoRound's own directories (0.16): the layouts of GPTQ, AWQ and compressed-tensors under another name.

``packing_format`` says which; auto_round's loader (inference/convert_model.py, backend.py) reads them so:

    auto_round:auto_gptq, auto_round:gptq, none    GPTQ's first form: zero points one too small
    auto_round, auto_round:gptqmodel               GPTQ's second form
    auto_round:auto_awq, auto_round:awq            AWQ's gemm
    auto_round:llm_compressor                      MXFP4 or NVFP4 of compressed-tensors
    auto_round:fp8_static                          FP8 (models/float8.py)

``extra_config`` says of single modules, by name or by an expression, what they have instead. A directory whose weights
were rotated (``rotation_config``) computes with a matrix beside each weight, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.formats import awq, compressed_tensors, gptq, scaled_floats
from llm_quantize.formats.expressions import compiled, each_meant
from llm_quantize.formats.packed import Fields, Layout, Numbers, PackedMatrix, Settings, StoredFormat, wrong_form
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.qtypes.held import HeldRows, HeldWords

if TYPE_CHECKING:
    from llm_quantize.formats.base import Mixes

NAME = "auto-round"
METHODS: Sequence[str] = ("auto-round", "auto_round", "autoround", "intel/auto-round")
LABEL = "AutoRound-{level}"
RESCALES = True
MIXES: Mixes | None = None
USUAL = "auto_round:auto_gptq"
_FORMATS: Sequence[StoredFormat] = [form for form in (gptq, awq, compressed_tensors, scaled_floats)]  # noqa: C416
_GPTQ, _AWQ, _COMPRESSED, _FP8 = _FORMATS
_MEANT: Mapping[str, tuple[StoredFormat, Mapping[str, Any]]] = {
    **dict.fromkeys((USUAL, "auto_round:gptq"), (_GPTQ, {"checkpoint_format": "gptq"})),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), (_GPTQ, {"checkpoint_format": "gptq_v2"})),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq"), (_AWQ, {"version": "gemm"})),
    "auto_round:llm_compressor": (_COMPRESSED, {}),
    "auto_round:fp8_static": (_FP8, {}),
}
"""{packing_format: the format that it is, and what a configuration of that says}."""

FORMS: Sequence[str] = tuple(_MEANT)
_FLOATS = ("mx_fp", "nv_fp")
_ROTATES = ("rotation_config", "spinquant_config", "hadamard_config", "transform_config")
_HOMES: tuple[tuple[StoredFormat, Collection[Layout]], ...] = (
    (_GPTQ, (gptq.LAYOUT,)),
    (_AWQ, awq.LAYOUTS),
    (_FP8, scaled_floats.LAYOUTS),
)
"""The formats that matrices may be in, and their layouts; whatever else is compressed-tensors'."""


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    values = settings.values
    form = str(values.get("packing_format") or USUAL).lower()
    turned = next((key for key in _ROTATES if values.get(key)), None)
    if turned is not None:
        return f"{form} with {turned}", False
    if form in _MEANT and _MEANT[form][0] is _COMPRESSED:
        kind = str(values.get("data_type"))
        return f"{form} of {kind}", values.get("bits") == 4 and kind.startswith(_FLOATS)
    return form, form in _MEANT


def _meant(settings: Settings, of: Mapping[str, Any] | None = None) -> tuple[StoredFormat, Settings]:
    """The format that a directory is in, and its configuration in that format's words, with what ``of`` says of single
    modules."""
    form, beside = _MEANT[str(settings.values.get("packing_format") or USUAL).lower()]
    values = {**settings.values, **({} if of is None or _left(of) else of)}
    said = {key: values[key] for key in ("bits", "group_size", "sym", "fmt") if values.get(key) is not None}
    if "sym" in said:
        said["zero_point"] = not said["sym"] if isinstance(said["sym"], bool) else said["sym"]
    return form, Settings({**said, **beside}, settings.file)


def _left(said: Mapping[str, Any]) -> bool:
    """Whether modules of which this is said are not quantized."""
    bits = said.get("bits")
    return type(bits) is int and bits >= 16


def _others(settings: Settings, names: Collection[str]) -> dict[str, Mapping[str, Any]]:
    """{module: what extra_config says of it} of those of ``names`` that it means: by name, else by an expression.
    Raises MalformedInputError."""
    said = settings.values.get("extra_config") or {}
    if not isinstance(said, dict) or not all(isinstance(one, dict) for one in said.values()):
        raise wrong_form(settings.file, "extra_config", "an object of objects", said)
    rest = [name for name in names if name not in said]
    rules = ((key, compiled(f".*(?:{key})", settings.file)) for key in said if key not in names)  # found anywhere
    found = {name: said[rule] for name, rule in each_meant(rules, rest, settings.file)}
    return {**found, **{name: said[name] for name in names if name in said}}


def _of(packed: PackedMatrix) -> StoredFormat:
    """The format that a matrix is in."""
    return next((form for form, layouts in _HOMES if packed.layout in layouts), _COMPRESSED)


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    if type(bits := settings.values.get("act_bits")) is int and bits < 16:
        yield "a runtime rounds activations too, which is not followed here; only the weights are measured"


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = info
    others = _others(settings, modules)
    for name, held in modules.items():
        form, meant = _meant(settings, others.get(name))
        yield from form.read(held, meant, numbers)


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``."""
    return _of(packed).codes(packed, fields, first, last)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
    """As ``StoredFormat.zeros``."""
    return _of(packed).zeros(packed, fields, first, last)


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    return _of(packed).scales(packed, fields, first, last)


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``."""
    return _of(packed).unpack(packed, fields, first, last)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``."""
    return _of(packed).held(packed, fields, first, last)


def words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words``."""
    return _of(packed).words(packed, fields)


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``."""
    form, meant = _meant(settings)
    yield from form.check(packed, meant, fields, first, last)


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: modules that extra_config leaves as they are."""
    for name, said in _others(settings, [matrix.name for matrix in matrices.values()]).items():
        if _left(said):
            yield f"{name} is quantized, but the configuration's extra_config gives it {said['bits']} bits"


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """That of the format that it is."""
    return "+".join(sorted({_of(matrix).layout_name([matrix]) for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """As the format that it is has it: 4bit, MXFP4A16."""
    found = {_of(matrix): [one for one in matrices if _of(one) is _of(matrix)] for matrix in matrices}
    return "+".join(sorted(form.level_of(held) for form, held in found.items()))

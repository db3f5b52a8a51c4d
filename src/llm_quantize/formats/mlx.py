"""MLX checkpoints as mlx_lm writes and reads them: integers with a scale and an offset for each group of weights. The
modes of floats are in mlx_floats.py.

N = out, K = in, G = K / group, b bits; T: float16 or bfloat16, as the checkpoint has its weights (float32 is read):

    weight   uint32  (N, K b / 32)  codes one after the other, the lowest bits of a word first, over its end
    scales   T       (N, G)         s, which may be negative
    biases   T       (N, G)         o: w = s * q + o, q from 0

Read from mlx 0.32 and mlx_lm 0.32.2. Embedding and output matrix are packed like the rest, a tied one once; config.json
says group_size, bits and mode under two keys, and under a module's name what is different there. mlx_lm takes bits and
groups from the shapes of what is stored; a tensor MODULE.scales says that MODULE is quantized. MLX decodes in T.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UnsupportedError, UsageError, printable
from llm_quantize.formats import mlx_floats as floats
from llm_quantize.formats import mlx_mixed as mixed
from llm_quantize.formats.base import Array, Coverage, Field, Mixes, Scheme, SchemeOptions
from llm_quantize.formats.bitpack import pack_bits, packed_words, unpack_bits
from llm_quantize.formats.level_names import known_level
from llm_quantize.formats.packed import (
    FLOATS,
    Fields,
    Layout,
    Numbers,
    PackedMatrix,
    Settings,
    check_fields,
    check_matrix,
    check_present,
    contradicts,
    held_words,
    misfit,
    modules,
    widths,
    wrong_form,
)
from llm_quantize.formats.packing import (
    NO_CACHES,
    are_stored,
    as_they_are,
    check_group,
    load_floats,
    mixture_of,
    no_caution,
    no_fields,
    store_floats,
    to_numpy,
)
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.kernels.repack import ROWS, Room, moved
from llm_quantize.qtypes.affine import GROUPS, WIDTHS, AffineType
from llm_quantize.qtypes.codebook import CodebookType
from llm_quantize.qtypes.held import HeldRows, HeldWords

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid
    from llm_quantize.models.opening import Source

NAME = "mlx"
TITLE = "MLX"
LABEL = "MLX-{level}"
EXAMPLE = DEFAULT = "4bit"
TRANSFORM = "none"
inputs = as_they_are
input_fields = no_fields
SYMMETRIC = None
NEEDS = ""
KERNEL = ""
EXPERTS_IN_TRANSFORMERS = True
PACKS_EXPERTS = True
OWN_ROUNDING = True
VLLM_STEPS: Sequence[tuple[str, tuple[int, int]]] = ()
OFFSETS = "an offset for each group"
OPTIONS: Sequence[str] = ()
EDGES = True
UNNAMED = ("quantization", ("group_size", "bits"))
RUNTIME = (
    "mlx_lm, on Apple silicon or with `mlx-cpu` elsewhere",
    '```python\nfrom mlx_lm import load, generate\n\nmodel, tokenizer = load("{name}")\n```',
)
MIXES: Mixes | None = mixed
CACHES = NO_CACHES
ACT_ORDER = False
vllm_caution = no_caution
RESCALES = False
LEVELS: Sequence[str] = (*mixed.BITS, *floats.MODES)
DEFAULT_GROUP = 64
MODE = "affine"
FORMS: Sequence[str] = (MODE, *floats.MODES)
FAMILIES: Collection[str] = frozenset(
    (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi", "phi3", "gpt_neox"),
        *("stablelm", "olmo2", "olmo3", "granite", "smollm3", "seed_oss", "nemotron", "starcoder2"),
        *("cohere", "cohere2", "glm4", "ernie4_5"),
    )
)
"""Families whose tensors mlx_lm knows under the names that checkpoints have, as tests have seen."""

_WORDS: Mapping[str, Mapping[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
"""{family: {word of transformers 5: mlx_lm's}} where it is not the same."""

_LAYOUT = Layout(MODE, ("weight", "scales", "biases"), (), telling="scales", scales="scales")
_UNSAID = (4, 64)  # bits and group size of a module whose own settings lack them
_ORIGINAL = "use the model that it was made from, in BF16 or F16 (its model card names it)"


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """Groups of 64, unless the options say otherwise; those of a mode of floats are fixed. Raises UsageError."""
    name = known_level(level, TITLE, LEVELS, usual={bits: name for name, bits in mixed.BITS.items()})
    if name in floats.MODES:
        return floats.scheme(NAME, name, options)
    if options.symmetric is True:
        raise UsageError("MLX has an offset in every group", remedy="leave --sym out")
    group = DEFAULT_GROUP if options.group_size is None else options.group_size
    return Scheme(NAME, name, AffineType(mixed.BITS[name], group, options.scale))


def groups(scheme: Scheme) -> Sequence[int]:
    """As ``Packed.groups``: mlx_lm's own 64, else 32; those of a mode of floats are fixed."""
    return () if scheme.level in floats.MODES else (DEFAULT_GROUP, 32)


def title(_scheme: Scheme) -> str:
    """Its name for people."""
    return TITLE


def refuse(source: Source, names: Sequence[str]) -> None:
    """As ``Packed.refuse``: experts, which mlx_lm stacks, and families that it lays out in another way."""
    kind = source.architecture.family.model_type
    experts = next((name for name in names if mixture_of(name) != name), None)
    if experts is not None:
        raise UnsupportedError(
            "mlx_lm keeps the experts of a layer in one tensor, which is not written",
            tensor=experts,
            remedy="write gguf, which packs experts",
        )
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"mlx_lm is not known to load models of the family {kind} under the names that this checkpoint has",
            file=source.checkpoint.config_file,
            expected=", ".join(sorted(FAMILIES)),
            found=kind,
            remedy="write gguf, which has this family",
        )


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where groups do not divide it."""
    if isinstance(scheme.qtype, CodebookType):
        return floats.fields(scheme, rows, columns, name=name)
    grid, groups = scheme.qtype, check_group(scheme, columns, name)
    return (
        Field("weight", "uint32", (rows, packed_words(columns, grid.bits))),
        Field("scales", grid.scale, (rows, groups)),
        Field("biases", grid.scale, (rows, groups)),
    )


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """The fields of ``codes`` uint8 (rows, columns) on ``grid``, as ``fields`` lists them.

    Raises NumericPolicyError for scales and offsets that are not finite, ValueError for a grid of another kind.
    """
    wanted = scheme.qtype
    if isinstance(wanted, CodebookType):
        return floats.pack(wanted, grid, codes)
    held = grid.m is not None and grid.z is None and grid.uniform and float(grid.levels[0]) == 0
    if not held or grid.group != wanted.group(grid.shape[1]) or len(grid.levels) != 1 << wanted.bits:
        raise ValueError(f"a grid of this kind cannot be stored as {wanted.name}")
    stored = []
    for what, part in (("scale", grid.scale()), ("bias", -grid.offset())):
        values = to_numpy(part).astype(np.float32, copy=False) + np.float32(0)
        if not np.isfinite(values).all():
            row, group = (int(index) for index in np.argwhere(~np.isfinite(values))[0])
            raise NumericPolicyError(
                f"a {what} is NaN or infinite",
                expected="finite numbers",
                found=f"{values[row, group]} at row {row}, group {group}",
                remedy="check the weights and the calibration of this matrix; --ignore leaves it as it is",
            )
        stored.append(store_floats(values, wanted.scale))
    return [pack_bits(to_numpy(codes), wanted.bits, axis=1).view(np.uint32), *stored]


def described(scheme: Scheme, rows: int, columns: int) -> PackedMatrix:
    """The description of a matrix (rows, columns) that ``pack`` made."""
    grid = scheme.qtype
    if isinstance(grid, CodebookType):
        return floats.described(grid, rows, columns)
    return PackedMatrix("", _LAYOUT, rows, columns, grid.bits, grid.group(columns), False, grid=grid.name)


def form_of(settings: Settings) -> tuple[str, bool]:
    """As ``StoredFormat.form_of``."""
    modes = [settings.values.get("mode", MODE), *(own.get("mode", MODE) for _, own in _own_settings(settings))]
    return "+".join(sorted({str(mode) for mode in modes})), all(mode in FORMS for mode in modes)


def _own_settings(settings: Settings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(module, what the configuration says of it alone)."""
    return ((name, own) for name, own in settings.values.items() if isinstance(own, dict))


def notes(settings: Settings) -> Iterator[str]:
    """As ``StoredFormat.notes``."""
    del settings
    yield from ()


def read(tensors: Mapping[str, TensorInfo], settings: Settings, numbers: Numbers) -> Iterator[PackedMatrix]:
    """As ``StoredFormat.read``: bits and groups from the shapes, as mlx_lm takes them, with the help of the
    configuration, as shapes alone tell their product only."""
    del numbers
    own = dict(_own_settings(settings))
    usual = _declared(settings, "quantization", settings.values, (None, None))
    for name, found in modules(tensors, _LAYOUT):
        mode, said = settings.values.get("mode", MODE), usual
        if name in own:
            mode = own[name].get("mode", MODE)
            said = _declared(settings, name, own[name], _UNSAID)
        required = _LAYOUT.required if mode == MODE else _LAYOUT.required[:2]
        check_present(name, replace(_LAYOUT, required=required), found)
        for info in found.values():
            _check_two(info)
        if mode == MODE:
            yield _matrix(name, found, *said, settings)
        else:
            kept = {suffix: found[suffix] for suffix in required}
            yield floats.matrix(name, mode, said, kept, settings.file)


def _check_two(info: TensorInfo) -> None:
    if len(info.shape) == 3:
        raise UnsupportedError(
            "experts stacked in one tensor, as mlx_lm has them, are not decoded by this version",
            file=info.file,
            tensor=info.name,
            expected="matrices",
            found=list(info.shape),
            remedy=_ORIGINAL,
        )
    check_matrix(info)


def _declared(
    settings: Settings, name: str, values: Mapping[str, Any], unsaid: tuple[int | None, int | None]
) -> tuple[int, int]:
    """(bits, group size) that the configuration says of a module, or of all. Raises MalformedInputError."""
    found = []
    groups = (16, *GROUPS) if values.get("mode", MODE) != MODE else GROUPS
    for key, known, default in zip(("bits", "group_size"), (WIDTHS, groups), unsaid, strict=True):
        value = values.get(key, default)
        if type(value) is not int or value not in known:
            raise wrong_form(settings.file, f"{key} of {printable(name, 100)}", ", ".join(map(str, known)), value)
        found.append(value)
    return found[0], found[1]


def _matrix(name: str, found: Mapping[str, TensorInfo], bits: int, group: int, settings: Settings) -> PackedMatrix:
    """One module. Raises IntegrityError where what is stored is not of ``bits`` and ``group``."""
    (rows, words), groups = found["weight"].shape, found["scales"].shape[1]
    columns = groups * group
    if words * 32 != columns * bits:
        if words * 32 % columns == 0 and words * 32 // columns in WIDTHS:
            raise contradicts(settings.file, f"{bits} bits in {name}", f"{words * 32 // columns} bits")
        raise misfit(found["weight"], f"U32 [{rows}, {packed_words(columns, bits)}]", found["weight"].shape)
    kind = (found["scales"].dtype,) if found["scales"].dtype in FLOATS else FLOATS
    matrix = PackedMatrix(name, _LAYOUT, rows, columns, bits, group, False, False, found, AffineType(bits, group).name)
    return check_fields(
        matrix,
        {
            "weight": (("U32",), ((rows, words),)),
            "scales": (kind, ((rows, groups),)),
            "biases": (kind, ((rows, groups),)),
        },
    )


def codes(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """As ``StoredFormat.codes``."""
    if floats.is_floats(packed):
        return floats.codes(packed, fields, first, last)
    return _stored(packed, fields, first, last).astype(np.int16)


def _stored(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.uint8]:
    words = np.ascontiguousarray(fields["weight"][first:last]).view(np.int32)
    return unpack_bits(words, packed.bits, packed.columns, axis=1)


def zeros(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
    """As ``StoredFormat.zeros``: offsets are no codes."""
    del packed, fields, first, last
    return None


def scales(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.scales``."""
    if floats.is_floats(packed):
        return floats.scales(packed, fields, first, last)
    return load_floats(fields["scales"][first:last])


def unpack(packed: PackedMatrix, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """As ``StoredFormat.unpack``: s q + o in float32, the product first."""
    if floats.is_floats(packed):
        return floats.unpack(packed, fields, first, last)
    groups = (last - first, packed.groups, packed.group)
    values = _stored(packed, fields, first, last).reshape(groups).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        values *= scales(packed, fields, first, last)[:, :, None]
        values += load_floats(fields["biases"][first:last])[:, :, None]
    return values.reshape(last - first, packed.columns)


def held(packed: PackedMatrix, fields: Fields, first: int, last: int) -> HeldRows | None:
    """As ``StoredFormat.held``."""
    if floats.is_floats(packed):
        return floats.held(packed, fields, first, last)
    levels, places = np.arange(1 << packed.bits, dtype=np.float32), _stored(packed, fields, first, last)
    each, offsets = scales(packed, fields, first, last), -load_floats(fields["biases"][first:last])
    return HeldRows(levels, places, packed.group, each, packed.scale, offsets=offsets)


def words(packed: PackedMatrix, fields: Fields) -> HeldWords | None:
    """As ``StoredFormat.words``."""
    if floats.is_floats(packed):
        return None
    offsets = load_floats(fields["biases"])
    return held_words(packed, fields, fields["weight"], ROWS, load_floats(fields["scales"]), offsets=offsets)


def repack(scheme: Scheme, held: HeldWords, room: Room) -> list[Array] | None:
    """As ``Packed.repack``: zero points become offsets, where those are floats of the scheme's type."""
    grid, zeros = scheme.qtype, held.zeros
    if not isinstance(grid, AffineType) or zeros is None or (grid.bits, grid.scale) != (held.bits, held.storage):
        return None
    columns = held.group * held.scales.shape[1]
    if grid.group(columns) != held.group or not np.isfinite(held.scales).all() or not held.scales.all():
        return None
    wide = held.scales.astype(np.float64) * zeros
    offsets = wide.astype(np.float32) + np.float32(0)
    if not np.array_equal(offsets, wide) or not are_stored(offsets, grid.scale):
        return None
    floats_of = (held.scales + np.float32(0), np.float32(0) - offsets)
    return [moved(held.words, held.layout, ROWS, room), *(store_floats(values, grid.scale) for values in floats_of)]


def check(packed: PackedMatrix, settings: Settings, fields: Fields, first: int, last: int) -> Iterator[tuple[str, str]]:
    """As ``StoredFormat.check``: offsets that are not finite."""
    del settings
    if floats.is_floats(packed):
        return
    bad = int((~np.isfinite(load_floats(fields["biases"][first:last]))).sum())
    if bad:
        yield "biases", f"{bad} offsets are NaN or infinite in rows {first} to {last - 1}"


def check_settings(settings: Settings, matrices: Mapping[str, PackedMatrix]) -> Iterator[str]:
    """As ``StoredFormat.check_settings``: modules that are said to be quantized, or not to be, and are otherwise."""
    held = {matrix.name for matrix in matrices.values()}
    for name, value in settings.values.items():
        if isinstance(value, dict) and name not in held:
            yield f"{printable(name, 200)} has settings of its own, but is not quantized"
        if value is False and name in held:
            yield f"{printable(name, 200)} is quantized, but the configuration says that it is not"


def layout_name(matrices: Collection[PackedMatrix]) -> str:
    """affine, mxfp4, ..."""
    return "+".join(sorted({matrix.layout.name for matrix in matrices}))


def level_of(matrices: Collection[PackedMatrix]) -> str:
    """4bit; 4+8bit where modules differ; mxfp4."""
    named = sorted({matrix.layout.name for matrix in matrices if floats.is_floats(matrix)})
    whole = [matrix for matrix in matrices if not floats.is_floats(matrix)]
    return "+".join([*named, *([f"{widths(whole)}bit"] if whole or not named else [])])


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization and quantization_config, key for key as mlx_lm.convert writes both."""
    mode = scheme.level if scheme.level in floats.MODES else MODE
    own = mixed.settings(scheme.qtype.name, coverage.mixed)
    return {"group_size": scheme.qtype.group_size, "bits": scheme.qtype.bits, "mode": mode, **own}


def least_zero(_scheme: Scheme) -> int:
    """There are no zero points."""
    return 0


def vllm_refusal(_scheme: Scheme) -> str | None:
    """vLLM (0.32) has no loader of it."""
    return "it has no loader for MLX's layout"


def configured(source: Source, config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """As ``Packed.configured``. mlx_lm has defaults of its own, so that what it must know is said in its words, beside
    what stands there: whether the head is tied, rotary positions, sliding windows."""
    found = _spelled(config) | {"quantization": own, "quantization_config": own}
    found.setdefault("tie_word_embeddings", source.architecture.hyper.tied)
    text = config.get("text_config")
    if isinstance(text, dict):
        found["text_config"] = _spelled(text)
        if "vocab_size" in text:
            found.setdefault("vocab_size", text["vocab_size"])
    return found


def _spelled(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, and what it says of rotary positions as it was said before transformers 5."""
    rotary, kinds = config.get("rope_parameters"), config.get("layer_types")
    words = _WORDS.get(str(config.get("model_type")), {})
    said: dict[str, Any] = {}
    if isinstance(rotary, dict):
        usual, sliding = rotary.get("full_attention", rotary), rotary.get("sliding_attention")
        if isinstance(usual, dict):
            said |= {key: usual[key] for key in ("rope_theta", "partial_rotary_factor") if key in usual}
            kind = usual.get("rope_type", "default")
            if kind != "default":
                said["rope_scaling"] = {key: usual[key] for key in usual if key != "rope_theta"} | {"type": kind}
        if isinstance(sliding, dict) and "rope_theta" in sliding:
            said["rope_local_base_freq"] = sliding["rope_theta"]
    if isinstance(kinds, list) and "full_attention" in kinds and "sliding_attention" in kinds:
        said["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return {words.get(key, key): value for key, value in said.items()} | dict(config)

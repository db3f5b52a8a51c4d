"""Rotary positions: what a configuration says, in transformers 4.x or 5.x words, and how GGUF says it.

Source of the formulas: transformers ``modeling_rope_utils`` (the meaning of rope_type); owner of the keys: llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from .base import Family, Hyper
from .config_reader import ConfigReader
from .kinds import Kind

DIVISORS = "divisors"
"""What a configuration derived of a GGUF file calls the rotary divisors that the file holds."""
STILL = 1e30
_NESTED = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one model. ``theta``: base of full-attention layers; ``local_theta``: of sliding ones, if
    it has its own; ``kind``: rope_type; ``share``: rotated part of a head; ``scaling``: the numbers of ``kind``."""

    theta: float
    local_theta: float | None
    kind: str
    share: float
    scaling: Mapping[str, object] = field(default_factory=dict)


def read_rope(config: ConfigReader, family: Family, limits: list[UnsupportedError]) -> Rope | None:
    """The rotary positions that ``config`` describes, or None where the family has none; what of them llama.cpp cannot
    compute is added to ``limits``.

    Raises: MalformedInputError (a value of the wrong kind).
    """
    if family.rope_default is None:
        return None
    parameters = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    local: Mapping[str, object] = {}
    if any(name in parameters for name in _NESTED):
        reader = ConfigReader(parameters, config.file)
        parameters, local = reader.mapping("full_attention"), reader.mapping("sliding_attention")
    reader = ConfigReader(parameters, config.file)
    kind = reader.text("rope_type") or reader.text("type") or "default"
    if kind == "su" or (kind == "yarn" and "longrope" in family.rope):
        kind = "longrope"
    if kind == "dynamic" and reader.get("alpha"):
        kind = "alpha"  # whatever the length of the text
    if kind != "default" and kind not in family.rope:
        limits.append(
            UnsupportedError(
                f"the rotary scaling {kind!r} cannot be computed by llama.cpp for {family.model_type}",
                file=config.file,
                expected=", ".join(["default", *sorted(family.rope)]),
                found=kind,
                remedy="use a checkpoint without this scaling",
            )
        )
    if "proportional" in family.rope:
        for name in ("rope_type", "type"):
            if (other_kind := ConfigReader(local, config.file).text(name)) not in (None, "default"):
                what = f"llama.cpp scales no rotary positions of {family.model_type}'s layers with a window"
                limits.append(UnsupportedError(what, file=config.file, expected="default", found=other_kind))
    theta = reader.number("rope_theta", default=config.number("rope_theta", default=family.rope_default))
    if theta <= 0:
        raise config.wrong("rope_theta", "a number above 0", theta)
    local_theta = family.rope_local_default
    if local_theta is not None:
        local_theta = config.number("rope_local_base_freq", default=local_theta, positive=True)
        local_theta = ConfigReader(local, config.file).number("rope_theta", default=local_theta, positive=True)
    elif (other := ConfigReader(local, config.file).number("rope_theta", default=theta)) != theta:
        what = f"llama.cpp has one rotary base for all layers of {family.model_type}"
        limits.append(UnsupportedError(what, file=config.file, expected=theta, found=other))
    if family.temperature and kind != "yarn" and reader.number(family.temperature, default=0.0):
        limits.append(
            UnsupportedError(
                f"llama.cpp scales queries by their position with YaRN alone in {family.model_type}",
                file=config.file,
                expected="rope_type yarn",
                found=kind,
            )
        )
    share = reader.number(
        "partial_rotary_factor",
        default=config.number("partial_rotary_factor", default=family.partial_default),
        positive=True,
    )
    if share > 1:
        raise config.wrong("partial_rotary_factor", "at most 1", share)
    if "proportional" in family.rope:  # the share is in the divisors
        return Rope(theta, local_theta, kind, 1.0, {**parameters, "partial_rotary_factor": share})
    if share != 1 and not family.partial:
        what = f"llama.cpp rotates whole heads for {family.model_type}"
        limits.append(UnsupportedError(what, file=config.file, expected="partial_rotary_factor 1", found=share))
    return Rope(theta, local_theta, kind, share, parameters)


def _original_context(rope: Rope, config: ConfigReader, hyper: Hyper) -> int:
    outside = config.get("original_max_position_embeddings")
    source = config if outside is not None else ConfigReader(rope.scaling, config.file)
    return source.integer("original_max_position_embeddings", default=hyper.context_length)


def _longrope_attention(rope: Rope, config: ConfigReader, hyper: Hyper) -> float:
    scaling = ConfigReader(rope.scaling, config.file)
    if scaling.get("attention_factor") is not None:
        return scaling.number("attention_factor", positive=True)
    original = _original_context(rope, config, hyper)
    factor = scaling.number("factor", default=hyper.context_length / original, positive=True)
    return 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_ramp(fast: float, slow: float, rope: Rope, hyper: Hyper, original: int) -> tuple[float, float]:
    """YaRN, section 3.2: the dimensions between which waves go over from kept to stretched, rounded outwards."""
    if fast <= 0 or slow <= 0 or rope.theta == 1:
        return 0.0, 0.0

    def dimension(turns: float) -> float:
        return hyper.rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    return max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), hyper.rotary - 1)


def is_rounded(rope: Rope, file: Path | None) -> bool:
    """Whether the ends of YaRN's ramp are whole numbers of dimensions. ``file``: where ``rope`` stands. Raises
    MalformedInputError."""
    return ConfigReader(rope.scaling, file).boolean("truncate", default=True)


def _yarn(rope: Rope, config: ConfigReader, family: Family, hyper: Hyper) -> dict[str, int | float | str]:
    scaling, keys = ConfigReader(rope.scaling, config.file), gguf.Keys.Rope
    original = _original_context(rope, config, hyper)
    factor = scaling.number("factor", default=hyper.context_length / original, positive=True)
    fast, slow = scaling.number("beta_fast", default=32.0), scaling.number("beta_slow", default=1.0)
    ramp = _yarn_ramp(fast or 32.0, slow or 1.0, rope, hyper, original)
    truncate = is_rounded(rope, config.file)
    unlike = not family.ramp and ramp != _yarn_ramp(32.0, 1.0, rope, hyper, original)
    if unlike or not (truncate or family.rounds_ramp):
        raise UnsupportedError(
            "llama.cpp has YaRN's ramp built in for this family",
            file=config.file,
            expected="truncate true" if family.ramp else "beta_fast 32, beta_slow 1, truncate true",
            found=f"beta_fast {fast}, beta_slow {slow}, truncate {truncate}",
        )
    found: dict[str, int | float | str] = {
        keys.SCALING_TYPE: gguf.RopeScalingType.YARN.value,
        keys.SCALING_FACTOR: factor,
        keys.SCALING_ORIG_CTX_LEN: original,
    }
    # The runtime itself multiplies by 1 + 0.1 ln(factor); the key holds what is to be multiplied besides.
    usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    wanted = usual
    if scaling.get("attention_factor") is not None:
        wanted = scaling.number("attention_factor", positive=True)
    elif scaling.get("mscale") is not None and scaling.get("mscale_all_dim") is not None and factor > 1:
        over, under = scaling.number("mscale"), scaling.number("mscale_all_dim")
        if over and under:
            wanted = (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    if family.ramp:
        found |= {keys.SCALING_YARN_BETA_FAST: fast or 32.0, keys.SCALING_YARN_BETA_SLOW: slow or 1.0}
        if under := scaling.number("mscale_all_dim", default=0.0):
            found[keys.SCALING_YARN_LOG_MUL] = under
            usual = usual / (0.1 * under * math.log(factor) + 1) if factor > 1 else 1.0
    if not math.isclose(wanted, usual):
        found[keys.SCALING_ATTN_FACTOR] = wanted / usual
    return found


def _base(rope: Rope, config: ConfigReader, hyper: Hyper) -> float:
    """The base of full-attention layers, as NTK-aware scaling by a fixed alpha stretches it."""
    if rope.kind != "alpha":
        return rope.theta
    alpha = ConfigReader(rope.scaling, config.file).number("alpha", positive=True)
    return float(rope.theta * alpha ** (hyper.rotary / (hyper.rotary - 2)))


def rope_metadata(rope: Rope, config: ConfigReader, family: Family, hyper: Hyper) -> dict[str, int | float | str]:
    """GGUF keys (with ``{arch}``) and values: bases, rotated dimensions, scaling."""
    keys = gguf.Keys.Rope
    found: dict[str, int | float | str] = {}
    if rope.kind == "linear":
        found[keys.SCALING_TYPE] = gguf.RopeScalingType.LINEAR.value
        found[keys.SCALING_FACTOR] = ConfigReader(rope.scaling, config.file).number("factor", positive=True)
    elif rope.kind == "yarn":
        found |= _yarn(rope, config, family, hyper)
        if family.temperature and (
            grows := ConfigReader(rope.scaling, config.file).number(family.temperature, default=0.0)
        ):
            found[gguf.Keys.Attention.TEMPERATURE_SCALE] = grows
    if "longrope" in family.rope:
        found[keys.SCALING_ORIG_CTX_LEN] = _original_context(rope, config, hyper)
    if rope.kind == "longrope":
        found[keys.SCALING_ATTN_FACTOR] = _longrope_attention(rope, config, hyper)
    found[keys.FREQ_BASE] = _base(rope, config, hyper)
    if rope.local_theta is not None:
        found[keys.FREQ_BASE_SWA] = rope.local_theta
    if family.count_rope or hyper.rotary != hyper.head_dim:
        found[keys.DIMENSION_COUNT] = hyper.rotary
    return found


def rope_constants(rope: Rope | None, config: ConfigReader, hyper: Hyper) -> dict[Kind, npt.NDArray[np.float32]]:
    """Divisors of the rotary frequencies, float32 (rotary / 2,), where the scaling is more than one number."""
    if rope is not None and hyper.uneven is not None:
        divisors = _proportional_divisors(rope, config, hyper.uneven.head_dim)
        return {Kind.ROPE_FREQS: divisors}
    if rope is None or rope.kind not in ("llama3", "longrope"):
        return {}
    if rope.kind == "llama3":
        said = DIVISORS in rope.scaling  # by a GGUF file, which has them instead of what they come from
        divisors = _divisors(DIVISORS, rope, config, hyper) if said else _llama3_divisors(rope, config, hyper)
        return {Kind.ROPE_FREQS: divisors}
    found = {}
    for name, tensor in (
        ("long_factor", Kind.ROPE_FACTORS_LONG),
        ("short_factor", Kind.ROPE_FACTORS_SHORT),
    ):
        found[tensor] = _divisors(name, rope, config, hyper)
    return found


def _divisors(name: str, rope: Rope, config: ConfigReader, hyper: Hyper) -> npt.NDArray[np.float32]:
    """Divisors that the configuration lists."""
    values = rope.scaling.get(name)
    if not isinstance(values, list) or len(values) != hyper.rotary // 2:
        raise config.wrong(f"rotary {name}", f"a list of {hyper.rotary // 2} numbers", values)
    return np.array([config.checked_number(f"rotary {name}", one, positive=True) for one in values], np.float32)


def _proportional_divisors(rope: Rope, config: ConfigReader, head_dim: int) -> npt.NDArray[np.float32]:
    """Of whole heads: the first pairs turn as they would without a share, the rest stands still (llama.cpp's sign of
    that is 1e30). Divisors of 1 where nothing is scaled, since llama.cpp wants some."""
    found = np.ones(head_dim // 2, np.float32)
    if rope.kind == "proportional":
        scaling = ConfigReader(rope.scaling, config.file)
        found *= np.float32(scaling.number("factor", default=1.0, positive=True))
        share = scaling.number("partial_rotary_factor", default=1.0, positive=True)
        found[int(share * head_dim // 2) :] = STILL
    return found


def _llama3_divisors(rope: Rope, config: ConfigReader, hyper: Hyper) -> npt.NDArray[np.float32]:
    """Llama 3's scaling: long waves are stretched by ``factor``, short ones kept, those between mixed."""
    scaling = ConfigReader(rope.scaling, config.file)
    factor = scaling.number("factor", positive=True)
    low, high = scaling.number("low_freq_factor", positive=True), scaling.number("high_freq_factor", positive=True)
    if high <= low:
        raise config.wrong("high_freq_factor", f"more than low_freq_factor ({low})", high)
    original = _original_context(rope, config, hyper)
    frequencies = rope.theta ** (-np.arange(0, hyper.rotary, 2, dtype=np.float64) / hyper.rotary)
    wave = 2 * np.pi / frequencies
    smooth = (original / wave - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < original / high, 1, np.where(wave > original / low, factor, mixed)).astype(np.float32)

"""What a quantized model's config.json says of how it is quantized: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.models.files import CONFIG_LIMIT

AGAIN = "fetch or make the model again; its files are damaged or of different versions"


@dataclass(frozen=True)
class WeightSettings:
    """What a configuration says of matrices of some width. ``varies``: single modules may differ from it."""

    group: int
    symmetric: bool
    minus_one: bool
    varies: bool


def is_packed_directory(path: Path) -> bool:
    """Whether ``path`` is a model directory whose configuration says that it is quantized. Raises what reading the
    configuration raises."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    config = read_json_object(inside(path, "config.json"), limit_bytes=CONFIG_LIMIT)
    return any(isinstance(where, dict) and (where.get(key) is not None) for where, key in _places(config))


def quantization_of(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The quantization_config. Raises UsageError where there is none, MalformedInputError where it is no object."""
    found = next((where[key] for where, key in _places(config) if where.get(key) is not None), None)
    if found is None:
        raise UsageError(
            "this model is not quantized",
            file=file,
            expected="a quantization_config",
            found="none",
            remedy="give a GGUF file, or the directory of a GPTQ, AWQ or compressed-tensors model",
        )
    if not isinstance(found, dict):
        raise _wrong(file, "quantization_config", "an object", found)
    return found


def _places(config: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    text = config.get("text_config")
    wheres = [config] + ([text] if isinstance(text, dict) else [])
    return [(where, key) for where in wheres for key in ("quantization_config", "compression_config")]


def method_of(settings: Mapping[str, Any], file: Path) -> tuple[str, tuple[str, ...]]:
    """(quant_method, layouts that its matrices may have). Raises UnsupportedError for anything else."""
    method = settings.get("quant_method")
    kind, known = "", True
    if method == "gptq":
        kind = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
        known = kind in ("gptq", "gptq_v2") and settings.get("pack_dtype", "int32") in ("int32", None)
        layouts: tuple[str, ...] = ("gptq",)
    elif method == "awq":
        kind = str(settings.get("version") or settings.get("format") or "gemm").lower()
        known = kind == "gemm"
        layouts = ("awq",)
    elif method == "compressed-tensors":
        groups = settings.get("config_groups", {})
        if not isinstance(groups, dict):
            raise _wrong(file, "config_groups", "an object", groups)
        inner = [one.get("format") for one in groups.values() if isinstance(one, dict)]
        kinds = {str(one) for one in (settings.get("format"), *inner) if one not in (None, "mixed-precision")}
        kind = ", ".join(sorted(kinds))
        known = bool(kinds) and kinds <= {"pack-quantized", "int-quantized", "naive-quantized"}
        layouts = ("pack-quantized", "int-quantized")
    else:
        known, layouts = False, ()
    if not known:
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=file,
            expected="gptq (gptq, gptq_v2), awq (gemm), compressed-tensors (pack-quantized, int-quantized)",
            found=printable(f"quant_method {method!r}{f', layout {kind}' if kind else ''}", 200),
        )
    return str(method), layouts


def declared_bits(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Every width that the configuration names, the usual one first."""
    found = [settings.get("bits"), settings.get("w_bit")]
    found += [weights.get("num_bits") for weights in _weights(settings)]
    return tuple(dict.fromkeys(bits for bits in found if type(bits) is int and 1 <= bits <= 8))


def _weights(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def weight_settings(settings: Mapping[str, Any], file: Path, layout: str, bits: int) -> WeightSettings:
    """What the configuration says of matrices of ``bits`` bits. Raises MalformedInputError for values of no sense."""
    if layout in ("gptq", "awq"):
        declared = declared_bits(settings)
        for key in ("bits", "w_bit"):
            if key in settings and settings[key] not in declared:
                raise _wrong(file, key, "a whole number from 1 to 8", settings[key])
        varies = bool(settings.get("dynamic"))
        if declared and bits not in declared and not varies:
            raise _contradicts(file, f"{declared[0]} bits", f"{bits} bits")
        group = settings.get("group_size", settings.get("q_group_size", 128))
        name = "sym" if layout == "gptq" else "zero_point"
        flag = settings.get(name, True)
        if not isinstance(flag, bool):
            raise _wrong(file, name, "true or false", flag)
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        return WeightSettings(_group_of(group, file), flag == (layout == "gptq"), kind == "gptq", varies)
    candidates = [weights for weights in _weights(settings) if weights.get("num_bits") == bits]
    if not candidates:
        raise _contradicts(file, f"{', '.join(map(str, declared_bits(settings))) or 'no'} bits", f"{bits} bits")
    found = candidates[0]
    if found.get("type", "int") != "int" or found.get("strategy") not in ("group", "channel", "tensor"):
        words = f"weights of type {found.get('type')!r}, strategy {found.get('strategy')!r}"
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=file,
            expected="integer weights with a scale for each group, channel or tensor",
            found=printable(words, 200),
        )
    group = found.get("group_size") if found["strategy"] == "group" else -1
    return WeightSettings(_group_of(group, file), bool(found.get("symmetric", True)), False, len(candidates) > 1)


def _group_of(value: Any, file: Path) -> int:
    if type(value) is not int or not (value in (-1, 0) or 1 <= value < 1 << 30):
        raise _wrong(file, "group_size", "-1, or a positive whole number", value)
    return value


def _wrong(file: Path, name: str, expected: str, found: object) -> MalformedInputError:
    return MalformedInputError(
        f"{name} in the quantization's configuration has the wrong form",
        file=file,
        expected=expected,
        found=printable(repr(found), 80),
        remedy="fetch config.json again",
    )


def _contradicts(file: Path, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "the weights are not what the quantization's configuration says",
        file=file,
        expected=expected,
        found=found,
        remedy=AGAIN,
    )


def notes_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of figures should know."""
    groups = settings.get("config_groups")
    if isinstance(groups, dict) and any(isinstance(g, dict) and g.get("input_activations") for g in groups.values()):
        yield "a runtime rounds activations too, as its configuration says; only its weights are measured here"

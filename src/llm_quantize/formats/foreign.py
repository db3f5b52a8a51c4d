"""Layouts of quantized weights that people hold and that are not decoded here: what each is, and what to do with it.

A layout is known by the name that its configuration gives, by the keys of a configuration without a name, or by tensors
that only it has. The table says nothing of values: nobody computes with these weights here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import TensorInfo

_ORIGINAL = "start from the model it was made from, in BF16 or F16 (its model card names it)"
_LIMIT = 1 << 20
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


class UnknownCodesError(UnsupportedError):
    """Quantized weights that transformers and vLLM do not know for what they are: they would compute with others."""


@dataclass(frozen=True)
class Foreign:
    """A layout. ``name``: what people call it. ``methods``: as quant_method names it, in small letters. ``keys``: what
    a configuration without quant_method has all of. ``tensors``: a regular expression for the ends of names that only
    it has. ``instead``: another way than the original model, which has the errors of this one. ``runs``: transformers
    or vLLM may know it."""

    name: str
    methods: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tensors: str = ""
    instead: str = ""
    runs: bool = True

    @property
    def remedy(self) -> str:
        """What to do."""
        return f"{_ORIGINAL}; or, with the errors of this one, {self.instead}" if self.instead else _ORIGINAL


_LOADED = "load it in transformers where its kernels are, then model.dequantize() and save_pretrained(OUT)"
_MLX = Foreign("MLX", ("mlx",), ("group_size", "bits"), r"\.biases$",
               "mlx_lm.convert --hf-path THIS --mlx-path OUT --dequantize", runs=False)  # fmt: skip
_PACKED_INTEGERS = Foreign("GPTQ or AWQ", ("gptq", "awq"), tensors=r"\.(qweight|qzeros)$")

_UNKNOWN = Foreign("of a kind that is not known here")

KINDS: tuple[Foreign, ...] = (
    _MLX,
    Foreign("bitsandbytes, 4 bit", ("bitsandbytes", "bitsandbytes_4bit", "bnb"), ("load_in_4bit",),
            r"\.weight\.(absmax|nested_absmax|quant_map|quant_state\.bitsandbytes__\w+)$", _LOADED),
    Foreign("bitsandbytes, 8 bit", ("bitsandbytes", "bitsandbytes_8bit", "bnb"), ("load_in_8bit",),
            r"\.(SCB|weight_format)$", _LOADED),
    Foreign("AutoRound", ("auto-round", "auto_round", "autoround", "intel/auto-round"),
            instead="export it again with AutoRound in its auto_gptq or auto_awq format, which is read here"),
    _PACKED_INTEGERS,
    Foreign("MXFP4", ("mxfp4",), tensors=r"_proj_(blocks|scales)$",
            instead="load it in transformers with Mxfp4Config(dequantize=True), then save_pretrained(OUT)"),
    Foreign("HQQ", ("hqq",), tensors=r"\.W_q$"),
    Foreign("EETQ", ("eetq",), tensors=r"\.weight_scales$"),
    Foreign("quanto", ("quanto",), tensors=r"\.weight\._(data|scale|shift)(\.|$)", instead=_LOADED),
    Foreign("torchao", ("torchao",), tensors=r"(_weight_qdata|weight[.:]_?q?data)$"),
    Foreign("AQLM", ("aqlm",), tensors=r"\.codebooks$"),
    Foreign("VPTQ", ("vptq",), tensors=r"\.(res_)?centroids(\.weight)?$"),
    Foreign("SpQR", ("spqr",), tensors=r"\.dense_weights$"),
    Foreign("HIGGS", ("higgs",), tensors=r"\.tables2?$"),
    Foreign("QuIP#", ("quip", "quip#"), tensors=r"\.Qidxs(_list\.\d+)?$"),
    Foreign("EXL3", ("exl3",), tensors=r"\.(suh|svh|trellis)$", runs=False),
    Foreign("EXL2", ("exl2",), tensors=r"\.(q_weight|q_scale|q_groups|q_invperm)$", runs=False),
    Foreign("BitNet", ("bitnet",), instead="take its repository of the same name that ends in -bf16, if there is one"),
    Foreign("FP-Quant", ("fp_quant",), tensors=r"\.dqweight$"),
    Foreign("NVFP4 or FP8 of ModelOpt", ("modelopt", "modelopt_fp4"), tensors=r"\.weight_scale_2$"),
    Foreign("NVFP4", ("nvfp4",), tensors=r"\.weight_global_scale$"),
    Foreign("compressed-tensors", ("compressed-tensors",), tensors=r"\.weight_packed$"),
    Foreign("MXFP8", ("mxfp8",)),
    Foreign("FP8", ("fp8", "fbgemm_fp8", "finegrained_fp8")),
    Foreign("Quark (AMD)", ("quark",)),
    Foreign("SINQ", ("sinq",)),
    Foreign("Four Over Six", ("fouroversix",)),
    Foreign("Metal", ("metal",)),
    Foreign("BitBLAS", ("bitblas",)),
    Foreign("Marlin", ("marlin",)),
    Foreign("DeepSpeed FP6", ("deepspeedfp",)),
    Foreign("a GGUF file's", ("gguf",), instead="give the GGUF file itself"),
)  # fmt: skip


@dataclass(frozen=True)
class _SideFile:
    """A file of settings beside a config.json that says nothing. ``method``: the quant_method that is meant where it
    names none. ``words``: {its word: today's}. ``within``: the object in it that has them. ``tells``: a regular
    expression for names of tensors that there are in a model of that kind."""

    method: str
    words: Mapping[str, str]
    kept: tuple[str, ...]
    tells: str
    within: str = ""


_INTEGERS_KEPT = ("bits", "group_size", "zero_point", "version", "sym", "desc_act", "checkpoint_format")
_QWEIGHT = r"\.(qweight|qzeros)$"

_SIDE_FILES: Mapping[str, _SideFile] = {
    "quant_config.json": _SideFile("awq", {"w_bit": "bits", "q_group_size": "group_size"}, _INTEGERS_KEPT, _QWEIGHT),
    "quantize_config.json": _SideFile("gptq", {}, _INTEGERS_KEPT, _QWEIGHT),
    "hf_quant_config.json": _SideFile(
        *("modelopt", {}, ("quant_algo", "kv_cache_quant_algo", "group_size"), r"\.weight_scale(_2)?$", "quantization")
    ),
}
"""By name: those of GPTQ and AWQ directories of 2023, and ModelOpt's. Transformers looks into none of them."""

SAID_IN = "said_in"
"""The key under which settings from a side file name it."""


def refuse_settings(settings: Mapping[str, Any], file: Path) -> UnsupportedError:
    """The error for a configuration that says ``settings`` of quantization (quantization_config, or MLX's
    ``quantization``)."""
    method = settings.get("quant_method")
    kind = _by_settings(settings)
    name = (kind or _UNKNOWN).name
    said = f"quant_method {method!r}" + ("" if method is not None else f", and {', '.join(map(str, settings))}")
    error = UnsupportedError if (kind or _UNKNOWN).runs else UnknownCodesError
    return error(
        f"this checkpoint is already quantized ({name}), which is not decoded; its original weights are gone",
        file=file,
        expected="float or FP8 weights, or GPTQ, AWQ, compressed-tensors or bitsandbytes in a form that is decoded",
        found=printable(said, 200),
        remedy='say "quant_method": "gptq" or "awq" in it, as its model card has it; or ' + _ORIGINAL
        if kind is _PACKED_INTEGERS and method is None
        else (kind or _UNKNOWN).remedy,
    )


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Raise UnknownCodesError where a configuration without quantization_config says in MLX's way that it is
    quantized."""
    own = config.get("quantization")
    if isinstance(own, dict) and own:
        raise refuse_settings(own, file)


def _by_settings(settings: Mapping[str, Any]) -> Foreign | None:
    method = settings.get("quant_method")
    held = {key for key, value in settings.items() if value not in (None, False)}
    if isinstance(method, str):
        named = [kind for kind in KINDS if method.lower() in kind.methods]
        return next((kind for kind in named if kind.keys and held.issuperset(kind.keys)), named[0] if named else None)
    if any(key in settings for key in ("desc_act", "zero_point", "sym")):
        return _PACKED_INTEGERS
    return next((kind for kind in KINDS if kind.keys and held.issuperset(kind.keys)), None)


def check_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise UnknownCodesError where ``tensors`` hold quantized weights of which neither their configuration nor a file
    beside it says anything."""
    found = _by_tensors(tensors)
    if found is None:
        return
    kind, info = found
    name, remedy = (kind or _UNKNOWN).name, (kind or _UNKNOWN).remedy
    if kind is _PACKED_INTEGERS:
        remedy = "give its config.json a quantization_config, which says what its codes mean; or " + _ORIGINAL
    raise UnknownCodesError(
        f"this checkpoint is already quantized ({name}): its weights are packed codes, and config.json says nothing "
        "of it",
        file=info.file,
        tensor=info.name,
        offset=info.offset,
        expected="float weights",
        found=f"{info.dtype} {list(info.shape)}",
        remedy=remedy,
    )


def _by_tensors(tensors: Mapping[str, TensorInfo]) -> tuple[Foreign | None, TensorInfo] | None:
    """(the layout, or None for one that is not known; a tensor that tells it), None for weights that are none."""
    patterns = [(kind, re.compile(kind.tensors)) for kind in KINDS if kind.tensors and kind is not _MLX]
    for name, info in tensors.items():
        kind = next((kind for kind, pattern in patterns if pattern.search(name)), None)
        if kind is not None:
            return kind, info
    codes = (info for name, info in tensors.items() if name.endswith(".weight") and info.dtype in _INTEGERS)
    for info in codes:
        module = info.name.removesuffix(".weight")
        return (_MLX if f"{module}.scales" in tensors and info.dtype == "U32" else None), info
    return None


def settings_beside(directory: Path, tensors: Collection[str]) -> dict[str, Any] | None:
    """The quantization_config that a file beside config.json in ``directory`` amounts to, with its name under SAID_IN;
    None where there is no such file, or ``tensors`` (names) are of another kind.

    Raises MalformedInputError for settings that say nothing of what the codes are.
    """
    for name, kind in _SIDE_FILES.items():
        path = inside(directory, name)
        tells = re.compile(kind.tells)
        if not path.is_file() or not any(tells.search(tensor) for tensor in tensors):
            continue
        said = read_json_object(path, limit_bytes=_LIMIT)
        inner = said.get(kind.within, {}) if kind.within else said
        renamed = {kind.words.get(key, key): value for key, value in (inner.items() if isinstance(inner, dict) else ())}
        kept = {key: renamed[key] for key in kind.kept if type(renamed.get(key)) in (int, bool, str)}
        if isinstance(kept.get("version"), str):
            kept["version"] = kept["version"].lower()
        if type(kept.get("bits")) is not int and "quant_algo" not in kept:
            raise MalformedInputError(
                "the settings of a quantized model name no width",
                file=path,
                expected="bits, w_bit or quant_algo",
                found=sorted(said),
            )
        if kept.pop("kv_cache_quant_algo", None) == "FP8":
            kept["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
        method = renamed.get("quant_method")
        return {"quant_method": method if isinstance(method, str) else kind.method, **kept, SAID_IN: name}
    return None


def has_side_file(directory: Path) -> bool:
    """Whether a file of settings that Transformers does not look into is in ``directory``."""
    return any((directory / name).is_file() for name in _SIDE_FILES)


def refuse_side_file(settings: Mapping[str, Any], file: Path) -> UnknownCodesError:
    """The error for running a model whose ``settings`` come from a side file: runtimes look for them in ``file``, its
    config.json, alone."""
    beside = settings[SAID_IN]
    kind = _by_settings(settings) or _UNKNOWN
    block = printable(json.dumps({key: value for key, value in settings.items() if key != SAID_IN}), 300)
    return UnknownCodesError(
        f"this checkpoint is already quantized ({kind.name}), and config.json says nothing of it: a runtime would make "
        "up its weights",
        file=file,
        expected="a quantization_config",
        found=f"{beside} alone",
        remedy=f'no runtime looks into {beside}: add what it says to config.json, as "quantization_config": {block}',
    )

"""Layouts of quantized weights that people hold and that are not decoded here: what each is, and what to do with it.

A layout is known by the name that its configuration gives, by the keys of a configuration without a name, or by tensors
that only it has. The table says nothing of values: nobody computes with these weights here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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

_SIDE_FILES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "quant_config.json": ("awq", {"w_bit": "bits", "q_group_size": "group_size"}),
    "quantize_config.json": ("gptq", {}),
}
"""Files of settings that GPTQ and AWQ directories of 2023 have: {name: (quant_method, {their word: today's})}."""

_TODAY = ("bits", "group_size", "zero_point", "version", "sym", "desc_act")


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


def check_tensors(tensors: Mapping[str, TensorInfo], directory: Path) -> None:
    """Raise UnknownCodesError where ``tensors`` hold quantized weights whose configuration says nothing of it; what
    files beside it say (``directory``) goes into the remedy."""
    found = _by_tensors(tensors)
    if found is None:
        return
    kind, info = found
    name, remedy = (kind or _UNKNOWN).name, (kind or _UNKNOWN).remedy
    if kind is _PACKED_INTEGERS:
        remedy = _settings_beside(directory) or (
            "give its config.json a quantization_config, which says what its codes mean; or " + _ORIGINAL
        )
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


def _settings_beside(directory: Path) -> str | None:
    """The remedy for a directory of 2023: what belongs into its config.json, from the file beside it. None without."""
    for name, (method, words) in _SIDE_FILES.items():
        path = inside(directory, name)
        if not path.is_file():
            continue
        said = read_json_object(path, limit_bytes=_LIMIT)
        renamed = {words.get(key, key): value for key, value in said.items()}
        kept = {key: renamed[key] for key in _TODAY if type(renamed.get(key)) in (int, bool, str)}
        if isinstance(kept.get("version"), str):
            kept["version"] = kept["version"].lower()
        if type(kept.get("bits")) is not int:
            raise MalformedInputError(
                "the settings of a quantized model name no width",
                file=path,
                expected="bits or w_bit",
                found=sorted(said),
            )
        block = printable(json.dumps({"quant_method": method, **kept}), 300)
        return f'no runtime looks into {name}: add what it says to config.json, as "quantization_config": {block}'
    return None

"""One small model in every way in which models are stored that can be read: the rows of the table of conversions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize import api
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.options import MethodOptions, Options
from tests.formats.test_gguf_scales import rewritten, scales_for
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.peer_layouts import write_peer
from tests.tiny_models import make_tiny, row_lengths_of_256

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Of the model: groups of 128 and super-blocks of 256 divide every row."""

Make = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Kind:
    """A kind of source. ``make``: (the model in bfloat16, an empty place) to the source. ``core``: its cells are run
    by the gate; those of the others are among the heavy tests."""

    make: Make
    core: bool = False


def _options(**method: Any) -> Options:
    return Options(threads=1, calibrate=False, method=MethodOptions(method="rtn", transform="none", **method))


def ours(format: str, level: str, **method: Any) -> Make:
    """As this package writes it."""

    def make(model: Path, place: Path) -> Path:
        made = api.quantize(model, format, levels=level, output_dir=place, name="m", options=_options(**method))
        return made[0].path

    return make


def plain(dtype: str) -> Make:
    return lambda model, place: make_tiny("llama", place / "m", dtype=dtype, **SIZES)


def family(variant: str) -> Make:
    return lambda model, place: make_tiny(variant, place / "m", num_hidden_layers=1, **row_lengths_of_256(variant))


def gpt2(model: Path, place: Path) -> Path:
    return make_tiny("gpt2", place / "m", **{**row_lengths_of_256("gpt2"), "n_layer": 1})


def gguf(level: str) -> Make:
    """A file of ``level``, or with its matrices in the type ``level`` where that is written in small letters."""

    def make(model: Path, place: Path) -> Path:
        types = Overrides(tensor_types=(("blk", level),), embedding_type="bf16", output_type="bf16")
        options = Options(threads=1, calibrate=False, overrides=types if level.islower() else Overrides())
        name = "Q8_0" if level.islower() else level
        return api.quantize(model, "gguf", levels=name, output_dir=place, name="m", options=options)[0].path

    return make


def with_numbers(model: Path, place: Path) -> Path:
    """NVFP4 of GGUF with a number beside each matrix, as convert_hf_to_gguf.py makes it of ModelOpt's."""
    whole = gguf("nvfp4")(model, place)
    return rewritten(whole, place / "scaled.gguf", None, scales_for(whole))


def by_hand(form: Form) -> Make:
    def make(model: Path, place: Path) -> Path:
        write_packed(model, place / "m", form)
        return place / "m"

    return make


def peer(name: str) -> Make:
    def make(model: Path, place: Path) -> Path:
        write_peer(model, place / "m", name)
        return place / "m"

    return make


def mixed(model: Path, place: Path) -> Path:
    """compressed-tensors with some matrices in 4 bits and some in 8."""
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    recipe = Recipe("mine", "W4A16", dict.fromkeys(names, "int8_g128"), sha256="0" * 64, form="compressed-tensors")
    options = Options(threads=1, method=MethodOptions(method="rtn"), overrides=Overrides(recipe=recipe))
    made = api.quantize(model, "compressed-tensors", levels="W4A16", output_dir=place, name="m", options=options)
    return made[0].path


SOURCES: Mapping[str, Kind] = {
    "BF16": Kind(plain("bfloat16"), core=True),
    "BF16, experts (Qwen 3 MoE)": Kind(family("qwen3_moe")),
    "BF16, matrices of (in, out) (GPT-2)": Kind(gpt2, core=True),
    "F16": Kind(plain("float16")),
    "F32": Kind(plain("float32")),
    "GGUF BF16": Kind(gguf("BF16")),
    "GGUF Q4_0": Kind(gguf("Q4_0"), core=True),
    "GGUF Q4_1": Kind(gguf("Q4_1")),
    "GGUF Q5_0": Kind(gguf("Q5_0")),
    "GGUF Q5_1": Kind(gguf("Q5_1")),
    "GGUF Q8_0": Kind(gguf("Q8_0"), core=True),
    "GGUF Q4_K_M": Kind(gguf("Q4_K_M"), core=True),
    "GGUF Q6_K": Kind(gguf("Q6_K")),
    "GGUF Q2_K": Kind(gguf("Q2_K")),
    "GGUF IQ4_NL": Kind(gguf("IQ4_NL")),
    "GGUF IQ4_XS": Kind(gguf("IQ4_XS")),
    "GGUF TQ2_0": Kind(gguf("TQ2_0")),
    "GGUF TQ1_0": Kind(gguf("TQ1_0")),
    "GGUF Q2_0": Kind(gguf("Q2_0")),
    "GGUF MXFP4": Kind(gguf("mxfp4")),
    "GGUF NVFP4": Kind(gguf("nvfp4")),
    "GGUF NVFP4 with scales": Kind(with_numbers),
    "GPTQ 2 bit g64": Kind(ours("gptq", "2bit", group_size=64)),
    "GPTQ 3 bit": Kind(ours("gptq", "3bit")),
    "GPTQ 4 bit": Kind(ours("gptq", "4bit"), core=True),
    "GPTQ 4 bit g32": Kind(ours("gptq", "4bit", group_size=32)),
    "GPTQ 4 bit whole rows": Kind(ours("gptq", "4bit", group_size=-1)),
    "GPTQ 8 bit": Kind(ours("gptq", "8bit")),
    "GPTQ 4 bit asymmetric, gptq_v2": Kind(by_hand(Form("gptq", symmetric=False, group=128, version="gptq_v2"))),
    "GPTQ 4 bit act-order": Kind(by_hand(Form("gptq", group=128, act_order=True)), core=True),
    "AWQ": Kind(ours("awq", "4bit"), core=True),
    "AWQ gemv": Kind(peer("AWQ gemv")),
    "AutoRound": Kind(peer("AutoRound")),
    "compressed-tensors W4A16": Kind(ours("compressed-tensors", "W4A16"), core=True),
    "compressed-tensors W4A16 act-order": Kind(by_hand(Form("compressed-tensors", group=128, act_order=True))),
    "compressed-tensors W4A16_ASYM": Kind(ours("compressed-tensors", "W4A16_ASYM")),
    "compressed-tensors W8A16": Kind(ours("compressed-tensors", "W8A16")),
    "compressed-tensors W8A8": Kind(ours("compressed-tensors", "W8A8")),
    "compressed-tensors W4AFP8": Kind(ours("compressed-tensors", "W4AFP8")),
    "compressed-tensors FP8_DYNAMIC": Kind(ours("compressed-tensors", "FP8_DYNAMIC")),
    "compressed-tensors FP8_BLOCK": Kind(ours("compressed-tensors", "FP8_BLOCK")),
    "compressed-tensors NVFP4A16": Kind(ours("compressed-tensors", "NVFP4A16"), core=True),
    "compressed-tensors MXFP4A16": Kind(ours("compressed-tensors", "MXFP4A16")),
    "compressed-tensors mixed 4 and 8 bit": Kind(mixed),
    "INT4 of Kimi K2": Kind(peer("Kimi")),
    "ModelOpt NVFP4": Kind(peer("ModelOpt NVFP4")),
    "ModelOpt MXFP4": Kind(peer("ModelOpt MXFP4")),
    "ModelOpt MXFP8": Kind(peer("ModelOpt MXFP8")),
    "ModelOpt FP8": Kind(peer("ModelOpt FP8")),
    "FP8 blocks of DeepSeek": Kind(peer("FP8 blocks"), core=True),
    "FP8 blocks, scales powers of two": Kind(peer("FP8 powers")),
    "FP8 rows of FBGEMM": Kind(peer("FP8 rows")),
    "bitsandbytes NF4": Kind(ours("bitsandbytes", "NF4"), core=True),
    "bitsandbytes NF4 double": Kind(ours("bitsandbytes", "NF4", double_quant=True)),
    "bitsandbytes FP4": Kind(ours("bitsandbytes", "FP4")),
    "bitsandbytes INT8": Kind(ours("bitsandbytes", "INT8")),
    "MLX 4 bit": Kind(ours("mlx", "4bit"), core=True),
    "MLX 8 bit": Kind(ours("mlx", "8bit")),
    "MLX mxfp4": Kind(ours("mlx", "mxfp4")),
    "MLX nvfp4": Kind(ours("mlx", "nvfp4")),
    "MLX mxfp8": Kind(ours("mlx", "mxfp8")),
    "CTranslate2 int8": Kind(ours("ctranslate2", "int8"), core=True),
    "CTranslate2 int16": Kind(ours("ctranslate2", "int16")),
}
"""{kind of source: how to make one}."""

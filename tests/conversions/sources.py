"""One small model in every way in which models are stored that can be read: the rows of the table of conversions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llm_quantize import api
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.options import MethodOptions, Options
from tests.formats.test_gguf_scales import rewritten, scales_for
from tests.models.adapters import factors, write_adapter
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.peer_layouts import write_peer
from tests.tiny_models import make_tiny, row_lengths_of_256

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
"""Of the model: groups of 128 and super-blocks of 256 divide every row."""

Make = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Given:
    """What a command is given: a model by its path or name, and adapters. ``environment``: what must be set."""

    model: str
    lora: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def here(self) -> Iterator[None]:
        """With the environment."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@dataclass(frozen=True)
class Kind:
    """A kind of source. ``make``: (the model in bfloat16, an empty place) to the source. ``given``: what commands are
    given of what ``make`` returned. ``core``: its cells are run by the gate; those of the others are among the heavy
    tests."""

    make: Make
    core: bool = False
    given: Callable[[Path], Given] = lambda path: Given(str(path))


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


MERGED = {"model.layers.0.self_attn.o_proj": (256, 256), "model.layers.0.mlp.down_proj": (256, 512)}
"""{module that the adapter changes: its shape}."""


def with_adapter(make: Make) -> Make:
    """The model, and an adapter beside it."""

    def both(model: Path, place: Path) -> Path:
        write_adapter(place / "adapter", factors(MERGED))
        return make(model, place)

    return both


def beside(path: Path) -> Given:
    return Given(str(path), (str(path.parent / "adapter"),))


def pickled(model: Path, place: Path) -> Path:
    """As ``torch.save`` wrote models before safetensors."""
    found = plain("bfloat16")(model, place)
    torch.save(load_file(found / "model.safetensors"), found / "pytorch_model.bin")
    (found / "model.safetensors").unlink()
    return found


def ollama(model: Path, place: Path) -> Path:
    """The blob of a store."""
    data = gguf("Q8_0")(model, place).read_bytes()
    digest, store = hashlib.sha256(data).hexdigest(), place / "models"
    blob, manifest = store / "blobs" / f"sha256-{digest}", store / "manifests/registry.ollama.ai/library/m/latest"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    blob.write_bytes(data)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(data)}
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": [layer]}))
    return blob


def in_store(path: Path) -> Given:
    return Given("ollama:m", environment={"OLLAMA_MODELS": str(path.parents[1])})


SOURCES: Mapping[str, Kind] = {
    "BF16": Kind(plain("bfloat16"), core=True),
    "BF16, experts (Qwen 3 MoE)": Kind(family("qwen3_moe")),
    "BF16, matrices of (in, out) (GPT-2)": Kind(gpt2, core=True),
    "F16": Kind(plain("float16")),
    "F32": Kind(plain("float32")),
    "BF16 in pytorch_model.bin": Kind(pickled),
    "BF16 with a LoRA": Kind(with_adapter(plain("bfloat16")), given=beside),
    "F32 with a LoRA": Kind(with_adapter(plain("float32")), given=beside),
    "GPTQ 4 bit g32 with a LoRA": Kind(with_adapter(ours("gptq", "4bit", group_size=32)), given=beside),
    "GGUF BF16": Kind(gguf("BF16")),
    "GGUF Q4_0": Kind(gguf("Q4_0"), core=True),
    "GGUF Q4_1": Kind(gguf("Q4_1")),
    "GGUF Q5_0": Kind(gguf("Q5_0")),
    "GGUF Q5_1": Kind(gguf("Q5_1")),
    "GGUF Q8_0": Kind(gguf("Q8_0"), core=True),
    "GGUF Q8_0 in Ollama's store": Kind(ollama, given=in_store),
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

"""What can run a model on which machine: WAYS, one row for each runtime and kind of machine, the usual one first.

Compute capabilities are those of vLLM's kernels: W4A16, W8A16, GPTQ, AWQ and W8A8 from 7.5 (Marlin and Cutlass), FP8
from 8.9, 4-bit floats as weights from 7.5 (Marlin), with 4-bit inputs from 10.0, bfloat16 from 8.0. They were read in
vLLM's code and documentation, and not run here.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llm_quantize.advice import needs
from llm_quantize.advice.choice import Choice, Found, Question
from llm_quantize.advice.directory_choices import Directories, Level
from llm_quantize.advice.gguf_choices import RUNTIME as LLAMA_CPP
from llm_quantize.advice.gguf_choices import gguf_choices
from llm_quantize.advice.machine import Machine
from llm_quantize.options import PROMPTS

COMPRESSED = "compressed-tensors"


@dataclass(frozen=True)
class Way:
    """A ``runtime`` on machines of ``device``. ``commands``: {"try", "run"}: lines for a shell that let the artifact at
    a path write, and serve it. ``suits``: in a few words, for whom."""

    runtime: str
    device: str
    find: Callable[[Question], Found] = field(repr=False)
    commands: Callable[[str, Choice, Machine, int], dict[str, str]] = field(repr=False)
    suits: str

    @property
    def usual(self) -> bool:
        """Whether it is the one that is meant where nobody names a runtime."""
        return self.runtime == LLAMA_CPP

    def room(self, machine: Machine) -> int | None:
        """Bytes that the runtime may have; None for llama.cpp, which splits a model between places."""
        return self.find.room(machine) if isinstance(self.find, Directories) else None


def _ours(path: str, runtime: str | None = None) -> str:
    named = [] if runtime is None else ["--runtime", runtime]
    return shlex.join(["llm-quantize", "run", path, PROMPTS[0], *named])


def _llama_cpp(path: str, choice: Choice, machine: Machine, context: int) -> dict[str, str]:
    run = ["llama-server", "-m", path, "-c", str(context)]
    if choice.placement is not None and machine.vram:
        run += ["-ngl", str(choice.placement.gpu_layers)]
    return {"try": _ours(path), "run": shlex.join(run)}


def _vllm_gpu(path: str, _choice: Choice, _machine: Machine, context: int) -> dict[str, str]:
    return {"run": shlex.join(["vllm", "serve", path, "--max-model-len", str(context)])}


def _vllm_cpu(path: str, choice: Choice, _machine: Machine, context: int) -> dict[str, str]:
    space = f"VLLM_CPU_KVCACHE_SPACE={choice.need.cache // needs.GIB}"
    serve = shlex.join(["vllm", "serve", path, "--max-model-len", str(context)])
    return {"try": _ours(path, "vllm"), "run": f"{space} {serve}"}


def _transformers_gpu(path: str, _choice: Choice, _machine: Machine, _context: int) -> dict[str, str]:
    lines = (
        f"from transformers import pipeline; p = pipeline('text-generation', {path!r}, device_map='cuda'); "
        f"print(p({PROMPTS[0]!r})[0]['generated_text'])"
    )
    return {"run": shlex.join(["python3", "-c", lines])}


def _transformers_cpu(path: str, _choice: Choice, _machine: Machine, _context: int) -> dict[str, str]:
    return {"run": _ours(path)}


def _mlx(path: str, _choice: Choice, _machine: Machine, _context: int) -> dict[str, str]:
    return {"try": _ours(path), "run": shlex.join(["mlx_lm.server", "--model", path])}


_ctranslate2 = _transformers_cpu

VLLM_GPU = (
    Level(COMPRESSED, "W8A16", 7.5),
    Level(COMPRESSED, "W8A8", 7.5),
    Level(COMPRESSED, "FP8_DYNAMIC", 8.9),
    Level(COMPRESSED, "W4A16", 7.5),
    Level(COMPRESSED, "NVFP4A16", 7.5),
    Level(COMPRESSED, "MXFP4A16", 7.5),
    Level(COMPRESSED, "MXFP4", 10.0),
    Level("gptq", "8bit", 7.5),
    Level("gptq", "4bit", 7.5),
    Level("awq", "4bit", 7.5),
)
VLLM_CPU = (Level(COMPRESSED, "W4A16"), Level("gptq", "4bit"), Level("awq", "4bit"), Level(COMPRESSED, "W8A8"))
BITSANDBYTES = (Level("bitsandbytes", "INT8", widens=True), Level("bitsandbytes", "NF4"), Level("bitsandbytes", "FP4"))
CTRANSLATE2 = (Level("ctranslate2", "int8"),)
MLX = tuple(Level("mlx", f"{bits}bit") for bits in (8, 6, 5, 4, 3))

_BITSANDBYTES_CPU = Directories("transformers", BITSANDBYTES, needs.transformers_cpu, needs.of_ram, "cpu")
_BITSANDBYTES_GPU = Directories("transformers", BITSANDBYTES, needs.transformers_gpu, needs.of_one_gpu, "gpu")
_IN_CTRANSLATE2 = Directories("ctranslate2", CTRANSLATE2, needs.ctranslate2, needs.of_ram, "cpu", floats=None)
_IN_VLLM_GPU = Directories("vllm", VLLM_GPU, needs.vllm_gpu, needs.of_vllm, "gpu", floats=8.0)
_IN_VLLM_CPU = Directories("vllm", VLLM_CPU, needs.vllm_cpu, needs.of_ram, "cpu", steps=(32, 32), experts=False)
_IN_MLX = Directories("mlx", MLX, needs.mlx, needs.of_metal, "gpu", floats=None)

_ONE = "one user, on any hardware"
_MANY = "many requests at once"
_TORCH = "PyTorch programs, and fine-tuning of adapters"

WAYS: Sequence[Way] = (
    *(Way(LLAMA_CPP, device, gguf_choices, _llama_cpp, _ONE) for device in ("cpu", "cuda", "apple")),
    Way("mlx", "apple", _IN_MLX, _mlx, "one user, on Apple silicon"),
    Way("vllm", "cuda", _IN_VLLM_GPU, _vllm_gpu, _MANY),
    Way("transformers", "cuda", _BITSANDBYTES_GPU, _transformers_gpu, _TORCH),
    Way("ctranslate2", "cpu", _IN_CTRANSLATE2, _ctranslate2, "programs that embed a model, on the CPU"),
    Way("vllm", "cpu", _IN_VLLM_CPU, _vllm_cpu, _MANY),
    Way("transformers", "cpu", _BITSANDBYTES_CPU, _transformers_cpu, _TORCH),
)


def ways_for(device: str, runtime: str | None = None) -> list[Way]:
    """The rows for machines of ``device``, of ``runtime`` alone where one is named."""
    return [way for way in WAYS if way.device == device and runtime in (None, way.runtime)]

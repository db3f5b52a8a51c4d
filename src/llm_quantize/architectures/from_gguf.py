"""What a GGUF file says of its model, in the words of Hugging Face: the tables of the families read backwards.

A file names an architecture, and several families may have it ("llama": Llama, Mistral, Mixtral). A configuration is
derived for each of them, and the first whose tensors and hyper-parameters are those of the file is the file's. So what
comes out is proved: `Architecture` of it gives back every tensor name and shape, and every value that both say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import LlmQuantizeError, MalformedInputError, UnsupportedError, printable
from ..io.gguf_file import MetaValue
from ..io.safetensors_file import TensorInfo
from . import ARCHITECTURES
from .architecture import Architecture
from .base import Family, OutputTensor
from .config_reader import ALIASES, LARGEST
from .kinds import Kind as T
from .mapping import artifact_shapes, checkpoint_shapes, output_name
from .rope import DIVISORS

_AGAIN = "make the file again with a current llama.cpp, or start from the original model"
_NOT_MODELS = {
    "adapter": "this is an adapter (LoRA), not a model: it only holds changes to another model's weights",
    "imatrix": "this is an importance matrix, not a model: --imatrix takes it",
    "mmproj": "this is the projector of a multimodal model, not a model that generates text",
    "vocab": "this is a vocabulary without weights, not a model",
}
_SCALE_LINEAR = "{arch}.rope.scale_linear"  # of files from 2023; llama.cpp still reads it
_LLAMA3 = (1.0, 4.0)  # low and high frequency factors, of which divisors alone tell the ratio
_CLOSE = 1e-5


@dataclass(frozen=True)
class Contents:
    """A GGUF model as its file has it: all metadata, {tensor: row-major shape}, and the values of one tensor, float32
    (the few that stand for configuration are read: rotary divisors)."""

    file: Path
    metadata: Mapping[str, MetaValue]
    shapes: Mapping[str, tuple[int, ...]]
    values: Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Derived:
    """``config``: as config.json would have it. ``shapes``: {name in an unquantized checkpoint: shape}. ``outputs``:
    which tensors of the file these are."""

    config: dict[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Sequence[OutputTensor]


def derive(contents: Contents) -> Derived:
    """The model that ``contents`` is.

    Raises UnsupportedError (no model, an architecture or tensors that no family here has, each by name),
    MalformedInputError (a value that the architecture needs is absent or impossible).
    """
    arch = _check_model(contents)
    families = [f for f in ARCHITECTURES.values() if f.arch == arch and not f.nested]
    if not families:
        known = sorted({family.arch for family in ARCHITECTURES.values()})
        near = difflib.get_close_matches(arch.lower()[:80], known, n=1, cutoff=0.3)
        raise UnsupportedError(
            f"the GGUF architecture {arch[:80]!r} is not supported",
            file=contents.file,
            expected=f"the nearest supported one is {near[0]!r}" if near else None,
            found=arch,
            remedy="supported: " + ", ".join(known),
        )
    if any(family.uneven for family in families):
        raise UnsupportedError(
            f"a GGUF file of the architecture {arch} cannot be a source: its sizes differ from layer to layer",
            file=contents.file,
            expected="one size for all layers",
            found=arch,
            remedy="start from the original model, a directory with config.json",
        )
    problems: list[tuple[int, LlmQuantizeError]] = []
    for family in families:
        try:
            found = _fit(family, contents)
        except (MalformedInputError, UnsupportedError) as problem:
            problems.append((len(contents.shapes), problem))
            continue
        if isinstance(found, Derived):
            return found
        problems.append(found)
    raise min(problems, key=lambda one: one[0])[1]


def _check_model(contents: Contents) -> str:
    """The name of the architecture. Raises UnsupportedError for what is no model."""
    kind = _Values(contents, "").text(gguf.Keys.General.TYPE, "model")
    if kind != "model":
        base = _Values(contents, "").text(gguf.Keys.General.BASE_MODEL_NAME.format(id=0), "")
        raise UnsupportedError(
            _NOT_MODELS.get(kind, f"a GGUF file of type {kind[:40]!r} is not a model"),
            file=contents.file,
            expected=f"{gguf.Keys.General.TYPE} = model",
            found=kind,
            remedy="give the model itself" + (f", {base}" if base else ""),
        )
    arch = _Values(contents, "").text(gguf.Keys.General.ARCHITECTURE, "")
    if not arch:
        raise MalformedInputError(
            "the file does not say what kind of model this is",
            file=contents.file,
            expected=f"{gguf.Keys.General.ARCHITECTURE}, a string",
            remedy=_AGAIN,
        )
    if not contents.shapes:
        raise MalformedInputError(
            "this model holds no tensors", file=contents.file, expected="weights", found="none", remedy=_AGAIN
        )
    return arch


class _Values:
    """The metadata of one architecture with typed questions, which raise MalformedInputError by name."""

    def __init__(self, contents: Contents, arch: str) -> None:
        self._contents, self._arch = contents, arch

    def get(self, key: str) -> object:
        """The value, None where there is none; a list of one value for every layer is that value."""
        found = self._contents.metadata.get(key.format(arch=self._arch))
        if found is None:
            return None
        value = found.value
        if isinstance(value, list) and value and not isinstance(value[0], bool) and value.count(value[0]) == len(value):
            return value[0]
        if isinstance(value, float) and found.type == gguf.GGUFValueType.FLOAT32:
            return float(str(np.float32(value)))  # the shortest number that is this float32
        return value

    def _wrong(self, key: str, expected: str, found: object) -> MalformedInputError:
        name = key.format(arch=self._arch)
        what = f"{name} is not in the metadata" if found is None else f"the value of {name} is not usable"
        text = None if found is None else printable(repr(found), 80)
        return MalformedInputError(what, file=self._contents.file, expected=expected, found=text, remedy=_AGAIN)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 on."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, "one whole number", value)
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """A finite number (positive if asked)."""
        value = self.get(key)
        value = default if value is None else value
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(value, int | float) or not usable or (positive and value <= 0):
            raise self._wrong(key, "a finite number" + (" above 0" if positive else ""), value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return default if value is None else value


def _fit(family: Family, contents: Contents) -> Derived | tuple[int, UnsupportedError]:
    """The model as one of ``family``; or how many tensors and values are not its, and the first of them."""
    config = _Inverse(family, contents).config()
    architecture = Architecture(family, config, contents.file)
    if architecture.limits:
        return len(contents.shapes), architecture.limits[0]
    # First by what the artifact has: a hostile number of experts must not make as many names.
    wanted = {
        **artifact_shapes(family, architecture.config, architecture.hyper),
        **{tensor.of(None): values.shape for tensor, values in architecture.constants.items()},
    }
    wanted = {name: _squeezed(shape) for name, shape in wanted.items()}
    found = {name: _squeezed(shape) for name, shape in contents.shapes.items()}
    off = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if off:
        name = min(off)
        problem = UnsupportedError(
            f"a tensor is not as {family.model_type} has it, the nearest family of this architecture",
            file=contents.file,
            tensor=name,
            expected=list(wanted[name]) if name in wanted else "no such tensor",
            found=list(found[name]) if name in found else "no such tensor",
            remedy="this variant is not supported; start from the original model if its family is",
        )
        return len(off), problem
    different = _different(architecture, contents)
    if different is not None:
        return 0, different
    shapes = checkpoint_shapes(family, architecture.config, architecture.hyper)
    infos = {name: TensorInfo(name, "", shape, contents.file, 0, 0) for name, shape in shapes.items()}
    outputs = architecture.map_tensors(infos).outputs
    return Derived(config, shapes, [output for output in outputs if output.name in found and output.constant is None])


def _different(architecture: Architecture, contents: Contents) -> UnsupportedError | None:
    """The error for a hyper-parameter that the file and its family's tables do not agree on, if there is one."""
    values = _Values(contents, architecture.gguf_name)
    for key, wanted in architecture.metadata().items():
        found, value = values.get(key), wanted.value
        if found is None or key.endswith(".vocab_size"):
            continue
        near = isinstance(found, int | float) and isinstance(value, int | float)
        if found != value and not (near and math.isclose(found, value, rel_tol=_CLOSE)):  # type: ignore[arg-type]
            return UnsupportedError(
                f"{key} is not what {architecture.family.model_type} would have with these tensors",
                file=contents.file,
                expected=printable(str(value), 80),
                found=printable(str(found), 80),
                remedy="this variant is not supported; start from the original model if its family is",
            )
    return None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF does not keep leading dimensions of 1."""
    return tuple(size for size in shape if size != 1)


class _Inverse:
    """One family's tables, read backwards."""

    def __init__(self, family: Family, contents: Contents) -> None:
        self.family, self.contents = family, contents
        self.values = _Values(contents, family.arch)

    def _named(self, name: str, value: object) -> dict[str, object]:
        """A value under the name that the family's configuration has for it, if it has one."""
        word = self.family.words.get(name, name)
        return {word: value} if word else {}

    def config(self) -> dict[str, object]:
        """The configuration. Raises MalformedInputError for a value that is absent or of a wrong kind."""
        family = self.family
        config: dict[str, object] = {"architectures": [family.generator], "model_type": family.model_type}
        for limit in family.limits:
            config[limit.name] = limit.allowed[0]
        config |= self._named("hidden_act", family.activations[0])
        config |= self._conditions()
        config |= self._sizes()
        config |= self._experts()
        if family.falcon_heads:
            config |= self._falcon(config, config.pop("two_norms") is True)
        config |= self._tokens()
        keys = gguf.Keys.Attention
        if family.norm == "rms":
            config |= self._named("rms_norm_eps", self.values.number(keys.LAYERNORM_RMS_EPS))
        else:
            config |= self._named("layer_norm_eps", self.values.number(keys.LAYERNORM_EPS))
        for value in family.values:
            found = self.values.get(value.key)
            if value.required and found is None:
                self.values.number(value.key)  # raises
            config |= self._named(value.name, None if found == value.empty else found)
        config |= self._layer_types()
        if family.rope_default is not None:
            config |= self._rope()
        return config

    def _conditions(self) -> dict[str, object]:
        """What weights depend on: true where those that only then exist are there."""
        found: dict[str, object] = {}
        for name in sorted({weight.when.lstrip("!") for weight in self.family.weights if weight.when}):
            on, off = (
                {output_name(weight, 0) for weight in self.family.weights if weight.when == when}
                for when in (name, f"!{name}")
            )
            there = self.contents.shapes.keys()
            found[name] = not there.isdisjoint(on - off) if on - off else there.isdisjoint(off - on)
        return found

    def _sizes(self) -> dict[str, object]:
        values, keys, heads = self.values, gguf.Keys.LLM, gguf.Keys.Attention
        embedding, count = values.integer(keys.EMBEDDING_LENGTH), values.integer(heads.HEAD_COUNT)
        table = self.contents.shapes.get("token_embd.weight", (0,))
        found = {
            **self._named("num_hidden_layers", values.integer(keys.BLOCK_COUNT)),
            **self._named("max_position_embeddings", values.integer(keys.CONTEXT_LENGTH)),
            **self._named("hidden_size", embedding),
            **(self._named("intermediate_size", self._width()) if self.family.dense else {}),
            **self._named("num_attention_heads", count),
            **self._named("num_key_value_heads", self._key_heads(count)),
            "vocab_size": table[0],
            "tie_word_embeddings": "output.weight" not in self.contents.shapes,
        }
        usual = embedding // max(1, count)
        head = values.integer(heads.KEY_LENGTH, usual)
        if self.family.own_head_dim or head != usual:
            found["head_dim"] = head
        if self.family.recurrent_period:
            found |= self._recurrence()
        if self.family.convolutions:
            found |= self._convolved()
        if self.family.score_layers:  # the runtime derives the divisor of the scores
            whole = values.integer(keys.BLOCK_COUNT) == self.family.score_layers
            found["query_pre_attn_scalar"] = usual if whole else head
        return found

    def _key_heads(self, heads: int) -> int:
        """The most of any layer. Raises MalformedInputError."""
        found = self.values.get(gguf.Keys.Attention.HEAD_COUNT_KV)
        if self.family.convolutions and isinstance(found, list) and found and all(type(one) is int for one in found):
            return int(max(found))
        return self.values.integer(gguf.Keys.Attention.HEAD_COUNT_KV, heads)

    def _convolved(self) -> dict[str, object]:
        """The layers without attention: those without key heads."""
        found = self.values.get(gguf.Keys.Attention.HEAD_COUNT_KV)
        count = self.values.integer(gguf.Keys.LLM.BLOCK_COUNT)
        heads = found if isinstance(found, list) else [1] * min(count, len(self.contents.shapes))
        return {
            "layer_types": ["full_attention" if one else "conv" for one in heads],
            "block_auto_adjust_ff_dim": False,
        }

    def _width(self) -> int:
        return self.values.integer(gguf.Keys.LLM.FEED_FORWARD_LENGTH)

    def _recurrence(self) -> dict[str, object]:
        """The layers without attention and the sizes of their states."""
        values, keys = self.values, gguf.Keys.SSM
        heads = values.integer(keys.TIME_STEP_RANK)
        every = max(1, values.integer(gguf.Keys.LLM.FULL_ATTENTION_INTERVAL, self.family.recurrent_period))
        layers = range(min(values.integer(gguf.Keys.LLM.BLOCK_COUNT), len(self.contents.shapes)))
        return {
            "layer_types": ["linear_attention" if (i + 1) % every else "full_attention" for i in layers],
            "linear_conv_kernel_dim": values.integer(keys.CONV_KERNEL),
            "linear_key_head_dim": values.integer(keys.STATE_SIZE),
            "linear_num_key_heads": values.integer(keys.GROUP_COUNT),
            "linear_num_value_heads": heads,
            "linear_value_head_dim": values.integer(keys.INNER_SIZE) // max(1, heads),
        }

    @property
    def _head_dim(self) -> int:
        usual = self.values.integer(gguf.Keys.LLM.EMBEDDING_LENGTH)
        usual //= max(1, self.values.integer(gguf.Keys.Attention.HEAD_COUNT))
        return self.values.integer(gguf.Keys.Attention.KEY_LENGTH, usual)

    def _experts(self) -> dict[str, object]:
        values, keys = self.values, gguf.Keys.LLM
        count = values.integer(keys.EXPERT_COUNT, 0)
        if not count:
            usual = any(name in self.family.defaults for name in ALIASES["num_experts"])
            return self._named("num_experts", 0) if usual else {}
        feed = self._width() if self.family.dense else None
        width = values.integer(keys.EXPERT_SHARED_FEED_FORWARD_LENGTH, 0)
        shared = {"shared_expert_intermediate_size": width} if width and not self.family.shared else {}
        return {
            **self._named("num_experts", count),
            "num_experts_per_tok": values.integer(keys.EXPERT_USED_COUNT),
            **self._named("moe_intermediate_size", values.integer(keys.EXPERT_FEED_FORWARD_LENGTH, feed)),
            **shared,
        }

    def _falcon(self, config: Mapping[str, object], two: bool) -> dict[str, object]:
        """Which of Falcon's three ways of sharing key heads. ``two``: attention has a norm of its own."""
        heads, kv = config["num_attention_heads"], config["num_kv_heads"]
        new = two or kv not in (1, heads)
        return {
            "new_decoder_architecture": new,
            "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
            "multi_query": kv == 1,
        }

    def _tokens(self) -> dict[str, object]:
        keys, rows = gguf.Keys.Tokenizer, self.contents.shapes.get("token_embd.weight", (0,))[0]
        found: dict[str, object] = {}
        for name, key in (("bos", keys.BOS_ID), ("eos", keys.EOS_ID), ("pad", keys.PAD_ID)):
            value = self.values.get(key)
            held = type(value) is int and 0 <= value < rows  # the others mean nothing to llama.cpp, too
            found[f"{name}_token_id"] = value if held else None
        return found

    def _layer_types(self) -> dict[str, object]:
        period, count = self.family.layer_types, self.values.integer(gguf.Keys.LLM.BLOCK_COUNT)
        if not period:
            return {}
        sliding: object = None
        if self.family.sliding_pattern:
            sliding = self.values.get(gguf.Keys.Attention.SLIDING_WINDOW_PATTERN)
        if not isinstance(sliding, list):
            slides = self.family.sliding_at in (0, count)
            sliding = [slides and (i + 1) % period != 0 for i in range(min(count, len(self.contents.shapes)))]
        whole: dict[str, object] = {"sliding_window": None} if self.family.sliding_at not in (0, count) else {}
        return whole | {"layer_types": ["sliding_attention" if one else "full_attention" for one in sliding]}

    def _rope(self) -> dict[str, object]:
        """Rotary positions, as transformers 5 spells them."""
        family, values, keys = self.family, self.values, gguf.Keys.Rope
        theta = values.number(keys.FREQ_BASE, 10000.0, positive=True)
        rotary, head = values.integer(keys.DIMENSION_COUNT, self._head_dim), self._head_dim
        share = min(1.0, rotary / max(1, head))
        share = share if int(head * share) == rotary else min(1.0, math.nextafter(share, 2))
        scaling = {"rope_theta": theta, **self._scaling(theta, rotary)}
        if share != 1:
            scaling["partial_rotary_factor"] = share
        if isinstance(sections := values.get(keys.DIMENSION_SECTIONS) if family.sections else None, list):
            scaling["mrope_section"] = [one for one in sections if one]
            scaling["mrope_interleaved"] = True
        plain: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
        found: dict[str, object] = {"rope_parameters": scaling}
        if family.rope_local_default is not None:
            plain["rope_theta"] = values.number(keys.FREQ_BASE_SWA, 10000.0)
        if family.rope_local_default is not None or family.sliding_pattern:
            found["rope_parameters"] = {"full_attention": scaling, "sliding_attention": plain}
        if "longrope" in family.rope:
            context = values.integer(gguf.Keys.LLM.CONTEXT_LENGTH)
            found["original_max_position_embeddings"] = values.integer(keys.SCALING_ORIG_CTX_LEN, context)
        return found

    def _scaling(self, theta: float, rotary: int) -> dict[str, object]:
        values, keys, shapes = self.values, gguf.Keys.Rope, self.contents.shapes
        context = values.integer(gguf.Keys.LLM.CONTEXT_LENGTH)
        original = values.integer(keys.SCALING_ORIG_CTX_LEN, context)
        names = [t.of(None) for t in (T.ROPE_FACTORS_LONG, T.ROPE_FACTORS_SHORT, T.ROPE_FREQS)]
        if names[0] in shapes and names[1] in shapes:
            long, short = (self._divisors(name, rotary).tolist() for name in names[:2])
            return {
                "rope_type": "longrope",
                "long_factor": long,
                "short_factor": short,
                "attention_factor": values.number(keys.SCALING_ATTN_FACTOR, 1.0),
                "original_max_position_embeddings": original,
            }
        if names[2] in shapes:
            divisors = self._divisors(names[2], rotary)
            return llama3_parameters(divisors, theta, rotary, self.contents.file)
        kind = values.text(keys.SCALING_TYPE, "linear")
        factor = values.number(keys.SCALING_FACTOR, values.number(_SCALE_LINEAR, 1.0))
        if kind == gguf.RopeScalingType.YARN.value:
            usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
            found: dict[str, object] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
            if self.family.ramp:
                found["beta_fast"] = values.number(keys.SCALING_YARN_BETA_FAST, 32.0)
                found["beta_slow"] = values.number(keys.SCALING_YARN_BETA_SLOW, 1.0)
                if under := values.number(keys.SCALING_YARN_LOG_MUL, 0.0):
                    found |= {"mscale": 1.0, "mscale_all_dim": under}
                    usual = usual / (0.1 * under * math.log(factor) + 1) if factor > 1 else 1.0
            if self.family.temperature:
                found[self.family.temperature] = values.number(gguf.Keys.Attention.TEMPERATURE_SCALE, 0.0)
            if values.get(keys.SCALING_ATTN_FACTOR) is not None:
                found["attention_factor"] = usual * values.number(keys.SCALING_ATTN_FACTOR)
            return found
        if kind == gguf.RopeScalingType.LINEAR.value and factor not in (0, 1):
            return {"rope_type": "linear", "factor": factor}
        return {"rope_type": "default"}

    def _divisors(self, name: str, rotary: int) -> npt.NDArray[np.float32]:
        found = self.contents.values(name)
        if found.shape != (rotary // 2,) or not np.all(np.isfinite(found)) or not np.all(found > 0):
            raise MalformedInputError(
                "the rotary divisors are not usable",
                file=self.contents.file,
                tensor=name,
                expected=f"{rotary // 2} numbers above 0",
                found=list(found.shape),
                remedy=_AGAIN,
            )
        return found


def llama3_parameters(divisors: npt.NDArray[np.float32], theta: float, rotary: int, file: Path) -> dict[str, object]:
    """The parameters of Llama 3's scaling from its divisors, float32 (rotary / 2,).

    Divisors tell ``factor``, and of the two frequency factors and the original context all but a common one, so the
    high factor is taken to be 4, as in every model published. The divisors themselves are kept: they are what the
    runtime computes with. Raises UnsupportedError where no parameters give them.
    """
    factor = float(str(divisors.max()))
    waves = 2 * math.pi * theta ** (np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    low, original = _llama3_bounds(divisors, factor, waves)
    high = _LLAMA3[1]
    found: dict[str, object] = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    again = 1 / ((1 - smooth) / factor + smooth)
    if factor <= 1 or not np.allclose(again, divisors, rtol=1e-3):
        raise UnsupportedError(
            "the rotary divisors are not those of Llama 3's scaling",
            file=file,
            tensor=T.ROPE_FREQS.of(None),
            found=printable(str(divisors.tolist()), 120),
            remedy="start from the original model",
        )
    return {**found, DIVISORS: divisors.tolist()}


def _llama3_bounds(
    divisors: npt.NDArray[np.float32], factor: float, waves: npt.NDArray[np.float64]
) -> tuple[float, int]:
    """(low frequency factor, original context) that fit best, from the divisors between the bounds.

    There 1 / divisor = (1 - s) / factor + s, with s = (original / wave - low) / (high - low).
    """
    low, high = _LLAMA3
    mixed = (divisors > 1 + _CLOSE) & (divisors < factor * (1 - _CLOSE))
    share = (1 / divisors[mixed].astype(np.float64) - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.empty(0)
    if len(share) > 1:
        turns = 1 / waves[mixed]
        slope = float((share[-1] - share[0]) / (turns[-1] - turns[0]))
        offset = float(turns[0] * slope - share[0])
        low = round(high * offset / (1 + offset), 4) if offset > 0 else low
        original = slope * (high - low)
    elif len(share) == 1:
        original = float(waves[mixed][0] * (share[0] * (high - low) + low))
    else:
        kept, stretched = waves[divisors <= 1 + _CLOSE], waves[divisors > 1 + _CLOSE]
        original = math.sqrt(kept.max(initial=waves[0] / high) * stretched.min(initial=waves[-1]) * low * high)
    return low, round(original) if 1 < original < LARGEST else 1

"""A configuration understood: the sizes of the model, its metadata in GGUF, and the map of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import gguf
from gguf import GGUFValueType

from ..errors import UnsupportedError
from ..io.gguf_file import MetaValue
from ..io.safetensors_file import TensorInfo
from .base import Family, Form, TensorMap
from .config_reader import LARGEST, ConfigReader
from .hyper import read_hyper
from .mapping import form_of, head_of, map_tensors
from .rope import Rope, is_rounded, read_rope, rope_constants, rope_metadata

_RAMP = (
    "llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which this model does not: its logits there are "
    "near those of transformers, not the same"
)


class Architecture:
    """One model of one family. ``gguf_name``: the architecture's name in GGUF. ``hyper``: its sizes.
    ``sliding``: for each layer, whether its attention has a window. ``notes``: what the user must know that is not
    an error. ``constants``: rotary divisors, where the scaling is more than one number. ``limits``: why llama.cpp's
    graph of this family cannot compute this variant, in the order found; the GGUF format refuses the first of them,
    every other format does not care.

    Raises: MalformedInputError (a value absent, of a wrong type or impossible).
    """

    def __init__(self, family: Family, config: Mapping[str, object], file: Path | None) -> None:
        self.family = family
        values = dict(config)
        if family.nested and isinstance(nested := config.get("text_config"), Mapping):
            values |= nested
        for name, word in family.words.items():
            if word in values and values.get(name) is None:
                values[name] = values[word]
        if family.falcon_heads:
            new = values.get("new_decoder_architecture") is True
            values["two_norms"] = new and values.get("num_ln_in_parallel_attn") in (2, None)
        if family.uneven:
            given = ConfigReader(values, file, family.defaults).get("hidden_size_per_layer_input")
            values["has_per_layer_input"] = bool(given)
            if not values.get("enable_moe_block"):
                values["num_experts"] = values["num_local_experts"] = None
        self.config = ConfigReader(values, file, family.defaults)
        self.gguf_name: str = family.arch
        self.limits: list[UnsupportedError] = []
        self._check_limits()
        self.rope: Rope | None = read_rope(self.config, family, self.limits)
        self.hyper = read_hyper(self.config, family, self.rope, self.limits)
        self.sliding = self._layer_types()
        self._check_recurrence()
        self._check_uneven()
        self._check_sections()
        self._check_scores()
        self._check_rotated_layers()
        self.constants = {} if self.limits else rope_constants(self.rope, self.config, self.hyper)
        self.notes = tuple(
            text.format(value=self.config.get(name)) for name, text in family.notes if self.config.get(name)
        )
        yarn = self.rope if self.rope is not None and self.rope.kind == "yarn" else None
        if family.rounds_ramp and yarn is not None and not is_rounded(yarn, self.config.file):
            self.notes += (_RAMP,)

    @property
    def window(self) -> int:
        """Tokens that a sliding layer attends to; 0: all of them."""
        named = next((v.name for v in self.family.values if v.key == gguf.Keys.Attention.SLIDING_WINDOW), None)
        if named is None or self.config.get(named) is None:
            return 0
        return self.config.integer(named, low=0)

    def _limit(self, name: str, expected: object, found: object) -> None:
        self.limits.append(
            UnsupportedError(
                f"llama.cpp cannot compute {self.family.model_type} with this {name}",
                file=self.config.file,
                expected=expected,
                found=repr(found)[:200],
                remedy="this variant cannot be run there; check config.json, or choose another model of the family",
            )
        )

    def _check_limits(self) -> None:
        act = self.config.text("hidden_act")
        if act is not None and act not in self.family.activations:
            self._limit("activation", " or ".join(self.family.activations), act)
        for limit in self.family.limits:
            value = self.config.get(limit.name)
            value = limit.default if value is None else value
            if not any(type(value) is type(one) and value == one for one in limit.allowed):
                self._limit(limit.name, " or ".join(map(repr, limit.allowed)), value)

    def _layer_types(self) -> list[bool]:
        """Which layers have a sliding window: as configured, and, unless the runtime reads it, as it has built in."""
        n_layer = self.hyper.n_layer
        period = self.family.layer_types if self.family.sliding_at in (0, n_layer) else 0
        if self.family.recurrent_period or self.family.convolutions:  # none slides
            return [False] * n_layer
        usual = [bool(period) and (i + 1) % max(1, period) != 0 for i in range(n_layer)]
        types = self.config.sequence("layer_types")
        if types is None:
            every = self.config.integer("sliding_window_pattern", low=0, default=period) if period else 0
            if every != period:
                self._limit("sliding_window_pattern", period, every)
            return usual
        found = [kind == "sliding_attention" for kind in types]
        known = all(kind in ("sliding_attention", "full_attention") for kind in types)
        if len(found) != n_layer:
            raise self.config.wrong("layer_types", f"one type for each of {n_layer} layers", types)
        if not known or (found != usual and not self.family.sliding_pattern):
            self._limit("order of layer_types", f"full_attention every {period or 1} layers", types)
        return found

    def _check_uneven(self) -> None:
        """Embeddings of the layers have a row for every token; a layer takes keys from one of its own kind."""
        found = self.hyper.uneven
        if found is None:
            return
        if self.hyper.n_expert:
            self.limits.append(
                UnsupportedError(
                    f"{self.family.model_type} with experts is not written as GGUF: scales beside its routers and "
                    "experts would not be read back as what they are",
                    file=self.config.file,
                    expected="enable_moe_block false",
                    found="enable_moe_block true",
                    remedy="take a dense model of this family",
                )
            )
        if found.per_layer and found.per_layer_vocab != self.hyper.vocab_size:
            self._limit("vocab_size_per_layer_input", self.hyper.vocab_size, found.per_layer_vocab)
        kinds = [layer in found.full for layer in range(self.hyper.n_layer)]
        if set(kinds[: found.first_shared]) != set(kinds):
            sharing = self.hyper.n_layer - found.first_shared
            expected = "a layer of every kind in layer_types that has keys of its own"
            raise self.config.wrong("num_kv_shared_layers", expected, sharing)
        # llama.cpp does not look for the layer that keys come from: the last but one with a window, the last without.
        if found.first_shared < len(kinds) and kinds[max(0, found.first_shared - 2) : found.first_shared] != [
            False,
            True,
        ]:
            expected = "sliding_attention, full_attention in the last two layers with keys of their own"
            self._limit("num_kv_shared_layers", expected, len(kinds) - found.first_shared)

    def _uneven_sizes(self) -> dict[str, MetaValue]:
        """What differs from layer to layer: one number where it does not, else one for each layer."""
        found, hyper = self.hyper.uneven, self.hyper
        if found is None:
            return {}
        keys, heads, rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
        layers = [hyper.in_layer(layer) for layer in range(hyper.n_layer)]
        values: dict[str, int | list[int]] = {
            keys.FEED_FORWARD_LENGTH: [one.feed_forward_length for one in layers],
            heads.HEAD_COUNT_KV: [one.n_head_kv for one in layers],
            heads.KEY_LENGTH: found.head_dim,
            heads.VALUE_LENGTH: found.head_dim,
            heads.KEY_LENGTH_SWA: hyper.head_dim,
            heads.VALUE_LENGTH_SWA: hyper.head_dim,
            heads.SHARED_KV_LAYERS: hyper.n_layer - found.first_shared,
            keys.EMBD_LENGTH_PER_LAYER_INP: found.per_layer,
            rope.DIMENSION_COUNT: found.head_dim,
            rope.DIMENSION_COUNT_SWA: hyper.head_dim,
        }
        named = {}
        for key, value in values.items():
            if isinstance(value, list) and len(set(value)) > 1:
                one = MetaValue(GGUFValueType.ARRAY, value, GGUFValueType.INT32)
            else:
                one = _meta(value[0] if isinstance(value, list) else value)
            named[key.format(arch=self.gguf_name)] = one
        return named

    def _check_recurrence(self) -> None:
        """Which layers have a state, and its sizes, must be such as the runtime computes."""
        found = self.hyper.recurrence
        if found is None:
            return
        every = self._interval()
        if found.layers != {i for i in range(self.hyper.n_layer) if (i + 1) % every}:
            self._limit("order of layer_types", f"full_attention every {every} layers", sorted(found.layers))
        if found.key_dim != found.value_dim:
            self._limit("linear_value_head_dim", f"linear_key_head_dim ({found.key_dim})", found.value_dim)

    def _interval(self) -> int:
        """Every so-manieth layer has attention: as configured, or as the layers themselves tell."""
        types = self.config.sequence("layer_types")
        if types is None or "full_attention" not in types:
            return self.config.integer("full_attention_interval", default=self.family.recurrent_period)
        return types.index("full_attention") + 1

    def _check_rotated_layers(self) -> None:
        """Layers without rotary positions must be those that the runtime leaves without."""
        period = self.family.rope_period
        rotated = self.config.sequence("no_rope_layers") if period else None
        if rotated is not None and list(rotated) != [int((i + 1) % period != 0) for i in range(self.hyper.n_layer)]:
            self._limit("no_rope_layers", f"0 every {period} layers, else 1", rotated)

    def _check_scores(self) -> None:
        """The divisor of attention scores, where the runtime derives it instead of reading it."""
        if not self.family.score_layers:
            return
        hyper, scalar = self.hyper, self.config.number("query_pre_attn_scalar")
        expected = hyper.head_dim
        if hyper.n_layer == self.family.score_layers:
            expected = hyper.embedding_length // hyper.n_head
        if scalar != expected:
            self._limit("query_pre_attn_scalar", expected, scalar)

    def form_of(self, name: str) -> Form | None:
        """See ``mapping.form_of``."""
        return form_of(self.family, self.config, name)

    def head_of(self, names: Iterable[str]) -> str | None:
        """See ``mapping.head_of``."""
        return head_of(self.family, names)

    def map_tensors(self, tensors: Mapping[str, TensorInfo]) -> TensorMap:
        """Every tensor of the checkpoint mapped, or left out with the reason (see mapping.map_tensors)."""
        return map_tensors(self.family, self.config, self.hyper, tensors, self.constants)

    def metadata(self, generation_config: Mapping[str, object] | None = None) -> dict[str, MetaValue]:
        """Hyper-parameters under GGUF's keys (no general.*, no tokenizer.*), in the order of convert_hf_to_gguf.

        ``generation_config`` is part of the interface; no present family takes a hyper-parameter from it.
        """
        del generation_config
        found: dict[str, int | float | bool | str] = dict(self._sizes())
        if self.rope is not None:
            found |= rope_metadata(self.rope, self.config, self.family, self.hyper)
        keys = gguf.Keys.Attention
        if self.family.norm == "rms":
            found[keys.LAYERNORM_RMS_EPS] = self.config.number("rms_norm_eps")
        else:
            found[keys.LAYERNORM_EPS] = self.config.number("layer_norm_eps")
        found |= self.family.fixed
        for value in self.family.values:
            if self.config.get(value.name) is None and not value.required:
                if value.empty is not None:
                    found[value.key] = value.empty
                continue
            if value.kind == "int":
                found[value.key] = self.config.integer(value.name, low=0)
            elif value.kind == "float":
                found[value.key] = self.config.number(value.name)
            else:
                found[value.key] = self.config.boolean(value.name)
        named = {key.format(arch=self.gguf_name): _meta(value) for key, value in found.items()}
        named |= self._uneven_sizes()
        named |= self._sections()
        if self.family.convolutions:
            heads = [
                0 if layer in self.hyper.convolved else self.hyper.n_head_kv for layer in range(self.hyper.n_layer)
            ]
            name = keys.HEAD_COUNT_KV.format(arch=self.gguf_name)
            named[name] = MetaValue(GGUFValueType.ARRAY, heads, GGUFValueType.INT32)
        if self.family.sliding_pattern:
            name = keys.SLIDING_WINDOW_PATTERN.format(arch=self.gguf_name)
            named[name] = MetaValue(GGUFValueType.ARRAY, list(self.sliding), GGUFValueType.BOOL)
        return named

    def _sections(self) -> dict[str, MetaValue]:
        """The rotated pairs for time, height and width, which are one position in text, and a fourth that is none."""
        found = self._rope_sections()
        if not found:
            return {}
        name = gguf.Keys.Rope.DIMENSION_SECTIONS.format(arch=self.gguf_name)
        return {name: MetaValue(GGUFValueType.ARRAY, found, GGUFValueType.INT32)}

    def _rope_sections(self) -> list[int]:
        """Four numbers of pairs; none where the family has one position. Raises MalformedInputError."""
        usual = self.family.sections
        if not usual or self.rope is None:
            return []
        found = ConfigReader(self.rope.scaling, self.config.file).sequence("mrope_section") or usual
        counts = [one for one in found if type(one) is int and 0 <= one <= LARGEST]
        if len(counts) != len(found) or len(found) > 4 or not any(counts):
            raise self.config.wrong("mrope_section", "up to four whole numbers, not all 0", list(found))
        return [*counts, 0, 0, 0, 0][:4]

    def _check_sections(self) -> None:
        """llama.cpp deals out pairs in turn to time, height and width, each as far as its section goes, and the rest to
        a fourth position, which is 0 in text: there must be no rest."""
        sections = self._rope_sections()
        if not sections:
            return
        pairs = [pair % sum(sections) for pair in range(self.hyper.rotary // 2)]
        if any(pair >= 3 * sections[pair % 3] for pair in pairs):
            self._limit("mrope_section", "time, height and width in turn, to the last rotated pair", sections)

    def _sizes(self) -> dict[str, int | float | bool | str]:
        hyper, keys, heads = self.hyper, gguf.Keys.LLM, gguf.Keys.Attention
        found: dict[str, int | float | bool | str] = {
            keys.BLOCK_COUNT: hyper.n_layer,
            keys.CONTEXT_LENGTH: hyper.context_length,
            keys.EMBEDDING_LENGTH: hyper.embedding_length,
            **({keys.FEED_FORWARD_LENGTH: hyper.feed_forward_length} if hyper.feed_forward_length else {}),
            heads.HEAD_COUNT: hyper.n_head,
            heads.HEAD_COUNT_KV: hyper.n_head_kv,
            keys.VOCAB_SIZE: hyper.vocab_size,
        }
        if self.family.own_head_dim:
            found |= {heads.KEY_LENGTH: hyper.head_dim, heads.VALUE_LENGTH: hyper.head_dim}
        if hyper.n_expert:
            found |= {keys.EXPERT_COUNT: hyper.n_expert, keys.EXPERT_USED_COUNT: hyper.n_expert_used}
            if hyper.expert_feed_forward_length != hyper.feed_forward_length:
                found[keys.EXPERT_FEED_FORWARD_LENGTH] = hyper.expert_feed_forward_length
            if hyper.shared_feed_forward_length:
                found[keys.EXPERT_SHARED_FEED_FORWARD_LENGTH] = hyper.shared_feed_forward_length
        return found | self._state_sizes()

    def _state_sizes(self) -> dict[str, int | float | bool | str]:
        found, keys = self.hyper.recurrence, gguf.Keys.SSM
        if found is None:
            return {}
        return {
            keys.CONV_KERNEL: found.kernel,
            keys.STATE_SIZE: found.key_dim,
            keys.GROUP_COUNT: found.key_heads,
            keys.TIME_STEP_RANK: found.value_heads,
            keys.INNER_SIZE: found.values,
            gguf.Keys.LLM.FULL_ATTENTION_INTERVAL: self._interval(),
        }


def _meta(value: int | float | bool | str) -> MetaValue:
    if isinstance(value, bool):
        return MetaValue(GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return MetaValue(GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return MetaValue(GGUFValueType.FLOAT32, value)
    return MetaValue(GGUFValueType.STRING, value)

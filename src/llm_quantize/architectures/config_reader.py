"""config.json read without trusting it: every value is asked for by type and range, and refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import MalformedInputError

# Names that mean the same in the configurations of different families.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed"),
    "intermediate_size": ("block_ff_dim", "intermediate_size", "n_inner", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_k", "top_k_experts"),
    "rms_norm_eps": ("rms_norm_eps",),
    "tie_word_embeddings": ("tie_embedding", "tie_word_embeddings"),
    "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "hidden_act": ("hidden_activation", "hidden_act", "activation_function", "activation"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
LARGEST = 2**31 - 1


class ConfigReader:
    """A configuration with typed questions. A null value is None: the family's default does not take its place.

    Every question raises MalformedInputError with the file and the name of the value, where it is absent without a
    default, of another type, out of range or not finite.
    """

    def __init__(
        self, values: Mapping[str, object], file: Path | None, defaults: Mapping[str, object] | None = None
    ) -> None:
        self.values = values
        self.file = file
        self.defaults = defaults or {}

    def get(self, name: str) -> object:
        """The value of ``name`` or one of its aliases, else the family's default where none is mentioned, else None."""
        mentioned = False
        for alias in ALIASES.get(name, (name,)):
            if (value := self.values.get(alias)) is not None:
                return value
            mentioned = mentioned or alias in self.values
        return None if mentioned else self.defaults.get(name)

    def wrong(self, name: str, expected: str, found: object) -> MalformedInputError:
        """The error for a value that cannot be what it says."""
        return MalformedInputError(
            f"the configuration's {name} is not usable",
            file=self.file,
            expected=expected,
            found=repr(found)[:200],
            remedy="download config.json again from the model's repository",
        )

    def absent(self, name: str) -> MalformedInputError:
        """The error for a value that must be there."""
        names = " or ".join(ALIASES.get(name, (name,)))
        return MalformedInputError(
            f"the configuration has no {names}",
            file=self.file,
            expected=f"a value for {names}",
            remedy="download config.json again from the model's repository",
        )

    def integer(self, name: str, *, low: int = 1, high: int = LARGEST, default: int | None = None) -> int:
        """A whole number in [low, high]."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.absent(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, *, default: float | None = None, positive: bool = False) -> float:
        """A finite number."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.absent(name)
        return self.checked_number(name, value, positive=positive)

    def checked_number(self, name: str, value: object, *, positive: bool = False) -> float:
        """``value`` as a finite number (positive if asked) that a float32 can hold."""
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38
        if not usable or not math.isfinite(value) or (positive and value <= 0):  # type: ignore[arg-type,operator]
            raise self.wrong(name, "a finite number" + (" above 0" if positive else ""), value)
        return float(value)  # type: ignore[arg-type]

    def boolean(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def holds(self, condition: str) -> bool:
        """Whether the boolean ``condition`` is true ("!" before it negates); "" always holds."""
        return not condition or self.boolean(condition.lstrip("!")) != condition.startswith("!")

    def text(self, name: str) -> str | None:
        """A string, or None where there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return value

    def mapping(self, name: str) -> Mapping[str, object]:
        """An object; empty where there is none."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object", value)
        return value

    def sequence(self, name: str) -> Sequence[object] | None:
        """A list, or None where there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

"""Recipes: which tensor gets which qtype, decided as llama.cpp's quantizer decides it.

A *level* (``Q4_K_M``) names a base qtype and, for some roles of tensors, exceptions that depend on the layer, the
family, the number of experts and whether an importance matrix is given. The levels and their exceptions are data
here (``LEVELS``, ``MIXES``); ``assign`` walks a model's tensors once and applies them. Owner of the rules:
llama.cpp, src/llama-quant.cpp; the tests compare every level with the quantizer itself. In words:
docs/reference/recipes.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gguf import LlamaFileType

from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.qtypes import QTYPES


@dataclass(frozen=True)
class Level:
    """A level as users name it. ``file_type`` is GGUF's general.file_type; ``base`` the qtype of most tensors."""

    name: str
    base: str
    file_type: int
    about: str


_LEVELS = (
    ("F32", "f32", LlamaFileType.ALL_F32, "32-bit floats: nothing is lost"),
    ("F16", "f16", LlamaFileType.MOSTLY_F16, "16-bit floats, IEEE half"),
    ("BF16", "bf16", LlamaFileType.MOSTLY_BF16, "16-bit floats with the range of F32"),
    ("Q8_0", "q8_0", LlamaFileType.MOSTLY_Q8_0, "8 bit: indistinguishable in use, the base of comparisons"),
    ("Q6_K", "q6_k", LlamaFileType.MOSTLY_Q6_K, "6 bit: nearly indistinguishable"),
    ("Q5_K_M", "q5_k", LlamaFileType.MOSTLY_Q5_K_M, "5 bit, sensitive tensors at 6: very small loss"),
    ("Q5_K_S", "q5_k", LlamaFileType.MOSTLY_Q5_K_S, "5 bit throughout: small loss"),
    ("Q5_1", "q5_1", LlamaFileType.MOSTLY_Q5_1, "5 bit, older grid with an offset"),
    ("Q5_0", "q5_0", LlamaFileType.MOSTLY_Q5_0, "5 bit, older symmetric grid"),
    ("Q4_K_M", "q4_k", LlamaFileType.MOSTLY_Q4_K_M, "4 bit, sensitive tensors at 6: the usual choice"),
    ("Q4_K_S", "q4_k", LlamaFileType.MOSTLY_Q4_K_S, "4 bit, the first layers at 5: a little smaller"),
    ("IQ4_NL", "iq4_nl", LlamaFileType.MOSTLY_IQ4_NL, "4 bit, non-linear grid"),
    ("IQ4_XS", "iq4_xs", LlamaFileType.MOSTLY_IQ4_XS, "4.25 bit, non-linear grid: the smallest good 4-bit level"),
    ("Q4_1", "q4_1", LlamaFileType.MOSTLY_Q4_1, "4 bit, older grid with an offset"),
    ("Q4_0", "q4_0", LlamaFileType.MOSTLY_Q4_0, "4 bit, older symmetric grid: fast on many devices"),
    ("Q3_K_L", "q3_k", LlamaFileType.MOSTLY_Q3_K_L, "3 bit, sensitive tensors at 5"),
    ("Q3_K_M", "q3_k", LlamaFileType.MOSTLY_Q3_K_M, "3 bit, sensitive tensors at 4 and 5: visible loss"),
    ("Q3_K_S", "q3_k", LlamaFileType.MOSTLY_Q3_K_S, "3 bit throughout: large loss"),
    ("Q2_K", "q2_k", LlamaFileType.MOSTLY_Q2_K, "2.6 bit, sensitive tensors at 3 and 4: very large loss"),
    ("Q2_K_S", "q2_k", LlamaFileType.MOSTLY_Q2_K_S, "2.6 bit throughout; wants an importance matrix"),
    ("TQ2_0", "tq2_0", LlamaFileType.MOSTLY_TQ2_0, "2 bit, for models trained with ternary weights"),
    ("TQ1_0", "tq1_0", LlamaFileType.MOSTLY_TQ1_0, "1.7 bit, for models trained with ternary weights"),
    ("MXFP4_MOE", "mxfp4", LlamaFileType.MOSTLY_MXFP4_MOE, "experts in MXFP4, everything else at 8 bit"),
)
LEVELS: Mapping[str, Level] = {name: Level(name, base, int(number), about) for name, base, number, about in _LEVELS}

ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}

# Levels that llama-quantize knows and this version does not, with the nearest level there is.
LATER_LEVELS: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M"), "TQ1_0 for ternary models, else Q2_K_S"),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S"), "Q2_K_S"),
    **{"IQ2_M": "Q2_K", "IQ3_XXS": "Q2_K", "IQ3_XS": "Q3_K_S", "IQ3_S": "Q3_K_S", "IQ3_M": "Q3_K_M"},
}

# qtypes that users may name for single tensors, in falling order of bits; and those that come later.
TENSOR_TYPES = tuple(sorted(QTYPES, key=lambda name: -QTYPES[name].bits_per_weight))
LATER_TENSOR_TYPES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def parse_level(text: str) -> Level:
    """The level a user named, in any case. Raises UsageError for no level, UnsupportedError for a later one."""
    name = text.strip().upper()
    name = ALIASES.get(name, name)
    if name in LATER_LEVELS:
        raise UnsupportedError(
            f"level {name} comes in a later version",
            remedy=f"take the nearest level there is: {LATER_LEVELS[name]}",
        )
    if name not in LEVELS:
        raise UsageError(f"there is no level {text!r}", expected="one of " + ", ".join(LEVELS), found=text)
    return LEVELS[name]


def parse_qtype(text: str) -> str:
    """The lower-case qtype a user named for a tensor. Raises UsageError, or UnsupportedError for a later one."""
    name = text.strip().lower()
    if name in TENSOR_TYPES:
        return name
    if name in LATER_TENSOR_TYPES:
        raise UnsupportedError(f"type {name} comes in a later version", remedy="take one of " + ", ".join(TENSOR_TYPES))
    is_level = name.upper() in LEVELS or name.upper() in LATER_LEVELS
    raise UsageError(
        f"{text!r} is a level for whole files, not the type of a tensor" if is_level else f"there is no type {text!r}",
        expected="one of " + ", ".join(TENSOR_TYPES),
        found=text,
    )


class Hyper(Protocol):
    """What the rules want to know of a model; ``architectures`` provides it."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_head_kv(self) -> int: ...
    @property
    def n_expert(self) -> int: ...


@dataclass(frozen=True)
class TensorShape:
    """A tensor as the recipe sees it: GGUF name, row-major shape, and the qtype it keeps when it is left alone."""

    name: str
    shape: tuple[int, ...]
    unquantized: str = "f32"


@dataclass(frozen=True)
class Overrides:
    """What the user fixed by hand. ``tensor_types``: (regular expression, qtype), the first that is found in the
    name wins; case does not matter. Qtypes are lower case, as ``parse_qtype`` returns them."""

    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    pure: bool = False


@dataclass(frozen=True)
class Assignment:
    """``qtypes[i]`` belongs to ``tensors[i]``. ``warnings``: one sentence for each thing that is not as asked."""

    level: Level
    qtypes: list[str]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among those of its role: ``index`` of ``count``, and the facts rules ask for."""

    index: int
    count: int
    sharing: int
    arch: str
    importance: bool


def _more(place: Place) -> bool:
    """In the first or the last eighth, or every third layer between."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


CONDITIONS: Mapping[str, Callable[[Place], bool]] = {
    "falcon": lambda place: place.arch == "falcon",
    "not falcon": lambda place: place.arch != "falcon",
    # At least four query heads share each value head, so that tensor is small and bits there are cheap.
    "shared": lambda place: place.sharing >= 4,
    "first 2": lambda place: place.index < 2,
    "first 4": lambda place: place.index < 4,
    "first 1/8": lambda place: place.index < place.count // 8,
    "first 1/16": lambda place: place.index < place.count // 16,
    "more": _more,
    "importance": lambda place: place.importance,
    "no importance": lambda place: not place.importance,
}

# For each level, the roles that do not simply get the base qtype: a qtype and the conditions that must all hold; the
# first such rule decides.
Rule = tuple[str, ...]
_IQ4: Mapping[str, Sequence[Rule]] = {"value": (("q5_k", "shared"),), "down": (("q5_k", "first 1/8", "no importance"),)}
MIXES: Mapping[str, Mapping[str, Sequence[Rule]]] = {
    "Q2_K": {
        "value": (("q4_k", "shared"), ("q3_k",)),
        "down": (("q3_k",),),
        "attention_output": (("q3_k", "not falcon"),),
    },
    "Q2_K_S": {"value": (("q4_k", "shared"),), "down": (("q4_k", "first 1/8"),)},
    "Q3_K_M": {
        "value": (("q5_k", "first 2"), ("q4_k",)),
        "down": (("q5_k", "first 1/16"), ("q4_k", "not falcon"), ("q4_k", "more")),
        "attention_output": (("q4_k", "not falcon"),),
    },
    "Q3_K_L": {
        "value": (("q5_k",),),
        "down": (("q4_k", "falcon"), ("q5_k",)),
        "attention_output": (("q4_k", "falcon"), ("q5_k",)),
    },
    "Q4_K_S": {"value": (("q5_k", "first 4"),), "down": (("q5_k", "first 1/8", "not falcon"),)},
    "Q4_K_M": {
        "value": (("q6_k", "more"),),
        "down": (("q6_k", "falcon", "first 1/16"), ("q5_k", "falcon", "more"), ("q4_k", "falcon"), ("q6_k", "more")),
    },
    "Q5_K_M": {"value": (("q6_k", "more"),), "down": (("q6_k", "more"),)},
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    # An importance matrix does not save the first layers from the symmetric grids; without one the bytes stay
    # what they were before there were importance matrices.
    "Q4_0": {"down": (("q4_1", "first 1/8", "importance"),)},
    "Q5_0": {"down": (("q5_1", "first 1/8", "importance"),)},
    "TQ1_0": {"embedding": (("q4_k",),)},
    "TQ2_0": {"embedding": (("q4_k",),)},
}

# With exactly eight experts attention is a small part of the model: these levels give its output 5 bits, and every
# level gives keys and values 8.
_EIGHT_EXPERTS = frozenset({"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"})

# What a row takes whose length its qtype's blocks do not divide; f16 where that fails too.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    **{"iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
}

# Parts of names that are never quantized: tiny, or broken by it.
_LEFT_ALONE = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d"),
    *("shortconv.conv.weight", "attn_rel_b.weight", ".position_embd", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("sam.pos_embd", "sam.neck.", "sam.net_", "time_mix_first.weight", "time_mix_lerp_fused.weight"),
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "ffn_gate_tid2eid.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "a.rvq.codebook", "mm.a.code_embd"),
)
_LEFT_ALONE_NAMES = ("position_embd.weight", "token_types.weight")

_ROLES = (
    *(("attn_qkv.weight", "value"), ("attn_kv_b.weight", "value"), ("attn_v.weight", "value")),
    *(("attn_k.weight", "key"), ("attn_q.weight", "query"), ("attn_output.weight", "attention_output")),
    *(("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down")),
)


def role(name: str) -> str:
    """The role of a tensor in the mix rules, from its GGUF name."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((found for part, found in _ROLES if part in name), "other")


def is_quantizable(tensor: TensorShape) -> bool:
    """Whether a level may change this tensor: a weight of two or more dimensions that is not on the list."""
    significant = [n for i, n in enumerate(tensor.shape) if n != 1 or any(m != 1 for m in tensor.shape[:i])]
    return (
        len(significant) >= 2
        and tensor.name.endswith("weight")
        and tensor.name not in _LEFT_ALONE_NAMES
        and not any(part in tensor.name for part in _LEFT_ALONE)
    )


def assign(
    level: str,
    tensors: Sequence[TensorShape],
    hyper: Hyper,
    *,
    arch: str,
    importance_names: Collection[str] | None = None,
    overrides: Overrides | None = None,
) -> Assignment:
    """Give each tensor its qtype. ``importance_names``: tensors that the importance matrix covers (None: there is
    none). Raises UsageError for an unknown level, a bad expression, or a level that needs an importance matrix."""
    recipe = _Recipe(parse_level(level), tensors, hyper, arch, importance_names or (), overrides or Overrides())
    qtypes = [tensor.unquantized for tensor in tensors]
    # Rules that count tensors of a role count them in llama.cpp's order: by layer, then by name.
    for index in sorted(range(len(tensors)), key=lambda i: (_layer(tensors[i].name), tensors[i].name)):
        if is_quantizable(tensors[index]):
            qtypes[index] = recipe.qtype(tensors[index])
    return Assignment(recipe.level, qtypes, recipe.warnings + recipe.unused_expressions())


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


@dataclass
class _Recipe:
    """One walk over a model: the mix rules count the tensors of each role that they have decided."""

    level: Level
    tensors: Sequence[TensorShape]
    hyper: Hyper
    arch: str
    importance_names: Collection[str]
    overrides: Overrides
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expressions = [(_compile(text), qtype) for text, qtype in self.overrides.tensor_types]
        self.used = [False] * len(self.expressions)
        self.tied = all(tensor.name != "output.weight" for tensor in self.tensors)
        self.values = sum(role(tensor.name) == "value" for tensor in self.tensors)
        self.decided = {"value": 0, "down": 0}

    def qtype(self, tensor: TensorShape) -> str:
        """The qtype of a tensor that may be quantized."""
        qtype = self._wanted(tensor)
        columns = tensor.shape[-1]
        if columns % QTYPES[qtype].block_size:
            other = FALLBACKS.get(qtype, "f16")
            other = other if columns % QTYPES[other].block_size == 0 else "f16"
            self.warnings.append(
                f"{tensor.name}: rows of {columns} weights do not divide into {qtype}'s blocks of "
                f"{QTYPES[qtype].block_size}; {other} is used instead"
            )
            qtype = other
        needs = self.level.name == "Q2_K_S" and qtype == "q2_k" and role(tensor.name) not in ("embedding", "output")
        if needs and tensor.name not in self.importance_names:
            raise UsageError(
                "Q2_K_S needs an importance matrix that covers every tensor it stores as q2_k",
                tensor=tensor.name,
                remedy="give one with --imatrix FILE, or take Q2_K",
            )
        return qtype

    def _wanted(self, tensor: TensorShape) -> str:
        """What overrides and rules ask for, before the row length is looked at."""
        kind = role(tensor.name)
        fixed = {"embedding": self.overrides.embedding_type, "output": self.overrides.output_type}.get(kind)
        if fixed is not None:
            return fixed
        # llama.cpp looks at expressions and mixes only where the level's own type is quantized, and not under pure.
        if self.level.base in ("f32", "f16", "bf16") or self.overrides.pure:
            return self.level.base
        for index, (expression, qtype) in enumerate(self.expressions):
            if expression.search(tensor.name):
                self.used[index] = True
                return qtype
        return self._mixed(tensor, kind)

    def _mixed(self, tensor: TensorShape, kind: str) -> str:
        """The level's mix rules, with llama.cpp's rules that hold across levels."""
        base = self.level.base
        if kind == "output" or (kind == "embedding" and self.tied):
            return self.overrides.output_type or self._output(tensor)
        if self.level.name == "MXFP4_MOE":
            return "mxfp4" if len(tensor.shape) == 3 and tensor.shape[0] > 1 else "q8_0"
        place = self._place(tensor, kind)
        rules = MIXES.get(self.level.name, {}).get(kind, ())
        qtype = next((q for q, *names in rules if all(CONDITIONS[name](place) for name in names)), base)
        if kind == "value" and self._is_70b() and qtype in ("q3_k", "q4_k"):
            qtype = "q5_k"
        if self.hyper.n_expert == 8:
            if kind in ("value", "key"):
                qtype = "q8_0"
            if kind == "attention_output" and self.arch != "falcon":
                qtype = "q5_k" if self.level.name in _EIGHT_EXPERTS else base
        return qtype

    def _output(self, tensor: TensorShape) -> str:
        """The output matrix, or the embedding that serves as one: errors here reach the logits unsoftened."""
        if (
            self.level.name == "MXFP4_MOE"
            or self.arch == "falcon"
            or tensor.shape[-1] % QTYPES[self.level.base].block_size
        ):
            return "q8_0"
        return "q8_0" if self.level.base == "q8_0" else "q6_k"

    def _place(self, tensor: TensorShape, kind: str) -> Place:
        index, count = self.decided.get(kind, 0), self.values if kind == "value" else self.hyper.n_layer
        if kind in self.decided:
            self.decided[kind] += 1
        # Expert tensors do not come one per layer, so their layer is read from the name.
        if kind == "down" and self.hyper.n_expert > 1:
            index = _layer(tensor.name)
        kv = self.hyper.n_head_kv
        sharing = self.hyper.n_head // kv if kv else 0
        return Place(index, count, sharing, self.arch, bool(self.importance_names))

    def _is_70b(self) -> bool:
        """A 70B model's values are an eighth of its queries, so more bits there cost next to nothing. llama.cpp knows
        such a model by its 80 layers (Llama with as many key as query heads is the older 65B)."""
        shared = self.hyper.n_head != self.hyper.n_head_kv
        return self.hyper.n_layer == 80 and (self.arch == "qwen2" or (self.arch == "llama" and shared))

    def unused_expressions(self) -> list[str]:
        """A warning for each expression that decided nothing."""
        return [
            f"the expression {text!r} decides no tensor"
            for (text, _), used in zip(self.overrides.tensor_types, self.used, strict=True)
            if not used
        ]


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise UsageError(f"{text!r} is not a regular expression: {error}", remedy="see --tensor-type") from error

"""Recipes: which tensor gets which qtype, decided as llama.cpp's quantizer decides it.

A *level* (``Q4_K_M``) names a base qtype and, for some roles of tensors, exceptions that depend on the layer, the
family, the number of experts and whether an importance matrix is given. The levels are data here (``LEVELS``), their
exceptions in ``recipe_mixes``; ``assign`` walks a model's tensors once and applies them. Owner of the rules:
llama.cpp, src/llama-quant.cpp; the tests compare every level with the quantizer itself. In words:
docs/reference/recipes.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gguf import LlamaFileType

from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.mixes import (
    APART,
    CONDITIONS,
    EIGHT_EXPERTS,
    FALLBACKS,
    LEFT_ALONE,
    LEFT_ALONE_NAMES,
    MIXES,
    NEED_IMPORTANCE,
    Position,
)
from llm_quantize.formats.level_names import FLOATS, known_level
from llm_quantize.formats.recipe import Recipe
from llm_quantize.measures.amounts import counted
from llm_quantize.plan import Substitution
from llm_quantize.qtypes import QTYPES
from llm_quantize.results import Settings


@dataclass(frozen=True)
class Level:
    """A level as users name it. ``file_type`` is GGUF's general.file_type; ``base`` the qtype of most tensors."""

    name: str
    base: str
    file_type: int
    about: str


_Q2_0 = 41  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q2_0, which gguf 0.19 lacks
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
    ("IQ3_M", "iq3_s", LlamaFileType.MOSTLY_IQ3_M, "3.4 bit grid, sensitive tensors at 4: smaller than Q3_K_M"),
    ("IQ3_S", "iq3_s", LlamaFileType.MOSTLY_IQ3_S, "3.4 bit grid throughout"),
    ("Q3_K_S", "q3_k", LlamaFileType.MOSTLY_Q3_K_S, "3 bit throughout: large loss"),
    ("IQ3_XS", "iq3_s", LlamaFileType.MOSTLY_IQ3_XS, "3.1 to 3.4 bit grids; wants an importance matrix"),
    ("IQ3_XXS", "iq3_xxs", LlamaFileType.MOSTLY_IQ3_XXS, "3.1 bit grid; wants an importance matrix"),
    ("Q2_K", "q2_k", LlamaFileType.MOSTLY_Q2_K, "2.6 bit, sensitive tensors at 3 and 4: very large loss"),
    ("Q2_K_S", "q2_k", LlamaFileType.MOSTLY_Q2_K_S, "2.6 bit throughout; wants an importance matrix"),
    ("IQ2_M", "iq2_s", LlamaFileType.MOSTLY_IQ2_M, "2.6 bit grid, some tensors at 3.4; wants an importance matrix"),
    ("IQ2_S", "iq2_xs", LlamaFileType.MOSTLY_IQ2_S, "2.3 bit grid, some tensors at 3.4; wants an importance matrix"),
    ("IQ2_XS", "iq2_xs", LlamaFileType.MOSTLY_IQ2_XS, "2.3 bit grid: very large loss; wants an importance matrix"),
    ("IQ2_XXS", "iq2_xxs", LlamaFileType.MOSTLY_IQ2_XXS, "2.1 bit grid: very large loss; wants an importance matrix"),
    ("Q2_0", "q2_0", _Q2_0, "2.25 bit, blocks of 64, for models trained with ternary weights"),
    ("TQ2_0", "tq2_0", LlamaFileType.MOSTLY_TQ2_0, "2 bit, for models trained with ternary weights"),
    ("IQ1_M", "iq1_m", LlamaFileType.MOSTLY_IQ1_M, "1.75 bit grid: the last resort; wants an importance matrix"),
    ("IQ1_S", "iq1_s", LlamaFileType.MOSTLY_IQ1_S, "1.6 bit grid: the smallest there is; wants an importance matrix"),
    ("TQ1_0", "tq1_0", LlamaFileType.MOSTLY_TQ1_0, "1.7 bit, for models trained with ternary weights"),
    ("Q1_0", "q1_0", LlamaFileType.MOSTLY_Q1_0, "1.125 bit, blocks of 128, for models trained with weights of one bit"),
    ("MXFP4_MOE", "mxfp4", LlamaFileType.MOSTLY_MXFP4_MOE, "experts in MXFP4, everything else at 8 bit"),
    ("NVFP4", "nvfp4", LlamaFileType.MOSTLY_NVFP4, "4.5 bit floats as NVFP4 releases have them, edges at 8 bit"),
)
LEVELS: Mapping[str, Level] = {name: Level(name, base, int(number), about) for name, base, number, about in _LEVELS}

TRAINED: Mapping[str, str] = {
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "ternary weights"),
    "Q1_0": "weights of one bit",
}
"""What a model must have been trained with for a level of so few values; any other loses nearly everything."""

FED = frozenset(("Q1_0", "Q2_0", "TQ1_0", "TQ2_0"))
"""Of those the levels whose codes error feedback chooses: any model then loses much, but not that."""

ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
USUAL: Mapping[int, str] = {
    **{2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M"},
    **{6: "Q6_K", 8: "Q8_0", 32: "F32"},
}
"""What people mean who give a number of bits."""

# qtypes that users may name for single tensors, in falling order of bits.
TENSOR_TYPES = tuple(sorted(QTYPES, key=lambda name: -QTYPES[name].bits_per_weight))


def parse_level(text: str) -> Level:
    """The level a user named, in any case, or by its bits. Raises UsageError where there is none of that name."""
    return LEVELS[known_level(text, "gguf", LEVELS, usual=USUAL, others={**FLOATS, **ALIASES})]


def parse_qtype(text: str) -> str:
    """The lower-case qtype a user named for a tensor. Raises UsageError where there is none of that name."""
    name = text.strip().lower()
    if name in TENSOR_TYPES:
        return name
    is_level = name.upper() in LEVELS
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


def check_recipe(recipe: Recipe, tensors: Sequence[TensorShape]) -> None:
    """Raise UsageError where ``recipe`` does not fit a model of these ``tensors``, naming the tensors. One that repeats
    the types of another model's file fits as far as the two agree (``unlike``)."""
    shapes = {tensor.name: tensor for tensor in tensors}
    if recipe.origin is not None:
        return
    recipe.refuse_unknown([name for name in recipe.tensors if name not in shapes])
    for name, qtype in recipe.tensors.items():
        block = QTYPES[qtype].block_size
        if not is_quantizable(shapes[name]) or shapes[name].shape[-1] % block:
            raise UsageError(
                f"the recipe {recipe.name} asks for {qtype} where it cannot be",
                tensor=name,
                expected=f"a matrix with rows of a multiple of {block} weights, no norm and no router",
                found=f"shape {list(shapes[name].shape)}",
            )


def unlike(recipe: Recipe, tensors: Sequence[TensorShape]) -> dict[str, tuple[str, ...]]:
    """{what differs between the file whose types ``recipe`` repeats and a model of these ``tensors``: which}."""
    if recipe.origin is None:
        return {}
    mine = {tensor.name for tensor in tensors if is_quantizable(tensor)}
    extra, missing = sorted(recipe.tensors.keys() - mine), sorted(mine - recipe.tensors.keys())
    told = {
        f"{counted(len(extra), 'tensor')} of {recipe.origin.file} that this model has not: passed over": tuple(extra),
        f"{counted(len(missing), 'tensor')} that {recipe.origin.file} has not: as {recipe.level} has them": tuple(
            missing
        ),
    }
    return {f"{text} (-v lists them)": names for text, names in told.items() if names}


BEST = "best"
FALLBACK_WAYS = ("llamacpp", BEST)
"""How a type is found for rows that do not divide into the blocks of the one they should have: llama.cpp's, or the one
that loses least in no more bytes (``fallback``)."""


@dataclass(frozen=True, repr=False)
class Overrides(Settings):
    """What the user fixed by hand. ``tensor_types``: (regular expression, qtype), the first that is found in the
    name wins; case does not matter. Qtypes are lower case: "q6_k". ``fallback``: one of FALLBACK_WAYS."""

    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    recipe: Recipe | None = None
    fallback: str = FALLBACK_WAYS[0]

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACK_WAYS:
            raise UsageError("unknown --fallback", expected=", ".join(FALLBACK_WAYS), found=self.fallback)

    @property
    def given(self) -> bool:
        """Whether there is anything of that kind."""
        return self != Overrides()

    @property
    def of_tensors(self) -> bool:
        """Whether there is anything beside a recipe."""
        return self != Overrides(recipe=self.recipe)


@dataclass(frozen=True)
class Assignment:
    """``qtypes[i]`` belongs to ``tensors[i]``. ``substituted``: the tensors that have not the type that rules or user
    ask for; ``warnings``: a sentence for each thing else that is not as asked."""

    level: Level
    qtypes: list[str]
    warnings: list[str] = field(default_factory=list)
    substituted: list[Substitution] = field(default_factory=list)


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
        and tensor.name not in LEFT_ALONE_NAMES
        and not any(part in tensor.name for part in LEFT_ALONE)
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
    none). Raises UsageError for an unknown level, a bad expression, or a tensor whose qtype needs importance and has
    none."""
    recipe = _Recipe(parse_level(level), tensors, hyper, arch, importance_names or (), overrides or Overrides())
    qtypes = recipe.walk()
    if recipe.uncovered:
        name, qtype = recipe.uncovered[0]
        raise UsageError(
            f"{recipe.level.name} needs an importance matrix that covers every tensor it stores as {qtype}",
            tensor=name,
            found=f"{len(recipe.uncovered)} tensors without importance" if importance_names else "no importance matrix",
            remedy="give the importance of this very model, or none: quantize then calibrates by itself"
            if importance_names
            else "--imatrix FILE, --statistics FILE, or leave out --no-calibration",
        )
    return Assignment(recipe.level, qtypes, recipe.unused_expressions(), recipe.substituted)


def needs_importance(
    level: str, tensors: Sequence[TensorShape], hyper: Hyper, *, arch: str, overrides: Overrides | None = None
) -> list[str]:
    """Names of the tensors that ``assign`` would refuse to store without an importance matrix; none: it can be done
    without. What the rows' lengths and the overrides make of the level counts, so this asks for the tensors. Raises
    UsageError for an unknown level or a bad expression."""
    recipe = _Recipe(parse_level(level), tensors, hyper, arch, (), overrides or Overrides())
    recipe.walk()
    return [name for name, _ in recipe.uncovered]


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
    substituted: list[Substitution] = field(default_factory=list)
    uncovered: list[tuple[str, str]] = field(default_factory=list)  # tensor, qtype: importance is needed and missing

    def __post_init__(self) -> None:
        self.expressions = [(_compile(text), qtype) for text, qtype in self.overrides.tensor_types]
        self.used = [False] * len(self.expressions)
        self.tied = all(tensor.name != "output.weight" for tensor in self.tensors)
        self.values = sum(role(tensor.name) == "value" for tensor in self.tensors)
        self.decided = {"value": 0, "down": 0, "gate": 0, "up": 0}

    def walk(self) -> list[str]:
        """The qtype of each tensor. Rules that count the tensors of a role count them in llama.cpp's order: by layer,
        then by name."""
        tensors = self.tensors
        qtypes = [tensor.unquantized for tensor in tensors]
        for index in sorted(range(len(tensors)), key=lambda i: (_layer(tensors[i].name), tensors[i].name)):
            if is_quantizable(tensors[index]):
                qtypes[index] = self.qtype(tensors[index])
        return qtypes

    def qtype(self, tensor: TensorShape) -> str:
        """The qtype of a tensor that may be quantized."""
        qtype = self._wanted(tensor)
        columns = tensor.shape[-1]
        if columns % QTYPES[qtype].block_size:
            other = FALLBACKS.get(qtype, "f16")
            other = other if columns % QTYPES[other].block_size == 0 else "f16"
            self.substituted.append(Substitution(tensor.name, tensor.shape, qtype, other))
            qtype = other
        if self._needs_importance(tensor.name, qtype) and tensor.name not in self.importance_names:
            self.uncovered.append((tensor.name, qtype))
        return qtype

    def _needs_importance(self, name: str, qtype: str) -> bool:
        """llama.cpp's rule for the tensors of layers; elsewhere only the grids that have no codes without weights."""
        if self.overrides.recipe is not None and name in self.overrides.recipe.kept:
            return False
        if role(name) in ("embedding", "output"):
            return QTYPES[qtype].needs_importance
        return qtype in NEED_IMPORTANCE or (qtype == "q2_k" and self.level.name == "Q2_K_S")

    def _wanted(self, tensor: TensorShape) -> str:
        """What overrides and rules ask for, before the row length is looked at."""
        kind = role(tensor.name)
        if self.overrides.recipe is not None and tensor.name in self.overrides.recipe.tensors:
            return self.overrides.recipe.tensors[tensor.name]
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
        if self.level.name in APART:
            return qtype
        if kind == "value" and self._is_70b() and qtype in ("q3_k", "q4_k"):
            qtype = "q5_k"
        if self.hyper.n_expert == 8:
            if kind in ("value", "key"):
                qtype = "q8_0"
            if kind == "attention_output" and self.arch != "falcon":
                qtype = "q5_k" if self.level.name in EIGHT_EXPERTS else base
        return qtype

    def _output(self, tensor: TensorShape) -> str:
        """The output matrix, or the embedding that serves as one: errors here reach the logits unsoftened."""
        if (
            self.level.name == "MXFP4_MOE"
            or self.arch == "falcon"
            or tensor.shape[-1] % QTYPES[self.level.base].block_size
        ):
            return "q8_0"
        if self.level.base == "q8_0":
            return "q8_0"
        return MIXES.get(self.level.name, {}).get("output", (("q6_k",),))[0][0]

    def _place(self, tensor: TensorShape, kind: str) -> Position:
        index, count = self.decided.get(kind, 0), self.values if kind == "value" else self.hyper.n_layer
        if kind in self.decided:
            self.decided[kind] += 1
        # Expert tensors do not come one per layer, so their layer is read from the name.
        if kind in ("down", "gate", "up") and self.hyper.n_expert > 1 and self.level.name not in APART:
            index = _layer(tensor.name)
        kv = self.hyper.n_head_kv
        sharing = self.hyper.n_head // kv if kv else 0
        return Position(index, count, sharing, self.hyper.n_expert, self.arch, bool(self.importance_names))

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

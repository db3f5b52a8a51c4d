"""The mix rules of the levels as data: which roles of tensors get another qtype than the level's base, and when.

Owner of the rules: llama.cpp, src/llama-quant.cpp; ``recipes`` applies them, docs/reference/recipes.md has them in
words, and the tests compare every level with the quantizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where a tensor stands among those of its role: ``index`` of ``count``, and the facts rules ask for."""

    index: int
    count: int
    sharing: int
    experts: int
    arch: str
    importance: bool


def _more(place: Position) -> bool:
    """In the first or the last eighth, or every third layer between."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


CONDITIONS: Mapping[str, Callable[[Position], bool]] = {
    "falcon": lambda place: place.arch == "falcon",
    "not falcon": lambda place: place.arch != "falcon",
    # At least four query heads share each value head, so that tensor is small and bits there are cheap.
    "shared": lambda place: place.sharing >= 4,
    "first 2": lambda place: place.index < 2,
    "first 4": lambda place: place.index < 4,
    "first 1/8": lambda place: place.index < place.count // 8,
    "first 1/16": lambda place: place.index < place.count // 16,
    "middle 3/4": lambda place: place.count // 8 <= place.index < 7 * place.count // 8,
    "more": _more,
    "4 experts": lambda place: place.experts >= 4,
    "8 experts": lambda place: place.experts == 8,
    "importance": lambda place: place.importance,
    "no importance": lambda place: not place.importance,
}

# For each level, the roles that do not simply get the base qtype: a qtype and the conditions that must all hold; the
# first such rule decides.
Rule = tuple[str, ...]


def _below_3_bits(value: str, embedding: str, attention_output: Sequence[Rule] = ()) -> Mapping[str, Sequence[Rule]]:
    """The rules that the levels of one and two bits share; ``value``: for values and the first of ``ffn_down``."""
    return {
        "output": (("q5_k",),),
        "embedding": ((embedding,),),
        "value": (("q4_k", "shared"), ("q4_k", "4 experts"), (value,)),
        "key": (("q4_k", "8 experts"),),
        "down": ((value, "first 1/8"),),
        "attention_output": (("q5_k", "8 experts"), *attention_output),
    }


_IQ1 = _below_3_bits("q2_k", "q2_k", (("iq2_xxs",),))
_IQ2_X = _below_3_bits("q2_k", "q2_k")
_IQ2_S = _below_3_bits("iq3_s", "iq3_s", (("iq3_s",),))
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
    **{"IQ1_S": _IQ1, "IQ1_M": _IQ1, "IQ2_XXS": _IQ2_X, "IQ2_XS": _IQ2_X, "IQ2_S": _IQ2_S, "IQ2_M": _IQ2_S},
    "IQ3_XXS": {
        "output": (("q5_k",),),
        "embedding": (("iq3_s",),),
        "value": (("q4_k", "shared"), ("iq3_s", "no importance")),
        "key": (("iq2_s",),),
        "query": (("iq2_s",),),
        "down": (("q4_k", "no importance", "first 1/8"), ("q3_k", "no importance")),
        "attention_output": (("iq3_s", "not falcon"),),
    },
    "IQ3_XS": {
        "value": (("q4_k", "shared"),),
        **dict.fromkeys(("key", "query"), (("iq3_xxs",),)),
        **dict.fromkeys(("gate", "up"), (("iq3_xxs", "middle 3/4"),)),
    },
    "IQ3_S": {"value": (("q4_k", "shared"),)},
    "IQ3_M": {
        "value": (("q4_k",),),
        "down": (("q4_k", "first 1/8"), ("q4_k", "8 experts", "more")),
        "attention_output": (("q4_k", "not falcon"),),
    },
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    # An importance matrix does not save the first layers from the symmetric grids; without one the bytes stay
    # what they were before there were importance matrices.
    "Q4_0": {"down": (("q4_1", "first 1/8", "importance"),)},
    "Q5_0": {"down": (("q5_1", "first 1/8", "importance"),)},
    "TQ1_0": {"embedding": (("q4_k",),)},
    "TQ2_0": {"embedding": (("q4_k",),)},
    # llama-quantize has no such level: what releases in NVFP4 leave as floats is at 8 bits.
    "NVFP4": dict.fromkeys(("embedding", "output"), (("q8_0",),)),
}

# These levels know nothing of the rules across levels (70B models, eight experts), and count ``ffn_down`` even where
# experts do not come one per layer.
APART = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})

# With exactly eight experts attention is a small part of the model: these levels give its output 5 bits, and every
# level gives keys and values 8.
EIGHT_EXPERTS = frozenset(
    {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS"}
)

# llama.cpp stores no tensor of a layer in these without importance, whatever the level.
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})

# What a row takes whose length its qtype's blocks do not divide; f16 where that fails too.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0", "q1_0", "q2_0"), "q4_0"),
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "nvfp4"), "iq4_nl"),
    **{"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
}

# Types that llama.cpp has had for months only, and not on every device: nothing gets them that does not ask for them.
YOUNG = frozenset({"q1_0", "q2_0", "nvfp4"})

# Parts of names that are never quantized: tiny, or broken by it.
LEFT_ALONE = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d"),
    *("shortconv.conv.weight", "attn_rel_b.weight", ".position_embd", ".rel_pos", ".patch_embd", ".patch_merger"),
    *("sam.pos_embd", "sam.neck.", "sam.net_", "time_mix_first.weight", "time_mix_lerp_fused.weight"),
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "ffn_gate_tid2eid.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "a.rvq.codebook", "mm.a.code_embd"),
)
LEFT_ALONE_NAMES = ("position_embd.weight", "token_types.weight")

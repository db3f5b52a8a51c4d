"""Which of llama.cpp's pre-tokenizers a tokenizer.json's own rules mean.

A byte-level BPE file says how text is cut into words before merging: a list of steps under ``pre_tokenizer``. llama.cpp
has a closed set of such rules, each under a name in ``tokenizer.ggml.pre``. Here every step list is brought to one
spelling and looked up; the model's name plays no part. Facts about the rules: llama.cpp ``src/llama-vocab.cpp``
(expressions, flags) and the ``tokenizers`` package (steps). docs/reference/tokenizers.md tells where the two differ.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats.gguf.vocabulary.json import flag, malformed

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+"
_CASED_UPPER = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*"

_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_GPT4O = rf"{_CASED}{_SHORT}?|{_CASED_UPPER}{_SHORT}?|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_TAIL}"
_TEKKEN = rf"{_CASED}|{_CASED_UPPER}|\p{{N}}|{_MARKS}[\r\n/]*|{_TAIL}"
_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_JAIS2 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|\s*[\r\n]+|{_SPACES}"
_SEED = rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_EXAONE_MOE = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    rf"{_MARKS}[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_MINICPM5 = rf"{_SHORT}|{_WORD}|\p{{N}}+|{_MARKS}[\r\n]*|{_TAIL}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}"
_ASCII_MARK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK_V3 = _ASCII_MARK + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_KANA_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED_RANGES = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class Rule:
    """One of llama.cpp's pre-tokenizers: its name, the steps that mean it, and what its name also switches.

    ``ignore_merges``: a whole word that is a token is taken as it is, whatever the merges say. ``exact``: False where
    llama.cpp's expression cuts words at combining marks, which the file's own expression does not.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    exact: bool = True


# Where several names stand for one rule, the one that most builds of llama.cpp know is listed.
RULES: tuple[Rule, ...] = (
    Rule("gpt-2", ("words",)),
    Rule("smollm", ("digits", "words")),
    Rule("llama-bpe", (_LLAMA3,), ignore_merges=True),
    Rule("dbrx", (_LLAMA3,)),
    Rule("qwen2", (_QWEN2,)),
    Rule("qwen35", (_QWEN35,)),
    Rule("tekken", (_TEKKEN,), ignore_merges=True, exact=False),
    Rule("gpt-4o", (_GPT4O,), exact=False),
    Rule("granite-embed-multi-97m", (_GPT4O,), ignore_merges=True),
    Rule("falcon", ("punctuation runs", "words", "digit runs", "[0-9][0-9][0-9]")),
    Rule("deepseek-v3", (r"\p{N}{1,3}", _KANA_HAN, _DEEPSEEK_V3)),
    Rule("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, "digits")),
    Rule(
        "deepseek-llm",
        (
            r"[\r\n]",
            rf"\s?[{_CASED_RANGES}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_HANGUL,
            "digits",
        ),
    ),
    Rule("bloom", (_BLOOM,)),
    Rule("viking", (_BLOOM, "digits")),
    Rule("jais-2", (_JAIS2,)),
    Rule("seed-coder", (_SEED,)),
    Rule("bailingmoe", (_QWEN2.replace(r"\s*[\r\n]+|", r"\s*[\r\n]|"),)),
    Rule("ufakzeka", (_UFAKZEKA,)),
    Rule("exaone-moe", (_EXAONE_MOE,)),
    Rule("minicpm5", (r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    Rule("laguna", (r"next (?:\r?\n)+(?!\r?\n)", _QWEN2)),
)

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = Rule("default", (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))
"""llama.cpp's rule where a file names none. No file of ours asks for it."""

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (
        *("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0", "mellum"),
        *("modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": (
        *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "glm4"),
    ),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
    "qwen2": ("stablelm2", "deepseek-r1-qwen", "kormo", "megrez", "hunyuan", "solar-open", "grok-2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "bloom": ("poro-chat", "gpt3-finnish"),
    "gpt-4o": ("llama4", "minimax-m2"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
}
"""Names that llama.cpp has for a rule beside the one that is written."""

BEGIN_WITH_BOS = frozenset(("llama-bpe", "tekken", *OTHER_NAMES["llama-bpe"])) - {"glm4"}
"""Names of which texts begin with bos where the file does not say."""

_BY_NAME: Mapping[str, Rule] = {
    name: rule for rule in (*RULES, _DEFAULT) for name in (rule.name, *OTHER_NAMES.get(rule.name, ()))
}

_CONTRACTIONS = (
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    "'(?i:[sdmt]|ll|ve|re)",
    "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
)


def canonical_expression(expression: str) -> str:
    """One spelling for expressions that find the same words.

    Control characters become escapes; the spellings of the English contractions and ``{1}`` become one; possessive
    ``?+`` and ``++`` become greedy where what follows can never need the characters they hold.
    """
    text = expression.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    for spelling in _CONTRACTIONS:
        text = text.replace(spelling, _SHORT)
    text = text.replace(r"[^\r\n\p{L}\p{N}]?+\p{L}+", _WORD).replace(r" ?[^\s\p{L}\p{N}]++[", _MARKS + "[")
    return text.replace(r"\p{N}{1}", r"\p{N}")


def _step(item: Mapping[str, Any], file: Path) -> Iterator[str]:
    kind = item.get("type")
    if kind == "ByteLevel":
        if flag(item, "add_prefix_space", True, file, "pre_tokenizer"):
            yield "ByteLevel with add_prefix_space"
        if flag(item, "use_regex", True, file, "pre_tokenizer"):
            yield "words"
    elif kind == "Digits":
        yield "digits" if flag(item, "individual_digits", False, file, "pre_tokenizer") else "digit runs"
    elif kind == "Punctuation":
        behavior = str(item.get("behavior", "Isolated")).lower()
        yield {"contiguous": "punctuation runs", "isolated": "punctuation"}.get(behavior, f"punctuation {behavior}")
    elif kind == "Split":
        yield _split(item, file)
    else:
        yield f"{kind}"


def _split(item: Mapping[str, Any], file: Path) -> str:
    pattern = item.get("pattern")
    if not isinstance(pattern, Mapping):
        malformed(file, "a Split of pre_tokenizer has no pattern", expected="{'Regex': ...}", found=repr(pattern))
    expression = pattern.get("Regex", pattern.get("String"))
    if not isinstance(expression, str):
        malformed(file, "a Split pattern of pre_tokenizer is not a string", found=repr(expression))
    expression = canonical_expression(expression) if "Regex" in pattern else re.escape(expression)
    behavior = str(item.get("behavior", "")).lower().replace("_", "")
    inverted = flag(item, "invert", False, file, "pre_tokenizer")
    # Expressions that end in "or white space" match every character: keeping only the matches keeps all the text.
    covers = expression.endswith(r"|\s+") or expression.endswith(r"|\s{1}")
    if (behavior == "isolated" and not inverted) or (behavior == "removed" and inverted and covers):
        return "digits" if expression == r"\p{N}" else expression
    if behavior == "mergedwithnext" and not inverted:
        return f"next {expression}"
    return f"{behavior}{' inverted' if inverted else ''} {expression}"


def flatten(item: object, key: str, file: Path, where: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a (nested) ``Sequence``; ``key`` is the name of its list."""
    if item is None:
        return
    if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
        malformed(file, f"{where} must be an object with a type", found=printable(repr(item), 80))
    if item["type"] != "Sequence":
        yield item
        return
    parts = item.get(key)
    if not isinstance(parts, list):
        malformed(file, f"a Sequence of {where} has no list '{key}'", found=printable(repr(parts), 80))
    for part in parts:
        yield from flatten(part, key, file, where)


def is_byte_level(pre_tokenizer: object, file: Path) -> bool:
    """Whether one of the steps maps bytes to characters."""
    return any(s["type"] == "ByteLevel" for s in flatten(pre_tokenizer, "pretokenizers", file, "pre_tokenizer"))


def canonical_steps(pre_tokenizer: object, file: Path) -> tuple[str, ...]:
    """The steps of ``pre_tokenizer`` in this module's spelling. Raises MalformedInputError."""
    items = flatten(pre_tokenizer, "pretokenizers", file, "pre_tokenizer")
    return tuple(text for item in items for text in _step(item, file))


def find_rules(pre_tokenizer: object, file: Path) -> tuple[Rule, ...]:
    """The rules that cut text as ``pre_tokenizer`` does (they differ in ``ignore_merges`` and ``exact``).

    Raises UnsupportedError, with the file's own rule and the nearest known one, when there is none.
    """
    steps = canonical_steps(pre_tokenizer, file)
    found = tuple(rule for rule in RULES if rule.steps == steps)
    if not found:
        near = max(RULES, key=lambda rule: difflib.SequenceMatcher(None, _show(rule.steps), _show(steps)).ratio())
        raise UnsupportedError(
            "llama.cpp has no pre-tokenizer with the rules of this tokenizer",
            file=file,
            expected=f"a known rule; the nearest is {near.name}: {_show(near.steps)}",
            found=_show(steps),
            remedy="another runtime; or ask for this rule in an issue, with the text above",
        )
    return found


def _show(steps: tuple[str, ...]) -> str:
    return json.dumps(steps, ensure_ascii=False)


def begins_with_bos(model: object, pre: object) -> bool:
    """Whether texts of the vocabulary ``model`` with the rule ``pre`` begin with bos where a GGUF file does not say."""
    return model == "llama" or (model == "gpt2" and isinstance(pre, str) and pre in BEGIN_WITH_BOS)


def rule_named(name: str, file: Path) -> Rule:
    """The rule that llama.cpp has under ``name``. Raises UnsupportedError for a name that is not known here."""
    rule = _BY_NAME.get(name)
    if rule is None:
        near = difflib.get_close_matches(name[:80], _BY_NAME, n=1, cutoff=0.3)
        raise UnsupportedError(
            f"the pre-tokenizer {name[:80]!r} is not known, so tokenizer.json cannot be made",
            file=file,
            expected=f"the nearest that is known is {near[0]!r}" if near else "a name of docs/reference/tokenizers.md",
            found=printable(name, 80),
            remedy="start from the directory of the original model, or make a GGUF file",
        )
    return rule


def written_steps(rule: Rule) -> dict[str, Any]:
    """``pre_tokenizer`` of tokenizer.json with the steps of ``rule``: what ``canonical_steps`` reads as them."""
    steps = [_written(step) for step in rule.steps]
    if "words" not in rule.steps:  # else the bytes are mapped already
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _written(step: str) -> dict[str, Any]:
    known = _STEPS.get(step)
    if known is not None:
        return dict(known)
    follows = step.startswith(_NEXT)
    expression = step.removeprefix(_NEXT) if follows else step
    behavior = "MergedWithNext" if follows else "Isolated"
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": False}


_NEXT = "next "
_STEPS: Mapping[str, Mapping[str, Any]] = {
    "words": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "digits": {"type": "Digits", "individual_digits": True},
    "digit runs": {"type": "Digits", "individual_digits": False},
    "punctuation runs": {"type": "Punctuation", "behavior": "Contiguous"},
}

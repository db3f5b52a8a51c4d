"""Byte-level BPE from tokenizer.json: llama.cpp's tokenizer model ``gpt2``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers.models import BPE

from llm_quantize.errors import printable
from llm_quantize.formats.gguf.vocabulary.json import TokenizerJson, flag
from llm_quantize.formats.gguf.vocabulary.pretokenizers import Rule, find_rules, flatten
from llm_quantize.formats.gguf.vocabulary.tokens import Vocabulary


def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table, a published fact)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(plain))
    return tuple(table[byte] for byte in range(256))


def check_bpe_options(source: TokenizerJson) -> None:
    """Refuse options of a BPE model that llama.cpp has no word for. Raises UnsupportedError."""
    model: Mapping[str, Any] = source.model
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            source.refuse(f"model.{name} cannot be expressed in GGUF", expected="none", found=repr(model[name]))
    if model.get("dropout"):
        source.refuse("a BPE model with dropout has no fixed ids", expected="no dropout", found=model["dropout"])


def check_normalizer(source: TokenizerJson) -> None:
    """Only NFC (and nothing) is accepted before byte-level BPE.

    llama.cpp normalizes nothing: text that is not in NFC gets other ids than here (docs/reference/tokenizers.md).
    """
    for step in flatten(source.normalizer, "normalizers", source.file, "normalizer"):
        if step["type"] != "NFC":
            source.refuse(
                "llama.cpp cannot normalize text before byte-level BPE as this tokenizer does",
                expected="no normalizer, or NFC",
                found=step["type"],
            )


def byte_level(source: TokenizerJson) -> Vocabulary:
    """The vocabulary of a byte-level BPE file. Raises UnsupportedError, MalformedInputError."""
    check_bpe_options(source)
    check_normalizer(source)
    unknown = source.model.get("unk_token")
    if unknown is not None and not all(character in source.ids for character in byte_characters()):
        source.refuse(
            "this byte-level vocabulary lacks bytes and has an unknown token, which llama.cpp's BPE never gives",
            expected="all 256 byte characters",
            found=f"unk_token {printable(str(unknown), 40)!r}",
        )
    for index, (left, right) in enumerate(source.merges):
        if " " in left or " " in right:
            source.refuse(f"model.merges[{index}] holds a space", found=repr((left, right)))
    rule = _choose(source, find_rules(source.pre_tokenizer, source.file))
    vocabulary = Vocabulary(
        file=source.file,
        model="gpt2",
        pre=rule.name,
        ids=dict(source.ids),
        texts=dict(source.tokens),
        merges=[f"{left} {right}" for left, right in source.merges],
    )
    vocabulary.add(source.added)
    return vocabulary


def _choose(source: TokenizerJson, rules: tuple[Rule, ...]) -> Rule:
    """The rule whose ``ignore_merges`` is the file's; another, more exact one where that makes no difference."""
    wanted = flag(source.model, "ignore_merges", False, source.file, "model")
    same = [rule for rule in rules if rule.ignore_merges == wanted]
    for rule in same:
        if rule.exact:
            return rule
    others = [rule for rule in rules if rule not in same and (rule.exact or not same)]
    astray = _unreachable(source) if others else None
    if others and astray is None:
        return others[0]
    if not same:
        source.refuse(
            "llama.cpp knows this tokenizer's pre-tokenizer only with the other setting of ignore_merges",
            expected=f"ignore_merges {str(not wanted).lower()}, or merges that make every token",
            found=f"ignore_merges {str(wanted).lower()}; the merges do not make {printable(str(astray), 60)!r}",
        )
    return same[0]


def _unreachable(source: TokenizerJson) -> str | None:
    """A token that its own characters do not merge to; None where ignore_merges makes no difference."""
    model = BPE(vocab=dict(source.ids), merges=list(source.merges))
    skipped = {token.content for token in source.added}
    for text, index in source.ids.items():
        if text in skipped or not text:
            continue
        tokens = model.tokenize(text)
        if len(tokens) != 1 or tokens[0].id != index:
            return text
    return None

"""How texts begin and end, by the files beside tokenizer.json.

What llama.cpp must be told otherwise than tokenizer.json has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gguf.constants import Keys

from llm_quantize.errors import printable
from llm_quantize.formats.gguf.vocabulary.special import BY_TEXT
from llm_quantize.formats.gguf.vocabulary.tokens import Vocabulary, number_value
from llm_quantize.io.gguf_file import MetaValue

Note = Callable[[str], None]

_HEEDING = frozenset(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer"))
"""Tokenizer classes (and their "Fast" forms) of transformers 4 that put add_bos_token and add_eos_token of
tokenizer_config.json in the place of tokenizer.json's post-processor. Those of transformers 5 do not."""

_ENDING = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>"),
    )
)
"""Tokens at which llama.cpp ends a generation because of their text, whatever the file says."""

MARKERS = _ENDING | {text for _, texts in BY_TEXT for text in texts}
"""Tokens that are control tokens to llama.cpp because of their text, whatever type the file gives them."""

_KEYS = Keys.Tokenizer
_ALSO_END = (_KEYS.FIM_PAD_ID, _KEYS.FIM_REP_ID, _KEYS.FIM_SEP_ID)
_FREE_TO_END = (_KEYS.EOT_ID, _KEYS.EOM_ID)


def heed_settings(
    settings: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Vocabulary, template: dict[str, int], note: Note
) -> None:
    """``settings`` (tokenizer_config.json) may say otherwise than tokenizer.json whether bos and eos are put around a
    text: what the model was run with decides, as its configuration tells the version and ``settings`` the class.

    Changes ``vocabulary.add_bos``, ``add_eos`` and takes out of ``template`` what is not added. ``note`` is told of
    every contradiction, and which side was taken.
    """
    named = settings.get("tokenizer_class")
    name = printable(named, 60) if isinstance(named, str) else "no class"
    heeding = name.removesuffix("Fast") in _HEEDING and not _is_version_5(config)
    for role in ("bos", "eos"):
        said, adds = settings.get(f"add_{role}_token"), role in template
        if not isinstance(said, bool) or said == adds:
            continue
        told = str(said).lower()
        contradiction = (
            f"tokenizer_config.json says add_{role}_token {told}, but tokenizer.json adds a {role}"
            if adds
            else f"tokenizer_config.json says add_{role}_token {told}, but tokenizer.json adds no {role}"
        )
        if not heeding:
            note(f"{contradiction}, and is followed: transformers does not heed the former for this model ({name})")
            continue
        note(
            f"{contradiction}; the former is followed, as by transformers 4, which this model was run with ({name}). "
            "Transformers 5 follows the latter"
        )
        if role == "bos":
            vocabulary.add_bos = said
        else:
            vocabulary.add_eos = said
        if not said:
            del template[role]


def _is_version_5(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 or later wrote the configuration. It never writes add_bos_token."""
    version = config.get("transformers_version")
    first = version.partition(".")[0] if isinstance(version, str) else ""
    return first.isascii() and first.isdigit() and len(first) < 4 and int(first) >= 5


def ending_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> list[int]:
    """The ids at which a generation ends, by generation_config.json, then those that config.json adds."""
    nested = config.get("text_config")
    found: list[int] = []
    for place in (generation_config or {}, config, nested if isinstance(nested, Mapping) else {}):
        value = place.get("eos_token_id")
        found += [index for index in (value if isinstance(value, list) else [value]) if type(index) is int]
    return list(dict.fromkeys(found))


def mark_ends(found: dict[str, MetaValue], ends: list[int], vocabulary: Vocabulary, note: Note) -> None:
    """Mark in ``found``, the ids of special tokens under GGUF's keys, all of ``ends`` at which llama.cpp would not end
    a generation by itself. GGUF has a place for an end of turn and one for an end of message; ``note`` is told of those
    that it has none for. Ids without a token are left out."""
    texts = vocabulary.texts

    def held(key: str) -> int | None:
        value = found.get(key)
        return None if value is None else int(value.value)

    def known(index: int | None) -> bool:
        return index is not None and (index == held(_KEYS.EOS_ID) or texts.get(index) in _ENDING)

    marked = {held(key) for key in (*_FREE_TO_END, *_ALSO_END)}
    missing = [index for index in ends if index in texts and not known(index) and index not in marked]
    empty = [key for key in _FREE_TO_END if held(key) is None or held(key) == held(_KEYS.EOS_ID)]
    needless = [key for key in reversed(_FREE_TO_END) if key not in empty and known(held(key))]
    for key, index in zip((*empty, *needless), missing, strict=False):
        found[key] = number_value(index)
    left = missing[len(empty) + len(needless) :]
    if left:
        named = ", ".join(printable(texts[index], 40) for index in left[:8])
        note(
            f"the model's files end a generation at {named} too, for which GGUF has no place left: llama.cpp goes on "
            "after them unless they are given as stop words"
        )

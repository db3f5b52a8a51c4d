"""Special tokens and chat templates of a Hugging Face directory, as llama.cpp's metadata keys."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys

from llm_quantize.errors import MalformedInputError, printable
from llm_quantize.formats.gguf.vocabulary.json import TokenizerJson, malformed
from llm_quantize.formats.gguf.vocabulary.tokens import Vocabulary, array_value, flag_value, number_value, text_value
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside, read_limited

_LIMIT = 64 << 20
ROLES = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
# Roles that no Hugging Face file names. llama.cpp finds them by text when it loads a model, in no fixed order; the ids
# are written so that the choice does not depend on the order of a hash table. First that is present wins.
BY_TEXT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        Keys.Tokenizer.EOT_ID,
        (
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "[EOT]",
            "<EOT>",
            "_<EOT>",
            "<end_of_utterance>",
            "<|end_of_text|>",
            "<|endoftext|>",
            "<｜end▁of▁sentence｜>",
        ),
    ),
    (Keys.Tokenizer.EOM_ID, ("<|eom_id|>",)),
    (
        Keys.Tokenizer.FIM_PRE_ID,
        ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    ),
    (
        Keys.Tokenizer.FIM_SUF_ID,
        ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    ),
    (
        Keys.Tokenizer.FIM_MID_ID,
        ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    ),
    (Keys.Tokenizer.FIM_PAD_ID, ("<|fim_pad|>", "<fim-pad>", "<fim_pad>")),
    (Keys.Tokenizer.FIM_REP_ID, ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    (Keys.Tokenizer.FIM_SEP_ID, ("<|file_sep|>",)),
)


def read_optional(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object ``name`` of ``directory``, empty when there is no such file."""
    path = inside(directory, name)
    return read_json_object(path, limit_bytes=_LIMIT) if path.exists() else {}


def template_ids(source: TokenizerJson, vocabulary: Vocabulary) -> dict[str, int]:
    """What the post-processor puts around a text: sets ``add_bos`` and ``add_eos``, returns those roles' ids."""
    vocabulary.add_bos = vocabulary.add_eos = False
    found: dict[str, int] = {}
    first: int | None
    last: int | None
    for item in _processors(source, source.post_processor):
        kind = item.get("type")
        if kind == "ByteLevel":
            continue  # trims offsets only
        if kind in ("RobertaProcessing", "BertProcessing"):
            first, last = _pair(source, item.get("cls")), _pair(source, item.get("sep"))
        elif kind == "TemplateProcessing":
            first, last = _template(source, item)
        else:
            source.refuse("this post-processor cannot be expressed in GGUF", found=repr(kind))
        for role, index in (("bos", first), ("eos", last)):
            if index is not None:
                if index not in vocabulary.texts:
                    malformed(source.file, "post_processor adds a token that does not exist", found=index)
                found[role] = index
    vocabulary.add_bos, vocabulary.add_eos = "bos" in found, "eos" in found
    return found


def _processors(source: TokenizerJson, item: object) -> Iterator[Mapping[str, Any]]:
    if item is None:
        return
    if not isinstance(item, Mapping):
        malformed(source.file, "post_processor must be an object", found=type(item).__name__)
    if item.get("type") != "Sequence":
        yield item
        return
    parts = item.get("processors")
    if not isinstance(parts, list):
        malformed(source.file, "a Sequence of post_processor has no list 'processors'")
    for part in parts:
        yield from _processors(source, part)


def _pair(source: TokenizerJson, item: object) -> int:
    if not isinstance(item, list) or len(item) != 2 or type(item[1]) is not int:
        malformed(source.file, "post_processor: expected [text, id]", found=printable(repr(item), 60))
    return item[1]


def _template(source: TokenizerJson, item: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Ids before and after the text in a TemplateProcessing's ``single``."""
    single, table = item.get("single"), item.get("special_tokens")
    if not isinstance(single, list) or not isinstance(table, Mapping):
        malformed(source.file, "post_processor: TemplateProcessing needs 'single' and 'special_tokens'")
    before: list[int] = []
    after: list[int] = []
    seen = False
    for part in single:
        if not isinstance(part, Mapping) or len(part) != 1:
            malformed(source.file, "post_processor: not a part of a template", found=printable(repr(part), 60))
        if "Sequence" in part:
            seen = True
            continue
        special = part.get("SpecialToken")
        name = special.get("id") if isinstance(special, Mapping) else None
        entry = table.get(name) if isinstance(name, str) else None
        ids = entry.get("ids") if isinstance(entry, Mapping) else None
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            malformed(source.file, "post_processor: a template's token has no ids", found=printable(repr(part), 60))
        (after if seen else before).extend(ids)
    if len(before) > 1 or len(after) > 1:
        source.refuse(
            "llama.cpp adds at most one token before and one after a text",
            expected="one special token at each end of the template",
            found=f"{len(before)} before, {len(after)} after",
        )
    return (before[0] if before else None), (after[0] if after else None)


def special_ids(
    directory: Path, config: Mapping[str, Any], vocabulary: Vocabulary, template: Mapping[str, int]
) -> dict[str, MetaValue]:
    """The ``*_token_id`` keys and ``add_*_token``.

    A role's token: what the post-processor adds, else tokenizer_config.json, special_tokens_map.json (by text), else
    config.json (by id), else what the tokenizer's own file says. Ids in config.json that no token has are left out, as
    llama.cpp would ignore them.
    """
    named = read_optional(directory, "special_tokens_map.json") | {
        key: value
        for key, value in read_optional(directory, "tokenizer_config.json").items()
        if key.endswith("_token") and value is not None
    }
    text_config = config.get("text_config")
    roles: dict[str, int] = {}
    for role in ROLES:
        index = _by_name(vocabulary, named.get(f"{role}_token"))
        for place in (config, text_config if isinstance(text_config, Mapping) else {}):
            value = place.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if index is None and type(value) is int and value in vocabulary.texts:
                index = value
        index = vocabulary.roles.get(role) if index is None else index
        if index is not None:
            roles[role] = index
    found: dict[str, MetaValue] = {}
    end_of_turn = roles.get("eos")
    roles |= template
    if end_of_turn is not None and end_of_turn != roles["eos"]:
        found[Keys.Tokenizer.EOT_ID] = number_value(end_of_turn)  # still ends a generation
    for role, index in roles.items():
        found[ROLES[role]] = number_value(index)
    for key, texts in BY_TEXT:
        index = next((vocabulary.ids[t] for t in texts if vocabulary.ids.get(t) in vocabulary.controls), None)
        if index is not None:
            found.setdefault(key, number_value(index))
    _fill_defaults(vocabulary, roles, found)
    found[Keys.Tokenizer.ADD_BOS] = flag_value(bool(vocabulary.add_bos) and "bos" in roles)
    found[Keys.Tokenizer.ADD_EOS] = flag_value(bool(vocabulary.add_eos) and "eos" in roles)
    return found


def _fill_defaults(vocabulary: Vocabulary, roles: Mapping[str, int], found: dict[str, MetaValue]) -> None:
    """An absent bos or eos is not "none" to llama.cpp but token 11 (or 1, 2, 0): name a harmless one instead."""
    stand_in = roles.get("eos", roles.get("bos", roles.get("pad")))
    if stand_in is None:
        stand_in = min(vocabulary.controls, default=None)
    if stand_in is not None:
        found.setdefault(Keys.Tokenizer.EOS_ID, number_value(stand_in))
        found.setdefault(Keys.Tokenizer.BOS_ID, number_value(stand_in))


def _by_name(vocabulary: Vocabulary, value: object) -> int | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return vocabulary.ids.get(text) if isinstance(text, str) else None


def chat_templates(directory: Path) -> dict[str, MetaValue]:
    """``tokenizer.chat_template`` and the named ones. Files of their own win over tokenizer_config.json's.

    Raises MalformedInputError for templates that are not text.
    """
    templates = dict(_template_files(directory))
    if not templates:
        for name in ("tokenizer_config.json", "chat_template.json"):
            templates = templates or _templates_in(
                directory / name, read_optional(directory, name).get("chat_template")
            )
    found: dict[str, MetaValue] = {}
    if "default" in templates:
        found[Keys.Tokenizer.CHAT_TEMPLATE] = text_value(templates.pop("default"))
    names = []
    for name, template in sorted(templates.items()):
        key = "".join(c if c in string.ascii_letters + string.digits else "_" for c in name)
        if key not in names:
            names.append(key)
            found[Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=key)] = text_value(template)
    if names:
        found[Keys.Tokenizer.CHAT_TEMPLATES] = array_value(GGUFValueType.STRING, names)
    return found


def _template_files(directory: Path) -> Iterator[tuple[str, str]]:
    path = inside(directory, "chat_template.jinja")
    if path.exists():
        yield "default", _text(path)
    for folder in ("additional_chat_templates", "chat_templates"):
        for item in sorted(inside(directory, folder).glob("*.jinja")):
            yield item.stem, _text(inside(directory, f"{folder}/{item.name}", declared_in=directory / folder))


def _text(path: Path) -> str:
    data = read_limited(path, _LIMIT)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8, or fetch it again"
        raise MalformedInputError(
            "a chat template must be UTF-8", file=path, offset=error.start, remedy=remedy
        ) from error
    if "\0" in text:
        what, remedy = "a chat template holds a NUL character", "fetch the file again"
        raise MalformedInputError(what, file=path, offset=data.index(b"\0"), remedy=remedy)
    return text


def _templates_in(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    pairs: list[tuple[Any, Any]]
    if isinstance(value, str):
        pairs = [("default", value)]
    elif isinstance(value, list):
        pairs = [(i.get("name"), i.get("template")) if isinstance(i, Mapping) else (None, None) for i in value]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        pairs = [(None, None)]
    if not all(isinstance(text, str) and "\0" not in text for pair in pairs for text in pair):
        malformed(path, "chat_template must be a text or named texts", found=printable(repr(value), 80))
    return dict(pairs)

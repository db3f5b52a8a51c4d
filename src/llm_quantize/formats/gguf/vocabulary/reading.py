"""A Hugging Face tokenizer as GGUF's ``tokenizer.*`` metadata, with ids equal in llama.cpp.

tokenizer.json is the truth where it exists (it is what ``transformers`` loads); tokenizer.model otherwise. What kind of
tokenizer it is follows from the file's own rules, never from a model's name. What llama.cpp cannot do is refused by
name, or, where it concerns rare text only, listed in docs/reference/tokenizers.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.vocabulary.around import Note, ending_ids, heed_settings, mark_ends
from llm_quantize.formats.gguf.vocabulary.bytelevel import byte_level
from llm_quantize.formats.gguf.vocabulary.json import AddedToken, added_token, check_id, malformed, read_tokenizer_json
from llm_quantize.formats.gguf.vocabulary.pretokenizers import begins_with_bos, is_byte_level
from llm_quantize.formats.gguf.vocabulary.sentencepiece import sentencepiece_vocabulary, trained_scores
from llm_quantize.formats.gguf.vocabulary.special import chat_templates, read_optional, special_ids, template_ids
from llm_quantize.formats.gguf.vocabulary.spm import character_bpe, unigram
from llm_quantize.formats.gguf.vocabulary.tokens import Vocabulary, array_value, text_value
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.paths import inside

_OTHER_FORMATS = (
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "qwen.tiktoken",
    "tekken.json",
    "spiece.model",
    "tokenizer.model.v3",
)


def _untold(_text: str) -> None:
    """Notes that nobody asked for."""


def read_vocabulary(
    directory: Path,
    config: Mapping[str, Any],
    *,
    embedding_rows: int | None,
    generation_config: Mapping[str, Any] | None = None,
    note: Note = _untold,
) -> dict[str, MetaValue]:
    """All ``tokenizer.*`` keys for the checkpoint in ``directory``, in a fixed order.

    ``note`` is told where the model's files contradict each other, and what llama.cpp cannot be told.

    ``embedding_rows``: rows of the token embedding; ids without a token up to there become unused ``[PAD…]`` tokens.
    None means not known: then the ids must be dense.

    Raises MalformedInputError (a file breaks its format, or does not fit the embedding), UnsupportedError (valid, but
    llama.cpp would give other ids), AccessError (a link out of the directory).
    """
    vocabulary, template = _load(Path(directory), config, note)
    texts, types, scores = vocabulary.arrays(embedding_rows)
    keys = Keys.Tokenizer
    metadata = {
        keys.MODEL: text_value(vocabulary.model),
        keys.PRE: text_value(vocabulary.pre),
        keys.LIST: array_value(GGUFValueType.STRING, texts),
        keys.TOKEN_TYPE: array_value(GGUFValueType.INT32, types),
    }
    if vocabulary.scores is not None:
        metadata[keys.SCORES] = array_value(GGUFValueType.FLOAT32, scores)
    if vocabulary.merges is not None:
        metadata[keys.MERGES] = array_value(GGUFValueType.STRING, vocabulary.merges)
    special = special_ids(Path(directory), config, vocabulary, template)
    mark_ends(special, ending_ids(config, generation_config), vocabulary, note)
    metadata |= special
    metadata |= vocabulary.flags
    metadata |= chat_templates(Path(directory))
    return metadata


def has_tokenizer(directory: Path) -> bool:
    """Whether there is any file of a tokenizer in ``directory``."""
    return any((Path(directory) / name).exists() for name in ("tokenizer.json", "tokenizer.model", *_OTHER_FORMATS))


def no_tokenizer(directory: Path) -> MalformedInputError:
    """The error where there is none and one is needed."""
    return MalformedInputError(
        "the model directory has no tokenizer",
        file=Path(directory) / "tokenizer.json",
        expected="tokenizer.json or tokenizer.model",
        found="neither",
        remedy="fetch the tokenizer files of the model too; a directory format can be made without them where nothing "
        "is calibrated: --method rtn, or --statistics of this model",
    )


@dataclass(frozen=True)
class Conventions:
    """How text begins and ends, and the chat template. ``special``: under GGUF's keys, as ``read_vocabulary`` has them.
    ``texts``, ``types``: {id: text}, {id: kind (gguf's TokenType)} of tokens, not of unused rows."""

    special: Mapping[str, MetaValue]
    texts: Mapping[int, str]
    types: Mapping[int, int]


def read_conventions(directory: Path, config: Mapping[str, Any]) -> Conventions:
    """The conventions of any tokenizer that transformers loads, whether llama.cpp has it or not.

    Raises MalformedInputError (no tokenizer, or a file that breaks its format), UnsupportedError (a file of another
    kind), AccessError (a link out of the directory).
    """
    path = inside(Path(directory), "tokenizer.json")
    if path.exists():
        source = read_tokenizer_json(path, any_model=True)
        vocabulary = Vocabulary(path, source.kind, "", dict(source.ids), dict(source.tokens), merges=[])
        vocabulary.add(source.added)
        try:
            template = template_ids(source, vocabulary)
        except UnsupportedError:  # more around a text than GGUF can say: nothing is put around it here
            template = {}
        else:
            heed_settings(read_optional(path.parent, "tokenizer_config.json"), config, vocabulary, template, _untold)
    else:
        vocabulary, template = _load(Path(directory), config, _untold)
    special = special_ids(Path(directory), config, vocabulary, template) | chat_templates(Path(directory))
    return Conventions(special, vocabulary.texts, vocabulary.types)


def said_conventions(metadata: Mapping[str, MetaValue]) -> Conventions:
    """The conventions that the metadata of a GGUF file says. What it leaves out of bos is llama.cpp's default: the
    texts of a SentencePiece model begin with it, and those of some rules of byte-level BPE."""
    keys = Keys.Tokenizer
    texts, types = (getattr(metadata.get(key), "value", ()) for key in (keys.LIST, keys.TOKEN_TYPE))
    special = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    begins = begins_with_bos(metadata[keys.MODEL].value, getattr(metadata.get(keys.PRE), "value", "default"))
    special.setdefault(keys.ADD_BOS, MetaValue(GGUFValueType.BOOL, begins))
    return Conventions(special, dict(enumerate(texts)), dict(enumerate(types)))


PHI3_NAMES = ("phi-3", "phi3")
PHI3_TOKENS = frozenset(("</s>", "<unk>", "<s>", "<|endoftext|>"))


def runtime_name(name: str, directory: Path, metadata: Mapping[str, MetaValue]) -> str:
    """``name`` for ``general.name``, so that llama.cpp treats white space after special tokens as this tokenizer does.

    GGUF has no key for "strips white space after it". llama.cpp does it for every special token but three when
    ``general.name`` holds "phi-3" or "phi3", and then fails to load a vocabulary without Phi-3's own tokens. So a
    tokenizer of that kind gets "Phi-3" in its name, and another gets it taken out. ``metadata``: read_vocabulary's.
    """
    named = any(word in name.lower() for word in PHI3_NAMES)
    complete = set(metadata[Keys.Tokenizer.LIST].value) >= PHI3_TOKENS
    path = inside(Path(directory), "tokenizer.json")
    strips = False
    if complete and path.exists():
        strips = any(token.rstrip for token in read_tokenizer_json(path).added)
    if strips == named:
        return name
    return f"{name} Phi-3" if strips else re.sub("(?i)phi-?3", "Phi 3", name)


def _load(directory: Path, config: Mapping[str, Any], note: Note) -> tuple[Vocabulary, dict[str, int]]:
    """The vocabulary, and the ids of what its post-processor adds."""
    path, model = inside(directory, "tokenizer.json"), inside(directory, "tokenizer.model")
    if path.exists():
        source = read_tokenizer_json(path)
        if source.kind == "Unigram":
            vocabulary = unigram(source)
        elif is_byte_level(source.pre_tokenizer, path):
            vocabulary = byte_level(source)
        else:
            vocabulary = character_bpe(source, functools.partial(trained_scores, model))
        template = template_ids(source, vocabulary)
        heed_settings(read_optional(directory, "tokenizer_config.json"), config, vocabulary, template, note)
        return vocabulary, template
    if model.exists():
        settings = read_optional(directory, "tokenizer_config.json")
        vocabulary = sentencepiece_vocabulary(model, added_beside(directory, settings))
        # Without tokenizer.json the tokenizer's class decides; Llama's and its kin put bos before a text unless told.
        vocabulary.add_bos = settings.get("add_bos_token") is not False and vocabulary.model == "llama"
        vocabulary.add_eos = settings.get("add_eos_token", vocabulary.model == "t5") is True
        return vocabulary, {}
    for name in _OTHER_FORMATS:
        if (directory / name).exists():
            raise UnsupportedError(
                "the tokenizer is in a format that this version does not read",
                file=directory / name,
                expected="tokenizer.json or tokenizer.model",
                found=name,
                remedy="AutoTokenizer.from_pretrained(M).save_pretrained(M) of transformers writes tokenizer.json",
            )
    raise no_tokenizer(directory)


def added_beside(directory: Path, settings: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """Added tokens of tokenizer_config.json and added_tokens.json, for directories without tokenizer.json."""
    found: dict[int, AddedToken] = {}
    path = directory / "added_tokens.json"
    for text, value in read_optional(directory, "added_tokens.json").items():
        index = check_id(value, path, f"the token {text[:60]!r}")
        found[index] = added_token({"content": text}, index, path, f"the token {text[:60]!r}")
    path = directory / "tokenizer_config.json"
    table = settings.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping):
        malformed(path, "added_tokens_decoder must be an object", found=type(table).__name__)
    for key, item in table.items():
        where = f"added_tokens_decoder[{key[:20]!r}]"
        if not key.isascii() or not key.isdigit() or not isinstance(item, Mapping):
            malformed(path, f"{where} is not an id with a token", expected="an id and an object")
        index = check_id(int(key[:20]), path, where)
        found[index] = added_token(item, index, path, where)
    return tuple(token for _, token in sorted(found.items()) if token.content)

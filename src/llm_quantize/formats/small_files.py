"""The small files beside the weights: tokenizer, generation settings, chat template, licence. Copied as they are.

A directory on disk holds more than a model: keys, notes, data, code, the states of a trainer. Only what runtimes read
is copied, by name, and whatever else is wanted is named by the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from llm_quantize.errors import AccessError, UsageError, printable
from llm_quantize.formats.folders import folder_files
from llm_quantize.io.output_file import CopiedFile, copied_file
from llm_quantize.io.paths import inside

MOST_BYTES = 512 << 20
MOST_INCLUDED = 256
_NAMED = 6

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "tokenizer.model.v[0-9]*", "tekken.json", "tiktoken.model", "*.tiktoken"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "dict.txt", "normalizer.json"),
    *("spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
)
"""Of the tokenizers that Transformers, vLLM and llama.cpp load (fnmatch patterns of names, as all of these)."""

CHAT_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
LICENCE_FILES = (
    *("licen[sc]e", "licen[sc]e.txt", "licen[sc]e.md", "licen[sc]e.pdf", "licen[sc]e-model", "licen[sc]e-code"),
    *("model_licen[sc]e", "copying", "copying.txt", "notice", "notice.txt", "notice.md"),
    *("use_policy.md", "use_policy.txt", "acceptable_use_policy.md"),
)
"""Texts that have to go with the weights, in whatever case they are written."""

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf"),
    *(".npz", ".tflite", ".nemo", ".mlmodel", ".index.json"),
)
_LOADED = (".safetensors", ".gguf", ".index.json")  # a stray one would be taken for the artifact's own weights
_MADE_ANEW = ("config.json", "manifest.json", "quantize_config.json", "quant_config.json", "README.md")


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name says what token ids mean, or how text becomes tokens and when it ends."""
    return any(fnmatchcase(name, pattern) for pattern in (*TOKENIZER_FILES, *CHAT_FILES))


def is_read(name: str) -> bool:
    """Whether runtimes read a file of this name, or a licence asks for it to be kept."""
    return (
        is_vocabulary(name)
        or name in (*PROCESSOR_FILES, *EMBEDDING_FILES)
        or any(fnmatchcase(name.lower(), pattern) for pattern in LICENCE_FILES)
    )


def small_files(directory: Path, include: Sequence[str] = ()) -> tuple[list[tuple[str, CopiedFile]], list[str]]:
    """([(name, file)] by name, warnings about what was left out) of the files directly in ``directory``, and of the
    folders that ``folders.py`` knows.

    Taken: what ``is_read`` knows, and what a glob of ``include`` matches. Never taken: what is made anew, and files
    that a runtime would take for weights. What cannot be taken (a name or link that paths.inside refuses) is told; what
    stays behind is told in one line, but for weights, old READMEs and hidden files.

    Raises UsageError for a glob that finds nothing and for more than MOST_INCLUDED files, MalformedInputError for a
    file of more than MOST_BYTES and for a modules.json of the wrong form.
    """
    nested, warnings = folder_files(directory)
    folders = {name.partition("/")[0] for name, _ in nested}
    found, left = [], []
    matched: dict[str, list[str]] = {glob: [] for glob in include}
    for entry in sorted(directory.iterdir(), key=lambda path: path.name):
        name = entry.name
        globs = [glob for glob in include if _included(name, glob) and not entry.is_dir()]
        if entry.is_dir() and name in folders:
            continue
        if not globs and (entry.is_dir() or not is_read(name)):
            left += [_shown(entry)] if _is_told(entry) else []
            continue
        try:
            path = inside(directory, name)
        except AccessError as error:
            warnings.append(f"{name[:80]!r} is not copied: {error.what}")
            continue
        if path.is_file():
            found.append((name, copied_file(path, MOST_BYTES)))
            for glob in globs:
                matched[glob].append(name)
    _check_included(directory, matched)
    found += [(name, copied_file(path, MOST_BYTES)) for name, path in nested]
    return found, [*warnings, *_told(left)]


def _included(name: str, glob: str) -> bool:
    """Whether ``glob`` names the file; as in a shell, only a glob that begins with a dot finds hidden ones."""
    if name in _MADE_ANEW or name.lower().endswith(_LOADED) or name.startswith(".") != glob.startswith("."):
        return False
    return fnmatchcase(name, glob)


def _check_included(directory: Path, matched: dict[str, list[str]]) -> None:
    """Raise UsageError where a glob found nothing, or all of them too much."""
    for glob, names in matched.items():
        if not names:
            raise UsageError(
                "--include finds no file of the model that can be copied",
                file=directory,
                expected="files directly in the model's directory, other than weights and config.json",
                found=glob,
                remedy="check the name; of a hub model, fetch the file first (hf download --local-dir) and give that "
                "directory",
            )
    count = len({name for found in matched.values() for name in found})
    if count > MOST_INCLUDED:
        raise UsageError(
            "--include finds too many files", file=directory, expected=f"at most {MOST_INCLUDED}", found=count
        )


def _is_told(entry: Path) -> bool:
    """Whether someone may miss it."""
    name = entry.name
    return not (name.startswith((".", "README")) or name in _MADE_ANEW or name.lower().endswith(_WEIGHTS))


def _shown(entry: Path) -> str:
    return printable(entry.name, 60) + ("/" if entry.is_dir() else "")


def _told(left: Sequence[str]) -> list[str]:
    """One line that names what is not copied, directories too; none where there is nothing."""
    if not left:
        return []
    names = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
    return [
        f"not copied, as runtimes do not read it: {names}; --include GLOB copies files (not directories) all the same"
    ]

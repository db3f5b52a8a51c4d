"""An artifact for the hub: verified, and of its files exactly those that its manifest lists, with a card for the hub.

What lies beside them (journals, unfinished files, notes) is never among them. The card of a directory is its own, with
metadata added that ``verify`` does not mind; a GGUF file, which has none, gets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.modelfile import modelfile_path
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import MalformedInputError, UsageError
from llm_quantize.events import EventSink, Stage, ignore
from llm_quantize.formats.card import About, bytes_words, card, with_added, without_added
from llm_quantize.formats.directory_check import CARD
from llm_quantize.formats.recipe_file import parse_fit
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import MetaValue, read_gguf
from llm_quantize.io.json_file import read_json_object
from llm_quantize.measures.uncertainty import figure
from llm_quantize.models.hub.push import account, push_files, require_name, require_token
from llm_quantize.models.quantized import is_stored_directory
from llm_quantize.options import PROMPTS

_GGUF_TAGS = ("gguf", "quantized")
_FRONT = {
    "license": Keys.General.LICENSE,
    "license_name": Keys.General.LICENSE_NAME,
    "license_link": Keys.General.LICENSE_LINK,
}


_METRICS = {
    "kld": ("kl_divergence", "KL divergence from the source, nats per token"),
    "perplexity": ("perplexity", "Perplexity"),
    "reference_perplexity": ("perplexity", "Perplexity of the source"),
    "same_top": ("accuracy", "Same likeliest token as the source"),
}
_MOST_JSON = 256 << 20


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: ``files`` [(name there, file or bytes)], ``name`` of the artifact, its ``level``."""

    name: str
    level: str
    files: Sequence[tuple[str, Path | bytes]]

    def sizes(self) -> list[tuple[str, int]]:
        """[(name, bytes)]."""
        return [(name, len(data) if isinstance(data, bytes) else data.stat().st_size) for name, data in self.files]


def upload_of(
    artifact: str | Path,
    *,
    owner: str,
    base_model: str | None = None,
    measured: str | Path | None = None,
    on_event: EventSink = ignore,
) -> Upload:
    """What of ``artifact`` goes to the hub, of which nothing is wrong. ``owner``: who quantized it; ``base_model``: the
    hub id of its source, where the manifest does not say it; ``measured``: what ``analyze quality --json`` said of it.

    Raises UsageError (no artifact of ours, or not a finished one; a measurement of others), MalformedInputError (none
    at all), IntegrityError (what ``verify`` finds).
    """
    path = Path(artifact)
    path = path if is_stored_directory(path) else _whole(path)
    manifest = read_manifest(manifest_path(path))
    if manifest is None:
        raise UsageError(
            "this is no finished artifact of llm-quantize: it has no manifest",
            file=path,
            expected=manifest_path(path).name,
            remedy="make it, or finish it, with llm-quantize quantize",
        )
    on_event(Stage("verify"))
    verify(path, on_event=on_event).raise_on_problems()
    folder = path if path.is_dir() else path.parent
    names = [str(entry["name"]) for entry in manifest["files"]]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files[manifest_path(path).name] = manifest_path(path)
    added = _origin(manifest, owner, base_model)
    results = [*_found_by_the_run(manifest), *([] if measured is None else _found_by_analysis(Path(measured), path))]
    if results:
        added["model-index"] = [{"name": path.stem if path.is_file() else path.name, "results": results}]
    if CARD in files:
        files[CARD] = with_added(without_added((folder / CARD).read_bytes()), added)
    else:
        files = {CARD: with_added(_gguf_card(path, manifest, names).encode(), added), **files}
        side = modelfile_path(path)
        if path.is_file() and side.is_file() and not side.is_symlink():
            files[side.name] = side
    return Upload(path.stem if path.is_file() else path.name, str(manifest["level"]), list(files.items()))


def owner_of(repository: str | None) -> str | None:
    """Whose ``repository`` (ORG/NAME) is; None where the account of the token decides, for NAME alone or none. Raises
    UsageError for what can be no name of one."""
    if repository is None:
        return None
    require_name(repository)
    return repository.partition("/")[0] if "/" in repository else None


def push(
    artifact: str | Path,
    repository: str | None = None,
    *,
    private: bool = False,
    base_model: str | None = None,
    measured: str | Path | None = None,
    bars: bool = False,
    on_event: EventSink = ignore,
) -> tuple[str, Upload]:
    """Verify ``artifact`` and write it to ``repository`` of the hub (None: its name, under the token's account), in one
    commit; (the address of the commit, what was sent).

    Raises NetworkError (no token, refused, unreachable), UsageError (no name of a repository, before anything is
    read), and as ``upload_of``.
    """
    owner = owner_of(repository)
    require_token()
    given, owner = repository or "", owner or account()
    upload = upload_of(artifact, owner=owner, base_model=base_model, measured=measured, on_event=on_event)
    name = given.rpartition("/")[2] or upload.name
    on_event(Stage(f"send {len(upload.files)} files to {owner}/{name}"))
    message = f"{upload.name}, quantized by llm-quantize"
    return push_files(f"{owner}/{name}", upload.files, private=private, message=message, bars=bars), upload


def _whole(path: Path) -> Path:
    """The GGUF file, or the directory of a split one, that ``path`` means."""
    files = artifact_files(path)
    return files[0] if len(files) == 1 else files[0].parent


def _origin(manifest: Mapping[str, Any], owner: str, base_model: str | None) -> dict[str, Any]:
    """Metadata that the hub knows: what it was made from, and by whom."""
    identity = manifest["identity"]
    base = base_model or (identity.get("source") if identity.get("source_revision") else None)
    found = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    return found | {"quantized_by": owner}


def _found_by_the_run(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the run that made it measured."""
    found = manifest.get("measured")
    if isinstance(found, Mapping):
        told = f"{found['tokens']} tokens of the calibration texts that were not calibrated on"
        yield _result("llm-quantize-held-out", told, {key: found[key] for key in ("kld", "same_top")})


def _found_by_analysis(file: Path, path: Path) -> Iterator[dict[str, Any]]:
    """What ``analyze quality --json``, kept in ``file``, measured of the artifact that is called as ``path``."""
    try:
        said = read_json_object(file, limit_bytes=_MOST_JSON)
        entries = {Path(one["path"]).name: one["divergence"] for one in said["artifacts"]}
        text, tokens = ", ".join(map(str, said["texts"])), int(said["tokens"])
        found = {key: float(entries[path.name][key]) for key in _METRICS} if path.name in entries else None
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedInputError(
            "this is no measurement of llm-quantize",
            file=file,
            expected="what llm-quantize analyze quality --json prints",
            remedy="llm-quantize analyze quality ARTIFACT --reference MODEL --json > FILE",
        ) from error
    if found is None:
        raise UsageError(
            "this measurement is of other artifacts",
            file=file,
            expected=path.name,
            found=", ".join(entries),
            remedy="measure this one with llm-quantize analyze quality, or leave --measured out",
        )
    yield _result("llm-quantize-text", f"{text}, {tokens} tokens in windows of {said.get('context')}", found)


def _result(kind: str, name: str, found: Mapping[str, float]) -> dict[str, Any]:
    """An evaluation result as model cards have it."""
    metrics = [{"type": _METRICS[key][0], "name": _METRICS[key][1], "value": value} for key, value in found.items()]
    return {"task": {"type": "text-generation"}, "dataset": {"type": kind, "name": name}, "metrics": metrics}


def _fit_told(manifest: Mapping[str, Any]) -> Any:
    """What a manifest says of the size that its recipe was chosen for."""
    made = manifest.get("made")
    recipe = made.get("recipe") if isinstance(made, dict) else None
    return recipe.get("fit") if isinstance(recipe, dict) else None


def _gguf_card(path: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    """The card of a GGUF artifact."""
    first = path if path.is_file() else path / names[0]
    metadata = read_gguf(first).metadata
    identity, level = manifest["identity"], str(manifest["level"])
    size = sum(int(entry["size"]) for entry in manifest["files"])
    recipe = {"Format": "GGUF", "Level": level, "Architecture": _text(metadata, Keys.General.ARCHITECTURE)}
    if identity.get("method"):
        recipe["Method"] = str(identity["method"])
    fit = parse_fit(manifest_path(path), _fit_told(manifest))
    recipe |= {} if fit is None else fit.words()
    weights = max(1, int(manifest["weights"]))
    said = "--chat" if Keys.Tokenizer.CHAT_TEMPLATE in metadata else f'"{PROMPTS[0]}"'
    about = About(
        tags=_GGUF_TAGS,
        recipe=recipe,
        sizes={"Together": f"{bytes_words(size)}, {8 * size / weights:.2f} bits per weight"},
        loading=f"## Loading\n\n```sh\nllama-cli -m {names[0]}\nllm-quantize run {names[0]} {said}\n```\n",
        library="gguf",
    )
    measured = manifest.get("measured")
    loss = None
    if isinstance(measured, Mapping):
        loss = {
            "KL divergence": f"{figure(measured['kld'], measured['kld_sem'], 6)} nats per token",
            "Same likeliest token": f"{100 * measured['same_top']:.2f} %",
            "Tokens": measured["tokens"],
        }
    return card(
        about,
        name=path.stem if path.is_file() else path.name,
        source=str(identity.get("source", "")),
        revision=identity.get("source_revision"),
        merged=[str(merge.get("words", "")) for merge in identity.get("adapters", [])],
        front=_front(metadata),
        measured=loss,
        manifest=manifest_path(path).name,
    )


def _front(metadata: Mapping[str, MetaValue]) -> dict[str, Any]:
    """Licence and languages of the source's card, as the file says them."""
    found: dict[str, Any] = {name: text for name, key in _FRONT.items() if (text := _text(metadata, key))}
    languages = metadata.get(Keys.General.LANGUAGES)
    return found | ({"language": list(languages.value)} if languages is not None else {})


def _text(metadata: Mapping[str, MetaValue], key: str) -> str:
    found = metadata.get(key)
    return "" if found is None else str(found.value)

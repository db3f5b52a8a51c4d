"""Models from the Hugging Face hub: the commit is pinned first, then only data files of that commit are fetched.

Files lie in huggingface_hub's own cache (``HF_HOME``); ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what
they mean there. Every file fetched is compared with the hash that the hub gives for it. Code is never fetched, and
pickled weights only where there are no others. Messages are our own words: a server's text, a URL or a token never gets
into them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.engine import run, stop_on_signals, stopped_error
from llm_quantize.errors import (
    IntegrityError,
    MalformedInputError,
    NetworkError,
    ResourceError,
    UnsupportedError,
    printable,
)
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.folders import is_known_file
from llm_quantize.formats.small_files import is_read
from llm_quantize.io.paths import inside
from llm_quantize.models.files import conversion_command
from llm_quantize.models.hub.errors import UNREACHABLE, translated
from llm_quantize.models.hub.headers import WeightFile, gguf_headers, headers_directory
from llm_quantize.models.weight_sets import (
    INDEX,
    PICKLED,
    PICKLED_INDEX,
    SINGLE,
    index_counts,
    refuse_adapter,
    weight_map,
)

SMALL_FILES = ("*.json", "*.jinja", "*.model", "README.md")
"""Top-level files fetched besides the weights and what runtimes read (an adapter's and a trainer's are left out),
and those in folders that ``formats/folders.py`` knows."""

_NOT_WANTED = ("adapter_*", "trainer_state.json", "consolidated*", "*.index.json")
_WORKERS = 4
_HASH_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class LocalSnapshot:
    """One commit of a repository on this machine. ``temporary``: the directory holds no weights, only headers with
    holes behind them, and lasts until this is cleaned up."""

    directory: Path
    commit: str
    temporary: tempfile.TemporaryDirectory[str] | None = None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the hub says of a file. ``sha256`` for large files, ``git_sha1`` (of "blob SIZE\\0" + bytes) for others."""

    name: str
    size: int | None
    sha256: str | None
    git_sha1: str | None


def resolve(
    model_id: str, revision: str | None, *, on_event: EventSink | None = None, headers_only: bool = False
) -> LocalSnapshot:
    """The snapshot of ``model_id`` at ``revision`` (branch, tag, commit; default branch if None), fetched as needed.

    With ``headers_only``, weight files that are not in the cache are not fetched: see ``LocalSnapshot.temporary``.
    Raises UsageError (not an id), NetworkError (unreachable, refused, gated, absent, offline and not cached),
    IntegrityError (bytes are not those the hub announced), UnsupportedError (no weights there), ResourceError.
    """
    tell = on_event or ignore
    hub = importlib.import_module("huggingface_hub")
    cached = _cached(hub, model_id, revision)
    if _offline(hub):
        if cached is None:
            raise NetworkError(
                "offline mode is on and this model is not in the cache",
                file=model_id,
                expected=f"commit {revision or 'main'} in {hub.constants.HF_HUB_CACHE}",
                remedy="unset HF_HUB_OFFLINE, or give the directory of a copy of the model",
            )
        return _whole(cached, model_id)
    if cached is not None and revision == cached.commit and _missing(cached) is None:
        return cached  # a commit never changes: nothing to ask
    try:
        commit, files = _listing(hub, model_id, revision)
    except NetworkError as error:
        if cached is None or error.found != UNREACHABLE or _missing(cached) is not None:
            raise
        tell(events.Caution(f"the hub cannot be reached; using the cached commit {cached.commit}"))
        return cached
    snapshot = _fetch(hub, model_id, commit, files, tell, headers_only)
    _remember(hub, model_id, revision or "main", commit)
    return snapshot


def fetch_chosen(
    model_id: str, revision: str | None, choose: Callable[[Collection[str]], Sequence[str]], *, on_event: EventSink
) -> list[Path]:
    """The files that ``choose`` picks of the repository's names, fetched and proved, in the cache; offline, of those
    that it holds. Raises as ``resolve``, and what ``choose`` raises."""
    hub = importlib.import_module("huggingface_hub")
    if _offline(hub):
        folder = _snapshot_folder(hub, model_id, revision)
        held = [] if folder is None else [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        return [] if folder is None else [folder / name for name in choose(held)]
    commit, files = _listing(hub, model_id, revision)
    wanted = [files[name] for name in choose([name for name in files if re.fullmatch(r"[A-Za-z0-9._/-]+", name)])]
    fetcher = _Fetcher(hub, model_id, commit, on_event)
    fetcher.check_space(wanted)
    fetcher.fetch(wanted)
    _remember(hub, model_id, revision or "main", commit)
    return [fetcher.path(file.name) for file in wanted]


def headers_chosen(
    model_id: str, revision: str | None, choose: Callable[[Collection[str]], Sequence[str]], *, on_event: EventSink
) -> tuple[list[Path], tempfile.TemporaryDirectory[str] | None]:
    """The GGUF files that ``choose`` picks of the repository's names, of those that are not in the cache the headers
    alone, and what is to be cleaned up then. Raises as ``fetch_chosen`` and ``gguf_headers``."""
    hub = importlib.import_module("huggingface_hub")
    if _offline(hub):
        return fetch_chosen(model_id, revision, choose, on_event=on_event), None
    commit, files = _listing(hub, model_id, revision)
    wanted = [files[name] for name in choose([name for name in files if re.fullmatch(r"[A-Za-z0-9._/-]+", name)])]
    fetcher = _Fetcher(hub, model_id, commit, on_event)
    weights = [WeightFile(file.name, file.size, fetcher.cached(file)) for file in wanted]
    if all(file.cached is not None for file in weights):
        return [file.cached for file in weights if file.cached is not None], None
    holder, paths = gguf_headers(hub, model_id, commit, weights)
    return paths, holder


def _snapshot_folder(hub: Any, model_id: str, revision: str | None) -> Path | None:
    """Where the cache keeps a commit of a repository, or what a branch of it was when it was last asked for."""
    place = Path(hub.constants.HF_HUB_CACHE) / ("models--" + model_id.replace("/", "--"))
    reference = place / "refs" / (revision or "main")
    commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else revision or ""
    folder = place / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _offline(hub: Any) -> bool:
    return bool(hub.constants.HF_HUB_OFFLINE)


def _cached(hub: Any, model_id: str, revision: str | None) -> LocalSnapshot | None:
    with translated(model_id, "config.json"):
        found = hub.try_to_load_from_cache(model_id, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    return LocalSnapshot(Path(found).parent, Path(found).parent.name)


def _missing(snapshot: LocalSnapshot) -> str | None:
    """The first weight file that the cached snapshot lacks, None if it has all."""
    usual, listed = _weight_names([path.name for path in snapshot.directory.iterdir()])
    index, single = snapshot.directory / listed, (snapshot.directory / usual).exists()
    if not index.exists():
        return None if single else usual
    names = sorted(set(weight_map(index, Path(usual).suffix).values()))
    absent = [name for name in names if not inside(snapshot.directory, name, declared_in=index).exists()]
    return None if single and len(absent) == len(names) else next(iter(absent), None)


def _weight_names(files: Collection[str]) -> tuple[str, str]:
    """(the usual single file of weights, the index of several), in the form in which ``files`` has them."""
    safe = SINGLE in files or INDEX in files or not (PICKLED in files or PICKLED_INDEX in files)
    return (SINGLE, INDEX) if safe else (PICKLED, PICKLED_INDEX)


def _whole(snapshot: LocalSnapshot, model_id: str) -> LocalSnapshot:
    missing = _missing(snapshot)
    if missing is not None:
        raise NetworkError(
            f"offline mode is on and the cache holds only part of {printable(model_id, 120)}",
            file=missing,
            expected=f"all weight files of commit {snapshot.commit}",
            found="this file is missing",
            remedy="unset HF_HUB_OFFLINE and run the same command again: what is there is kept",
        )
    return snapshot


def _remember(hub: Any, model_id: str, revision: str, commit: str) -> None:
    """Note in the cache which commit a branch or tag was, as huggingface_hub does, so that offline runs find it."""
    if revision == commit or not re.fullmatch(
        r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", revision
    ):
        return
    ref = Path(hub.constants.HF_HUB_CACHE) / ("models--" + model_id.replace("/", "--")) / "refs" / revision
    with translated(model_id, None):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="ascii")


def _listing(hub: Any, model_id: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """(commit, {name: file}) of the repository; names that could lead anywhere else are left out."""
    with translated(model_id, None, revision):
        info = hub.HfApi().model_info(model_id, revision=revision, files_metadata=True, timeout=30.0)
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise NetworkError(
            "the hub's answer names no commit", file=model_id, found=info.sha, remedy="check HF_ENDPOINT, or try later"
        )
    files = {}
    for sibling in info.siblings or ():
        lfs = sibling.lfs
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size, sha256, sibling.blob_id)
    return info.sha, files


def _fetch(
    hub: Any, model_id: str, commit: str, files: Mapping[str, RemoteFile], tell: EventSink, headers_only: bool
) -> LocalSnapshot:
    _refuse_without_weights(model_id, files)
    refuse_adapter(Path(model_id), files.__contains__)
    small = [
        name
        for name in files
        if (is_read(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOT_WANTED)
        and re.fullmatch(r"[A-Za-z0-9._-]+", name)
    ]
    small += [name for name in files if is_known_file(name) and re.fullmatch(r"[A-Za-z0-9._/-]+", name)]
    fetcher = _Fetcher(hub, model_id, commit, tell)
    single, listed = _weight_names(files)
    fetcher.fetch([files[name] for name in [*small, *(name for name in (listed,) if name in files)]])
    index = fetcher.path(listed) if listed in files else None
    weights = [single] if index is None else sorted(set(weight_map(index, Path(single).suffix).values()))
    if single in files and not index_counts(weights, files.__contains__):
        weights = [single]
    elif index is not None:
        if single in files and single not in weights:
            tell(
                events.Caution(f"{single} of {printable(model_id, 120)} is not fetched, as {listed} names other files")
            )
        for name in weights:
            inside(index.parent, name, declared_in=index)
        absent = next((name for name in weights if name not in files), None)
        if absent is not None:
            raise MalformedInputError(
                f"the index names a shard that {printable(model_id, 120)} does not hold",
                file=absent,
                expected=f"{len(weights)} shards",
                found="no such file in the repository",
                remedy="tell the model's authors, or choose another --revision",
            )
    if headers_only:
        found = [WeightFile(name, files[name].size, fetcher.cached(files[name])) for name in weights]
        if any(file.cached is None for file in found):
            _refuse_pickled_headers(model_id, single, weights)
            temporary, directory = headers_directory(hub, model_id, commit, fetcher.paths(), found)
            return LocalSnapshot(directory, commit, temporary)
    fetcher.check_space([files[name] for name in weights])
    fetcher.fetch([files[name] for name in weights])
    return LocalSnapshot(fetcher.path(weights[0], weights[0].count("/")), commit)


def _refuse_pickled_headers(model_id: str, single: str, weights: Sequence[str]) -> None:
    """Raise UnsupportedError where what is in the weights stands at their end, and in many places: it is not fetched
    alone."""
    if single == PICKLED:
        raise UnsupportedError(
            "what is in pickled weights cannot be told without fetching them whole",
            file=f"{model_id}/{weights[0]}",
            expected="safetensors, whose headers can be fetched alone",
            remedy=f"hf download {model_id}, then the same command again",
        )


def _refuse_without_weights(model_id: str, files: Mapping[str, RemoteFile]) -> None:
    if files.keys() & {SINGLE, INDEX, PICKLED, PICKLED_INDEX}:
        return
    if "adapter_config.json" in files:
        raise UnsupportedError(
            "this is an adapter (LoRA), not a model: it only holds changes to another model's weights",
            file=f"{model_id}/adapter_config.json",
            remedy="give the model that it was trained on as MODEL, and this as --lora",
        )
    pickled = next((name for name in files if name.endswith((".bin", ".pt", ".pth"))), None)
    if pickled is not None:
        raise UnsupportedError(
            "the weights are pickled, in a file of a name under which no runtime looks for them",
            file=f"{model_id}/{pickled}",
            expected=f"{SINGLE} or {PICKLED}",
            remedy=conversion_command(model_id),
        )
    raise UnsupportedError(
        "this repository holds no safetensors weights of a whole model",
        file=model_id,
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(sorted(files)[:6]) or "no files",
        remedy="choose the repository of the model in transformers' format",
    )


class _Fetcher:
    """Fetches files of one commit into the cache, a few at a time, and proves each by its hash."""

    def __init__(self, hub: Any, model_id: str, commit: str, tell: EventSink) -> None:
        self._hub, self._model_id, self._commit, self._tell = hub, model_id, commit, tell
        self._paths: dict[str, Path] = {}
        self._lock = threading.Lock()

    def path(self, name: str, parents: int | None = None) -> Path:
        """Where file ``name`` lies; with ``parents``, the snapshot's directory, that many levels above its folder."""
        path = self._paths[name]
        return path if parents is None else path.parents[parents]

    def paths(self) -> dict[str, Path]:
        """{name: where it lies} of everything fetched so far."""
        return dict(self._paths)

    def check_space(self, files: list[RemoteFile]) -> None:
        """Raise ResourceError before the first byte if the cache's disk cannot hold what is missing."""
        needed = sum(file.size or 0 for file in files if self._in_cache(file) is None)
        place = Path(self._hub.constants.HF_HUB_CACHE)
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ResourceError(
                f"not enough disk space to fetch {printable(self._model_id, 120)}",
                file=self._hub.constants.HF_HUB_CACHE,
                expected=f"{needed:,} bytes free",
                found=f"{free:,} bytes",
                remedy="free some space, or set HF_HOME to a larger disk",
            )

    def fetch(self, files: list[RemoteFile]) -> None:
        """Fetch and check ``files``; events tell the progress. The first failure is raised, the rest cancelled."""
        waiting = [file for file in files if not self._take_cached(file)]
        if not waiting:
            return
        total = sum(file.size or 0 for file in waiting)
        counted = [0]

        def tell() -> None:
            done = max(counted[0], sum(file.size or 0 for file in waiting if file.name in self._paths))
            name = next((file.name for file in waiting if file.name not in self._paths), files[-1].name)
            self._tell(events.Download(file=name, done=min(done, total), total=total))

        with _quiet(self._hub), stop_on_signals() as stop:
            work = partial(self._fetch_one, bar=_bar(self._hub, stop, counted))
            for name, path in run(work, waiting, threads=_WORKERS, stop=stop, on_wait=tell):
                self._paths[name] = path
            tell()

    def _in_cache(self, file: RemoteFile) -> Path | None:
        found = self._hub.try_to_load_from_cache(self._model_id, file.name, revision=self._commit)
        return Path(found) if isinstance(found, str) else None

    def cached(self, file: RemoteFile) -> Path | None:
        """Where the cache holds ``file`` in its announced size, None if it does not."""
        path = self._in_cache(file)
        if path is None or (file.size is not None and path.stat().st_size != file.size):
            return None
        return path

    def _take_cached(self, file: RemoteFile) -> bool:
        path = self.cached(file)
        if path is None:
            return False
        self._paths[file.name] = path
        return True

    def _fetch_one(self, file: RemoteFile, bar: type) -> tuple[str, Path]:
        stale = self._in_cache(file)
        with translated(self._model_id, file.name, self._commit):
            path = Path(
                self._hub.hf_hub_download(
                    self._model_id,
                    file.name,
                    revision=self._commit,
                    force_download=stale is not None,
                    tqdm_class=bar,
                )
            )
        _check_bytes(path, file, self._model_id)
        return file.name, path


def _check_bytes(path: Path, file: RemoteFile, model_id: str) -> None:
    """Compare a fetched file with what the hub announced; a wrong one is removed so that it is fetched again."""
    size = path.stat().st_size
    expected, found = f"{file.size} bytes", f"{size} bytes"
    right = file.size is None or size == file.size
    if right and (file.sha256 or file.git_sha1):
        digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                digest.update(block)
        expected, found = str(file.sha256 or file.git_sha1), digest.hexdigest()
        right = expected == found
    if right:
        return
    Path(os.path.realpath(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise IntegrityError(
        f"a file fetched from {printable(model_id, 120)} is not the one that the hub announced",
        file=file.name,
        expected=expected,
        found=found,
        remedy="run the same command again: the wrong file was removed; if it comes again, check proxy and HF_ENDPOINT",
    )


def _bar(hub: Any, stop: threading.Event, counted: list[int]) -> type:
    """A progress bar for huggingface_hub that shows nothing: it adds to ``counted`` the bytes that come, and ends the
    download once ``stop`` is set. The hub's library keeps whole files only."""
    lock = threading.Lock()

    class Bar(hub.utils.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise stopped_error(resumable=True)
            with lock:
                counted[0] += int(n or 0)
            return super().update(n)  # type: ignore[no-any-return]

    return Bar


@contextmanager
def _quiet(hub: Any) -> Iterator[None]:
    """Without huggingface_hub's own progress bars: we tell the progress by events."""
    was_off = hub.utils.are_progress_bars_disabled()
    if not was_off:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            hub.utils.enable_progress_bars()

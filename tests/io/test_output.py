"""Resumable output: torn and flipped journals, failing calls, lost power, two writers, things in the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from llm_quantize.errors import (
    AccessError,
    BusyError,
    IntegrityError,
    LlmQuantizeError,
    ResourceError,
    UsageError,
)
from llm_quantize.io import leftovers
from llm_quantize.io import output as output_module
from llm_quantize.io.artifact_paths import hidden_directory, journal_path
from llm_quantize.io.durable import fail_os
from llm_quantize.io.journal import parse_journal, record_line
from llm_quantize.io.leftovers import discard_hidden, discard_partial, hidden_bytes
from llm_quantize.io.output import ResumableOutput

from ..faults.injection import Disk, PowerLoss, failing, killing, short_writes, wrapped
from ..faults.small_output import IDENTITY, MANIFEST, SmallOutput

BOTH = pytest.mark.parametrize("files", [1, 2], ids=["file", "directory"])


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of thousands of runs that do not ask what the disk holds."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Template:
    """An unfinished output, put back before every try."""

    def __init__(self, small: SmallOutput) -> None:
        small.make(finish=False)
        assert small.journal is not None
        self.small, self.journal = small, small.journal.read_bytes()
        paths = [small.partial] if len(small.files) == 1 else sorted(small.partial.iterdir())
        self.files = {path: path.read_bytes() for path in paths}

    def restore(self) -> None:
        small = self.small
        if small.target.is_dir():
            shutil.rmtree(small.target)
        for path in (small.target, small.target.with_name(small.target.name + ".manifest.json")):
            path.unlink(missing_ok=True)
        for path, data in self.files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        assert small.journal is not None
        small.journal.write_bytes(self.journal)


@BOTH
def test_bytes_are_the_planned_ones(tmp_path: Path, files: int) -> None:
    small = SmallOutput(tmp_path / "deep" / "er" / "m.gguf", files)
    small.make()
    assert small.whole()
    names = {path.name for path in small.target.parent.iterdir()}
    assert names == ({"m.gguf", "m.gguf.manifest.json"} if files == 1 else {"m.gguf"})
    assert small.warnings == []


@BOTH
def test_resumes_what_is_recorded_and_nothing_more(tmp_path: Path, files: int) -> None:
    small = SmallOutput(tmp_path / "m.gguf", files)
    small.make(stop_after=2)
    assert not small.target.exists()
    first = list(small.done)
    small.make()
    assert first + small.done == list(small.units)
    assert small.whole()


def test_journal_torn_at_every_byte(tmp_path: Path, no_fsync: None) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    template = Template(small)
    lines = template.journal.splitlines()
    for length in range(len(template.journal)):
        template.restore()
        small.journal.write_bytes(template.journal[:length])
        small.make()
        assert small.whole(), length
        kept = template.journal[:length].split(b"\n")
        whole = sum(line in kept for line in lines)
        assert len(small.done) == len(small.units) - max(0, whole - 1), length


def test_a_torn_last_record_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(stop_after=2)
    small.journal.write_bytes(small.journal.read_bytes()[:-9])
    small.make(stop_after=1)
    assert len(small.warnings) == 1
    small.make(stop_after=0)
    small.make()
    assert len(small.done) == 1
    assert small.whole()


def test_bit_flipped_at_every_byte_of_the_journal(tmp_path: Path, no_fsync: None) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    template = Template(small)
    identity_ends = template.journal.index(b"\n")
    for at in range(len(template.journal)):
        template.restore()
        data = bytearray(template.journal)
        data[at] ^= 1 << at % 8
        small.journal.write_bytes(data)
        small.make()
        assert small.whole(), at
        assert small.warnings, at
        # A damaged identity starts again; a damaged record costs its unit; a lost line break costs two.
        assert 1 <= len(small.done) <= (2 if at > identity_ends else len(small.units)), at


@BOTH
def test_bit_flipped_at_every_byte_of_the_partial(tmp_path: Path, no_fsync: None, files: int) -> None:
    small = SmallOutput(tmp_path / "m.gguf", files)
    template = Template(small)
    number = files - 1
    path = sorted(template.files)[number]
    owners: list[str | None] = [None] * len(template.files[path])
    for unit, (span, _) in small.units.items():
        if span.file == number:
            owners[span.offset : span.offset + span.nbytes] = [unit] * span.nbytes
    for at, owner in list(enumerate(owners))[:: 1 if files == 1 else 9]:
        template.restore()
        data = bytearray(template.files[path])
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        small.make()
        assert small.whole(), at
        assert small.done == ([] if owner is None else [owner]), at


def test_stale_bytes_never_show_in_the_gaps(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    size = small.files[0].size
    for journal in (b"", b"garbage\n", b"\xff" * 100):
        small.partial.write_bytes(b"\xaa" * size)
        small.journal.write_bytes(journal)
        small.make()
        assert small.whole()
        small.target.unlink()
    without = SmallOutput(tmp_path / "n.gguf", journal=False)
    without.partial.write_bytes(b"\xaa" * size)
    without.make()
    assert without.whole()
    split = SmallOutput(tmp_path / "s", 2)
    split.partial.mkdir()
    (split.partial / "part-00001-of-00003.gguf").write_bytes(b"of another split")
    split.make()
    assert split.whole()


@pytest.mark.parametrize("key", sorted(IDENTITY))
def test_another_identity_is_refused_by_name(tmp_path: Path, key: str) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(stop_after=2)
    before = small.partial.read_bytes(), small.journal.read_bytes()
    for other in ({**IDENTITY, key: "other"}, {k: v for k, v in IDENTITY.items() if k != key}):
        with pytest.raises(LlmQuantizeError) as caught:
            small.make(other)
        assert type(caught.value) is (IntegrityError if key.startswith("source") else UsageError)
        assert caught.value.exit_code == (8 if key.startswith("source") else 2)
        assert f"{key} = " in str(caught.value)
        assert "--overwrite" in str(caught.value)
    assert (small.partial.read_bytes(), small.journal.read_bytes()) == before
    small.make()
    assert len(small.done) == 1
    small.target.unlink()
    small.make(stop_after=1)
    small.make({**IDENTITY, key: "other"}, replace=True)
    assert len(small.done) == 3
    assert small.whole()


@BOTH
def test_two_writers(tmp_path: Path, files: int) -> None:
    small, other = (SmallOutput(tmp_path / "m.gguf", files) for _ in range(2))

    def refused(_: object) -> None:
        for replace in (False, True):
            with pytest.raises(BusyError, match="another process") as caught:
                other.make(replace=replace)
            assert caught.value.exit_code == 10
        discard_partial(small.target, small.journal)

    small.make(each=refused)
    assert small.whole()


def test_writers_with_journals_apart_still_see_each_other(tmp_path: Path) -> None:
    small, other = SmallOutput(tmp_path / "m.gguf"), SmallOutput(tmp_path / "m.gguf", journal=False)

    def refused(_: object) -> None:
        with pytest.raises(BusyError):
            other.make()

    small.make(each=refused)
    assert small.whole()


def test_a_lock_of_another_process_counts(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(stop_after=1)
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.flock(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(small.partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(BusyError):
            small.make()
        assert holder.stdin is not None
        holder.stdin.close()
    small.make()
    assert small.whole()


def test_a_partial_that_was_taken_away_is_never_renamed(tmp_path: Path) -> None:
    """Locks can be absent; then another's half-made file may stand under our partial name."""
    small = SmallOutput(tmp_path / "m.gguf")

    def steal(_: object) -> None:
        small.partial.unlink(missing_ok=True)
        small.partial.write_bytes(b"half of something else")

    with pytest.raises(BusyError):
        small.make(each=steal)
    assert not small.target.exists()


def test_a_file_finished_meanwhile_is_left_alone(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make()
    inode = small.target.stat().st_ino
    with pytest.raises(BusyError):
        small.make()
    assert small.target.stat().st_ino == inode


def test_without_locks_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    small = SmallOutput(tmp_path / "m.gguf")
    small.make()
    assert small.whole()
    assert "no locks" in small.warnings[0]


CODES = {errno.ENOSPC: ResourceError, errno.EIO: ResourceError, errno.EROFS: AccessError}


def _failure(small: SmallOutput, replace: bool) -> LlmQuantizeError | None:
    try:
        small.make(replace=replace)
    except LlmQuantizeError as error:
        return error
    return None


@pytest.mark.parametrize("number", sorted(CODES), ids=lambda number: errno.errorcode[number])
@BOTH
def test_every_call_fails_once(tmp_path: Path, no_fsync: None, number: int, files: int) -> None:
    for replacing in (False, True):
        nth = 0
        while True:
            nth += 1
            small = SmallOutput(tmp_path / f"{replacing}-{nth}" / "m.gguf", files)
            if replacing:
                small.make()
            with wrapped(failing(nth, number)) as seen:
                problem = _failure(small, replacing)
            # A directory that is there already may refuse to be made; nothing else may fail unnoticed.
            assert problem or nth > len(seen) or seen[nth - 1] == "mkdir", f"call {nth}, {seen[nth - 1]}"
            assert problem is None or (type(problem) is CODES[number] and str(tmp_path) in str(problem.file))
            if not small.whole():
                small.make()
            assert small.whole()
            if nth > len(seen):
                break
        assert nth > 20


def test_failed_fsync_takes_back_what_it_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first unit is durable, the second was written when fsync failed, the third is recorded just after that."""
    small = SmallOutput(tmp_path / "m.gguf")
    units = list(small.units)
    outcomes: list[object] = []

    def no(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def record_third(output: output_module.ResumableOutput) -> None:
        try:
            output.record(units[2], {"sha256": hashlib.sha256(small.units[units[2]][1]).hexdigest()})
        except LlmQuantizeError as error:
            outcomes.append(error)

    def fail_at_the_second(output: output_module.ResumableOutput) -> None:
        if len(small.done) == 1:
            output.sync()
            return
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", no)
            with pytest.raises(ResourceError, match="durable"):
                output.sync()
        thread = threading.Thread(target=record_third, args=(output,))
        thread.start()
        thread.join()
        with pytest.raises(ResourceError, match="durable"):
            output.sync()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.make(each=fail_at_the_second)
    assert [type(outcome) for outcome in outcomes] == [ResourceError]
    records, damaged = parse_journal(small.journal.read_bytes())
    assert damaged == 0
    assert [record.get("unit") for record in records] == [None, units[0]]
    small.make()
    assert small.done == units[1:]
    assert small.whole()


@BOTH
def test_short_writes_and_reads(tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: pread(descriptor, (count + 1) // 2, offset))
    small = SmallOutput(tmp_path / "m.gguf", files)
    with wrapped(short_writes):
        small.make(stop_after=2)
        small.make()
    assert len(small.done) == len(small.units) - 2
    assert small.whole()


@pytest.fixture
def interruptions() -> Iterator[list[int]]:
    """Signals that arrive all the time: every system call may be interrupted."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_interrupted_calls(tmp_path: Path, interruptions: list[int]) -> None:
    for number in range(5):
        small = SmallOutput(tmp_path / f"{number}.gguf", sizes=(1 << 20, 3 << 20))
        small.make(stop_after=1)
        small.make()
        assert len(small.done) == 1
        assert small.whole()
    assert interruptions


def test_unreadable_unit_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(finish=False)
    unit = list(small.units)[1]
    bad = small.units[unit][0].offset
    pread = os.pread

    def broken(descriptor: int, count: int, offset: int) -> bytes:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", broken)
    small.make()
    assert small.done == [unit]
    assert "cannot be read back" in small.warnings[0]
    assert small.whole()


@BOTH
def test_power_loss_at_every_call(tmp_path: Path, no_fsync: None, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first_of_the_end = 1 << 30
    monkeypatch.setattr(output_module, "SYNC_BYTES", 300)  # some units durable, the last one not
    for seed in range(12):
        nth, total = (0 if seed < 3 else first_of_the_end), 1 << 30
        while nth <= total:
            nth += 1
            root = tmp_path / f"{seed}-{nth}"
            root.mkdir()
            small = SmallOutput(root / "m.gguf", files)
            if seed % 3 == 2:
                small.make()
            # The power fails, fails again while recovering, then holds.
            for attempt, at in enumerate((nth, nth // 2 + 1)):
                disk = Disk(root, seed * 10_000 + nth * 10 + attempt, at)
                with wrapped(disk.before) as seen:
                    try:
                        if attempt == 0 or not small.target.exists():
                            small.make(replace=seed % 3 == 2 and attempt == 0)
                    except PowerLoss:
                        disk.lose()
                if attempt == 0 and len(seen) < nth:
                    total = len(seen)
                small.whole()
            if not small.whole():
                small.make()
            assert small.whole()
        assert nth > 20
        # The end, where names change, is tried with more chances of what the disk keeps.
        first_of_the_end = min(first_of_the_end, total - 14)


def _in_the_way(kind: str, path: Path, elsewhere: Path) -> None:
    if kind == "link":
        elsewhere.write_bytes(b"precious")
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory"])
@pytest.mark.parametrize("place", [".partial", ".journal"])
def test_things_in_the_way(tmp_path: Path, kind: str, place: str) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    path, elsewhere = tmp_path / f"m.gguf{place}", tmp_path / "elsewhere"
    _in_the_way(kind, path, elsewhere)
    for replace in (False, True):
        with pytest.raises(AccessError) as caught:
            small.make(replace=replace)
        assert caught.value.exit_code == 6
        assert str(caught.value.file) == str(path)
        if "link" in kind:
            assert "a link stands" in str(caught.value)
            assert "Too many levels" not in str(caught.value)
    assert not elsewhere.exists() or elsewhere.read_bytes() == b"precious"
    assert not small.target.exists()


def test_directory_output_things_in_the_way(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m", 2)
    (tmp_path / "elsewhere").mkdir()
    small.partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessError, match="link"):
        small.make()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    small.partial.unlink()
    small.partial.write_bytes(b"a file")
    with pytest.raises(AccessError):
        small.make()
    small.partial.unlink()
    small.target.mkdir()
    (small.target / "thesis.txt").write_text("years of work")
    with pytest.raises(AccessError, match="--overwrite"):
        small.make(replace=True)
    assert (small.target / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["directory", "dangling link", "fifo"])
def test_final_name_taken_by_something_else(tmp_path: Path, kind: str) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    _in_the_way(kind, small.target, tmp_path / "elsewhere")
    with pytest.raises(AccessError):
        small.make(replace=True)
    assert small.done == []


def test_replacing_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    for files in (1, 2):
        small = SmallOutput(tmp_path / f"m{files}", files)
        small.make()
        small.make(replace=True, stop_after=2)
        assert small.whole()
        small.make(replace=True)
        assert small.done == list(small.units)[2:]
        assert small.warnings == []
        assert small.whole()


@BOTH
def test_replacing_discards_an_unfinished_run_of_something_else(tmp_path: Path, files: int) -> None:
    small = SmallOutput(tmp_path / "m.gguf", files)
    small.make()
    small.make(replace=True, stop_after=1)
    small.make({**IDENTITY, "level": "Q8_0"}, replace=True)
    assert small.done == list(small.units)
    assert "another level" in small.warnings[0]
    assert small.whole()


@BOTH
def test_killed_while_putting_in_place_loses_nothing(tmp_path: Path, no_fsync: None, files: int) -> None:
    """From the moment the old artifact is gone until the new one stands, the finished partial is what there is."""
    gone = 0
    for call in range(1, 30):
        small = SmallOutput(tmp_path / f"{call}.gguf", files)
        small.make()
        small.make(replace=True, finish=False)
        with wrapped(_power_off(call)) as seen, contextlib.suppress(PowerLoss):
            small.make(replace=True)
        if len(seen) < call:
            break
        if not small.target.exists():
            gone += 1
            small.make(replace=True)
            assert (small.done, small.warnings) == ([], [])
        assert small.whole()
    assert gone


def _power_off(nth: int) -> Callable[[str, tuple[object, ...]], None]:
    count = [0]

    def before(_name: str, _arguments: tuple[object, ...]) -> None:
        count[0] += 1
        if count[0] >= nth:
            raise PowerLoss

    return before


@BOTH
def test_an_unfinished_run_without_its_journal_starts_again_with_a_warning(tmp_path: Path, files: int) -> None:
    small = SmallOutput(tmp_path / "m.gguf", files)
    beside, small.journal = small.journal, tmp_path / "journals" / "m.journal"
    small.make(stop_after=2)
    small.journal = beside
    small.make(stop_after=1)
    assert len(small.warnings) == 1
    assert "--checkpoint-dir" in small.warnings[0]
    assert str(small.partial) in small.warnings[0]
    small.make()
    assert (len(small.done), small.warnings) == (3 * files - 1, [])
    assert small.whole()


def test_no_journal_over_an_unfinished_run_leaves_no_journal(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(stop_after=2)
    without = SmallOutput(tmp_path / "m.gguf", journal=False)
    without.make()
    assert "--no-checkpoints" in without.warnings[0]
    assert without.whole()
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m.gguf.manifest.json"}


@BOTH
def test_without_a_journal_nothing_is_left_of_a_run_that_ends_early(tmp_path: Path, files: int) -> None:
    def fail(_: object) -> None:
        raise KeyboardInterrupt

    small = SmallOutput(tmp_path / "m.gguf", files, journal=False)
    with pytest.raises(KeyboardInterrupt):
        small.make(each=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_whose_journal_survived_alone(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make(stop_after=2)
    small.partial.unlink()
    small.make()
    assert len(small.done) == 3
    assert len(small.warnings) == 1
    assert "gone" in small.warnings[0]


def test_names_of_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"]
    shared = [journal_path(target, tmp_path / "journals") for target in targets]
    assert len(set(shared)) == 2
    assert {path.parent for path in shared} == {tmp_path / "journals"}
    monkeypatch.chdir(tmp_path)
    assert journal_path(Path("a/m.gguf"), tmp_path / "journals") == shared[0]
    assert journal_path(targets[0]) == journal_path(targets[0], Path("b/../a")) == tmp_path / "a" / "m.gguf.journal"


@BOTH
def test_a_refused_writer_leaves_nothing(tmp_path: Path, files: int) -> None:
    small, other = (SmallOutput(tmp_path / "m.gguf", files) for _ in range(2))
    small.journal = tmp_path / "journals" / "m.journal"
    if files == 2:
        other = SmallOutput(tmp_path / "m.gguf", 3)  # another split: other names inside the same directory

    def refused(_: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BusyError):
            other.make()
        assert sorted(tmp_path.rglob("*")) == before

    small.make(each=refused)
    assert small.whole()


def test_nothing_is_left_where_the_journal_cannot_be_opened(tmp_path: Path) -> None:
    for files in (1, 2):
        small = SmallOutput(tmp_path / f"{files}.gguf", files)
        small.journal.mkdir()
        with pytest.raises(AccessError):
            small.make()
        assert not small.partial.exists()


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AccessError):
        SmallOutput(tmp_path / "file" / "m.gguf").make()
    with pytest.raises(AccessError, match="too long"):
        SmallOutput(tmp_path / ("n" * 300)).make()
    real = os.open
    for number in (errno.EACCES, errno.EROFS, errno.EPERM):

        def refused(path: object, flags: int, *rest: int, number: int = number) -> int:
            if flags & os.O_CREAT:
                raise OSError(number, os.strerror(number))
            return real(path, flags, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(AccessError, match="not permitted") as caught:
            SmallOutput(tmp_path / "m.gguf").make()
        assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, 5),
        (errno.EDQUOT, 5),
        (errno.EFBIG, 5),
        (errno.EIO, 5),
        (errno.ESTALE, 5),
        (errno.EMFILE, 5),
        (errno.EACCES, 6),
        (errno.EPERM, 6),
        (errno.EROFS, 6),
        (errno.ELOOP, 6),
        (errno.EISDIR, 6),
        (errno.ENAMETOOLONG, 6),
    ],
)
def test_exit_codes_of_system_errors(number: int, code: int) -> None:
    with pytest.raises(LlmQuantizeError) as caught:
        fail_os(OSError(number, os.strerror(number)), "writing failed", Path("m.gguf"))
    assert caught.value.exit_code == code
    assert caught.value.file == "m.gguf"
    assert caught.value.found == os.strerror(number)
    assert caught.value.remedy


def _removed(small: SmallOutput) -> None:
    shutil.rmtree(small.target.parent)


def _unlinked(small: SmallOutput) -> None:
    small.partial.unlink()


def _replaced(small: SmallOutput) -> None:
    small.partial.unlink()
    small.partial.write_bytes(b"half of something else")


@pytest.mark.parametrize(
    ("accident", "told"),
    [(_removed, "the directory .* was removed"), (_unlinked, "it was removed"), (_replaced, "something else")],
)
def test_an_output_taken_away_is_noticed_at_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: Callable[[SmallOutput], None], told: str
) -> None:
    monkeypatch.setattr(output_module, "SYNC_BYTES", 1)
    small = SmallOutput(tmp_path / "out" / "m.gguf")
    with pytest.raises(BusyError, match=told) as caught:
        small.make(each=lambda _: accident(small))
    assert len(small.done) == 1  # the next unit already ends the run
    assert caught.value.file == str(small.partial)
    monkeypatch.undo()
    small.make()
    assert small.whole()


def test_finish_wants_every_unit(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    with small.open() as output, pytest.raises(IntegrityError):
        output.finish(MANIFEST)
    assert not small.target.exists()


def test_write_stays_inside_its_span(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    span, data = small.units["t0.1[0:1]"]
    with small.open() as output:
        for position, part in ((1, data), (-1, data[:2]), (len(data), b"x")):
            with pytest.raises(ValueError, match="span"):
                output.write(span, position, part)


def test_discard_removes_what_is_left_and_only_that(tmp_path: Path) -> None:
    for files in (1, 2):
        small = SmallOutput(tmp_path / f"m{files}", files)
        small.make(stop_after=2)
        discard_partial(small.target, small.journal)
    assert list(tmp_path.iterdir()) == []
    kept = SmallOutput(tmp_path / "kept", 2)
    kept.partial.mkdir()
    (kept.partial / "notes.txt").write_text("mine")
    discard_partial(kept.target, kept.journal)
    assert (kept.partial / "notes.txt").exists()


def _killed(run: Callable[[], None], nth: int) -> bool:
    """Whether ``run``, in a process of its own, was killed ahead of its ``nth`` persistence call; else it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with wrapped(killing(nth)):
                run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return bool(os.waitstatus_to_exitcode(status))


def _model_directory(tmp_path: Path, files: int = 2) -> SmallOutput:
    """A directory whose files only its manifest, which comes before them in the alphabet, calls ours."""
    return SmallOutput(tmp_path / "model", files, suffix=".safetensors")


@pytest.mark.parametrize("then", ["overwritten", "discarded", "overwritten by another"])
def test_a_directory_whose_replacement_was_killed_at_any_call(tmp_path: Path, no_fsync: None, then: str) -> None:
    """Overwriting again ends whole; finding the old one complete, or another in its place, leaves nothing beside it."""
    wanted = 3 if then == "overwritten by another" else 2
    call, killed = 0, True
    while killed:
        call += 1
        here = tmp_path / str(call)
        _model_directory(here).make()
        small = _model_directory(here, wanted)
        killed = _killed(partial(small.make, {**IDENTITY, "files": wanted}, replace=True), call)
        if then != "discarded":
            small.make({**IDENTITY, "files": wanted}, replace=True)
            assert small.whole(), call
        elif small.target.exists():
            discard_partial(small.target, small.journal)
            assert small.whole(), call
        else:  # killed between taking the old one away and putting the new one in its place
            small.make({**IDENTITY, "files": wanted})
        assert [path.name for path in here.iterdir()] == ["model"], call
    assert call > 30


def test_an_unfinished_directory_of_other_files_is_discarded(tmp_path: Path, no_fsync: None) -> None:
    """Its journal says what they are called."""
    _model_directory(tmp_path).make()
    other = _model_directory(tmp_path, 3)
    other.make({**IDENTITY, "files": 3}, replace=True, stop_after=4)
    discard_partial(other.target, other.journal, _model_directory(tmp_path).expected)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_something_else_where_the_replaced_has_to_wait_is_refused_before_work(tmp_path: Path) -> None:
    small = _model_directory(tmp_path)
    small.make()
    waiting = tmp_path / "model.replaced.partial"
    waiting.mkdir()
    (waiting / "notes.txt").write_text("mine")
    with pytest.raises(AccessError) as caught:
        small.make(replace=True)
    assert caught.value.file == str(waiting)
    assert small.done == []
    (waiting / "notes.txt").rename(waiting / "part-00001-of-00002.safetensors")  # half of an earlier one of ours
    small.make(replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_hidden_states_of_a_living_run_stay(tmp_path: Path) -> None:
    small = SmallOutput(tmp_path / "m.gguf")
    small.make()

    def tidied(output: ResumableOutput) -> None:
        place = output.hidden()
        (place / "0").write_bytes(b"states" * 1000)
        discard_partial(small.target, small.journal)
        discard_hidden(small.target)
        assert (place / "0").exists()
        assert hidden_bytes(small.target) >= 6000

    small.make(replace=True, each=tidied)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "m.gguf.manifest.json"]
    hidden_directory(small.target).mkdir()
    (hidden_directory(small.target) / "0").write_bytes(b"states")
    discard_hidden(small.target)
    assert not hidden_directory(small.target).exists()


def test_hidden_states_that_another_process_keeps_make_it_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "_PAUSE", 0.0)
    small = SmallOutput(tmp_path / "m.gguf")
    descriptor = leftovers.hold_hidden(small.target)
    with small.open() as output, pytest.raises(BusyError):
        output.hidden()
    os.close(descriptor)
    with small.open() as output:
        assert output.hidden().is_dir()


def test_journal_lines() -> None:
    records = [{"a": 1}, {"ü": "\n"}, {}]
    data = b"".join(record_line(record) for record in records)
    assert parse_journal(data) == (records, 0)
    assert parse_journal(data.replace(b"1", b"2", 1))[1] == 1
    assert parse_journal(b"\n\n" + data + b"deadbeef 3 [1]\nx\n \n  \n") == (records, 4)

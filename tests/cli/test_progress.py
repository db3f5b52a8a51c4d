"""One bar for a run: it never goes back, it is full only at the end, and the time that it tells is true."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from llm_quantize import events
from llm_quantize.cli import progress, run
from llm_quantize.cli.common import Mode
from llm_quantize.cli.progress import _Drawn, _Whole, seconds_text, told
from llm_quantize.compare.comparison import compare
from llm_quantize.options import MeasurementOptions, Options
from llm_quantize.pipeline import quantize


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("llm_quantize.cli.progress.time.monotonic", lambda: now[0])
    return now


def heard(into: list[float]) -> events.EventSink:
    def sink(event: events.Event) -> None:
        if isinstance(event, events.Step):
            assert event.whole is not None, event
            into.append(event.whole)

    return sink


def test_parts_have_parts() -> None:
    shares: list[float] = []
    first, second = events.parts(heard(shares), [1.0, 3.0])
    for part in events.parts(first, [1.0, 1.0]):
        part(events.Stage("begin"))
        part(events.Measure(done=1, total=2))
        part(events.Measure(done=2, total=2))
    second(events.Progress(done=5, total=10, unit="tokens"))
    second(events.Check("what", done=0, total=0))  # nothing to do is done
    assert shares == pytest.approx([0, 1 / 16, 1 / 8, 1 / 8, 3 / 16, 1 / 4, 5 / 8, 1])
    assert events.Measure(done=1, total=2).to_dict() == {"event": "measure", "done": 1, "total": 2}


def test_the_time_left_is_true_at_a_steady_rate(clock: list[float]) -> None:
    whole = _Whole()
    for second in range(100):
        clock[0] = 100.0 + second
        whole.hear(events.Measure(done=second, total=100, whole=second / 100))
        if second >= 10:
            assert whole.left == pytest.approx(100 - second, rel=0.05)
    assert whole.words() == "99% of all, 1 s left"


def test_what_was_done_before_is_not_counted_as_speed(clock: list[float]) -> None:
    """An earlier run did half; then a part that goes at a tenth of the rate that was thought."""
    whole = _Whole()
    whole.hear(events.Stage("resumed", whole=0.0))
    clock[0] += 1
    whole.hear(events.Stage("resumed", whole=0.5))
    for second in range(1, 101):
        clock[0] += 1
        whole.hear(events.Measure(done=second, total=200, whole=0.5 + second / 400))
    assert whole.left == pytest.approx(100, rel=0.1)
    share = whole.share
    whole.hear(events.Measure(done=0, total=1, whole=0.1))
    assert whole.share == share


def test_nothing_is_said_before_anything_is_known(clock: list[float]) -> None:
    whole = _Whole()
    assert whole.left is None
    whole.hear(events.Stage("begin", whole=0.0))
    clock[0] += 60
    whole.hear(events.Stage("begin", whole=0.0001))
    assert whole.words() == "0% of all"


def test_times_are_short() -> None:
    assert [seconds_text(value) for value in (0.4, 89, 91, 3600, 12_000)] == [
        "0 s", "89 s", "2 min", "60 min", "3 h 20 min",
    ]  # fmt: skip


def test_there_is_one_bar_for_all(clock: list[float]) -> None:
    bar = Bar(console=Console(file=io.StringIO()))
    drawn = _Drawn("compare", bar)
    places = []
    for part in events.parts(drawn, [1.0, 1.0]):
        part(events.Stage("one"))
        for done in range(1, 5):
            clock[0] += 2
            part(events.Measure(done=done, total=4))
            places.append((bar.tasks[0].completed, bar.tasks[0].total))
    assert len(bar.tasks) == 1
    assert places == [*((step / 8, 1.0) for step in range(1, 8)), (1.0, None)]
    assert bar.tasks[0].fields["left"] == "0 s left"


def test_no_bar_stands_at_its_end_while_the_run_goes_on(clock: list[float]) -> None:
    bar = Bar(console=Console(file=io.StringIO()))
    drawn = _Drawn("calibrate", bar)
    for done in (1, 2, 3, 4):
        clock[0] += 2
        drawn(events.Progress(done=done, total=4, unit="tokens"))
        assert bar.tasks[0].total == (4 if done < 4 else None)
    assert bar.tasks[0].percentage == 0  # it moves to and fro
    drawn(events.Progress(done=1, total=4, unit="tokens"))
    drawn(events.Stage("another"))
    assert (bar.tasks[0].total, bar.tasks[0].completed) == (None, 0)


def test_a_run_tells_how_far_it_is(demo_model: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    quantize(str(demo_model), levels=["Q4_0", "Q8_0"], output_dir=tmp_path, on_event=heard(shares))
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1  # putting the files in place comes after the last weight


def test_a_comparison_tells_how_far_it_is(demo_model: Path, tmp_path: Path) -> None:
    """Measuring moves with every window through every block, not block by block."""
    shares: list[float] = []
    measured: list[events.Measure] = []

    def sink(event: events.Event) -> None:
        heard(shares)(event)
        if isinstance(event, events.Measure):
            measured.append(event)

    options = Options(threads=1, measurement=MeasurementOptions(context=32, windows=4, prompts=("Once",)))
    compare(str(demo_model), tmp_path, variants=[("gguf", "Q8_0")], options=options, on_event=sink)
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert 0.5 < shares[-1] < 1
    totals = [event for event in measured if event.total == measured[0].total]
    # The source and one artifact through 6 blocks, the source's four windows once more, then a head each.
    assert len(totals) == 6 * 3 * 4 + 4
    assert totals[-1].done == totals[-1].total


def test_profile_prints_nothing_into_its_own_bar(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live: list[bool] = [False]
    original = told

    class Watched:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.inner = original(*arguments, **options)

        def __enter__(self) -> Any:
            live[0] = True
            return self.inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            live[0] = False
            return self.inner.__exit__(*error)

    def echo(*words: Any, **options: Any) -> None:
        assert not live[0] or options.get("err")
        printed.append(str(words[0]))

    printed: list[str] = []
    monkeypatch.setattr("llm_quantize.cli.analyze_profile.told", Watched)
    monkeypatch.setattr("llm_quantize.cli.analyze_profile.click.echo", echo)
    words = ["analyze", "profile", str(demo_model), "--windows", "1", "--context", "16", "--types", "q4_0"]
    assert run([*words, "--profile", str(tmp_path / "p.json"), "-o", str(tmp_path / "r.json"), "--dry-run"]) == 0
    assert "of memory" in printed[-1]
    assert progress.EVERY > 0
    capsys.readouterr()


def test_lines_without_a_terminal_say_how_far_all_is(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with told(Mode(False, 0, False), "quantize") as sink:
        part, _ = events.parts(sink, [1.0, 1.0])
        for done in range(11):
            part(events.Measure(done=done, total=10))
            clock[0] += 6
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantize: 0% (0% of all)"
    assert lines[-1] == "quantize: 100% (50% of all, 60 s left)"

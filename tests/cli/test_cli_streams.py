"""Standard streams that go away, fail, or cannot say a character; text from input that looks like markup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import gguf
import pytest

from llm_quantize.cli import run
from llm_quantize.cli.common import Mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.streams import json_text
from llm_quantize.events import Progress

HOSTILE = "[/foo][red]x\x1b[2J"


def start(*words: str | Path, **facts: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llm_quantize", *map(str, words)]
    return subprocess.Popen(command, text=True, **facts)  # type: ignore[call-overload, no-any-return]


def shell(redirection: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "llm_quantize", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("plan", "-q", "Q4_K_M", "-v"), ("info", "--json"), ("info",)])
def test_a_reader_of_the_output_that_went_away(demo_model: Path, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(words[0], demo_model, *words[1:], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_head(demo_model: Path) -> None:
    words = (sys.executable, "-m", "llm_quantize", "plan", str(demo_model), "-q", "Q4_K_M", "-v")
    script = '{ "$@"; echo "rc $?" >&2; } | head -1'
    done = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("token_embd.weight\t2048 x 256\t")
    assert done.stderr == "rc 0\n"


def test_a_verdict_survives_its_reader(demo_model: Path, tmp_path: Path) -> None:
    assert run(["-s", "quantize", str(demo_model), "-q", "Q8_0", "-o", str(tmp_path)]) == 0
    path = tmp_path / "demo-llama-Q8_0.gguf"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    reader, writer = os.pipe()
    os.close(reader)
    process = start("verify", path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 8


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("way", ["vanished", "closed", "full"])
def test_a_job_needs_nobody_to_watch(demo_model: Path, tmp_path: Path, way: str, options: tuple[str, ...]) -> None:
    words = ("quantize", demo_model, "-q", "Q8_0", "-o", tmp_path, *options)
    if way == "vanished":
        reader, writer = os.pipe()
        os.close(reader)
        process = start(*words, stdout=subprocess.DEVNULL, stderr=writer)
        os.close(writer)
        code = process.wait()
    else:
        code = shell("2>&-" if way == "closed" else "2>/dev/full", *words).returncode
    assert code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["demo-llama-Q8_0.gguf", "demo-llama-Q8_0.gguf.manifest.json"]
    assert run(["verify", str(tmp_path / names[0])]) == 0


def test_a_sink_keeps_its_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", broken)
    for as_json in (False, True):
        with told(Mode(as_json, 0, False), "test") as sink:
            sink(Progress(1, 1))
    with told(Mode(False, 0, False), "test") as sink, pytest.raises(TypeError):
        sink(Progress(cast(int, None), 1))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_output_that_cannot_be_written(demo_model: Path, options: tuple[str, ...]) -> None:
    full = shell(">/dev/full", "info", demo_model, *options)
    assert full.returncode == 5
    assert full.stderr.startswith("llm-quantize: standard output cannot be written\n  found: No space left on device\n")
    closed = shell(">&-", "info", demo_model, *options)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", "")
    everything = shell("<&- >&- 2>&-", "info", demo_model, *options)
    assert everything.returncode == 0


def test_a_narrow_encoding(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "モデル").symlink_to(demo_model)
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for options in ((), ("--json",)):
        process = start("info", tmp_path / "モデル", *options, stdout=-1, stderr=-1, env=narrow)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert "\\u30e2\\u30c7\\u30eb" in out
        if options:
            assert json.loads(out)["directory"].endswith("モデル")
    process = start("info", tmp_path / "無", stdout=-1, stderr=-1, env=narrow)
    assert "\\u7121" in process.communicate()[1]
    assert process.returncode == 2


def test_json_says_half_a_pair_of_surrogates() -> None:
    assert json.loads(json_text({"name": "a\udcff"})) == {"name": "a\udcff"}


def foreign(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(HOSTILE)
    writer.add_string("tokenizer.ggml.model", HOSTILE)
    writer.add_string("note", HOSTILE)
    import numpy as np

    writer.add_tensor("[/bold]" + HOSTILE, np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("terminal", [False, True])
def test_input_is_neither_markup_nor_escapes(
    demo_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    escaped = HOSTILE.replace("\x1b", "\\x1b")
    assert run(["info", "--tensors", str(foreign(tmp_path / "[b]x.gguf"))]) == 0
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert out.count(escaped) == 6
    assert "[b]x.gguf" in out
    model, place = tmp_path / "m[" / "b]", tmp_path / "o[red][" / "o]"  # m[/b] and [/o] in their paths
    model.parent.mkdir()
    model.symlink_to(demo_model)
    level = ["-q", "Q8_0", "-n", "name"]
    for words in (["info"], ["plan", *level, "-v"], ["quantize", *level, "-o", str(place)]):
        assert run([words[0], str(model), *words[1:]]) == 0
        expected = {"info": "m[/b]", "plan": "name-Q8_0.gguf", "quantize": "o[red][/o]/name-Q8_0.gguf"}
        assert expected[words[0]] in capsys.readouterr().out
    assert run(["verify", str(place / "name-Q8_0.gguf"), "--source", str(model)]) == 0
    assert "o[red][/o]/name-Q8_0.gguf" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "[b]x.gguf")]) in (0, 8)
    assert "\x1b[2J" not in "".join(capsys.readouterr())

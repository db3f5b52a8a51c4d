"""How a runtime in a process of its own is asked and understood, with scripts that stand for runtimes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.errors import MissingExtraError, NumericPolicyError, ResourceError, UnsupportedError, UsageError
from llm_quantize.events import Event, EventSink, Generated
from llm_quantize.runtimes import generate, isolated, transformers, vllm
from llm_quantize.runtimes.base import Reply, Request
from llm_quantize.runtimes.isolated import Worker

WORKERS = Path(isolated.__file__).parent / "workers"
HEAD = f"""
import json, os, subprocess, sys, time
import numpy as np
from pathlib import Path
sys.path.insert(0, {str(WORKERS)!r})
from telling import start, versions
def answer(**facts):
    return {{"texts": [], "tokens": [], "versions": {{}}, "kernels": [], "seconds": {{}}}} | facts
"""


def ask(tmp_path: Path, body: str, request: Request | None = None, **settings: str) -> Reply:
    """The reply of a script whose ``main`` has the lines of ``body``."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    script = tmp_path / "script.py"
    script.write_text(f"{HEAD}\ndef main(folder, request):\n{lines}\nstart(main)\n")
    fake = Worker("Fake", str(script), "LLM_QUANTIZE_FAKE", ("numpy",), "pip install fake")
    return isolated.run(fake, tmp_path, request or Request(), settings=settings, options={"own": 7})


def test_request_and_reply_arrive_whole(tmp_path: Path) -> None:
    windows = np.arange(6, dtype=np.int32).reshape(2, 3)
    body = """
windows = np.load(folder / "windows.npy")
np.save(folder / "logprobs.npy", windows[..., None] * np.float32([-1, -2]))
return answer(texts=request["prompts"], tokens=[[request["own"], request["max_tokens"]]],
              kernels=[request["dtype"], os.environ["A_SETTING"], os.environ["OMP_NUM_THREADS"]],
              versions=versions("numpy", "no-such-package"), seconds={"load": 1.5})
"""
    request = Request(windows, ("é\n", "b"), max_tokens=5, dtype="bfloat16", threads=3)
    reply = ask(tmp_path, body, request, A_SETTING="on")
    assert reply.logprobs is not None
    np.testing.assert_array_equal(reply.logprobs, windows[..., None] * np.float32([-1, -2]))
    assert reply.texts == ("é\n", "b")
    assert reply.tokens == ((7, 5),)
    assert reply.kernels == ("bfloat16", "on", "3")
    assert reply.versions == {"numpy": np.__version__}
    assert reply.seconds == {"load": 1.5}
    assert ask(tmp_path, "return answer()").logprobs is None


def test_nothing_reaches_the_hub_and_caches_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    body = """
names = ["HF_HUB_OFFLINE", "HF_HOME", "TMPDIR", "PYTHONPATH"]
return answer(texts=[os.environ.get(name, "none") for name in names])
"""
    offline, home, temporary, path = ask(tmp_path, body).texts
    assert (offline, path) == ("1", "none")
    assert home == temporary
    assert not Path(home).exists()


def test_words_of_the_runtime_are_kept(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ask(tmp_path, 'raise ValueError("Unsupported config:\\n  bits=3, sym=True")')
    assert caught.value.found == "ValueError: Unsupported config:\n  bits=3, sym=True"
    assert caught.value.file == str(tmp_path)
    assert not isinstance(caught.value, MissingExtraError)


def test_a_package_that_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match="pip install fake") as caught:
        ask(tmp_path, "import no_such_module_at_all")
    assert caught.value.found == "ModuleNotFoundError: No module named 'no_such_module_at_all'"


def test_a_process_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="exit status -6") as caught:
        ask(tmp_path, 'print("illegal tile", file=sys.stderr, flush=True)\nos.abort()')
    assert caught.value.found is not None
    assert "illegal tile" in caught.value.found
    with pytest.raises(UnsupportedError, match="exit status 3"):
        ask(tmp_path, "os._exit(3)")


def test_time_is_bounded_and_children_go_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    body = f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path({str(note)!r}).write_text(str(child.pid))
print("still loading", flush=True)
time.sleep(60)
"""
    begun = time.monotonic()
    with pytest.raises(ResourceError, match="longer than 3 s") as caught:
        ask(tmp_path, body, Request(timeout=3))
    assert time.monotonic() - begun < 30
    assert caught.value.found == "still loading"
    for _ in range(100):
        if not _alive(int(note.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("the child's child lives on")


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    body = 'np.save(folder / "logprobs.npy", np.float32([[[0, 0], [np.nan, 0]]]))\nreturn answer()'
    with pytest.raises(NumericPolicyError, match="1 of 2 positions"):
        ask(tmp_path, body, Request(np.zeros((1, 2), np.int32)))


def test_interpreters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Worker("Fake", "x.py", "LLM_QUANTIZE_FAKE", ("no_such_module_at_all",), "pip install fake")
    with pytest.raises(MissingExtraError, match="pip install fake"):
        isolated.interpreter(fake)
    monkeypatch.setenv("LLM_QUANTIZE_FAKE", str(tmp_path / "python"))
    with pytest.raises(UsageError, match="LLM_QUANTIZE_FAKE"):
        isolated.interpreter(fake)
    monkeypatch.setenv("LLM_QUANTIZE_FAKE", sys.executable)
    assert isolated.interpreter(fake) == sys.executable


@pytest.mark.parametrize("runtime", [vllm.VLLM, transformers.TRANSFORMERS])
def test_scripts_are_there_and_import_nothing_of_ours(runtime: Worker) -> None:
    text = (WORKERS / runtime.script).read_text()
    assert not re.search(r"^\s*(from|import) llm_quantize", text, re.MULTILINE)
    assert "pip install" in runtime.remedy


def test_text_of_a_directory_comes_from_the_runtime_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    asked = []

    def answer(directory: Path, request: Request) -> Reply:
        asked.append((directory, request))
        return Reply(None, ("and so on",), ((1, 2),), {}, (), {"generate": 0.5}, 3)

    def speak(
        _worker: Worker, directory: Path, request: Request, on_event: EventSink, **_more: Any
    ) -> Generator[str, None, None]:
        yield from ("and", " so on")
        on_event(isolated.generated(answer(directory, request)))

    monkeypatch.setattr(vllm, "run", answer)
    monkeypatch.setattr(transformers, "written_once", speak)
    for runtime in ("vllm", "transformers", None):
        heard: list[Event] = []
        pieces = list(
            generate(
                tmp_path, "Once", max_tokens=3, temperature=0.5, seed=2, threads=1, runtime=runtime,
                on_event=heard.append,
            )
        )  # fmt: skip
        assert "".join(pieces) == "and so on"
        assert heard == [Generated(tokens=2, seconds=0.5, threads=3)]
    request = Request(None, ("Once",), max_tokens=3, temperature=0.5, seed=2, threads=1)
    assert asked == [(tmp_path, request)] * 3
    with pytest.raises(UsageError, match="transformers or vllm"):
        list(generate(tmp_path, "Once", runtime="llama.cpp"))
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        list(generate(tmp_path / "a.gguf", "Once", runtime="vllm"))


def test_vllm_gets_the_context_that_a_request_needs(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"max_position_embeddings": 600}')
    text = Request(prompts=("abc", "é"), max_tokens=20)
    assert vllm._context(tmp_path, text) == 3 + 20 + 512
    assert vllm._context(tmp_path, Request(np.zeros((1, 600), np.int32))) == 601
    config.write_text('{"text_config": {"max_position_embeddings": 64}}')
    assert vllm._context(tmp_path, text) == 64
    config.unlink()
    assert vllm._context(tmp_path, text) == 535

"""Conversations: the model stays loaded, all that was said is asked with, and what was read is not read again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.errors import MissingExtraError, ResourceError, UnsupportedError, UsageError
from llm_quantize.events import Caution, Event, Generated, ignore
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes import converse, generate, runtime_for, session, transformers
from llm_quantize.runtimes.base import Answered, Prompt, Request, talk
from llm_quantize.runtimes.chat import in_template
from llm_quantize.runtimes.conversation import Conversation
from llm_quantize.runtimes.isolated import Worker
from tests.runtimes.test_isolated import WORKERS

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = "<|endoftext|>"
FORMATS = {"llama.cpp": ("gguf", "F32"), "transformers": None, "ctranslate2": ("ctranslate2", "float32")}
REUSES = {"llama.cpp", "transformers"}


def talking_model(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of the directory ``model`` with a chat template."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").write_text(template)
    settings: dict[str, Any] = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": EOS, "eos_token": EOS}))
    return copy


@pytest.fixture(scope="module")
def models(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{runtime: the built-in model, with a chat template, in its format}."""
    folder = tmp_path_factory.mktemp("talking")
    source = talking_model(demo_model, folder)
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    made = {"transformers": source}
    for runtime, form in FORMATS.items():
        if form is not None:
            name, level = form
            made[runtime] = quantize(str(source), name, levels=[level], output_dir=folder, options=options)[0].path
    return made


def heard_to_the_end(writing: Generator[str, None, Answered]) -> tuple[list[str], Answered]:
    """The pieces of an answer, and how it ended."""
    pieces: list[str] = []
    while True:
        try:
            pieces.append(next(writing))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("runtime", FORMATS)
def test_each_answer_is_that_to_all_that_was_said(models: dict[str, Path], runtime: str) -> None:
    """The text of a fresh run of the whole history in the template, greedily, whatever was kept of it in a cache."""
    heard: list[Event] = []
    exact = {"dtype": "float32", "threads": 1}  # in bfloat16, how a prompt is read in parts decides between near words
    with converse(models[runtime], max_tokens=12, system="Be brief.", on_event=heard.append, **exact) as told:
        assert told.context == 1024
        for turn, text in enumerate(("The old man", "and then", "日本 <b>")):
            asked = [*told.messages, *talk(text)]
            pieces, answered = heard_to_the_end(told.say(text))
            assert told.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
            assert answered.told.tokens <= 12
            assert len(pieces) > 4
            assert answered.end in ("limit", "end")
            assert (answered.reused > 0) == (turn > 0 and runtime in REUSES)
            request = Request(chat=True, **exact)  # type: ignore[arg-type]
            with runtime_for(models[runtime]).converse(models[runtime], request, ignore) as fresh:
                assert heard_to_the_end(fresh.answer(fresh.prompt(asked), 12, lambda: False))[0] == pieces
            if runtime == "transformers":
                (whole,) = in_template(models[runtime], [asked])
                assert "".join(pieces) == continued_by_transformers(models[runtime], whole)
        assert [message["role"] for message in told.messages] == ["system", *["user", "assistant"] * 3]
        told.reset()
        assert told.messages == [{"role": "system", "content": "Be brief."}]
        again, _ = heard_to_the_end(told.say("The old man"))
        assert again
    assert heard == []


def continued_by_transformers(model: Path, text: str) -> str:
    """What transformers itself writes after a text with its special tokens, in one go."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("runtime", FORMATS)
def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(models: dict[str, Path], runtime: str) -> None:
    most = 300  # so many that the runtime is not done before it is stopped, on a busy machine too
    with converse(models[runtime], threads=1, max_tokens=most) as told:
        pieces: list[str] = []
        writing = told.say("The old man", lambda: len(pieces) >= 3)
        while True:
            try:
                pieces.append(next(writing))
            except StopIteration as end:
                answered: Answered = end.value
                break
        assert answered.end == "stopped"
        assert 3 <= answered.told.tokens < most
        assert told.messages == [*talk("The old man"), {"role": "assistant", "content": "".join(pieces)}]
        # Closed early instead: the same, and the next answer is to the next question.
        told.reset()
        writing = told.say("The old man")
        first = next(writing)
        writing.close()
        assert told.messages[-1]["content"] == first
        told.reset()
        after, answered = heard_to_the_end(told.say("and then"))
        assert answered.end in ("limit", "end")
        told.reset()
        assert heard_to_the_end(told.say("and then"))[0] == after


def test_a_prompt_can_be_stopped_while_it_is_read(models: dict[str, Path]) -> None:
    """Then nothing was said, and the message is taken back."""
    asked = iter([False, True])
    with converse(models["llama.cpp"], threads=1, context=4096) as told:
        pieces, answered = heard_to_the_end(told.say("a b " * 900, lambda: next(asked)))
        assert (pieces, answered.end, answered.told.tokens, told.messages) == ([], "stopped", 0, [])
        assert heard_to_the_end(told.say("The old man", lambda: bool(told.messages[2:])))[0]


@pytest.mark.parametrize("runtime", FORMATS)
def test_a_full_context_leaves_out_the_oldest(models: dict[str, Path], runtime: str) -> None:
    heard: list[Event] = []
    with converse(
        models[runtime], threads=1, context=96, max_tokens=10, system="Be brief.", on_event=heard.append
    ) as told:
        assert told.context == 96
        for count in range(5):
            heard_to_the_end(told.say(f"This is message {count}"))
        said = [message["content"] for message in told.messages]
        assert said[0] == "Be brief."
        assert "This is message 0" not in said
        assert said[-2] == "This is message 4"
        warnings = [event.text for event in heard if isinstance(event, Caution)]
        assert warnings
        assert warnings[0].startswith("the context of 96 tokens is full")
        kept = told.messages
        with pytest.raises(UsageError, match="does not fit the context"):
            next(told.say("too long " * 100))
        assert told.messages == kept
        # The answer ends where the context does.
        told.reset()
    with converse(models[runtime], threads=1, context=40) as told:
        _, answered = heard_to_the_end(told.say("The old man"))
        assert answered.end in ("limit", "end")
        assert answered.told.tokens + (answered.told.prompt_tokens or 0) <= 41


@pytest.mark.parametrize("runtime", ["llama.cpp", "ctranslate2"])
def test_draws_are_those_of_the_seed(models: dict[str, Path], runtime: str) -> None:
    def drawn(seed: int) -> list[str]:
        with converse(models[runtime], threads=1, max_tokens=8, temperature=2.0, seed=seed) as told:
            return ["".join(told.say("The old man")) for _ in range(2)]

    one = drawn(1)
    assert drawn(1) == one
    assert drawn(2) != one
    assert one[0] != one[1]


@pytest.mark.parametrize("runtime", FORMATS)
def test_a_model_without_a_template_is_refused(demo_model: Path, tmp_path: Path, runtime: str) -> None:
    model, form = demo_model, FORMATS[runtime]
    if form is not None:
        options = Options(threads=1, method=MethodOptions(method="rtn"))
        model = quantize(str(demo_model), form[0], levels=[form[1]], output_dir=tmp_path, options=options)[0].path
    with pytest.raises(UnsupportedError, match="no chat template") as caught, converse(model, threads=1):
        pass
    assert caught.value.remedy == "run without --chat"


def test_what_has_no_effect_is_refused(models: dict[str, Path]) -> None:
    for more, words in (({"top_p": 0.5}, "--top-p has no effect"), ({"gpu_layers": 1}, "no use for --gpu-layers")):
        with pytest.raises(UsageError, match=words), converse(models["transformers"], **more):  # type: ignore[arg-type]
            pass


class Counting:
    """A session whose tokens are words, and whose answers are numbers."""

    context = 20

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        text = " ".join(message["content"] for message in messages)
        return Prompt(text, len(text.split()))

    def answer(self, prompt: Prompt, most: int, stop: Callable[[], bool]) -> Generator[str, None, Answered]:
        self.asked.append(prompt.text.split())
        for number in range(min(most, 2)):
            yield f"{number} "
        return Answered(Generated(2, 1.0, 1), "end")


def test_what_is_left_out_is_as_little_as_half_a_context() -> None:
    counting, heard = Counting(), []
    told = Conversation(counting, system="S", max_tokens=5, on_event=heard.append)
    for name in "abcdefg":
        list(told.say(f"{name} {name}"))
    # 1 + 4 for each exchange: the fourth message would leave no room for 5 of 20.
    assert [len(asked) for asked in counting.asked] == [3, 7, 11, 15, 7, 11, 15]
    assert counting.asked[4] == ["S", "d", "d", "0", "1", "e", "e"]
    assert len(heard) == 1


# How a session is spoken with, with scripts that stand for runtimes.

SPEAKER = f"""
import os, sys, time
sys.path.insert(0, {str(WORKERS)!r})
from telling import start
class Speaker:
    trained = 50
    def __init__(self, request):
        self.request = request
    def encode(self, text, special):
        return [ord(c) for c in text] + [0] * special
    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")
    def write(self, ids, most, put):
        BODY
def main(folder, request):
    raise AssertionError
start(main, Speaker)
"""


def speaker(tmp_path: Path, body: str) -> Worker:
    """A runtime whose ``write`` has the lines of ``body``."""
    script = tmp_path / "script.py"
    script.write_text(SPEAKER.replace("BODY", "\n        ".join(body.strip().splitlines())))
    return Worker("Fake", str(script), "LLM_QUANTIZE_FAKE", ("numpy",), "pip install fake")


def test_text_is_told_while_it_is_written(tmp_path: Path) -> None:
    """In pieces, before the process ends, with characters whole that were written in two parts."""
    body = """
for token in b"one tw\\xc3\\xb6 ":
    put(token)
    time.sleep(0.02)
return 1
"""
    heard: list[Event] = []
    request = Request(prompts=("ab",), threads=2, max_tokens=50)
    pieces = list(session.written_once(speaker(tmp_path, body), tmp_path, request, heard.append))
    assert pieces == ["o", "n", "e", " ", "t", "w", "ö", " "]
    warning, told = heard
    assert isinstance(warning, Caution)
    assert "3 tokens of prompt and up to 50 of answer pass the 50" in warning.text
    assert isinstance(told, Generated)
    assert (told.tokens, told.threads, told.prompt_tokens) == (9, 2, 2)
    assert 0.1 < told.seconds < 5


def test_who_stops_reading_stops_the_writing(tmp_path: Path) -> None:
    body = f"""
Path = __import__("pathlib").Path
for token in range(65, 90):
    Path({str(tmp_path)!r}, "written").write_text(chr(token))
    put(token)
    time.sleep(0.1)
return 0
"""
    writing = session.written_once(speaker(tmp_path, body), tmp_path, Request(prompts=("a",)), ignore)
    assert next(writing) == "A"
    began = time.monotonic()
    writing.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 2
    time.sleep(0.3)
    assert (tmp_path / "written").read_text() < "F"


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ('raise ValueError("no kernel")', UnsupportedError, "ValueError: no kernel"),
        ("import no_such_module_at_all", MissingExtraError, "no_such_module_at_all"),
        ('print("illegal tile", flush=True)\nos.abort()', UnsupportedError, "illegal tile"),
        ('put(65)\nraise ValueError("later")', UnsupportedError, "ValueError: later"),
    ],
)
def test_failures_are_told_in_its_words(tmp_path: Path, body: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        list(session.written_once(speaker(tmp_path, body), tmp_path, Request(prompts=("a",)), ignore))
    assert words in str(caught.value.found)  # type: ignore[attr-defined]


def test_a_speaker_that_cannot_be_made(tmp_path: Path) -> None:
    worker = speaker(tmp_path, "return 0")
    script = Path(worker.script)
    script.write_text(script.read_text().replace("self.request = request", 'raise OSError("no such weights")'))
    with pytest.raises(UnsupportedError, match="does not run") as caught:
        list(session.written_once(worker, tmp_path, Request(prompts=("a",)), ignore))
    assert caught.value.found == "OSError: no such weights"


VLLM = """
class SamplingParams:
    def __init__(self, **given):
        self.given = given

class Step:
    def __init__(self, ids, finished):
        self.outputs, self.finished, self.num_cached_tokens = [self], finished, 4
        self.token_ids = ids

class Engine:
    class model_config:
        max_model_len = 64
    def __init__(self):
        self.open = {}
    def add_request(self, name, prompt, params):
        self.open[name] = [0, prompt["prompt_token_ids"], params.given]
    def has_unfinished_requests(self):
        return bool(self.open)
    def abort_request(self, names):
        for name in names:
            del self.open[name]
    def step(self):
        steps = []
        for name, state in list(self.open.items()):
            state[0] += 2
            most = state[2]["max_tokens"]
            finished = state[0] >= most
            steps.append(Step(list(range(30, 30 + min(most, state[0]))), finished))
            if finished:
                del self.open[name]
        return steps

class LLM:
    def __init__(self, **given):
        assert given["enable_prefix_caching"] and given["max_model_len"] == 64
        self.llm_engine = Engine()
"""


def test_vllm_is_asked_step_by_step(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that stands for vLLM, with what its engine is asked for: the real one is not installed here."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", str(python))
    with converse(models["transformers"], runtime="vllm", context=64, max_tokens=7, threads=1) as told:
        pieces, answered = heard_to_the_end(told.say("The old man"))
        assert (answered.told.tokens, answered.end, answered.reused) == (7, "limit", 4)
        heard: list[str] = []
        writing = told.say("on", lambda: bool(heard))
        heard.append(next(writing))
        more, stopped = heard_to_the_end(writing)
        assert stopped.end in ("stopped", "limit")
        assert "".join([*heard, *more]).startswith("".join(pieces)[:1])
        told.reset()
        assert heard_to_the_end(told.say("The old man"))[0] == pieces


def test_the_text_of_one_prompt_is_that_of_the_conversation(models: dict[str, Path]) -> None:
    one = "".join(generate(models["transformers"], "The old man", chat=True, max_tokens=9, threads=1))
    with converse(models["transformers"], max_tokens=9, threads=1) as told:
        assert "".join(told.say("The old man")) == one
    request = Request(prompts=("The old man",), chat=True, max_tokens=9, threads=1)
    assert transformers.run(models["transformers"], request).texts[0] == one


def test_a_runtime_that_dies_in_the_middle_ends_the_conversation(tmp_path: Path, models: dict[str, Path]) -> None:
    worker = speaker(tmp_path, "put(65)\nos._exit(3)")
    with session.talking(worker, models["transformers"], Request(threads=1, chat=True)) as talking:
        told = Conversation(talking)
        writing = told.say("x")
        assert next(writing) == "A"
        with pytest.raises(UnsupportedError, match="exit status 3"):
            next(writing)
        with pytest.raises((UnsupportedError, ResourceError)):
            next(told.say("y"))

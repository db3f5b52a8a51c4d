"""Chat templates in their process: the text that Hugging Face gives, many conversations for one start, and limits."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from llm_quantize.errors import MalformedInputError, MissingExtraError, ResourceError, UnsupportedError
from llm_quantize.models import chat_template
from llm_quantize.models.chat_template import ChatTemplate, render

TALK = [{"role": "user", "content": "x"}]
FILE = Path("m.gguf")


def test_loops_know_their_place() -> None:
    template = (
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ loop.last }}{% else %}none{% endfor %}"
        "{% for k, v in messages[0].items() if k != 'role' %}{{ k }}={{ v * 2 }}{% endfor %}{{ '%s' % 2 ** 3 }}"
    )
    messages = [{"role": "user", "content": "x"}] * 2
    assert render(template, messages, bos="", eos="", file=FILE) == "1/2False2/2Truecontent=xx8"
    assert render(template.split("{% for k")[0], [], bos="", eos="", file=FILE) == "none"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no system role') }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=range(6),
)
def test_a_hostile_template_is_refused(template: str) -> None:
    with pytest.raises(UnsupportedError, match="cannot be rendered"):
        render(template, [{"role": "user", "content": "x"}], bos="", eos="", file=FILE)


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops": "{% for a in 'abcdefgh' %}" * 15 + "{% endfor %}" * 15,
    "a macro": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "a long text": "{{ 'a' * 3000000000 }}",
    "a large number": "{{ 99999 ** (99999 ** 2) > 1 }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "plus": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a format": "{{ '{:>3999999999}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(3999999999) }}",
    "join": "{{ range(99999) | join('a' * 100000) }}",
    "in": "{% set big = range(99999) | list %}{% for i in range(99999) %}{{ -1 in big }}{% endfor %}",
    "center": "{{ 'a' | center(3999999999) }}",
    "wordwrap": "{{ ('a' * 20000000) | wordwrap(1) }}",
    "an indent": "{{ [[[[1]]]] | tojson(indent=999999999) }}",
    "a sum": "{% set l = [[1] * 99999] %}{{ (l * 99999) | sum(start=[]) }}",
    "a sort": "{% for i in range(9999) %}{{ range(99999) | sort(reverse=true) | first }}{% endfor %}",
    "a long answer": "{{ 'abcd' * 9000000 }}",
    "a long refusal": "{{ raise_exception('abcd' * 99000000) }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_refused(kind: str) -> None:
    before = os.times()
    with pytest.raises((MalformedInputError, UnsupportedError)) as caught:
        render(ENDLESS[kind], TALK, bos="", eos="", file=FILE, seconds=1)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 1  # of this process
    assert after.children_user + after.children_system - before.children_user - before.children_system < 4
    if kind != "a long refusal":
        assert "too much time or memory" in str(caught.value)
        assert "remove it from the model's files" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_one_process_renders_many_conversations() -> None:
    with ChatTemplate("{{ messages[0].content }}{{ bos_token }}{% if add_generation_prompt %}>{% endif %}",
                      bos="<s>", eos="", file=FILE) as template:  # fmt: skip
        assert template.render(TALK) == "x<s>>"
        assert template._process is not None
        pid = template._process.pid
        began = time.monotonic()
        for number in range(500):
            text = f"{number} \ud800 日本 \U0001f600\n"
            assert template.render([{"role": "user", "content": text}], reply=False) == f"{text}<s>"
        assert time.monotonic() - began < 20
        assert template._process.pid == pid


def test_a_refused_conversation_does_not_end_the_process() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}fine"
    with ChatTemplate(source, bos="", eos="", file=FILE) as template:
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="no system"):
                template.render([{"role": "system", "content": "x"}])
            assert template.render(TALK) == "fine"


def test_all_conversations_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that takes a little less than the limit each time is ended, too."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS_EACH", 0.01)
    slow = "{% for i in range(99999) %}{% endfor %}" * 20
    template = ChatTemplate(slow, bos="", eos="", file=FILE, seconds=1)
    with pytest.raises(MalformedInputError, match="too much time"):
        all(template.render(TALK) == "" for _ in range(1000))


def test_the_process_ends_with_the_object() -> None:
    template = ChatTemplate("x", bos="", eos="", file=FILE)
    template.render(TALK)
    assert template._process is not None
    pid = template._process.pid
    del template
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_is_killed_says_so() -> None:
    with ChatTemplate("x", bos="", eos="", file=FILE) as template:
        template.render(TALK)
        assert template._process is not None
        os.kill(template._process.pid, signal.SIGKILL)
        with pytest.raises(MalformedInputError, match="signal 9"):
            template.render(TALK)
        assert template.render(TALK) == "x"  # another process


def test_a_python_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match="exit status 1"):
        render("x", TALK, bos="", eos="", file=FILE)
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(ResourceError, match="no more processes"):
        render("x", TALK, bos="", eos="", file=FILE)


def test_without_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="llamacpp"):
        render("x", TALK, bos="", eos="", file=FILE)


def test_secrets_of_the_environment_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with ChatTemplate("x", bos="", eos="", file=FILE) as template:
        template.render(TALK)
        assert template._process is not None
        own = Path(f"/proc/{template._process.pid}/environ").read_bytes()
    assert b"secret" not in own

"""Chats with model directories: the text that transformers would set, rendered where it can do no harm."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.cli import run as command
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.events import ignore
from llm_quantize.models import chat_template
from llm_quantize.runtimes import transformers
from llm_quantize.runtimes.base import Request, talk
from llm_quantize.runtimes.chat import in_template

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{{ -1 in range(99999) | list }}{% endfor %}"
EOS = "<|endoftext|>"


@pytest.fixture
def talking(demo_model: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(demo_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    settings: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": EOS, "__type": "AddedToken"}, "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_the_text_is_that_of_transformers(talking: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(talking)
    prompts = ["The old man", "a\n日本 <b>"]
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    expected = [tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in talks]
    assert list(in_template(talking, [talk(prompt) for prompt in prompts])) == expected
    assert expected[0] == f"{EOS}<user>The old man{EOS}\n<assistant>"


def test_both_ways_into_transformers_continue_it_alike(talking: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(talking)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The old man"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        output = AutoModelForCausalLM.from_pretrained(talking).generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    request = Request(prompts=("The old man",), max_tokens=8, chat=True)
    assert "".join(transformers.generate(talking, request, ignore)) == expected
    assert transformers.run(talking, request).texts[0] == expected


def test_an_endless_template_stops_no_command(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    (talking / "chat_template.jinja").write_text(ENDLESS)
    request = Request(prompts=("x",), max_tokens=2, chat=True)
    with pytest.raises(MalformedInputError, match="too much time"):
        next(transformers.generate(talking, request, ignore))
    with pytest.raises(MalformedInputError, match="too much time"):
        transformers.run(talking, request)
    assert command(["run", str(talking), "x", "--chat"]) == 3
    assert "chat template takes too much time" in capsys.readouterr().err


def test_an_endless_template_does_not_hang_a_calibration(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The built-in mix holds conversations, so that a plain run renders the template."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    (talking / "chat_template.jinja").write_text(ENDLESS)
    began = time.process_time()
    words = ["quantize", str(talking), "-q", "IQ2_XS", "-o", str(tmp_path), "--calibration-samples", "2"]
    assert command([*words, "--sequence-length", "64"]) == 3
    assert time.process_time() - began < 30
    told = capsys.readouterr().err
    assert "chat template takes too much time" in told
    assert "give text without conversations" in told
    (talking / "chat_template.jinja").write_text(TEMPLATE)
    assert command([*words, "--sequence-length", "64"]) in (0, 20)


def test_a_directory_without_a_template(demo_model: Path) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        in_template(demo_model, [talk("x")])

"""Modelfiles: Ollama's template writes what the model's own writes, and nothing breaks out of its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from gguf.constants import GGUFValueType, Keys

from llm_quantize.artifacts import modelfile as module
from llm_quantize.artifacts.modelfile import create_command, go_template, modelfile
from llm_quantize.cli import run
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.models.turns import Turns, fit_turns
from llm_quantize.options import Options
from llm_quantize.pipeline import quantize
from tests.oracles.ollama import commands, execute
from tests.runtimes.test_conversation import TEMPLATE, talking_model

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml with its own system message": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"Q\".<|im_end|>\n' }}{% endif %}" + CHATML,
    "llama 3": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma, without system": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "gemma 3, system in the first turn": "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set said = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set said = messages %}{% endif %}{% for m in said %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {% if loop.first and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "an opened thought": CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
    "words alone": "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}### reply:\n",
}
UNSAYABLE = {
    "the date": "{{ strftime_now('%d %b %Y') }}" + CHATML,
    "numbers of turns": "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}",
    "only the last turn": "{{ messages[-1].content }}",
    "twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ '<' ~ m.content | upper ~ '>' }}{% endfor %}",
    "what is said decides": "{% for m in messages %}<{{ m.content }}{{ '!' if 'x' in m.content }}>{% endfor %}",
    "json": "{{ messages | tojson }}",
    "refuses": "{{ raise_exception('no') }}",
    "is none": "{% for %}",
}


def fitted(template: str) -> Turns:
    return fit_turns(lambda day: ChatTemplate(template, bos=BOS, eos=EOS, file=Path("m.gguf"), today=day))


def talks(system: bool) -> list[list[dict[str, str]]]:
    """Conversations that the fit has not seen."""
    words = ["What?", '"}}{{"', 'a """ b', "back\\slash\ttab", "日本\n語", "PARAMETER x", "z" * 99]
    found = []
    for count in (1, 3, 7):
        said = [{"role": ("user", "assistant")[i % 2], "content": words[i]} for i in range(count)]
        found += [said, [{"role": "system", "content": "Be {{ .kind }}\nand brief"}, *said]] if system else [said]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_writes_what_the_models_own_template_writes(name: str) -> None:
    turns = fitted(TEMPLATES[name])
    assert turns.takes_system == (name != "gemma, without system")
    text = go_template(turns)
    with ChatTemplate(TEMPLATES[name], bos=BOS, eos=EOS, file=Path("m.gguf")) as template:
        for messages in talks(turns.takes_system):
            assert execute(text, messages) == template.render(messages) == turns.render(messages)


def test_a_system_message_that_the_template_refuses_goes_before_the_first() -> None:
    turns = fitted(TEMPLATES["gemma, without system"])
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    expected = "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert execute(go_template(turns), messages) == expected


def test_an_answer_that_is_begun_goes_on() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    text = execute(go_template(fitted(CHATML)), messages)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI am"


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_cannot_be_said_is_not(name: str) -> None:
    with pytest.raises(UnsupportedError):
        fitted(UNSAYABLE[name])


def stored(template: str | None, marks: Sequence[str] = (), **more: MetaValue) -> dict[str, MetaValue]:
    """Metadata as a GGUF file holds it."""
    tokens = [BOS, EOS, *marks, "word"]
    types = [TokenType.CONTROL] * (len(tokens) - 1) + [TokenType.NORMAL]
    found: dict[str, Any] = {
        Keys.Tokenizer.LIST: MetaValue(GGUFValueType.ARRAY, tokens, GGUFValueType.STRING),
        Keys.Tokenizer.TOKEN_TYPE: MetaValue(GGUFValueType.ARRAY, [int(kind) for kind in types], GGUFValueType.INT32),
        Keys.Tokenizer.BOS_ID: MetaValue(GGUFValueType.UINT32, 0),
        Keys.Tokenizer.EOS_ID: MetaValue(GGUFValueType.UINT32, 1),
    }
    if template is not None:
        found[Keys.Tokenizer.CHAT_TEMPLATE] = MetaValue(GGUFValueType.STRING, template)
    return found | more


def made(
    monkeypatch: pytest.MonkeyPatch, metadata: Mapping[str, MetaValue]
) -> tuple[list[tuple[str, str]], str | None]:
    """The commands of the Modelfile of such a file, as Ollama reads them."""

    class File:
        pass

    file = File()
    file.metadata = metadata  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "read_gguf", lambda _path: file)
    found = modelfile(Path("a.gguf"))
    return commands(found.text), found.unsaid


def test_stops_begin_token_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|other|>"]
    settings = {
        Keys.Tokenizer.ADD_BOS: MetaValue(GGUFValueType.BOOL, True),
        Keys.General.SAMPLING_TEMP: MetaValue(GGUFValueType.FLOAT32, 0.6000000238418579),
        Keys.General.SAMPLING_TOP_K: MetaValue(GGUFValueType.INT32, 40),
        Keys.General.SAMPLING_TOP_P: MetaValue(GGUFValueType.FLOAT32, 1.0),
        Keys.General.SAMPLING_PENALTY_REPEAT: MetaValue(GGUFValueType.FLOAT32, 1.1),
    }
    found, unsaid = made(monkeypatch, stored(TEMPLATES["llama 3"], marks, **settings))
    assert unsaid is None
    assert [pair for pair in found if pair[0] != "template"] == [
        ("from", "./a.gguf"),
        ("stop", "<|eot_id|>"),
        ("stop", "<|start_header_id|>"),
        ("stop", "<|end_header_id|>"),
        ("temperature", "0.6"),
        ("top_p", "1"),
        ("top_k", "40"),
        ("repeat_penalty", "1.1"),
    ]
    # Ollama puts the begin token in front where the file says so; else the template has to.
    user = [{"role": "user", "content": "Hi"}]
    text = execute(dict(found)["template"], user)
    assert not text.startswith(BOS)
    settings[Keys.Tokenizer.ADD_BOS] = MetaValue(GGUFValueType.BOOL, False)
    found, _ = made(monkeypatch, stored(TEMPLATES["llama 3"], marks, **settings))
    assert execute(dict(found)["template"], user) == BOS + text
    found, _ = made(monkeypatch, stored(TEMPLATES["words alone"]))
    assert ("stop", "### user:") in found
    assert made(monkeypatch, stored(None)) == ([("from", "./a.gguf")], None)


@pytest.mark.parametrize(
    "words",
    [
        '"""\nFROM /etc/passwd\nTEMPLATE """',
        '" }}{{ .System }}{{ "',
        '\\"""\nSYSTEM x\n',
        "}}\n{{ template }} {{",
        "\r\nADAPTER x\u2028\x00\x7f",
        '"',
        '"""',
        "\\",
    ],
)
def test_nothing_breaks_out(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    template = f"{{% for m in messages %}}{{{{ {json.dumps(words)} ~ m.role ~ m.content ~ eos_token }}}}{{% endfor %}}"
    metadata = stored(template, [words])
    found, unsaid = made(monkeypatch, metadata)
    assert unsaid is None
    assert {name for name, _ in found} <= {"from", "template", "stop"}
    assert [value for name, value in found if name == "from"] == ["./a.gguf"]
    with ChatTemplate(template, bos=BOS, eos=EOS, file=Path("m.gguf")) as own:
        for messages in talks(system=True):
            assert execute(dict(found)["template"], messages) == own.render(messages)


def test_beside_each_level_and_of_finished_files(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = talking_model(demo_model, tmp_path), tmp_path / "out"
    words = ["quantize", str(model), "-q", "Q8_0", "-q", "Q4_0", "-o", str(out)]
    assert run(words) == 0
    assert not list(out.glob("*.Modelfile"))
    capsys.readouterr()
    assert run([*words, "--export-ollama"]) == 0
    told = capsys.readouterr().out
    paths = [out / "model-Q8_0.Modelfile", out / "model-Q4_0.Modelfile"]
    for path in paths:
        assert " ".join(create_command(path)) in told
        found = commands(path.read_text())
        assert found[0] == ("from", f"./{path.stem}.gguf")
        with ChatTemplate(TEMPLATE, bos="<|endoftext|>", eos="<|endoftext|>", file=path) as own:
            for messages in talks(system=True):
                assert execute(dict(found)["template"], messages) == own.render(messages)
    assert run(["verify", str(out / "model-Q8_0.gguf")]) == 0
    # The same again changes nothing; what a user changed stays, unless it is to be replaced.
    before = paths[0].stat().st_mtime_ns
    assert run([*words, "--export-ollama", "--json"]) == 0
    assert [
        Path(one["modelfile"]) for one in json.loads(capsys.readouterr().out.splitlines()[-1])["artifacts"]
    ] == paths
    assert paths[0].stat().st_mtime_ns == before
    mine = paths[0].read_text() + "PARAMETER num_ctx 8192\n"
    paths[0].write_text(mine)
    assert run([*words, "--export-ollama"]) == 0
    assert "another Modelfile" in capsys.readouterr().err
    assert paths[0].read_text() == mine


def test_a_template_that_it_cannot_say_is_a_fallback(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = talking_model(demo_model, tmp_path, UNSAYABLE["numbers of turns"])
    words = ["quantize", str(model), "-q", "Q8_0", "-o", str(tmp_path / "out"), "--export-ollama"]
    for _ in range(2):
        assert run(words) == 20
        assert "the chat template cannot be said in Ollama's language" in capsys.readouterr().out
        assert commands((tmp_path / "out/model-Q8_0.Modelfile").read_text())[0] == ("from", "./model-Q8_0.gguf")
    assert "TEMPLATE" not in (tmp_path / "out/model-Q8_0.Modelfile").read_text()
    assert run([*words, "--strict"]) == 9


@pytest.mark.parametrize("form", ["gptq", "safetensors", "ctranslate2"])
def test_other_formats_refuse_it(demo_model: Path, tmp_path: Path, form: str) -> None:
    levels = {"gptq": "4bit", "safetensors": "F16", "ctranslate2": "int8"}
    with pytest.raises(UsageError, match=r"gguf|--export-ollama"):
        quantize(
            str(demo_model),
            form,
            levels=[levels[form]],
            output_dir=tmp_path,
            options=Options(modelfile=True, threads=1),
        )
    options = Options(modelfile=True, split_max_size=1 << 20)
    with pytest.raises(UsageError, match="one file"):
        quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path, options=options)
    assert not list(tmp_path.iterdir())


def test_killed_while_it_is_written(demo_model: Path, tmp_path: Path) -> None:
    """At its renaming: the artifact is whole, and the same command writes it."""
    model = talking_model(demo_model, tmp_path)
    words = ["quantize", str(model), "-q", "Q8_0", "-o", str(tmp_path / "out"), "--export-ollama"]
    script = (
        "import os, pathlib, sys\nfrom llm_quantize.cli import run\nrename = pathlib.Path.rename\n"
        "def killed(self, to):\n"
        "    if str(to).endswith('.Modelfile'):\n        os._exit(9)\n    return rename(self, to)\n"
        "pathlib.Path.rename = killed\nrun(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], env={**os.environ}, capture_output=True)
    assert done.returncode == 9
    path = tmp_path / "out/model-Q8_0.Modelfile"
    assert not path.exists()
    assert path.with_name(path.name + ".partial").exists()
    assert run(words) == 0
    assert commands(path.read_text())
    assert not path.with_name(path.name + ".partial").exists()

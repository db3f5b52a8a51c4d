"""Benchmark tasks: what a model answers is plain arithmetic on its logits; the harness gets the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.cli import run
from llm_quantize.errors import MissingExtraError, NetworkError, UnsupportedError, UsageError
from llm_quantize.evaluation import tasks as module
from llm_quantize.evaluation.answers import Answers, stop_texts
from llm_quantize.evaluation.tasks import run_tasks
from llm_quantize.measures.perplexity import log_softmax
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.hearing import into
from tests.runtimes.test_llama_cpp import make_gguf

BOS, EOS = 258, 259
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("tasks") / "tiny.gguf", template=TEMPLATE)


def test_scores_are_sums_of_log_probabilities(model: Path) -> None:
    context, continuation = [BOS, 97, 98, 99], [100, 257, 32]
    with LlamaCpp(model, context=64, threads=1) as llama:
        answers = Answers(llama)
        rows = log_softmax(llama.logits([*context, *continuation[:-1]]))
        expected = sum(rows[3 + i, token] for i, token in enumerate(continuation))
        value, greedy = answers.score(context, continuation)
        assert value == pytest.approx(expected, abs=1e-9)
        assert not greedy
        likeliest = int(np.argmax(llama.logits(context)[-1]))
        assert answers.score(context, [likeliest]) == (pytest.approx(rows[3].max(), abs=1e-6), True)
        # Kept rows give what a fresh model gives, whichever order the questions come in.
        for one in ([100], [257], [100, 257], [32, 100, 257], [100]):
            assert answers.score(context, one) == Answers(llama).score(context, one)
        total = sum(math.exp(answers.score(context, [token])[0]) for token in range(260))
        assert total == pytest.approx(1, abs=1e-5)


def test_a_long_context_loses_its_beginning_and_is_counted(model: Path) -> None:
    ids = np.random.Generator(np.random.PCG64(1)).integers(0, 256, 40).tolist()
    with LlamaCpp(model, context=16, threads=1) as llama:
        answers = Answers(llama)
        assert answers.score(ids, [5, 6]) == Answers(llama).score(ids[-15:], [5, 6])
        assert answers.truncated == 1
        assert answers.score(ids[:15], [5, 6])
        assert answers.truncated == 1
        for wrong in ([], ids[:17]):
            with pytest.raises(UsageError, match="does not fit"):
                answers.score(ids, wrong)


def test_what_begins_a_text(model: Path) -> None:
    with LlamaCpp(model, context=64, threads=1) as llama:
        plain, chat = Answers(llama), Answers(llama, chat=True)
        assert (plain.prefix, plain.begins) == (BOS, True)
        assert plain.encode("abc") == [BOS, 257]
        assert plain.encode("abc", begin=False) == [257]
        assert EOS not in plain.encode("a</s>")
        assert chat.encode("<s>a</s>") == [BOS, 97, EOS]
        text = chat.render([{"role": "user", "content": "ab"}])
        assert text == "<s>[user]ab[reply]"
        assert chat.encode(text).count(BOS) == 1


def test_answers_end_at_a_stop_text(model: Path) -> None:
    with LlamaCpp(model, context=64, threads=1) as llama:
        answers = Answers(llama)
        free = answers.complete("abc", stop=[], most=20)
        assert free == "".join(llama.generate("abc", max_tokens=20))
        assert len(free) > 4
        mark = free[3:5]
        assert answers.complete("abc", stop=["never", mark], most=20) == free[: free.index(mark)]
        assert answers.complete("abc", stop=[free[0]], most=20) == ""
        assert answers.truncated == 0
        answers.complete("x y " * 40, stop=[], most=20)
        assert answers.truncated == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ([], 256, 0.0)),
        ({"until": "\n", "max_gen_toks": 3}, (["\n"], 3, 0.0)),
        ({"until": ["a", "", None], "do_sample": True, "temperature": 0.5}, (["a"], 256, 0.5)),
        ({"until": None, "do_sample": False, "temperature": 0.5, "max_new_tokens": 9}, ([], 9, 0.0)),
    ],
)
def test_generation_options(options: dict[str, Any], expected: tuple[list[str], int, float]) -> None:
    assert stop_texts(options) == expected


def test_without_a_template_or_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LlamaCpp(make_gguf(tmp_path / "m.gguf"), context=16, threads=1) as llama,
        pytest.raises(UnsupportedError, match="no chat template"),
    ):
        Answers(llama, chat=True).render([])
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"\.\[tasks\]"):
        run_tasks(tmp_path / "m.gguf", ["arc_easy"])
    assert run(["analyze", "tasks", str(tmp_path / "m.gguf"), "--tasks", "arc_easy"]) == 4


def test_only_failures_of_data_become_network_errors() -> None:
    with pytest.raises(NetworkError, match="cannot be read or fetched"), module._DataErrors():
        raise FileNotFoundError("words.jsonl")
    with pytest.raises(KeyError), module._DataErrors():
        raise KeyError("doc_to_text")


# With the harness itself, where the extra is installed.

QUESTIONS = [("abc a", [" b", " c"], 0), ("x", ["y", "zz"], 1), ("ab ab", [" ab", " 12"], 0)]
KINDS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "never",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub" / "datasets"))
    data = tmp_path / "questions.jsonl"
    lines = [json.dumps({"text": t, "choices": c, "answer": a}) for t, c, a in QUESTIONS]
    data.write_text("\n".join(lines), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, settings in KINDS.items():
        task = {"task": f"own_{name}", **common, **settings, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("default")  # the harness and its 38 dependencies have their own
@pytest.mark.heavy
def test_the_harness_gets_these_numbers(model: Path, own_tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Any] = []
    names = [f"own_{name}" for name in KINDS]
    report = run_tasks(model, names, context=64, threads=1, include=own_tasks, on_event=into(events))
    scores = {(score.task, score.metric): score for score in report.scores}
    with LlamaCpp(model, context=64, threads=1) as llama:
        answers = Answers(llama)
        right = nats = 0.0
        for text, choices, answer in QUESTIONS:
            head = answers.encode(text)
            found = [answers.score(head, answers.encode(text + choice)[len(head) :])[0] for choice in choices]
            right += int(np.argmax(found)) == answer
            nats -= answers.score([BOS], answers.encode(text, begin=False))[0]
    size = sum(len(text) for text, _, _ in QUESTIONS)
    assert scores["own_choice", "acc"].value == pytest.approx(right / 3)
    assert scores["own_choice", "acc"].samples == 3
    assert scores["own_choice", "acc"].higher_is_better is True
    assert scores["own_rolling", "bits_per_byte"].value == pytest.approx(nats / size / math.log(2))
    assert scores["own_answer", "exact_match"].value == 0
    assert report.truncated == 0
    assert {event["event"] for event in events} == {"measure"}
    with pytest.raises(UsageError, match="no task") as caught:
        run_tasks(model, ["own_choise"], include=own_tasks)
    assert "own_choice" in str(caught.value.expected)
    with pytest.raises(UsageError, match="no such directory"):
        run_tasks(model, names, include=own_tasks / "none")
    words = ["analyze", "tasks", str(model), "--tasks", "own_choice", "--include", str(own_tasks), "--limit", "2"]
    capsys.readouterr()
    assert run([*words, "--context", "64", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["scores"][0]["task"] == "own_choice"
    assert shown["scores"][0]["samples"] == 2
    assert run([*words, "--context", "64", "--chat"]) == 0
    assert "own_choice" in capsys.readouterr().out

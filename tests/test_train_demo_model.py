"""The training script: repeatable, stoppable, and its output is a model transformers and tokenizers read."""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_demo_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of sentences made from a small grammar: something that can be learned."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    for name, words in (("a", ["the", "cat", "dog", "sees", "and"]), ("b", ["猫", "犬", "を", "見る", "。"])):
        documents = [" ".join(random.choice(words, 200)) for _ in range(10)]
        (folder / f"{name}.txt.xz").write_bytes(lzma.compress("\0".join(documents).encode()))
    return folder


@pytest.fixture
def tiny(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def shape(family: str, vocabulary: int = 2048) -> object:
        return script.Shape(
            family, hidden=32, layers=2, heads=2, kv_heads=1, head=16, intermediate=64,
            experts=4, expert_intermediate=32, vocabulary=vocabulary, context=64,
        )  # fmt: skip

    monkeypatch.setattr(script, "default_shape", shape)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(script.torch, "use_deterministic_algorithms", lambda *_, **__: None)
    monkeypatch.setattr(script.torch, "set_num_threads", lambda *_: None)


def arguments(texts: Path, out: Path, family: str, tokens: str = "12k") -> list[str]:
    return [str(texts), str(out), "--family", family, "--tokens", tokens, "--batch", "4", "--vocabulary", "280",
            "--device", "cpu"]  # fmt: skip


def test_tokenizer_is_the_demo_models_kind(script: ModuleType, texts: Path) -> None:
    from llm_quantize.data import demo_model

    shipped = json.loads((demo_model() / "tokenizer.json").read_text(encoding="utf-8"))
    made = json.loads(script.train_tokenizer(texts, 280).to_str())
    assert made["pre_tokenizer"] == shipped["pre_tokenizer"]
    assert [token["content"] for token in made["added_tokens"]] == [
        token["content"] for token in shipped["added_tokens"]
    ]
    assert len(made["model"]["vocab"]) == 280
    assert made == json.loads(script.train_tokenizer(texts, 280).to_str())


@pytest.mark.usefixtures("tiny")
def test_stopped_and_continued_gives_the_same_bytes(
    script: ModuleType, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = tmp_path / "held.txt"
    heldout.write_text("the cat sees the dog and " * 400, encoding="utf-8")
    command = [*arguments(texts, tmp_path / "whole", "qwen3"), "--heldout", str(heldout)]
    assert script.main(command) == 0

    class StopsAfter(script.Stop):
        def __init__(self, checks: int = 5) -> None:
            self.left = checks

        @property
        def asked(self) -> bool:
            self.left -= 1
            return self.left < 0

    command[1] = str(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(script, "Stop", StopsAfter)
        assert script.main(command) == script.STOPPED
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    other = [word if word != "12k" else "13k" for word in command]
    with pytest.raises(SystemExit, match="tokens="):
        script.main(other)
    other = [word if word != "qwen3" else "llama" for word in command]
    with pytest.raises(SystemExit, match="other tensors"):
        script.main(other)
    assert script.main(command) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "whole" / "training-state.safetensors").exists()
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "| held |" in card
    assert str(tmp_path) not in card


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_families_learn_and_load(script: ModuleType, texts: Path, tmp_path: Path, family: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    assert script.main(arguments(texts, tmp_path, family, "40k")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "the cat and the dog sees " * 200
    value, bits = script.perplexity(model, tokenizer, text)
    assert value < 40  # 280 without training
    ids = tokenizer.encode(text).ids
    assert bits == pytest.approx(np.log2(value) * len(ids) / len(text))


def test_orthogonalize_brings_singular_values_near_one(script: ModuleType) -> None:
    torch.manual_seed(0)
    for rows, columns in ((8, 24), (24, 8), (16, 16)):
        values = torch.linalg.svdvals(script.orthogonalize(torch.randn(3, rows, columns)))
        assert values.max() < 1.4
        assert values.median() > 0.6


def test_every_window_once_in_an_epoch(script: ModuleType) -> None:
    corpus = np.arange(1000, dtype=np.uint16)
    run = script.Run(seed=3, batch=3, window=8, tokens=1)
    per_epoch = (1000 - 9) // 8
    starts = np.concatenate([script.batch_at(corpus, run, step)[:, 0].numpy() for step in range(per_epoch // 3)])
    assert len(set(starts)) == len(starts)
    assert len(set(starts % 8)) == 1
    again = script.batch_at(corpus, run, 2).numpy()
    assert (again == script.batch_at(corpus, run, 2).numpy()).all()
    assert (np.diff(again, axis=1) == 1).all()


def test_learning_rate_rises_and_ends_near_nothing(script: ModuleType) -> None:
    rates = [script.rate_at(progress) for progress in (0, 0.01, 0.03, 0.3, 0.65, 1)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[2] == rates[3] == 1.0
    assert rates[4] == pytest.approx(0.5, abs=0.01)
    assert rates[5] == pytest.approx(0.001)


def test_count_of(script: ModuleType) -> None:
    assert [script.count_of(text) for text in ("5M", "200k", "1.5M", "12")] == [5_000_000, 200_000, 1_500_000, 12]

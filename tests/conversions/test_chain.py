"""One model through one format after another: values stay what they are at each exact step, and so do token ids."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file

from llm_quantize import api
from llm_quantize.artifacts.verify import verify
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.conversions.test_conversions import alike, values
from tests.tiny_models import make_tiny, reference_logits, reference_model, row_lengths_of_256
from tests.tiny_tokenizers import nasty_texts

TOKENS = np.random.Generator(np.random.PCG64(3)).integers(0, 256, 40).tolist()
WAY: tuple[tuple[str, str | None, str], ...] = (
    ("compressed-tensors", None, "W4A16-g32"),
    ("gguf", None, "Q4_0"),
    ("compressed-tensors", None, "W4A16-g32"),
    ("gptq", None, "GPTQ-4bit-g32"),
    ("mlx", None, "MLX-4bit-g32"),
    ("gptq", "4bit", "GPTQ-4bit-g32"),
    ("gguf", None, "Q4_0"),
    ("awq", None, "AWQ-4bit-g32"),
    ("compressed-tensors", None, "W4A16_ASYM-g32"),
    ("gptq", None, "GPTQ-4bit-g32-asym"),
    ("gguf", None, "Q5_0"),
    ("mlx", None, "MLX-5bit-g32"),
    ("gguf", None, "Q5_1"),
    ("safetensors", None, "F32"),
)
"""(format, the level that is named, what is made), each of the one before. A grid with offsets may be one without:
that has to be named, and is found out by looking."""


def step(source: Path, place: Path, format: str, level: str | None) -> Path:
    options = Options(threads=1, exact=True, calibrate=False, method=MethodOptions(transform="none", group_size=None))
    result = api.convert(source, format, level, output_dir=place, name="m", options=options)
    assert result.conversion is not None
    assert result.conversion["verdict"] == "exact"
    outcome = verify(result.path, source=str(source))
    assert outcome.ok, outcome.all_problems()
    return result.path


def ids(path: Path) -> list[list[int]]:
    with open_source(str(path)).checkpoint:
        tokenizer = TextTokenizer(open_source(str(path)))
        return [tokenizer.encode(text) for text in nasty_texts()]


def special_ids(path: Path) -> list[list[int]]:
    """As transformers has them, which takes the text of a special token for the token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return [tokenizer(text).input_ids for text in nasty_texts()]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The float model, GPTQ of it, and every step."""
    folder = tmp_path_factory.mktemp("chain")
    made = [make_tiny("llama", folder / "net", **row_lengths_of_256("llama"))]
    options = Options(threads=1, calibrate=False, method=MethodOptions(method="rtn", group_size=32))
    made.append(api.convert(made[0], "gptq", "4bit", output_dir=folder / "first", name="m", options=options).path)
    for number, (format, level, expected) in enumerate(WAY):
        made.append(step(made[-1], folder / str(number), format, level))
        assert expected in made[-1].name, (number, made[-1].name)
    return made


def test_values_are_the_same_at_every_step(chain: list[Path]) -> None:
    wanted = values(chain[1])
    for path in chain[2:]:
        assert alike(values(path), wanted), path


def test_the_same_step_gives_the_same_bytes(chain: list[Path]) -> None:
    """By way of GGUF and of MLX, the directories come back; what is beside the codes may be stored wider."""
    firsts: dict[tuple[str, str], Path] = {}
    for (format, _, level), path in zip(WAY, chain[2:], strict=True):
        first = firsts.setdefault((format, level), path)
        if format == "gguf":
            ones, others = ({t.name: bytes(t.data) for t in gguf.GGUFReader(one).tensors} for one in (first, path))
            assert ones == others
        elif first != path:
            stored, again = (load_file(one / "model.safetensors") for one in (first, path))
            assert stored.keys() == again.keys()
            assert all(stored[name].dtype == again[name].dtype or "proj" not in name for name in stored)
            assert all(bool((stored[name].float() == again[name].float()).all()) for name in stored)


def test_token_ids_are_the_same_at_every_step(chain: list[Path]) -> None:
    wanted, special = ids(chain[0]), special_ids(chain[0])
    assert len({tuple(one) for one in wanted}) > 10
    assert wanted != special, "no text has the text of a special token"
    for path in chain[1:]:
        assert ids(path) == wanted, path
        if path.is_dir():
            assert special_ids(path) == special, path


def test_runtimes_compute_the_same(chain: list[Path]) -> None:
    """transformers on the floats of the last step, and llama.cpp, which rounds inputs to 8 bits."""
    expected = reference_logits(reference_model(chain[-1]), TOKENS)
    for path in (path for path in chain if path.suffix == ".gguf"):
        with LlamaCpp(path, context=64, threads=1) as llama:
            assert np.abs(llama.logits(TOKENS) - expected).max() < 0.02 * np.ptp(expected)


def test_what_the_configuration_says_stays(chain: list[Path]) -> None:
    first = json.loads((chain[0] / "config.json").read_text())
    sizes = ["hidden_size", "intermediate_size", "vocab_size", *(key for key in first if key.startswith("num_"))]
    for path in (path for path in chain[1:] if path.is_dir()):
        config = json.loads((path / "config.json").read_text())
        for key in ("model_type", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", *sizes):
            assert config[key] == first[key], (path, key)

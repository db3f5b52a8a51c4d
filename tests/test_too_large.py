"""A weight that a type cannot hold is refused by every format, with tensor, index, value and a remedy that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import kernels
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.range import DIVIDED, first_beyond
from tests.tiny_models import make_tiny, row_lengths_of_256

NAME, INDEX = "model.layers.1.mlp.up_proj.weight", (3, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, one weight of 3e38."""
    model = make_tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny", **row_lengths_of_256("qwen2"))
    tensors = {name: values.to(torch.bfloat16) for name, values in load_file(model / "model.safetensors").items()}
    tensors[NAME][INDEX] = 3e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


WAYS = [
    *(f"gguf -q {level}" for level in ("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "Q2_K", "F16")),
    *(f"{form} -q 4bit --group-size 32 --method rtn --transform none" for form in ("gptq", "awq")),
    "gguf -q Q4_K_S --method gptq --statistics STATISTICS --inputs source",
    "gptq -q 4bit --group-size 32 --statistics STATISTICS --inputs source",
    "safetensors -q F16",
]


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model before it had that weight, under this one's name."""
    from tests.io.test_statistics_file import edit, put, reseal

    directory = tmp_path_factory.mktemp("statistics")
    sound = make_tiny("qwen2", directory / "sound", **row_lengths_of_256("qwen2"))
    text = directory / "words.txt"
    text.write_text("the cat sat on a mat by the river " * 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_QUANTIZE_CACHE", str(directory / "cache"))
        words = ["--calibration-data", str(text), "--calibration-samples", "2", "--sequence-length", "64"]
        words += ["--collect", "imatrix,hessian", "--threads", "1", "-o", str(directory / "s.safetensors")]
        assert run(["analyze", "importance", str(sound), *words]) == 0
    from llm_quantize.models.opening import open_source

    with (source := open_source(str(model))).checkpoint:
        edit(directory / "s.safetensors", put("model", {"name": "tiny", "sha256": source.content()}))
    reseal(directory / "s.safetensors")
    return directory / "s.safetensors"


@pytest.mark.parametrize("way", WAYS)
def test_every_format_refuses_it_and_its_remedy_works(
    way: str, model: Path, statistics: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model), *way.replace("STATISTICS", str(statistics)).split(), "-o", str(tmp_path)]
    command += ["--threads", "1"]
    assert run(command) == 9
    told = " ".join(capfd.readouterr().err.split())
    assert "a weight is too large for" in told
    assert re.search(r"found: 3\.00406e\+38 at row 3, column 7", told)
    assert "up_proj" in told or "blk.1.ffn_up.weight" in told
    remedy = told[told.index("what to do:") :]
    given = shlex.split(remedy[remedy.index(" -") :])
    if "-q" in given:
        command = command[: command.index("-q")] + command[command.index("-q") + 2 :]
    assert run([*command, *given]) == 0, capfd.readouterr().err
    (artifact,) = [path for path in tmp_path.iterdir() if path.suffix in (".gguf", "") and path.name != "cache"]
    assert verify(artifact, source=str(model)).ok


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("level", ["Q4_K_M", "Q8_0"])
def test_the_remedy_works_for_tensors_that_rules_of_their_own_decide(
    name: str, level: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny("llama", tmp_path / "model", **row_lengths_of_256("llama"))
    tensors = {name: values.to(torch.bfloat16) for name, values in load_file(model / "model.safetensors").items()}
    assert name in tensors
    tensors[name][2, 1] = -1e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    command = ["quantize", str(model), "gguf", "-q", level, "-o", str(tmp_path / "out")]
    assert run(command) == 9
    told = " ".join(capfd.readouterr().err.split())
    remedy = told[told.index("what to do:") :]
    assert run([*command, *shlex.split(remedy[remedy.index(" -") :])]) == 0, capfd.readouterr().err


# All but q1_0, which holds the mean magnitude of a block and not the largest.
@pytest.mark.parametrize("qtype", [name for name in QTYPES if np.isfinite(QTYPES[name].largest) and name != "q1_0"])
def test_up_to_the_limit_a_type_holds_a_weight_or_its_scale_overflows(qtype: str) -> None:
    """``largest`` is the largest: nothing that passes both checks loses its block."""
    limit = QTYPES[qtype].largest
    for share in (0.3, 0.6, 0.9, 1.0):
        for sign in (1, -1):
            rows = np.zeros((1, 256), np.float32)
            rows[0, 5] = sign * share * limit
            assert first_beyond(rows, limit) == -1
            packed = kernels.quantize(qtype, rows, np.ones(256, np.float32))
            if QTYPES[qtype].infinite_blocks(packed).size == 0:
                value = kernels.dequantize(qtype, packed, 256)[0, 5]
                assert abs(value - rows[0, 5]) < 0.8 * abs(rows[0, 5]), (share, sign, value / rows[0, 5])


@pytest.mark.parametrize("qtype", sorted(DIVIDED))
@pytest.mark.parametrize("times", [1.01, 10, 1e6, None])
def test_a_divided_scale_always_shows_what_does_not_fit(qtype: str, times: float | None) -> None:
    chance = np.random.default_rng(3)
    for index in (0, 7, 255):
        for sign in (1, -1):
            rows = (chance.standard_normal((1, 256)) * 0.02).astype(np.float32)
            rows[0, index] = sign * (3.4e38 if times is None else times * QTYPES[qtype].largest)
            found = QTYPES[qtype].infinite_blocks(kernels.quantize(qtype, rows))
            assert found.tolist() == [index // QTYPES[qtype].block_size]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [8 * 65504.0, 65504.0, 4096 * 65504.0])
def test_first_beyond_equals_comparing_each(dtype: str, limit: float) -> None:
    chance = np.random.default_rng(2)
    for _ in range(200):
        values = (chance.standard_normal((3, 8)) * limit / 2).astype(np.float32)
        values[0, 0] = chance.choice([limit, -limit, np.nan, np.inf, 0.0, -0.0])
        if dtype == "bfloat16":
            stored = (values.view(np.uint32) >> 16).astype(np.uint16)
            values = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            stored = values
        found = np.flatnonzero(np.isfinite(values) & (np.abs(values) > limit))
        assert first_beyond(stored, limit) == (found[0] if found.size else -1)
    assert first_beyond(np.full((1, 4), 65504, np.float16), 65504.0) == -1

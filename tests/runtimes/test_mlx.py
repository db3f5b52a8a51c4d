"""MLX directories in mlx_lm itself (make test-mlx): its encoder's bytes, its converter's files, logits of every family
that a plan takes, and text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.fit import fit
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run as command
from llm_quantize.data import demo_model
from llm_quantize.errors import MissingExtraError, UnsupportedError
from llm_quantize.events import ignore
from llm_quantize.formats import mlx as form
from llm_quantize.formats import mlx_floats as floats
from llm_quantize.formats.base import SchemeOptions
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.grids import grid_type
from llm_quantize.grids.codebook import CodebookGridType, block_maxima, ladder_of
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.qtypes.affine import GROUPS, WIDTHS
from llm_quantize.runtimes import converse, generate, mlx
from llm_quantize.runtimes.base import Request, talk
from llm_quantize.runtimes.isolated import interpreter
from tests.oracles.reference_directories import divergence, logprobs
from tests.runtimes.test_conversation import heard_to_the_end, talking_model
from tests.tiny_models import TINY, make_tiny

pytestmark = pytest.mark.mlx
# Shorter than the sliding windows of the tiny models, of which mlx_lm's Gemma 2 knows nothing.
WINDOWS = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (2, 20)).astype(np.int32)
ASK = Request(WINDOWS, ("The night in the", "12"), max_tokens=6, dtype="float32", threads=1, timeout=300)
# phi3-longrope: mlx_lm has the long factors at every length.
VARIANTS = [name for name, (kind, _) in TINY.items() if kind in form.FAMILIES and name != "phi3-longrope"]


def in_mlx(script: str, folder: Path) -> None:
    """Run ``script`` in ``folder`` with the interpreter that has mlx_lm."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [interpreter(mlx.MLX), "-c", script],
        cwd=folder,
        env={**kept, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def decoded(path: Path) -> dict[str, np.ndarray]:
    """{weight: float32} of everything that is quantized."""
    source = open_source(str(path))
    with source.checkpoint as model:
        return {
            name: np.asarray(model.read_rows(name, 0, model.matrix(name)[0]), np.float32)
            for name, info in model.tensors.items()
            if info.dtype.startswith(("affine", "e2m1", "e4m3"))
        }


def made(model: Path, folder: Path, level: str = "4bit", **method: object) -> Path:
    options = Options(
        threads=1,
        calibration=CalibrationOptions(samples=4, length=64),
        method=MethodOptions(**method),  # type: ignore[arg-type]
    )
    (result,) = quantize(str(model), "mlx", levels=[level], output_dir=folder, options=options)
    return result.path


def test_its_encoder_writes_the_same_bytes(tmp_path: Path) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0], weight[1], weight[2] = 0, 0.3, weight[2].abs()
    weight[3], weight[4] = -weight[3].abs(), weight[4] * 1e-6
    save_file({"bfloat16": weight.bfloat16(), "float16": weight.half()}, tmp_path / "in.safetensors")
    in_mlx(
        "import mlx.core as mx\nfound = {}\n"
        "for kind, w in mx.load('in.safetensors').items():\n"
        f"  for bits in {WIDTHS}:\n    for group in {GROUPS}:\n"
        "      parts = mx.quantize(w, group_size=group, bits=bits)\n"
        "      names = ('weight', 'scales', 'biases')\n"
        "      found |= {f'{kind}.{bits}.{group}.{n}': p for n, p in zip(names, parts)}\n"
        "      found[f'{kind}.{bits}.{group}.value'] = mx.dequantize("
        "parts[0], *(p.astype(mx.float32) for p in parts[1:]), group_size=group, bits=bits)\n"
        "mx.save_safetensors('out.safetensors', found)",
        tmp_path,
    )
    theirs = load_file(tmp_path / "out.safetensors")
    for kind, values in (("bfloat16", weight.bfloat16()), ("float16", weight.half())):
        for bits in WIDTHS:
            for group in GROUPS:
                scheme = form.scheme(f"{bits}bit", SchemeOptions(group_size=group, scale=kind))
                grid, codes = grid_type(scheme.qtype.name, scale=kind).plain(values.float(), None)
                for name, array in zip(("weight", "scales", "biases"), form.pack(scheme, grid, codes), strict=True):
                    wanted = theirs[f"{kind}.{bits}.{group}.{name}"]
                    same = array.tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()
                    assert same, f"{name} of {kind}, {bits} bits, groups of {group}"
                value = theirs[f"{kind}.{bits}.{group}.value"]
                torch.testing.assert_close(grid.decode(codes), value, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("mode", floats.MODES)
def test_modes_of_floats_are_its_encoders_but_for_ties(mode: str, tmp_path: Path) -> None:
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    weight[0] = 0
    grid = floats.grid_of(mode)
    save_file({"w": weight}, tmp_path / "in.safetensors")
    in_mlx(
        "import mlx.core as mx\nw = mx.load('in.safetensors')['w']\n"
        f"size = dict(group_size={grid.group_size}, bits={grid.bits}, mode={mode!r})\n"
        "q, s = mx.quantize(w, **size)\n"
        "mx.save_safetensors('out.safetensors', {'weight': q, 'scales': s, 'value': mx.dequantize(q, s, **size)})",
        tmp_path,
    )
    theirs = load_file(tmp_path / "out.safetensors")
    kind = CodebookGridType(grid, ladder_of(grid, block_maxima(grid, weight.float()), float(weight.abs().max())))
    ours, codes = kind.plain(weight.float(), None)
    scheme = form.scheme(mode, SchemeOptions())
    words, scales = form.pack(scheme, ours, codes)
    assert scales.tobytes() == theirs["scales"].numpy().tobytes()
    stored = theirs["weight"].view(torch.int32).numpy().view(np.uint32)
    assert words.shape == stored.shape
    value, mine = theirs["value"].float(), ours.decode(codes)
    other = value != mine
    assert torch.equal((value - weight.float()).abs()[other], (mine - weight.float()).abs()[other])
    assert other.float().mean() < 0.05
    packed = floats.described(grid, 64, 256)
    read = floats.unpack(packed, {"weight": stored, "scales": theirs["scales"].numpy()}, 0, 64)
    assert np.array_equal(read, value.numpy())


@pytest.mark.parametrize("mode", floats.MODES)
def test_modes_of_floats_with_feedback_have_the_decoders_logits(mode: str, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    path = made(model, tmp_path, mode)
    reply = mlx.run(path, ASK)
    assert reply.logprobs is not None
    assert abs(divergence(logprobs(model, decoded(path), WINDOWS), reply.logprobs)) < 1e-6
    assert reply.kernels == ("QuantizedEmbedding", "QuantizedLinear")


@pytest.mark.parametrize("level", [level for level in form.LEVELS if level.endswith("bit")])
def test_rounding_makes_what_its_converter_makes(level: str, tmp_path: Path) -> None:
    in_mlx(
        "from mlx_lm.convert import convert\n"
        f"convert({str(demo_model())!r}, 'theirs', quantize=True, q_bits={level[0]}, q_group_size=64)",
        tmp_path,
    )
    ours = made(demo_model(), tmp_path, level, method="rtn")
    stored, wanted = (load_file(path / "model.safetensors") for path in (ours, tmp_path / "theirs"))
    assert stored.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(stored[name].view(torch.uint8), value.view(torch.uint8)), name
    said, asked = (json.loads((path / "config.json").read_text()) for path in (ours, tmp_path / "theirs"))
    assert {key: said[key] for key in asked} == asked
    outcome = verify(tmp_path / "theirs", source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_has_the_logits_of_the_decoded_weights(variant: str, tmp_path: Path) -> None:
    more = {"intermediate_size": 256} if variant.startswith("gpt_neox") else {}  # mlx_lm's is always 4 widths
    model = make_tiny(variant, tmp_path / "model", **more)
    path = made(model, tmp_path, method="rtn", group_size=32)
    reply = mlx.run(path, Request(WINDOWS, dtype="float32", threads=1))
    assert reply.logprobs is not None
    assert abs(divergence(logprobs(model, decoded(path), WINDOWS), reply.logprobs)) < 1e-6
    assert {"QuantizedLinear", "QuantizedEmbedding"} & set(reply.kernels)


@pytest.mark.parametrize(("level", "group"), [("3bit", 32), ("5bit", 64), ("8bit", 128)])
def test_with_feedback_logits_text_and_run(level: str, group: int, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    path = made(model, tmp_path, level, group_size=group)
    reply = mlx.run(path, ASK)
    assert reply.logprobs is not None
    assert abs(divergence(logprobs(model, decoded(path), WINDOWS), reply.logprobs)) < 1e-6
    assert reply.kernels == ("QuantizedEmbedding", "QuantizedLinear")
    assert len(reply.texts) == 2
    assert all(0 < len(tokens) <= 6 for tokens in reply.tokens)
    assert "".join(generate(path, "The night in the", max_tokens=6, threads=1))


def test_a_size_is_a_mix_that_it_loads(tmp_path: Path) -> None:
    calibration = CalibrationOptions(samples=4, length=64)
    recipe = fit(str(demo_model()), "mlx", 3_300_000, options=Options(calibration=calibration, threads=1))
    options = Options(calibration=calibration, threads=1, overrides=Overrides(recipe=recipe))
    (result,) = quantize(str(demo_model()), "mlx", levels=[recipe.level], output_dir=tmp_path, options=options)
    assert len(set(recipe.tensors.values())) > 1
    assert result.size <= 3_300_000
    reply = mlx.run(result.path, ASK)
    assert reply.logprobs is not None
    assert abs(divergence(logprobs(demo_model(), decoded(result.path), WINDOWS), reply.logprobs)) < 1e-6


def test_a_conversation(tmp_path: Path) -> None:
    """What was read is kept, and changes no answer; one that is stopped is kept as far as it came."""
    path = made(talking_model(demo_model(), tmp_path), tmp_path, "8bit", method="rtn")
    with converse(path, max_tokens=8, threads=1) as told:
        assert told.context == 1024
        for turn, text in enumerate(("The old man", "and then")):
            asked = [*told.messages, *talk(text)]
            pieces, answered = heard_to_the_end(told.say(text))
            assert (answered.reused > 0) == (turn > 0)
            with mlx.converse(path, Request(chat=True, threads=1), ignore) as fresh:
                assert heard_to_the_end(fresh.answer(fresh.prompt(asked), 8, lambda: False))[0] == pieces
        heard: list[str] = []
        writing = told.say("on", lambda: bool(heard))
        heard.append(next(writing))
        more, answered = heard_to_the_end(writing)
        assert answered.end in ("stopped", "limit")
        assert told.messages[-1]["content"] == "".join([*heard, *more])


def test_a_tensor_that_it_has_no_place_for_is_refused_in_its_words(tmp_path: Path) -> None:
    path = made(make_tiny("llama", tmp_path / "model"), tmp_path, method="rtn", group_size=32)
    stored = load_file(path / "model.safetensors") | {"model.layers.0.self_attn.q_proj.extra": torch.zeros(3)}
    save_file(stored, path / "model.safetensors", {"format": "mlx"})
    with pytest.raises(UnsupportedError) as caught:
        mlx.run(path, ASK)
    assert "q_proj.extra" in str(caught.value.found)


def test_quality_is_the_same_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(demo_model(), tmp_path, method="rtn")
    asked = ["analyze", "quality", str(path), "--reference", str(demo_model()), "--windows", "2", "--runtime", "mlx"]
    assert command([*asked, "--json"]) == 0
    assert "mlx" in capsys.readouterr().out


def test_an_interpreter_without_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_MLX", sys.executable)
    with pytest.raises(MissingExtraError, match="mlx-runtime"):
        mlx.run(made(make_tiny("llama", tmp_path / "model"), tmp_path, method="rtn", group_size=32), ASK)

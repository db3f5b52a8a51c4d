"""--fallback best: what the choice is, that it is measured, and that it is the same every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import pipeline
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf import fallback
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.io.imatrix_file import read_imatrix
from llm_quantize.kernels import reference
from llm_quantize.options import MethodOptions, Options
from llm_quantize.plan import ArtifactPlan
from llm_quantize.qtypes import QTYPES
from tests.oracles.legacy_imatrix import write_legacy
from tests.tiny_models import make_tiny

COLUMNS = 96
LEVELS = ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No block of 256 divides its rows. One matrix lies on the grid of q4_0."""
    path = make_tiny(
        "llama", tmp_path_factory.mktemp("odd") / "odd", hidden_size=COLUMNS, intermediate_size=192, dtype="float32"
    )
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    packed = reference.QUANTIZE["q4_0"](tensors[name].numpy(), None)
    tensors[name] = torch.from_numpy(reference.DEQUANTIZE["q4_0"](packed, COLUMNS).copy())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def imatrix(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "odd.dat"
    draw = np.random.default_rng(3)
    source = pipeline.open_source(str(odd))
    with source.checkpoint:
        values = {
            output.name: np.exp(3 * draw.standard_normal(output.shape[-1])).astype(np.float32)
            for output in source.tensors.outputs
            if output.name.startswith("blk.") and len(output.shape) == 2
        }
    return write_legacy(path, [(name, 1, found) for name, found in values.items()])


def options(way: str, imatrix: Path | None = None, **more: object) -> Options:
    return Options(overrides=Overrides(fallback=way), imatrix=imatrix, calibrate=False, threads=1, **more)  # type: ignore[arg-type]


def made(odd: Path, folder: Path, level: str, chosen: Options) -> tuple[Path, ArtifactPlan]:
    (result,) = pipeline.quantize(str(odd), levels=[level], output_dir=folder, options=chosen)
    return result.path, result.plan


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type.name.lower() for tensor in read_gguf(path).tensors}


def loss(kind: str, weight: np.ndarray, importance: np.ndarray | None) -> float:
    """The slow twin: numpy's quantizer, all rows, one sum."""
    packed = reference.QUANTIZE[kind](weight, importance if QTYPES[kind].uses_importance else None)
    error = (reference.DEQUANTIZE[kind](packed, weight.shape[1]).astype(np.float64) - weight) ** 2
    return float((error if importance is None else error * importance).sum())


def test_candidates_fit_and_take_no_more() -> None:
    assert fallback.candidates(96, 96 // 32 * 18)[:2] == ["q4_0", "iq4_nl"]
    assert "q5_0" not in fallback.candidates(96, 96 // 32 * 18)
    assert fallback.candidates(96, 96 // 32 * 24)[:3] == ["q5_1", "q5_0", "q4_1"]
    assert not {"q4_k", "tq2_0", "f16", "iq2_xs"} & set(fallback.candidates(96, 10**6))
    assert "q4_k" in fallback.candidates(256, 10**6)
    assert not {"q1_0", "q2_0", "nvfp4"} & set(fallback.candidates(384, 10**6))
    assert fallback.candidates(200, 10**6) == []


def test_few_rows_are_all_looked_at_and_many_in_slabs() -> None:
    assert fallback.ranges(100) == [(0, 100)]
    slabs = fallback.ranges(5000)
    assert slabs[0] == (0, 32)
    assert slabs[-1] == (4968, 5000)
    assert len(slabs) == 8
    assert all(
        before[1] <= after[0] for before, after in zip(fallback.ranges(257), fallback.ranges(257)[1:], strict=False)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_what_loses_least_in_no_more_bytes(
    level: str, weighted: bool, odd: Path, imatrix: Path, tmp_path: Path
) -> None:
    importance = imatrix if weighted else None
    usual, _ = made(odd, tmp_path / "usual", level, options("llamacpp", importance))
    best, plan = made(odd, tmp_path / "best", level, options("best", importance))
    before, after = types(usual), types(best)
    values = read_imatrix(imatrix) if weighted else None
    source = pipeline.open_source(str(odd))
    substituted = {one.tensor: one for one in plan.substituted}
    with source.checkpoint:
        for output in source.tensors.outputs:
            if output.name not in substituted:
                assert after[output.name] == before[output.name]
                continue
            name, looked_at = output.pieces[0].source, fallback.ranges(output.shape[0])
            weight = np.concatenate([source.checkpoint.read_rows(name, *range_) for range_ in looked_at])
            if any(part in output.name for part in ("attn_q", "attn_k")):
                continue  # their rows are in another order: which type they get is the same sum in another order
            rows = None if values is None else values.rows(output.name, output.shape)
            vector = None if rows is None else rows[0]
            limit = QTYPES[before[output.name]].row_bytes(output.shape[-1])
            losses = {kind: loss(kind, weight, vector) for kind in fallback.candidates(output.shape[-1], limit)}
            found = after[output.name]
            assert losses[found] == min(losses.values()), output.name
            if losses[before[output.name]] == losses[found]:
                assert found == before[output.name]
            else:
                share = losses[found] / losses[before[output.name]]
                assert substituted[output.name].share == pytest.approx(share, rel=1e-9)
                assert substituted[output.name].usual == before[output.name]
    assert best.stat().st_size <= usual.stat().st_size + 64  # what else the headers say
    assert verify(best, source=str(odd)).ok
    if level == "Q2_K":
        assert after["blk.1.ffn_up.weight"] == "iq4_nl"
        assert after["blk.0.ffn_gate.weight"] == "q4_0", "it lies on that grid"
        assert "blk.1.ffn_up.weight: rows of 96: iq4_nl, not q2_k (it loses 0." in "\n".join(
            line for lines in plan.details.values() for line in lines
        )


def test_the_same_bytes_again_and_it_is_said(odd: Path, imatrix: Path, tmp_path: Path) -> None:
    digests = set()
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        path, plan = made(odd, folder, "Q2_K", options("best", imatrix))
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        manifest = read_manifest(Path(f"{path}.manifest.json")) or {}
        assert manifest["identity"]["fallback"] == "best"
        assert manifest["fallbacks"] == plan.fallbacks()
        assert any("iq4_nl is used instead" in text for text in manifest["fallbacks"])
        again = pipeline.quantize(str(odd), levels=["Q2_K"], output_dir=folder, options=options("best", imatrix))
        assert again[0].status == "already complete"
    assert len(digests) == 1


def test_a_plan_of_headers_is_an_upper_bound_and_says_so(odd: Path, tmp_path: Path) -> None:
    (best,) = pipeline.plan(str(odd), levels=["Q2_K"], options=options("best"))
    (usual,) = pipeline.plan(str(odd), levels=["Q2_K"], options=options("llamacpp"))
    assert best.size == usual.size
    (note,) = [note for note in best.notes if "--fallback best" in note]
    assert "at most as large" in note
    assert not usual.notes
    assert "fallback" not in usual.identity
    (whole,) = pipeline.plan(str(odd), levels=["Q8_0"], options=options("best"))
    assert not whole.notes


def test_rows_that_are_not_finite_do_not_decide(odd: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in odd.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(odd / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    path, _ = made(broken, tmp_path / "out", "Q2_K", options("best", nonfinite="zero"))
    found = types(path)
    assert found["blk.0.ffn_up.weight"] == "iq4_nl"
    assert found["blk.1.ffn_up.weight"] == "q4_0", "nothing is known of it"


def test_other_formats_have_no_fallback(odd: Path) -> None:
    with pytest.raises(UsageError, match="options of other formats were given for gptq"):
        pipeline.plan(
            str(odd), "gptq", levels=["4bit"],
            options=Options(overrides=Overrides(fallback="best"), method=MethodOptions(method="rtn")),
        )  # fmt: skip
    with pytest.raises(UsageError, match="unknown --fallback"):
        Overrides(fallback="none")

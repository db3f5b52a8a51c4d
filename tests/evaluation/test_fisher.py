"""Sensitivities by gradients: those of a dense twin, near what was measured, whatever threads, files and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize import memory
from llm_quantize.errors import NumericPolicyError, ResourceError
from llm_quantize.evaluation import fisher as fisher_module
from llm_quantize.evaluation.ladders import ladder_of
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.sensitivity import Profile, read_profile, write_profile
from llm_quantize.events import Measure
from llm_quantize.models.opening import open_source
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.weights import CheckpointWeights

from ..oracles.dense_fisher import DenseFisher
from ..tiny_models import make_tiny, reference_model
from .test_sensitivity import TYPES, profile_of, windows_of


def estimated(model: Path, windows: np.ndarray | None = None, **options: Any) -> Profile:
    source = open_source(str(model))
    with source.checkpoint:
        found = windows_of() if windows is None else windows
        plan = plan_profile(source, found, TYPES, None, estimated=True, **{"threads": 2, **options})
        return measure_profile(plan, journal=options.get("journal"))


def long_windows() -> np.ndarray:
    return windows_of(2, 150)  # more than the positions that the head takes at once


@pytest.mark.parametrize("variant", ["llama", "llama3", "gpt2"])
def test_a_figure_is_that_of_the_dense_twin(variant: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model")
    found = {(row.tensor, row.qtype): row.kld for row in estimated(model, long_windows()).rows}
    whole = reference_model(model)
    dense = DenseFisher(whole, long_windows())
    parameters = dict(whole.named_parameters())
    seen = set()
    with (source := open_source(str(model))).checkpoint:
        ladder = ladder_of("gguf")
        weights = CheckpointWeights(source.checkpoint)
        with ladder.holding(source, Pool(1, None, None), None, None) as hold:
            for one in ladder.candidates(source, TYPES, {}):
                changes = {name: value - weights.read(name).float() for name, value in hold(one).items()}
                (change,) = changes.values()
                expected = 0.0
                if one.name in ("token_embd.weight", "output.weight"):
                    if one.name == "output.weight" or variant != "llama":
                        expected += dense.head_cost(change)
                    if one.name == "token_embd.weight":
                        ids = torch.from_numpy(long_windows().astype(np.int64))
                        expected += dense.embedding_cost(dense.embedded + change[ids])
                else:
                    names = [f"{name}" if name in parameters else f"transformer.{name}" for name in changes]
                    expected = dense.cost(dict(zip(names, changes.values(), strict=True)))
                assert found[one.key] == pytest.approx(expected, rel=2e-3), one.key
                seen.add(one.name)
    assert {"token_embd.weight"} < seen


@pytest.mark.parametrize("variant", ["llama", "llama3", "gpt2", "granitemoe", "qwen3_moe", "gemma3"])
def test_estimates_are_near_what_is_measured(variant: str, tmp_path: Path) -> None:
    """Gradients see all positions, a measurement the second half: with random weights these are alike. What comes
    before a router is left out: gradients do not see a token go to another expert, most of it with random routers."""
    model = make_tiny(variant, tmp_path / "model")
    windows = windows_of(24, 32)
    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, windows, ("q8_0",), None, threads=2)
        measured = {row.tensor: row.kld for row in measure_profile(plan).rows}
        plan = plan_profile(source, windows, ("q8_0",), None, threads=2, estimated=True)
        assert plan.cost.estimated
        assert "by the gradients of 768 tokens" in plan.cost.sentence()
        found = {row.tensor: row.kld for row in measure_profile(plan).rows}
    assert found.keys() == measured.keys()
    if "moe" in variant:
        found = {name: kld for name, kld in found.items() if name.startswith(("blk.1.ffn", "output"))}
    ratios = np.log([found[name] / measured[name] for name in found])
    assert abs(np.median(ratios)) < 0.35, dict(zip(found, np.exp(ratios), strict=True))
    assert np.abs(ratios).max() < 1.6, dict(zip(found, np.exp(ratios), strict=True))


def test_threads_and_files_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama3", tmp_path / "model")
    windows = windows_of(5, 40)
    alone = estimated(model, windows, threads=1)
    assert alone == estimated(model, windows, threads=3)
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, windows, TYPES, None, threads=2, estimated=True)
        assert plan.disk == 5 * 40 * 64 * 4 * (2 + 3)
        assert measure_profile(plan) == alone
    assert alone.estimated
    assert alone.text["tokens"] == windows.size


def test_a_stopped_estimate_goes_on(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    whole, journal = estimated(model), tmp_path / "p.journal"

    def stop(event: Measure) -> None:
        if event.done > event.total // 2:
            raise KeyboardInterrupt

    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, windows_of(), TYPES, None, journal=journal, estimated=True)
        with pytest.raises(KeyboardInterrupt):
            measure_profile(plan, journal=journal, on_event=stop)
        again = plan_profile(source, windows_of(), TYPES, None, journal=journal, estimated=True)
        assert 0 < len(again.known) < len(whole.rows)
        assert measure_profile(again, journal=journal) == whole
        done = plan_profile(source, windows_of(), TYPES, None, journal=journal, estimated=True)
        assert done.cost.forwards == 0
        assert measure_profile(done, journal=journal) == whole
        measured = plan_profile(source, windows_of(), TYPES, None, journal=journal)
        assert not measured.known, "what was measured and what was estimated are two"


def test_what_is_not_finite_and_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama", tmp_path / "model")
    with pytest.raises(ResourceError, match="gradients do not fit"):
        estimated(model, max_ram=1 << 20)
    drawn = fisher_module._drawn
    monkeypatch.setattr(fisher_module, "_drawn", lambda *given: drawn(*given) * float("nan"))
    with pytest.raises(NumericPolicyError, match="gradients of window"):
        estimated(model)


def test_an_estimate_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = estimated(make_tiny("llama", tmp_path / "model"))
    write_profile(tmp_path / "p.json", profile)
    assert read_profile(tmp_path / "p.json") == profile
    assert profile_of(tmp_path / "model").estimated is False


def test_errors_that_fall_together() -> None:
    """rho by single products; of independent errors about 1, of errors that the inputs do not see 0."""
    random = torch.Generator().manual_seed(3)
    error, weight, inputs = (torch.randn(shape, generator=random) for shape in ((5, 7), (5, 7), (40, 7)))
    fisher, gram = weight.square(), inputs.T @ inputs
    moved = apart = 0.0
    for row, information in zip(error.tolist(), fisher.tolist(), strict=True):
        share = sum(information)
        moved += share * sum(row[i] * row[j] * float(gram[i, j]) for i in range(len(row)) for j in range(len(row)))
        apart += share * sum(value**2 * float(gram[i, i]) for i, value in enumerate(row))
    assert fisher_module.together(error, fisher, gram) == pytest.approx(moved / apart, rel=1e-4)
    inputs[:, 1] = inputs[:, 0]
    hidden = torch.zeros(5, 7)
    hidden[:, 0], hidden[:, 1] = 1.0, -1.0
    assert fisher_module.together(hidden, fisher, inputs.T @ inputs) == pytest.approx(0, abs=1e-5)
    assert fisher_module.together(torch.zeros(5, 7), fisher, gram) == 1


def test_drawn_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(20_000, 1)
    share = torch.softmax(logits[0], 0)
    found = fisher_module._drawn(logits, 3, 0)
    counts = (share - found).sum(0)
    assert torch.allclose(counts / 20_000, share, atol=0.01)
    assert torch.equal(found, fisher_module._drawn(logits, 3, 0))
    assert not torch.equal(found, fisher_module._drawn(logits, 4, 0))

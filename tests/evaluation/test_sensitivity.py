"""Measured sensitivities: equal to artifacts that were really written, whatever groups, threads and interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.errors import IntegrityError, MalformedInputError, ResourceError, UnsupportedError, UsageError
from llm_quantize.evaluation import profile as profile_module
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.sensitivity import (
    Profile,
    Sensitivity,
    candidates,
    read_profile,
    refuse_other_model,
    write_profile,
)
from llm_quantize.events import Measure
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.imatrix_file import Imatrix, read_imatrix
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize

from ..oracles.legacy_imatrix import random_entry, write_gguf_imatrix
from ..tiny_models import VOCABULARY, make_tiny

TYPES = ("q8_0", "q4_0")


def windows_of(count: int = 2, length: int = 16) -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCABULARY // 2, (count, length)).astype(np.int32)


def profile_of(model: Path, types: tuple[str, ...] = TYPES, imatrix: Imatrix | None = None, **options: Any) -> Profile:
    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, windows_of(), types, imatrix, threads=options.pop("threads", 2), **options)
        return measure_profile(plan, journal=options.get("journal"))


def written_kld(model: Path, tensor: str, qtype: str, directory: Path, imatrix: Path | None = None) -> float:
    """The same figure by the long way: a file with this one tensor quantized, decoded and compared."""
    overrides = Overrides(recipe=Recipe(f"{tensor}-{qtype}", "F32", {tensor: qtype}))
    options = Options(overrides=overrides, imatrix=imatrix)
    (result,) = quantize(str(model), levels=["F32"], output_dir=directory, options=options)
    source = open_source(str(model))
    with source.checkpoint:
        return measure_quality(source, [result.path], windows_of(), threads=1).artifacts[0].divergence.kld


CASES = {
    "llama": ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"),
    "llama3": ("token_embd.weight", "blk.0.attn_v.weight"),  # tied
    "gpt2": ("blk.0.attn_qkv.weight",),  # transposed
    "granitemoe": ("blk.0.ffn_up_exps.weight",),  # one source tensor in two outputs
    "qwen3_moe": ("blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"),
}


@pytest.mark.parametrize("variant", sorted(CASES))
def test_a_figure_is_that_of_a_written_artifact(variant: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model", **({"moe_intermediate_size": 64} if variant == "qwen3_moe" else {}))
    found = {(row.tensor, row.qtype): row.kld for row in profile_of(model).rows}
    qtype = "q4_0"
    for tensor in CASES[variant]:
        expected = written_kld(model, tensor, qtype, tmp_path)
        assert expected > 1e-5
        assert found[tensor, qtype] == pytest.approx(expected, rel=1e-3, abs=1e-9), tensor
        assert found[tensor, "q8_0"] < found[tensor, qtype]


def test_importance_is_used(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    tensor = "blk.0.attn_q.weight"
    path = write_gguf_imatrix(tmp_path / "i.gguf", {tensor: random_entry(np.random.default_rng(1), 1, 64)})
    plain = {(row.tensor, row.qtype): row.kld for row in profile_of(model).rows}
    found = {(row.tensor, row.qtype): row.kld for row in profile_of(model, imatrix=read_imatrix(path)).rows}
    assert found[tensor, "q4_0"] != plain[tensor, "q4_0"]
    assert found[tensor, "q4_0"] == pytest.approx(written_kld(model, tensor, "q4_0", tmp_path, path), rel=1e-3)
    assert found["blk.0.attn_k.weight", "q4_0"] == plain["blk.0.attn_k.weight", "q4_0"]


def test_every_tensor_at_every_type(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model")
    profile = profile_of(model)
    source = open_source(str(model))
    with source.checkpoint:
        wanted = candidates(source, TYPES, {})
        names = {output.name for output in source.tensors.outputs}
    assert [(row.tensor, row.qtype) for row in profile.rows] == [one.key for one in wanted]
    assert {"token_embd.weight", "output.weight", "blk.0.ffn_up_exps.weight"} <= set(profile.by_tensor()) <= names
    assert not [name for name in profile.by_tensor() if "norm" in name or "ffn_gate_inp" in name]
    assert all(row.kld_sem > 0 and row.kld >= 0 for row in profile.rows)
    assert profile.text["tokens"] == 2 * 7
    row = next(row for row in profile.rows if row.qtype == "q8_0")
    assert row.bits == 8.5


def test_groups_and_threads_change_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama3", tmp_path / "model")
    whole = profile_of(model, threads=1)
    monkeypatch.setattr(profile_module, "STREAM_BYTES", 3 * 2 * 16 * 64 * 4)
    source = open_source(str(model))
    with source.checkpoint:
        plan = plan_profile(source, windows_of(), TYPES, None, threads=3)
        assert len(plan.groups) > 5
        assert max(map(len, plan.groups)) == 3
        assert plan.cost.streams == sum(map(len, plan.groups)) == len(whole.rows)
        assert plan.cost.tokens == 32
        assert plan.cost.sentence()
        told: list[tuple[int, int]] = []
        assert measure_profile(plan, on_event=lambda event: told.append((event.done, event.total))) == whole
        assert [done for done, _ in told] == list(range(1, told[0][1] + 1))


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama", tmp_path / "model")
    whole = profile_of(model)
    monkeypatch.setattr(profile_module, "STREAM_BYTES", 4 * 2 * 16 * 64 * 4)
    journal = tmp_path / "p.journal"
    source = open_source(str(model))

    def stop(event: Measure) -> None:
        if event.done > event.total // 2:
            raise KeyboardInterrupt

    with source.checkpoint:
        plan = plan_profile(source, windows_of(), TYPES, None, journal=journal)
        with pytest.raises(KeyboardInterrupt):
            measure_profile(plan, journal=journal, on_event=stop)
        with journal.open("ab") as file:
            file.write(b"0000 torn")
        again = plan_profile(source, windows_of(), TYPES, None, journal=journal)
        assert 0 < len(again.known) < len(whole.rows)
        assert again.cost.streams == len(whole.rows) - len(again.known)
        assert measure_profile(again, journal=journal) == whole
        done = plan_profile(source, windows_of(), TYPES, None, journal=journal)
        assert done.cost.streams == 0
        assert measure_profile(done, journal=journal) == whole
        other = plan_profile(source, windows_of(3), TYPES, None, journal=journal)
        assert not other.known


def test_candidates_fall_back_and_are_refused(tmp_path: Path) -> None:
    source = open_source(str(make_tiny("llama", tmp_path / "model")))
    with source.checkpoint:
        assert {one.qtype for one in candidates(source, ["q4_k", "q6_k"], {})} == {"q5_0", "q8_0"}
        for types in ([], ["f16"], ["q9"]):
            with pytest.raises(UsageError, match="no such type"):
                candidates(source, types, {})
        with pytest.raises(UsageError, match="no window"):
            plan_profile(source, windows_of(1, 2), TYPES, None)
        with pytest.raises(ResourceError):
            plan_profile(source, windows_of(), TYPES, None, max_ram=1 << 20)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = Sensitivity("blk.0.attn_q.weight", "q4_k", 4.5, 144, 1e-3, 1e-5)
    profile = Profile("tiny", "a" * 64, {"sha256": "t", "tokens": 5}, None, (row,))
    path = tmp_path / "p.json"
    write_profile(path, profile)
    assert read_profile(path) == profile
    refuse_other_model(profile, "a" * 64, path)
    with pytest.raises(IntegrityError, match="another model"):
        refuse_other_model(profile, "b" * 64, path)
    good = json.loads(path.read_text(encoding="utf-8"))
    for change, error in (
        ({"format": "x"}, MalformedInputError),
        ({"format_version": 1}, UnsupportedError),
        ({"model": {}}, MalformedInputError),
        ({"text": []}, MalformedInputError),
        ({"importance": 4}, MalformedInputError),
        ({"sensitivities": []}, MalformedInputError),
        ({"sensitivities": [{}]}, MalformedInputError),
        ({"sensitivities": good["sensitivities"] * 2}, MalformedInputError),
        ({"sensitivities": [{**good["sensitivities"][0], "kld": "low"}]}, MalformedInputError),
        ({"sensitivities": [{**good["sensitivities"][0], "kld": -1.0}]}, MalformedInputError),
        ({"sensitivities": [{**good["sensitivities"][0], "qtype": "q9"}]}, MalformedInputError),
        ({"sensitivities": [{**good["sensitivities"][0], "nbytes": 0}]}, MalformedInputError),
    ):
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(error):
            read_profile(path)

"""Blocks that gradient steps refine: the loss and its gradient against a dense twin, and what of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize.architectures.rows import Arrays, read_output_rows
from llm_quantize.blockwise.refining import Outcome, Part, Refinement, drawn
from llm_quantize.blockwise.refining_sizes import PACES, TRIAL, batch_of, refinement_held, refinement_windows
from llm_quantize.errors import UsageError
from llm_quantize.events import Progress
from llm_quantize.formats.table import FORMATS
from llm_quantize.grids import grid_type
from llm_quantize.methods.refine import Moving
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import _refuse_refinement, plan, quantize
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import open_network
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.weights import CheckpointWeights

from ..oracles import dense_refinement as dense
from ..tiny_models import make_tiny, reference_model
from .tiny import matrices, options, run, write_text

NAMES = ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.gate_proj.weight")
WINDOWS, LENGTH = 4, 12
GROUPS: dict[str, Any] = {"group_size": 32}


@dataclass
class Bench:
    """Block 1 of a tiny model with two matrices on a grid of 2 bits, and its dense twin."""

    refinement: Refinement
    parts: list[Part]
    values: dict[str, Any]
    twin: Any
    windows: list[tuple[Any, Any]]
    begin: Callable[[float], list[Part]]

    def twin_gets(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            with torch.no_grad():
                self.twin.get_parameter(name).copy_(torch.from_numpy(np.asarray(value, np.float64)))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    model = make_tiny("llama", tmp_path / "tiny", dtype="float32")
    source = open_source(str(model))
    draw = torch.Generator().manual_seed(3)
    with source.checkpoint:
        network, weights = open_network(source, dtype="float32"), CheckpointWeights(source.checkpoint)
        entering = Activations(WINDOWS, LENGTH, network.width, torch.float32)
        target = Activations(WINDOWS, LENGTH, network.width, torch.float32)
        hidden = torch.randn(WINDOWS, LENGTH, network.width, generator=draw)
        hidden[:, 0] *= 40  # the first token of each window is massive
        outputs = {output.pieces[0].source: output for output in source.tensors.outputs if output.pieces}
        with network.block(1, weights) as block:
            for window in range(WINDOWS):
                entering.write(window, hidden[window])
                noise = 0.05 * torch.randn(LENGTH, network.width, generator=draw)
                target.write(window, block(hidden[window]) + noise)

            def put(values: Mapping[str, Any]) -> None:
                for name, value in values.items():
                    block.replace(name, torch.from_numpy(np.array(value, np.float32)))

            found = {name: weights.read(name).float() for name in NAMES}
            grids = {name: grid_type("int2_g32").fit(weight, None) for name, weight in found.items()}
            codes = {name: grids[name].nearest(weight) for name, weight in found.items()}
            values = {name: grids[name].decode(codes[name]).numpy().copy() for name in NAMES}

            def begin(pace: float) -> list[Part]:
                return [
                    Part(
                        name,
                        outputs[name],
                        start,
                        Moving(grids[name].rows(start, start + 16), codes[name][start : start + 16], 80, pace),
                    )
                    for name in NAMES
                    for start in range(0, len(codes[name]), 16)
                ]

            put(values)
            refinement = Refinement(block, entering, target, WINDOWS, Pool(1, None, None), put, lambda _: None)
            seen = [(entering.read(w).numpy(), target.read(w).numpy()) for w in range(WINDOWS)]
            made = Bench(refinement, begin(1.0), values, reference_model(model).double(), seen, begin)
            made.twin_gets(values)
            yield made


def test_the_loss_is_that_of_the_twin(bench: Bench) -> None:
    assert bench.refinement.held == range(WINDOWS - 1, WINDOWS)
    for windows in ((3,), (0, 1, 2)):
        expected = dense.loss(bench.twin, 1, [bench.windows[w] for w in windows])
        assert bench.refinement.loss(windows) == pytest.approx(expected, rel=1e-4)
    plain = np.mean([((dense.block_output(bench.twin, 1, h) - t) ** 2).mean() for h, t in bench.windows])
    assert dense.loss(bench.twin, 1, bench.windows) < 0.95 * plain  # the massive token counts less


def test_the_gradient_of_places_and_scales_is_what_moving_them_does(bench: Bench) -> None:
    gradients = bench.refinement._gradients([0, 2])
    seen = [bench.windows[0], bench.windows[2]]
    arrays = Arrays(gradients.__getitem__)
    for part in (bench.parts[0], bench.parts[-1]):
        moving, rows = part.moving, part.rows
        moving.places = moving.places.clamp(max=2) + 0.5
        found = read_output_rows(arrays, part.weight, rows.start, rows.stop)
        by_place, by_float = moving.gradients(torch.from_numpy(np.array(found, np.float32)))
        places, d = moving.places.double().numpy(), moving.grid.d.double().numpy()
        whole = np.array(bench.values[part.name], np.float64)

        def of(p: Any, floats: Any, part: Part = part, whole: Any = whole, places: Any = places, d: Any = d) -> float:
            # A change of one value, with all the others at their codes, as the gradient was taken there.
            base = dense.values(part.moving.grid, places, d, None)
            changed = whole.copy()
            changed[part.rows] += dense.values(part.moving.grid, p, floats, None) - base
            bench.twin_gets({part.name: changed})
            return dense.loss(bench.twin, 1, seen)

        for row, column in ((0, 0), (3, 40)):
            hot = np.zeros_like(places)
            hot[row, column] = 1.0
            expected = dense.slope(lambda by, of=of, p=places, d=d, hot=hot: of(p + by * hot, d), 1e-3)
            assert float(by_place[row, column]) == pytest.approx(expected, rel=5e-3, abs=1e-7)
            hot = np.zeros_like(d)
            hot[row, column // 32] = 1.0
            expected = dense.slope(lambda by, of=of, p=places, d=d, hot=hot: of(p, d + by * hot), 1e-4)
            assert float(by_float[0][row, column // 32]) == pytest.approx(expected, rel=5e-3, abs=1e-6)
        bench.twin_gets({part.name: whole})


def test_steps_lower_the_loss_of_what_they_see_and_leave_codes(bench: Bench) -> None:
    fit = range(WINDOWS - 1)
    first = bench.refinement.loss(fit)
    were = {name: value.copy() for name, value in bench.values.items()}
    parts, pace = bench.refinement.run(bench.begin, were, 80)
    assert pace in PACES
    for part in parts:
        grid, codes = part.moving.hardened()
        assert torch.equal(part.moving.values(), grid.decode(codes))
        bench.values[part.name][part.rows] = grid.decode(codes).numpy()
    found = bench.refinement.loss(fit)
    bench.refinement.put(bench.values)
    assert bench.refinement.loss(fit) == found < 0.95 * first


def test_steps_that_go_too_far_are_taken_again_and_shorter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two paces that lose on the windows of the first step are given up, and the block is as it was before each."""
    lost = iter([1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr(Refinement, "loss", lambda _, windows: next(lost))
    put: list[Any] = []
    given = replace(bench.refinement, put=lambda values: put.append({n: v.copy() for n, v in values.items()}))
    begun: list[float] = []

    def begin(pace: float) -> list[Part]:
        begun.append(pace)
        return bench.begin(pace)

    _, pace = given.run(begin, bench.values, 8)
    assert begun == list(PACES[:3])
    assert pace == PACES[2]
    for index in (TRIAL, 2 * TRIAL + 1):
        assert all(np.array_equal(put[index][name], value) for name, value in bench.values.items())
    assert len(put) == 2 * (TRIAL + 1) + 8


def test_every_window_is_drawn_once_before_any_comes_again() -> None:
    steps = list(drawn(6, 4, 9, 2))
    assert steps == list(drawn(6, 4, 9, 2)) != list(drawn(6, 4, 9, 3))
    flat = [window for step in steps for window in step]
    assert [len(step) for step in steps] == [4] * 9
    assert all(sorted(flat[at : at + 6]) == list(range(6)) for at in range(0, 36, 6))


def test_how_much_text_it_sees() -> None:
    assert [refinement_held(windows) for windows in (2, 8, 16, 48)] == [1, 1, 2, 6]
    assert (batch_of(42, 512), batch_of(3, 512), batch_of(42, 8192)) == (4, 3, 1)
    assert refinement_windows(48, 512, 10) == 2 * 6 + (2 + 3 * 10) * 4


def test_a_tie_keeps_what_was() -> None:
    assert Outcome(1.0, 0.5, 4, 1).kept
    assert not Outcome(1.0, 1.0, 4, 1).kept
    assert not Outcome(1.0, float("nan"), 4, 1).kept


# whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("refining") / "model", dtype="float32")


def _weights(artifact: Path) -> bytes:
    return next(artifact.glob("*.safetensors")).read_bytes()


def test_each_block_says_what_became_of_it_and_only_better_ones_are_kept(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    more: dict[str, Any] = {"samples": 32, "length": 64, **GROUPS}
    plain, without = run(model, tmp_path / "plain", options(text, **more), "gptq", "2bit")
    refined, manifest = run(model, tmp_path / "refined", options(text, refinement=24, **more), "gptq", "2bit")
    assert all("refinement" not in entry for entry in matrices(without).values())
    assert "refinement" not in without["made"]["options"]["method"]
    assert manifest["made"]["options"]["method"]["refinement"] == 24
    told = {name: entry["refinement"] for name, entry in matrices(manifest).items() if "layers" in name}
    for block in ("layers.0.", "layers.1."):
        facts = [one for name, one in told.items() if block in name]
        assert len(facts) == 7
        assert all(one == facts[0] for one in facts)
        assert facts[0]["steps"] == 24
        assert facts[0]["held_back"] == 4
        assert facts[0]["kept"] == (facts[0]["after"] < facts[0]["before"])
    assert any(one["kept"] for one in told.values())
    assert _weights(plain.path) != _weights(refined.path)


def test_a_block_that_gets_worse_keeps_its_codes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes are those of a run without refinement where the steps go uphill."""
    text = write_text(tmp_path)
    plain, _ = run(model, tmp_path / "plain", options(text, samples=8, length=48, **GROUPS), "gptq", "2bit")
    step = Moving.step
    monkeypatch.setattr(Moving, "step", lambda moving, gradient: step(moving, -gradient))
    chosen = options(text, samples=8, length=48, refinement=40, **GROUPS)
    refined, manifest = run(model, tmp_path / "refined", chosen, "gptq", "2bit")
    told = [entry["refinement"] for entry in matrices(manifest).values() if "refinement" in entry]
    assert len(told) == 14
    assert not any(one["kept"] for one in told)
    assert all(one["after"] > one["before"] for one in told)
    assert _weights(plain.path) == _weights(refined.path)


@pytest.mark.parametrize("more", [{"correction": 0.0}, {"inputs": "block"}, {"threads": 2}])
def test_it_goes_with_other_options(model: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    text = write_text(tmp_path)
    results = []
    for number in range(2):
        chosen = options(text, samples=4, length=48, refinement=8, **GROUPS, **(more if number else {}))
        result, manifest = run(model, tmp_path / str(number), chosen, "gptq", "2bit")
        assert sum("refinement" in entry for entry in matrices(manifest).values()) == 14
        results.append(_weights(result.path))
    assert (results[0] == results[1]) == ("threads" in more)


@pytest.mark.parametrize(
    ("format", "level", "more"),
    [
        ("gguf", "Q4_1", {}),
        ("awq", "4bit", GROUPS),
        ("compressed-tensors", "W4A16", GROUPS),
        ("mlx", "2bit", GROUPS),
        ("bitsandbytes", "nf4", {"double_quant": True, "group_size": 32}),
    ],
)
def test_every_format_with_codes_takes_it(
    model: Path, tmp_path: Path, format: str, level: str, more: dict[str, Any]
) -> None:
    chosen = options(write_text(tmp_path), samples=4, length=48, refinement=12, **more)
    _, manifest = run(model, tmp_path / "out", chosen, format, level)
    assert sum("refinement" in entry for entry in matrices(manifest).values()) == 14


def test_experts_are_refined_too(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model", dtype="float32")
    chosen = options(write_text(tmp_path), samples=4, length=48, refinement=8)
    _, manifest = run(model, tmp_path / "out", chosen, "gguf", "Q4_0")
    refined = [name for name, entry in matrices(manifest).items() if "refinement" in entry]
    assert any("exps" in name for name in refined)


def test_one_bar_that_only_rises_and_ends_full(model: Path, tmp_path: Path) -> None:
    chosen = options(write_text(tmp_path), samples=4, length=48, refinement=8, **GROUPS)
    seen: list[Any] = []
    quantize(str(model), "gptq", levels=["2bit"], output_dir=tmp_path / "out", options=chosen, on_event=seen.append)
    done = [event.done / event.total for event in seen if isinstance(event, Progress) and event.unit == "tokens"]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"method": "rtn"}, "runs no text"),
        ({"inputs": "source"}, "only the source runs"),
    ],
)
def test_it_is_refused_in_the_plan_where_no_block_runs(
    model: Path, tmp_path: Path, more: dict[str, Any], found: str
) -> None:
    chosen = options(write_text(tmp_path), refinement=4, **GROUPS, **more)
    with pytest.raises(UsageError, match="--refine") as caught:
        plan(str(model), "gptq", levels=["2bit"], options=chosen)
    assert found in str(caught.value)


def test_it_is_refused_with_statistics(tmp_path: Path) -> None:
    chosen = options(write_text(tmp_path), refinement=4, statistics=tmp_path / "statistics.safetensors")
    with pytest.raises(UsageError, match="--refine") as caught:
        _refuse_refinement([], FORMATS["gptq"], chosen)
    assert "--statistics" in str(caught.value)


def test_steps_are_not_negative() -> None:
    with pytest.raises(UsageError, match="--refine"):
        MethodOptions(refinement=-1)

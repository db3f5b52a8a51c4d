"""Every tensor's type, against llama.cpp's own quantizer run on small random models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf import levels as recipes
from llm_quantize.formats.gguf.levels import LEVELS, Overrides, TensorShape
from llm_quantize.qtypes import QTYPES
from tests.oracles.llama_quantize import Job, Model, Outcome, Tensor, run, save_importance, write_model

ARCHS = (
    *("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3"),
    *("phi3", "gpt2", "gptneox", "stablelm", "olmo2", "granite", "smollm3", "falcon"),
)


KNOWN = tuple(level for level in LEVELS if level not in ("Q2_0", "NVFP4"))
KNOWN_TYPES = tuple(qtype for qtype in recipes.TENSOR_TYPES if qtype != "q2_0")
"""What cyllama's quantizer knows: its llama.cpp is older than Q2_0, and none has a rule for NVFP4."""


@dataclass(frozen=True)
class Case:
    model: Model
    level: str
    importance: bool = False
    overrides: Overrides = field(default_factory=Overrides)


def covered(model: Model) -> dict[str, np.ndarray]:
    """An importance of ones for every weight, experts apart."""
    return {
        t.name: np.ones(t.shape[-1] * (t.shape[0] if len(t.shape) == 3 else 1), np.float32)
        for t in model.tensors()
        if t.name.endswith("weight") and len(t.shape) > 1
    }


def shapes_of(model: Model) -> list[TensorShape]:
    """The tensors in a shuffled order: order must not matter."""
    shapes = [TensorShape(t.name, t.shape) for t in model.tensors()]
    random.Random(1).shuffle(shapes)
    return shapes


def assigned(case: Case) -> recipes.Assignment:
    """Our answer, in the order of the model's tensors."""
    shapes = shapes_of(case.model)
    found = recipes.assign(
        case.level,
        shapes,
        case.model,
        arch=case.model.arch,
        importance_names=covered(case.model) if case.importance else None,
        overrides=case.overrides,
    )
    back = {shape.name: qtype for shape, qtype in zip(shapes, found.qtypes, strict=True)}
    return replace(found, qtypes=[back[t.name] for t in case.model.tensors()])


def number(qtype: str | None) -> int | None:
    return None if qtype is None else int(gguf.GGMLQuantizationType[qtype.upper()])


def differences(cases: Sequence[Case], directory: Path) -> list[str]:
    """What differs between our assignment and the types that llama.cpp announces."""
    sources: dict[Model, str] = {}
    jobs = []
    for index, case in enumerate(cases):
        if case.model not in sources:
            sources[case.model] = write_model(directory / f"{len(sources)}.gguf", case.model)
        source, overrides = sources[case.model], case.overrides
        importance = f"{source}.npz"
        if case.importance and not Path(importance).exists():
            save_importance(Path(importance), covered(case.model))
        jobs.append(
            Job(
                source,
                str(directory / f"{index}.out"),
                LEVELS[case.level].file_type,
                imatrix=importance if case.importance else None,
                output_type=number(overrides.output_type),
                embedding_type=number(overrides.embedding_type),
                # llama-quantize lowers the case of an expression before the library sees it.
                tensor_types=tuple((text.lower(), number(q) or 0) for text, q in overrides.tensor_types),
                pure=overrides.pure,
                dry_run=True,
            )
        )
    return [
        f"{case}: {what}"
        for case, job, outcome in zip(cases, jobs, run(jobs), strict=True)
        if (what := _difference(case, outcome))
    ]


def needing(case: Case) -> list[str]:
    """Names of the tensors that cannot be stored without importance."""
    return recipes.needs_importance(
        case.level, shapes_of(case.model), case.model, arch=case.model.arch, overrides=case.overrides
    )


def _difference(case: Case, outcome: Outcome) -> str:
    needed = [] if case.importance else needing(case)
    # llama.cpp notices an embedding or output matrix of such a type only when it quantizes it, and then dies.
    in_layers = [name for name in needed if name.startswith("blk.")]
    would_die = any(_cannot_be(t, outcome.types[t.name]) for t in case.model.tensors() if outcome.types)
    if not outcome.error and not would_die and bool(in_layers) != outcome.needs_imatrix:
        return f"importance needed by {in_layers}, llama.cpp: {outcome.needs_imatrix}"
    try:
        ours = assigned(case)
    except UsageError as refused:
        return "" if refused.tensor in needed else f"we refuse: {refused}"
    if outcome.error:
        # Where llama.cpp has no fallback for a row length it fails; we fall back to f16 and say so.
        return "" if ours.substituted else outcome.error[-300:]
    found = {
        tensor.name: (ours_, theirs)
        for tensor, ours_ in zip(case.model.tensors(), ours.qtypes, strict=True)
        if (theirs := outcome.types[tensor.name]) != ours_ and not _cannot_be(tensor, theirs)
    }
    return f"ours, theirs: {found}" if found or needed else ""


def _cannot_be(tensor: Tensor, theirs: str) -> bool:
    """llama.cpp may announce a type whose blocks the rows do not divide into, and dies when it gets there; we fall
    back, and say so."""
    return tensor.shape[-1] % QTYPES[theirs].block_size != 0


@pytest.mark.parametrize("arch", ARCHS)
def test_every_level_of_every_family(arch: str, tmp_path: Path) -> None:
    model = Model(arch=arch, n_layer=8, n_head=8, n_head_kv=2, n_expert=4 if "moe" in arch else 0)
    cases = [Case(model, level, importance) for level in KNOWN for importance in (False, True)]
    assert differences(cases, tmp_path) == []


def random_case(chance: random.Random, *, by_hand: bool) -> Case:
    heads_kv = chance.choice((1, 2, 4))
    arch = chance.choice(ARCHS)
    experts = "moe" in arch or (arch in ("llama", "granite") and chance.random() < 0.4)
    model = Model(
        arch=arch,
        n_layer=chance.choice((1, 2, 3, 7, 8, 16, 32)),
        n_head=heads_kv * chance.choice((1, 2, 4, 8)),
        n_head_kv=heads_kv,
        n_expert=chance.choice((2, 4, 8, 16)) if experts else 0,
        tied=chance.random() < 0.5,
        columns=chance.choice((256, 256, 288, 100)),
        ffn_columns=chance.choice((256, 256, 160, 100)),
    )
    overrides = Overrides()
    if by_hand:
        kinds = (None, *KNOWN_TYPES)
        expressions = ("attn_v", r"blk\.0\.", "ffn_down", "ATTN_Q", ".*", "token_embd", r"^output\.weight$", "norm")
        chosen = tuple(
            (chance.choice(expressions), chance.choice(KNOWN_TYPES)) for _ in range(chance.choice((0, 1, 2, 3)))
        )
        overrides = Overrides(chance.choice(kinds), chance.choice(kinds), chosen, chance.random() < 0.3)
    return Case(model, chance.choice(KNOWN), chance.random() < 0.6, overrides)


@pytest.mark.parametrize("by_hand", [False, True], ids=["rules", "overrides"])
def test_random_models(by_hand: bool, tmp_path: Path) -> None:
    chance = random.Random(2)
    assert differences([random_case(chance, by_hand=by_hand) for _ in range(120)], tmp_path) == []


def test_models_of_eighty_layers(tmp_path: Path) -> None:
    cases = [
        Case(Model(arch=arch, n_layer=80, n_head=heads, n_head_kv=4), "Q3_K_M")
        for arch in ("llama", "qwen2", "qwen3")
        for heads in (4, 8)
    ]
    assert differences(cases, tmp_path) == []


@pytest.mark.heavy
@pytest.mark.parametrize("arch", ARCHS)
def test_the_whole_product(arch: str, tmp_path: Path) -> None:
    models = [
        Model(arch=arch, n_layer=layers, n_head=8, n_head_kv=kv, n_expert=experts, tied=tied, columns=columns)
        for layers in (3, 16)
        for kv in (2, 8)
        for experts in ((2, 8) if "moe" in arch else (0,))
        for tied in (False, True)
        for columns in (256, 288)
    ]
    cases = [Case(m, level, importance) for m in models for level in KNOWN for importance in (False, True)]
    assert differences(cases, tmp_path) == []


def test_levels_carry_the_numbers_of_the_format() -> None:
    assert len(LEVELS) == 36
    for name in KNOWN:
        level = LEVELS[name]
        known = gguf.LlamaFileType(level.file_type).name
        assert known in (f"MOSTLY_{name}", f"ALL_{name}")


def test_a_level_that_the_quantizer_at_hand_does_not_know_is_as_the_other_of_few_bits(tmp_path: Path) -> None:
    model = Model(n_layer=2)
    source = write_model(tmp_path / "model.gguf", model)
    (outcome,) = run([Job(source, str(tmp_path / "out"), LEVELS["Q2_0"].file_type, dry_run=True)])
    assert "invalid output file type" in outcome.error, "cyllama knows it now: put it into KNOWN"
    ours = assigned(Case(model, "Q2_0")).qtypes
    assert [kind.replace("q1_0", "q2_0") for kind in assigned(Case(model, "Q1_0")).qtypes] == ours


@pytest.mark.parametrize("tied", [False, True])
def test_nvfp4_is_that_type_with_edges_at_8_bits(tied: bool, tmp_path: Path) -> None:
    """No llama-quantize has a rule for it: it is what Q8_0 is with the type asked for in the blocks."""
    model = Model(n_layer=2, tied=tied)
    source = write_model(tmp_path / "model.gguf", model)
    (outcome,) = run([Job(source, str(tmp_path / "out"), LEVELS["NVFP4"].file_type, dry_run=True)])
    assert "invalid output file type" in outcome.error, "cyllama has a rule now: compare with that"
    job = Job(source, str(tmp_path / "out"), LEVELS["Q8_0"].file_type, tensor_types=(("blk", 40),), dry_run=True)
    (outcome,) = run([job])
    assert outcome.error == ""
    ours = dict(zip((tensor.name for tensor in model.tensors()), assigned(Case(model, "NVFP4")).qtypes, strict=True))
    assert ours == outcome.types
    assert recipes.parse_level("nvfp4").name == "NVFP4"


def test_names_are_read_in_any_case() -> None:
    assert recipes.parse_level(" q4_k ").name == "Q4_K_M"
    assert recipes.parse_level("mxfp4").name == "MXFP4_MOE"
    assert recipes.parse_qtype("Q4_K") == "q4_k"
    assert recipes.parse_qtype("IQ2_XXS") == "iq2_xxs"


def test_levels_that_need_importance_say_so_before_any_plan() -> None:
    needed = {level for level in LEVELS if needing(Case(Model(n_layer=8), level))}
    low = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}
    assert needed == low | {"Q2_K_S"}
    by_hand = Overrides(tensor_types=((r"blk\.0\.ffn_up", "iq2_s"),), embedding_type="iq2_xxs", output_type="iq1_m")
    assert needing(Case(Model(), "Q4_K_M", overrides=by_hand)) == ["token_embd.weight", "blk.0.ffn_up.weight"]
    # Rows that do not divide into blocks fall back to a type that needs none.
    assert needing(Case(Model(columns=288, ffn_columns=160), "IQ1_S")) == []


@pytest.mark.parametrize("level", ["IQ2_XXS", "Q2_K_S"])
def test_a_tensor_without_importance_is_refused_as_llama_cpp_does(level: str, tmp_path: Path) -> None:
    model = Model()
    missing = "blk.0.attn_k.weight"
    values = {name: ones for name, ones in covered(model).items() if name != missing}
    stored = save_importance(tmp_path / "some.npz", values)
    source = write_model(tmp_path / "model.gguf", model)
    (outcome,) = run([Job(source, str(tmp_path / "out"), LEVELS[level].file_type, imatrix=stored)])
    assert f"Missing importance matrix for tensor {missing}" in outcome.error
    with pytest.raises(UsageError, match="importance matrix") as refused:
        recipes.assign(level, shapes_of(model), model, arch=model.arch, importance_names=values)
    assert (refused.value.tensor, refused.value.found) == (missing, "1 tensors without importance")
    assert refused.value.remedy == "give the importance of this very model, or none: quantize then calibrates by itself"
    with pytest.raises(UsageError, match="importance matrix") as refused:
        recipes.assign(level, shapes_of(model), model, arch=model.arch)
    assert refused.value.remedy == "--imatrix FILE, --statistics FILE, or leave out --no-calibration"


def test_unknown_names_are_refused_with_what_exists() -> None:
    with pytest.raises(UsageError, match="Q4_K_M"):
        recipes.parse_level("Q4")
    with pytest.raises(UsageError, match="a level for whole files"):
        recipes.parse_qtype("q4_k_m")
    with pytest.raises(UsageError, match="q6_k"):
        recipes.parse_qtype("int4")
    with pytest.raises(UsageError, match="a level for whole files"):
        recipes.parse_qtype("IQ3_M")


def test_a_bad_expression_is_refused_and_an_idle_one_is_named() -> None:
    case = Case(Model(), "Q4_K_M", overrides=Overrides(tensor_types=(("attn_[", "q8_0"),)))
    with pytest.raises(UsageError, match="regular expression"):
        assigned(case)
    idle = assigned(Case(Model(), "Q4_K_M", overrides=Overrides(tensor_types=(("no_such", "q8_0"),))))
    assert any("no_such" in warning for warning in idle.warnings)


def test_a_fallback_is_named() -> None:
    found = assigned(Case(Model(columns=288), "Q4_K_S"))
    assert any(one.shape[-1] == 288 and "attn_q" in one.tensor and one.taken == "q5_0" for one in found.substituted)
    assert found.warnings == []

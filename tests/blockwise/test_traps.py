"""What the field gets wrong, of the run: starved experts, failed factors, models on a grid, what must stay as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.blockwise.solver import FALLBACKS, OUT_OF_RANGE, STARVED, UNREACHED
from llm_quantize.cli import run as command_line
from llm_quantize.errors import NumericPolicyError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source

from ..faults.forking import hashes
from ..tiny_models import make_tiny
from .tiny import left_behind, matrices, options, run, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def change(model: Path, edit: Any) -> None:
    """Let ``edit`` change the tensors of a checkpoint."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def decoded(model: Path, artifact: Path) -> dict[str, torch.Tensor]:
    """The artifact's values under the source's names."""
    with (source := open_source(str(model))).checkpoint:
        found = open_decoded(source, artifact)
        values = {name: found.read(name).float() for name in found.names}
        found.close()
    return values


# experts


def unreachable(model: Path) -> None:
    """Expert 3 of layer 0 is never the first choice: its logit is half of one whose opposite stands there too."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
        router[1], router[3] = -router[0], router[0] / 2

    change(model, edit)


def assert_only_types(result: ArtifactResult) -> None:
    """Nothing is degraded but types whose blocks rows of 64 do not divide: the plan's doing, not the method's."""
    assert result.fallbacks == result.plan.fallbacks()
    assert not result.nonfinite or not any(result.nonfinite.values())


@pytest.mark.parametrize(("format", "level"), [("gguf", "Q4_0"), ("compressed-tensors", "W4A16")])
def test_experts_that_no_token_reached(format: str, level: str, text: Path, tmp_path: Path) -> None:
    model = make_tiny("mixtral", tmp_path / "model", dtype="float32", num_experts_per_tok=1)
    unreachable(model)
    group = {} if format == "gguf" else {"group_size": 32}
    result, manifest = run(model, tmp_path / "out", options(text, samples=1, length=12, **group), format, level)
    told = matrices(manifest)
    if format == "gguf":
        stack = told["blk.0.ffn_gate_exps.weight"]
        assert len(stack["tokens"]) == 4
        assert sum(stack["tokens"]) == 12
        assert stack["tokens"][3] == 0
        assert stack["fallbacks"] == {UNREACHED: 1}
        assert STARVED in stack["notes"]
        assert "fallbacks" not in told["blk.0.attn_q.weight"]
    else:
        starved = told["model.layers.0.block_sparse_moe.experts.3.w1"]
        assert starved["tokens"] == 0
        assert starved["fallbacks"] == {UNREACHED: 1}
    assert any(UNREACHED in line for line in result.degradations())
    values = decoded(model, result.path)
    source = load_file(model / "model.safetensors")
    for name, value in values.items():
        assert torch.isfinite(value).all(), name
        if "experts.3" in name:
            assert (value - source[name]).norm() < 0.12 * source[name].norm(), name


def test_experts_as_wide_as_the_model_are_not_drawn_to_the_router(text: Path, tmp_path: Path) -> None:
    """Inputs of the second stack of experts are not the model's, though both are 64 wide."""
    model = make_tiny("qwen3_moe", tmp_path / "model", dtype="float32", moe_intermediate_size=64)
    result, manifest = run(model, tmp_path / "out", options(text, samples=3, length=48, correction=1.0))
    told = matrices(manifest)
    for block in range(2):
        down, up = (told[f"blk.{block}.ffn_{name}_exps.weight"] for name in ("down", "up"))
        assert down["tokens"] == up["tokens"]
        assert down["loss"] < 0.8 * down["plain_loss"]
    assert_only_types(result)


# factors


def test_a_failed_factor_is_told(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")
    monkeypatch.setattr("llm_quantize.methods.hessian.factor_in_place", lambda work: False)
    result, manifest = run(model, tmp_path / "out", options(text))
    told = matrices(manifest)
    assert all(entry["fallbacks"] == {FALLBACKS["diagonal"]: 1} for entry in told.values())
    assert any("could not be factored" in note for note in told["blk.0.attn_q.weight"]["notes"])
    line = result.degradations()[-1]
    assert line.startswith(f"{manifest['matrices'][0]['name']} and 13 more: ")
    again, _ = run(model, tmp_path / "out", options(text))
    assert again.status == "already complete"
    assert again.degradations() == result.degradations()


def test_a_fallback_reaches_the_command_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")
    monkeypatch.setattr("llm_quantize.methods.hessian.factor_in_place", lambda work: False)
    words = ["quantize", str(model), "gptq", "-q", "4bit", "--group-size", "32", "--calibration-data", str(text)]
    words += ["--calibration-samples", "2", "--sequence-length", "32", "--threads", "1", "-o"]
    assert command_line([*words, str(tmp_path / "a")]) == 20
    assert "no error feedback" in capsys.readouterr().out
    assert command_line(["--json", *words, str(tmp_path / "b"), "--strict"]) == 9
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["artifacts"][0]["fallbacks"].keys() == {FALLBACKS["diagonal"]}
    assert "--calibration-samples" in facts["remedy"]


def test_dead_channels_are_a_note_only(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][5:9] = 0

    change(model, edit)
    result, manifest = run(model, tmp_path / "out", options(text))
    entry = matrices(manifest)["blk.0.attn_q.weight"]
    assert entry["notes"] == {"4 of 64 channels were always 0: they keep their weights": 1}
    assert "fallbacks" not in entry
    assert_only_types(result)
    assert torch.isfinite(decoded(model, result.path)["model.layers.0.self_attn.q_proj.weight"]).all()


# models on a grid


def onto_grid(model: Path, group: int, *, signed: bool = False) -> None:
    """Every matrix of the blocks a multiple of an int4 grid, scales powers of two and a half, as bfloat16 holds."""
    generator = torch.Generator().manual_seed(3)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if not name.endswith("_proj.weight"):
                continue
            rows, columns = value.shape
            codes = torch.randint(-7, 8, (rows, columns // group, group), generator=generator)
            codes[:, :, 0] = -8 if signed else 7
            scale = torch.randint(3, 8, (rows, columns // group, 1), generator=generator) / 128
            tensors[name] = (codes * scale).reshape(rows, columns).to(torch.bfloat16)

    change(model, edit)


@pytest.mark.parametrize(
    ("format", "level", "group", "signed"),
    [
        ("gguf", "Q4_0", 32, True),
        ("gguf", "Q4_0", 32, False),
        ("compressed-tensors", "W4A16", 32, True),
        ("gptq", "4bit", 32, False),
    ],
)
def test_a_model_on_the_grid_is_rounded_plainly(
    format: str, level: str, group: int, signed: bool, text: Path, tmp_path: Path
) -> None:
    model = make_tiny("llama", tmp_path / "model")
    onto_grid(model, group, signed=signed)
    chosen = options(text, **({} if format == "gguf" else {"group_size": group}))
    result, manifest = run(model, tmp_path / "out", chosen, format, level)
    assert all(entry.get("on_grid") is True for entry in manifest["matrices"])
    source = load_file(model / "model.safetensors")
    for name, value in decoded(model, result.path).items():
        if name.endswith("_proj.weight"):
            np.testing.assert_array_equal(value.numpy(), source[name].float().numpy(), err_msg=name)


def test_a_model_on_another_grid_is_not(text: Path, tmp_path: Path) -> None:
    """Multiples of a 6-bit grid are no multiples of a 4-bit one; and a random model is on none."""
    model = make_tiny("llama", tmp_path / "model")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            if name.endswith("up_proj.weight"):
                tensors[name] = (value.float() * 16).round().clamp(-31, 31).to(torch.bfloat16) / 16

    change(model, edit)
    _, manifest = run(model, tmp_path / "out", options(text))
    assert not any("on_grid" in entry for entry in manifest["matrices"])


# what stays


def test_what_is_not_quantized_is_kept_to_the_bit(text: Path, tmp_path: Path) -> None:
    """Embedding, output, norms, biases, routers, and every small file."""
    for variant in ("llama-bias", "qwen3_moe", "qwen3"):
        model = make_tiny(variant, tmp_path / variant)
        small = {"generation_config.json": b'{"do_sample": true}', "chat_template.jinja": b"{{ messages }}\n",
                 "special_tokens_map.json": b"{}"}  # fmt: skip
        for name, data in small.items():
            (model / name).write_bytes(data)
        chosen = options(text, group_size=16, transform="none")
        for format, level in (("gptq", "4bit"), ("compressed-tensors", "W4A16")):
            result, manifest = run(model, tmp_path / f"{variant}-{format}", chosen, format, level)
            packed = {name for entry in manifest["matrices"] for name in entry["fields"]}
            source = load_file(model / "model.safetensors")
            stored: dict[str, torch.Tensor] = {}
            for file in result.path.glob("*.safetensors"):
                stored |= load_file(file)
            kept = {name: value for name, value in stored.items() if name not in packed}
            assert {name for name in source if not name.endswith("_proj.weight")} <= kept.keys() | set()
            for name, value in kept.items():
                if name in source:
                    assert value.dtype == source[name].dtype
                    assert torch.equal(value, source[name]), name
            for name in (*small, "tokenizer.json", "tokenizer_config.json"):
                if (model / name).exists() and name != "generation_config.json":
                    assert (result.path / name).read_bytes() == (model / name).read_bytes(), name


def test_embedding_and_output_of_gguf_follow_the_recipe(text: Path, tmp_path: Path) -> None:
    """Feedback is for the blocks: the two tables have the bytes of the plain artifact of the same recipe."""
    model = make_tiny("llama", tmp_path / "model")
    files = []
    for method in ("rtn", "gptq"):
        result, manifest = run(model, tmp_path / method, options(text, method=method))
        entries = {tensor.name: tensor for tensor in read_gguf(result.path).tensors}
        data = result.path.read_bytes()
        files.append({name: data[entry.offset :][: entry.nbytes] for name, entry in entries.items()})
    named = {entry["name"] for entry in manifest["matrices"]}
    assert named == {name for name in files[0] if name.startswith("blk.") and "norm" not in name}
    for name in files[0].keys() - named:
        assert files[0][name] == files[1][name], name
    assert all(files[0][name] != files[1][name] for name in named)


# mixed recipes


def test_a_mixed_recipe_of_scalars_words_and_floats(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=256, num_attention_heads=4)
    types = (("ffn_gate", "iq2_s"), ("ffn_up", "tq2_0"), ("attn_q", "f16"), ("attn_k", "iq3_s"), ("attn_v", "bf16"))
    chosen = options(text, overrides=Overrides(tensor_types=types))
    result, manifest = run(model, tmp_path / "out", chosen, level="Q4_K_M")
    told = matrices(manifest)
    assert "blk.0.attn_q.weight" not in told
    assert "blk.0.attn_v.weight" not in told
    assert {entry["type"] for entry in told.values()} >= {"iq2_s", "tq2_0", "iq3_s", "q4_k"}
    assert "loss" in told["blk.0.attn_output.weight"]
    assert told["blk.0.ffn_gate.weight"]["loss"] < told["blk.0.ffn_gate.weight"]["plain_loss"]
    assert told["blk.0.ffn_up.weight"]["loss"] < 0.5 * told["blk.0.ffn_up.weight"]["plain_loss"]
    source, values = load_file(model / "model.safetensors"), decoded(model, result.path)
    for name, bound in (("q_proj", 1e-3), ("o_proj", 0.3), ("gate_proj", 0.5), ("k_proj", 0.35)):
        key = next(key for key in values if f"layers.0.self_attn.{name}" in key or f"layers.0.mlp.{name}" in key)
        assert (values[key] - source[key].float()).norm() < bound * source[key].float().norm(), name


# NaN and infinity


def poison(model: Path, name: str, value: float = float("nan")) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 7] = value

    change(model, edit)


NAN_AT = "model.layers.1.mlp.up_proj.weight"


def test_nan_weights_follow_the_policy(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    poison(model, NAN_AT)
    for policy in ("refuse", "keep"):
        with pytest.raises(NumericPolicyError) as caught:
            run(model, tmp_path / policy, options(text, nonfinite=policy))
        assert "1" in str(caught.value.to_dict())
    for format, level, more in (("gguf", "Q4_0", {}), ("gptq", "4bit", {"group_size": 32})):
        out = tmp_path / f"zero-{format}"
        result, manifest = run(model, out, options(text, nonfinite="zero", **more), format, level)
        (name,) = manifest["nonfinite_replaced"]
        assert manifest["nonfinite_replaced"][name] == 1
        assert "up" in name
        assert any("replaced by zero" in line for line in result.degradations())
        values = decoded(model, result.path)[NAN_AT]
        assert torch.isfinite(values).all()
        assert values[3, 7].abs() < 0.2


def test_an_activation_that_is_not_finite_names_its_place_and_keeps_finished_blocks(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e5
        tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e16

    change(model, edit)
    with pytest.raises(NumericPolicyError) as caught:
        run(model, tmp_path / "out", options(text))
    facts = caught.value.to_dict()
    assert "model.layers.1.mlp.down_proj" in str(facts)
    assert "sample 0, token" in str(facts)
    assert left_behind(tmp_path / "out", (".partial",))
    journal = next((tmp_path / "out").glob("*.journal")).read_text()
    assert "blk.0.ffn_down.weight" in journal


def test_failed_runs_leave_the_same_bytes_when_they_go_on(text: Path, tmp_path: Path) -> None:
    """What a run of another kind refused changes nothing for the next one."""
    model = make_tiny("llama", tmp_path / "model")
    run(model, tmp_path / "a", options(text))
    run(model, tmp_path / "b", options(text, inputs="source"))
    assert hashes(tmp_path / "a") != hashes(tmp_path / "b")


# scales that float16 cannot hold


def test_weights_below_the_scales_are_told(text: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model", dtype="float32")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-12
        tensors["model.layers.0.mlp.up_proj.weight"][3] = 0

    change(model, edit)
    result, manifest = run(model, tmp_path / "out", options(text, group_size=32), "gptq", "4bit")
    told = {name: facts["fallbacks"] for name, facts in matrices(manifest).items() if "fallbacks" in facts}
    assert told == {"model.layers.1.mlp.down_proj": {OUT_OF_RANGE: 1}}
    assert result.degradations()

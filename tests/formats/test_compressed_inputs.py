"""What compressed-tensors' configurations say of inputs: which module, which grid, and what is not followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quantize.errors import MalformedInputError
from llm_quantize.formats import compressed_tensors as form
from llm_quantize.formats.base import Coverage, SchemeOptions
from llm_quantize.formats.compressed_groups import Groups
from llm_quantize.formats.compressed_inputs import InputsOf, read_inputs
from llm_quantize.formats.packed import Settings
from llm_quantize.qtypes.inputs import InputGrid

TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FLOATS = {**TOKENS, "type": "float"}


def settings(*groups: dict[str, Any]) -> Settings:
    return Settings({"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}}, Path("config.json"))


def test_a_name_an_expression_a_class() -> None:
    groups = settings(
        {"targets": ["Linear"], "input_activations": TOKENS},
        {"targets": ["re:.*down_proj$"], "input_activations": None},
        {"targets": ["m.0.down_proj", "re:.*o_proj"], "input_activations": FLOATS},
    )
    said = InputsOf(Groups(groups))
    assert not said.unknown
    found = said.of(["m.0.down_proj", "m.1.down_proj", "m.1.o_proj", "m.1.q_proj"])
    expected = {"down_proj": InputGrid("e4m3"), "q_proj": InputGrid("int8")}
    assert found["m.0.down_proj"] == expected["down_proj"] == found["m.1.o_proj"]
    assert found["m.1.down_proj"] is None
    assert found["m.1.q_proj"] == expected["q_proj"]


def test_an_expression_that_cannot_be_matched_is_refused() -> None:
    said = settings(
        {"targets": ["Linear"], "input_activations": TOKENS}, {"targets": [r"re:(a)\1"], "input_activations": None}
    )
    with pytest.raises(MalformedInputError, match="linear time"):
        InputsOf(Groups(said)).of(["a"])


def test_a_group_without_targets_means_no_module() -> None:
    bare = {"targets": None, "input_activations": TOKENS}
    said = InputsOf(Groups(settings(bare, {"targets": ["re:.*o_proj"], "input_activations": None})))
    assert said.of(["m.o_proj", "m.q_proj"]) == {"m.o_proj": None, "m.q_proj": None}


@pytest.mark.parametrize(
    "change",
    [{"symmetric": False}, {"strategy": "tensor"}, {"strategy": "block"}, {"num_bits": 16}, {"num_bits": "8"},
     {"type": "complex"}, {"strategy": "group"}, {"strategy": "group", "group_size": -1}, {"dynamic": "local"}],
)  # fmt: skip
def test_what_is_not_followed_is_said(change: dict[str, Any]) -> None:
    assert read_inputs({**TOKENS, **change}) is None
    said = settings({"targets": ["Linear"], "input_activations": {**TOKENS, **change}})
    assert InputsOf(Groups(said)).unknown
    (note,) = form.notes(said)
    assert "only the weights are measured" in note


@pytest.mark.parametrize("level", form.LEVELS)
def test_a_level_is_read_as_it_was_meant(level: str) -> None:
    scheme = form.scheme(level, SchemeOptions())
    said = Settings(form.config(scheme, Coverage([])), Path("config.json"))
    assert not list(form.notes(said))
    assert InputsOf(Groups(said)).of(["m"])["m"] == form.inputs(scheme)
    assert (form.inputs(scheme) is None) == level.removesuffix("_ASYM").endswith("A16")

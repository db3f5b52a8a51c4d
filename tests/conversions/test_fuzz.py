"""Sources of no sense, for every reader: only our errors, and no more memory than a right one takes.

LLM_QUANTIZE_FUZZ says how many inputs are tried of each kind of source (fuzz.py tells how fast they go).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.conversions.fuzz import attack, changed, made
from tests.conversions.sources import SIZES, SOURCES
from tests.tiny_models import make_tiny

COUNT = int(os.environ.get("LLM_QUANTIZE_FUZZ", "500"))
QUICK = ("GPTQ 4 bit", "GGUF Q4_0", "CTranslate2 int8", "BF16 in pytorch_model.bin", "BF16 with a LoRA")
"""One for each form of container, for the gate."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama", **SIZES)


@pytest.mark.heavy
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("name", SOURCES)
def test_damage(name: str, model: Path, tmp_path: Path) -> None:
    source, lora = made(name, model, tmp_path)
    found = attack(source, COUNT, seed=list(SOURCES).index(name), lora=lora)
    assert 0 < found[""] < COUNT or COUNT < 100, "nothing is damaged, or all of it"
    assert len(found) > 10 or COUNT < 100, "all are refused at the door"


@pytest.mark.parametrize("name", QUICK)
def test_some_damage(name: str, model: Path, tmp_path: Path) -> None:
    source, lora = made(name, model, tmp_path)
    assert len(attack(source, 60, seed=-1, lora=lora)) > 3


def test_a_change_changes_one_thing() -> None:
    value = {"a": [1, {"b": None}], "c": "x"}
    found = [changed(random.Random(seed), value) for seed in range(200)]
    assert value == {"a": [1, {"b": None}], "c": "x"}
    assert sum(one != value for one in found) > 150

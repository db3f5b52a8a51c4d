"""The table of names in GGUF against the gguf package's, wherever the package knows the name."""

from __future__ import annotations

import gguf
import pytest

from llm_quantize.architectures import ARCHITECTURES
from llm_quantize.architectures.kinds import Kind

NEWER: frozenset[str] = frozenset()
"""Kinds and architectures that llama.cpp has and the package has not."""
PACKAGE = {kind.name: name for kind, name in gguf.TENSOR_NAMES.items()}


@pytest.mark.parametrize("member", Kind.__members__)
def test_a_kind_is_called_as_in_the_package(member: str) -> None:
    if member in NEWER:
        assert member not in PACKAGE, "the package knows it now"
    else:
        assert Kind.__members__[member].value == PACKAGE[member]


def test_an_architecture_has_the_kinds_that_its_families_use() -> None:
    package = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    known = 0
    for family in ARCHITECTURES.values():
        if family.arch in NEWER:
            assert family.arch not in package, "the package knows it now"
            continue
        names = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[package[family.arch]]}
        used = {weight.tensor for weight in family.weights} - ({Kind.OUTPUT} if not family.output else set())
        if gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_GATE_UP_EXP] in names:  # llama.cpp reads gate and up apart as well
            used -= {Kind.FFN_GATE_EXP, Kind.FFN_UP_EXP}
        assert used <= names | {Kind[member] for member in NEWER & Kind.__members__.keys()}, family.model_type
        known += 1
    assert known > 30


def test_names_of_tensors() -> None:
    assert Kind.ATTN_Q.of(12) == "blk.12.attn_q.weight"
    assert Kind.OUTPUT.of(None, ".bias") == "output.bias"

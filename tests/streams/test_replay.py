"""What leads to the last matrix of a module is skipped where its input is known: the same bits, for every family."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.blockwise.inputs import capture
from llm_quantize.streams.network import Block
from llm_quantize.streams.taps import is_matrix
from tests.streams.networks import opened, streamed_states, windows
from tests.tiny_models import STREAMED, make_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    def get(variant: str) -> Path:
        directory = root / variant
        return directory if directory.exists() else make_tiny(variant, directory)

    return get


def called(block: Block) -> list[str]:
    """The matrices of ``block`` that are used from now on, in order."""
    names: list[str] = []
    for name, module in block._module.named_modules():
        if is_matrix(module):
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: names.append(name))
    return names


@pytest.mark.parametrize("variant", STREAMED)
def test_the_rest_of_a_block_is_the_same(variant: str, models: Any) -> None:
    network, weights = opened(models(variant))
    entering = next(iter(network.embed(weights, windows(1, 20))))
    for index in range(network.n_blocks):
        with network.block(index, weights) as block:
            taps = [tap for tap in network.taps(index) if tap.name in block.endings]
            if variant == "gpt_oss":  # its attention gives its weights as well, which its block does not look at
                assert not taps
                entering = block(entering)
                continue
            assert taps, "attention of every other family ends in its output projection"
            seen, leaving = capture(block, entering, taps, whole=True)
            assert leaving is not None
            known = {tap: values for (tap, _), values in seen.items()}
            names = called(block)
            with block.knowing(known):
                found = block(entering)
            assert torch.equal(found, leaving)
            used = len(names)
            assert {block.endings[tap.name] for tap in taps} <= set(names)
            names.clear()
            assert torch.equal(block(entering), leaving)
            assert len(names) > used
            with block.knowing({tap: values + 1 for tap, values in known.items()}):
                assert not torch.equal(block(entering), leaving)
            entering = leaving


@pytest.mark.parametrize(
    ("variant", "endings"),
    [
        ("llama", {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("mixtral", {"self_attn.o_proj"}),
    ],
)
def test_what_modules_end_in(variant: str, endings: set[str], models: Any) -> None:
    network, weights = opened(models(variant))
    with network.block(0, weights) as block:
        assert set(block.endings.values()) == endings


def test_a_replaced_last_matrix_is_used(models: Any) -> None:
    network, weights = opened(models("llama"))
    entering = streamed_states(network, weights, windows(1, 12))[0]
    with network.block(0, weights) as block:
        taps = [tap for tap in network.taps(0) if block.endings.get(tap.name) == "self_attn.o_proj"]
        seen, before = capture(block, entering, taps, whole=True)
        (name,) = taps[0].tensors
        block.replace(name, weights.read(name).float() * 2)
        with block.knowing({taps[0].name: seen[taps[0].name, 0]}):
            found = block(entering)
        assert torch.equal(found, block(entering))
        assert before is not None
        assert not torch.equal(found, before)


def test_a_block_with_endings_tells_of_keys_and_values(models: Any) -> None:
    """Until its attention is skipped: what was put before a module's forward hides nothing of it."""
    network, weights = opened(models("llama"))
    entering = next(iter(network.embed(weights, windows(1, 12))))
    told: list[int] = []
    with network.block(0, weights) as block:
        taps = [tap for tap in network.taps(0) if block.endings.get(tap.name) == "self_attn.o_proj"]
        seen, _ = capture(block, entering, taps, cache=lambda keys, values: told.append(keys.shape[2]))
        assert told == [12]
        with block.knowing({taps[0].name: seen[taps[0].name, 0]}):
            capture(block, entering, taps, cache=lambda keys, values: told.append(keys.shape[2]))
        assert told == [12]


def test_the_weights_of_a_block_are_gone_when_it_is_left(models: Any) -> None:
    """At once: modules that held themselves would keep them until garbage is collected."""
    network, weights = opened(models("llama"))
    gc.disable()
    try:
        with network.block(0, weights) as block:
            held = [weakref.ref(block._module.get_submodule(name)) for name in block.endings.values()]
            assert len(held) == 2
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()

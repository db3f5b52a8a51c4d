"""The streamed forward is transformers' whole forward, for every family; every matrix's input is seen and named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.architectures import ARCHITECTURES
from llm_quantize.streams.network import Network
from llm_quantize.streams.weights import CheckpointWeights
from tests.streams.networks import opened, streamed_logits, streamed_states, whole_logits, windows
from tests.tiny_models import STREAMED, TINY, WINDOW, make_tiny, reference_logits, reference_model, to_version_4

LENGTH = WINDOW + 12  # longer than the sliding windows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    def get(variant: str) -> Path:
        directory = root / variant
        return directory if directory.exists() else make_tiny(variant, directory)

    return get


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in TINY.values()} >= set(ARCHITECTURES)


@pytest.mark.parametrize("variant", STREAMED)
def test_logits_are_those_of_the_whole_model(variant: str, models: Any) -> None:
    network, weights = opened(models(variant))
    ids = windows(2, LENGTH)
    found, expected = streamed_logits(network, weights, ids), whole_logits(models(variant), ids)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == (LENGTH, network.vocab_size)
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text", "cohere2", "falcon", "mixtral", "gpt2"])
def test_logits_agree_with_exact_attention(variant: str, models: Any) -> None:
    network, weights = opened(models(variant))
    ids = windows(1, LENGTH)
    expected = torch.from_numpy(reference_logits(reference_model(models(variant)), ids[0].tolist()))
    found = streamed_logits(network, weights, ids)[0]
    assert (found - expected).abs().max() <= 3e-6 * (expected.max() - expected.min())


@pytest.mark.parametrize("variant", ["llama", "mixtral", "gemma3_text"])
def test_bfloat16_is_that_of_the_whole_model(variant: str, models: Any) -> None:
    network, weights = opened(models(variant), "bfloat16")
    ids = windows(1, LENGTH)
    states = streamed_states(network, weights, ids)
    assert states[0].dtype == torch.bfloat16
    with network.head(weights) as head:
        assert torch.equal(head(states[0]), whole_logits(models(variant), ids, torch.bfloat16)[0])


@pytest.mark.parametrize("variant", ["qwen3", "gemma3_text", "gpt_neox", "llama-yarn", "phi3-longrope"])
def test_old_configurations(variant: str, tmp_path: Path) -> None:
    directory = make_tiny(variant, tmp_path / "model")
    to_version_4(directory)
    network, weights = opened(directory)
    ids = windows(1, LENGTH)
    assert torch.equal(streamed_logits(network, weights, ids)[0], whole_logits(directory, ids)[0])


@pytest.mark.parametrize("variant", ["granite", "gemma2", "cohere"])
def test_the_head_takes_any_rows(variant: str, models: Any) -> None:
    """Logits of a position depend on nothing but its own hidden state."""
    network, weights = opened(models(variant))
    state = streamed_states(network, weights, windows(1, LENGTH))[0]
    with network.head(weights) as head:
        whole = head(state)
        parts = torch.cat([head(state[rows]) for rows in (slice(0, 5), slice(5, 6), slice(6, None))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_windows_of_several_lengths(models: Any) -> None:
    network, weights = opened(models("gemma3_text"))
    for length in (1, LENGTH, 7, LENGTH):
        ids = windows(1, length, seed=length)
        assert torch.equal(streamed_logits(network, weights, ids)[0], whole_logits(models("gemma3_text"), ids)[0])


@pytest.mark.parametrize("variant", ["llama-dynamic", "phi3-longrope"])
def test_windows_beyond_the_trained_length(variant: str, models: Any) -> None:
    """Rotary frequencies that depend on the length are those of this window, not of an earlier one."""
    network, weights = opened(models(variant))
    for length in (9, 520, 600, 530, 9):
        ids = windows(1, length)
        expected = whole_logits(models(variant), ids)[0]
        assert torch.equal(streamed_logits(network, weights, ids)[0], expected)


@contextmanager
def multiplications(seen: list[tuple[torch.Tensor, torch.Tensor]], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product with a weight matrix: (W (out, in), inputs (tokens, in))."""
    linear, addmm, matmul = torch.nn.functional.linear, torch.addmm, torch.Tensor.__matmul__

    def seen_linear(inputs: Any, weight: Any, bias: Any = None) -> Any:
        seen.append((weight.clone(), inputs.reshape(-1, inputs.shape[-1]).clone()))
        return linear(inputs, weight, bias)

    def seen_addmm(bias: Any, inputs: Any, weight: Any) -> Any:
        seen.append((weight.T.clone(), inputs.clone()))
        return addmm(bias, inputs, weight)

    def seen_matmul(inputs: Any, weight: Any) -> Any:
        if weight.ndim == 2:
            seen.append((weight.T.clone(), inputs.reshape(-1, inputs.shape[-1]).clone()))
        return matmul(inputs, weight)

    with patch.context() as context:
        context.setattr(torch.Tensor, "__matmul__", seen_matmul)
        context.setattr(torch.nn.functional, "linear", seen_linear)
        context.setattr(torch, "addmm", seen_addmm)
        yield


def names_of(matrix: torch.Tensor, network: Network, index: int, weights: CheckpointWeights) -> set[tuple[str, int]]:
    """Which checkpoint tensors (and which matrix of a stacked one, else 0) are rows of ``matrix``, by their values."""
    found = set()
    for name in network.tensors(index):
        value = weights.read(name).float()
        if value.ndim < 2:
            continue
        for number, one in enumerate(value if value.ndim == 3 else [value]):
            for shape in (one, one.T):
                rows = shape.shape[0]
                starts = range(0, matrix.shape[0] - rows + 1, rows) if shape.shape[1] == matrix.shape[1] else ()
                if any(torch.equal(matrix[start : start + rows], shape) for start in starts):
                    found.add((name, number))
    return found


@pytest.mark.parametrize("variant", STREAMED)
def test_every_matrix_is_seen_with_its_input(variant: str, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, weights = opened(models(variant))
    state = next(network.embed(weights, windows(1, LENGTH)))
    for index in range(min(2, network.n_blocks)):
        told: dict[tuple[str, int], torch.Tensor] = {}
        taps = network.taps(index)
        assert len({tap.name for tap in taps}) == len(taps)

        def sink(tap: Any, matrix: int, inputs: torch.Tensor, told: Any = told, taps: Any = taps) -> None:
            assert tap in taps
            assert inputs.shape[1] == tap.columns
            for name, number in tap.tensors.items():
                if number is None or number == matrix:
                    assert (name, matrix if number is None else 0) not in told
                    told[name, matrix if number is None else 0] = inputs.clone()

        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        with network.block(index, weights) as block:
            with block.observe(sink), multiplications(seen, monkeypatch):
                after = block(state)
            assert torch.equal(block(state), after)
        assert seen
        named = set()
        for matrix, inputs in seen:
            names = names_of(matrix, network, index, weights)
            assert names
            for one in names:
                assert torch.equal(told[one], inputs)
            named |= names
        assert set(told) == named
        several = {name for name in network.tensors(index) if weights.read(name).ndim >= 2}
        matrices = {
            name
            for name in several
            if ".conv1d." not in name and ".conv.conv." not in name and not name.endswith("bias")
        }
        listed = {name for tap in taps for name in tap.tensors}
        assert matrices == listed
        state = after


def test_torch_is_what_computes_and_nobody_need_be_told(models: Any) -> None:
    opened(models("qwen3_5_text"))
    talks = logging.getLogger("transformers.integrations.hub_kernels")

    def told(text: str) -> Any:
        return talks.filter(logging.LogRecord(talks.name, logging.WARNING, "", 0, text, None, None))

    assert not told("`f` is falling back to its reference PyTorch implementation because `g` is not installed")
    assert told("something else")


def test_matrices_of_one_input_are_one_tap(models: Any) -> None:
    network, _ = opened(models("qwen2_moe"))
    ends = [{name.partition("layers.1.")[2] for name in tap.tensors} for tap in network.taps(1)]
    assert {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"} in ends
    assert {
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert_gate.weight",
        "mlp.gate.weight",
    } in ends
    experts = [tap for tap in network.taps(1) if tap.matrices == 4]
    assert [len(tap.tensors) for tap in experts] == [8, 4]
    assert set(experts[0].tensors.values()) == {0, 1, 2, 3}


def test_the_input_of_the_output_is_seen(models: Any) -> None:
    network, weights = opened(models("llama"))
    state = streamed_states(network, weights, windows(1, LENGTH))[0]
    seen: list[torch.Tensor] = []
    with network.head(weights) as head:
        with head.observe(lambda _tap, _matrix, inputs: seen.append(inputs.clone())):
            logits = head(state)
        head(state)
    matrix = weights.read("lm_head.weight").float()
    assert network.head_tap().tensors == {"lm_head.weight": None}
    assert len(seen) == 1
    torch.testing.assert_close(seen[0] @ matrix.T, logits)

"""Products by oneDNN: those of float64 to float32's precision, whatever the rows beside them, and left to torch where
they are not float32 on the CPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from llm_quantize.streams import products
from llm_quantize.streams.products import FastProducts, available


def operands(rows: int, terms: int, columns: int, *, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rows + terms + columns)
    shapes = ((2, rows, terms), (columns, terms), (columns,))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often oneDNN is asked from now on."""
    calls: list[int] = []
    plain = products._operation()

    def noted(*given: Any) -> Any:
        calls.append(1)
        return plain(*given)

    monkeypatch.setattr(products, "_operation", lambda: noted)
    return calls


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(64, 576, 192), (5, 17, 3), (1, 8, 1), (33, 1536, 70)])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_float64(shape: tuple[int, int, int], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    x, weight, bias = operands(*shape)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    with torch.inference_mode(), FastProducts():
        found = torch.nn.functional.linear(x, weight, bias if biased else None)
        one = torch.nn.functional.linear(x[:1].contiguous(), weight, bias if biased else None)
    assert calls == [1, 1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * shape[1] ** 0.5)
    assert torch.equal(one, found[:1]), "a product must not depend on what is beside it"


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
def test_what_is_not_float32_in_order_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    linear = torch.nn.functional.linear
    x, weight, bias = operands(6, 16, 4)
    for given in (
        operands(6, 16, 4, dtype=torch.bfloat16),
        operands(6, 16, 4, dtype=torch.float64),
        [x.transpose(0, 1), weight, bias],
        [x[..., :8], weight[:, :8], bias],
        [x[:, :0], weight, bias],
    ):
        with torch.inference_mode():
            expected = linear(*given)
            with FastProducts():
                assert torch.equal(linear(*given), expected)
    with FastProducts():
        assert torch.equal(torch.matmul(x, weight.T), x @ weight.T)
    assert not calls


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
def test_threads_have_the_same_products() -> None:
    x, weight, bias = operands(64, 576, 192)
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode(), FastProducts():
            found[number] = torch.nn.functional.linear(x, weight, bias)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], found[0]) for number in range(4))


@pytest.mark.parametrize("lacking", ["oneDNN", "x86", "leave"])
def test_a_torch_without_it(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "oneDNN":
        monkeypatch.setattr(products, "_operation", lambda: None)
    elif lacking == "x86":
        monkeypatch.setattr(products.platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not available()
    x, weight, bias = operands(6, 16, 4)
    with FastProducts():
        assert torch.equal(torch.nn.functional.linear(x, weight, bias), torch._C._nn.linear(x, weight, bias))

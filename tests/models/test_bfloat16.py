"""Products in bfloat16 on processors with and without bfloat16 arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from mcsharp_sdk.models import bfloat16


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_has_bfloat16_arithmetic", lambda: False)
    monkeypatch.setattr(bfloat16, "CHUNK_WEIGHTS", 1000)


@pytest.mark.parametrize("rows", [1, 16, 33, 100, 700])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("arithmetic", [False, True])
def test_the_product_is_rounded_once(
    rows: int, with_bias: bool, arithmetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "_has_bfloat16_arithmetic", lambda: arithmetic)
    monkeypatch.setattr(bfloat16, "CHUNK_WEIGHTS", 1000)
    torch.manual_seed(rows)
    x = torch.randn(2, rows, 96).bfloat16()
    weight, bias = torch.randn(50, 96).bfloat16(), torch.randn(50).bfloat16()
    exact = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    found = bfloat16.linear(x, weight, bias if with_bias else None)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    # Half a unit in the last place, and the float32 sum's own error where terms cancel.
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_rows_are_multiplied_in_blocks_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_has_bfloat16_arithmetic", lambda: True)
    met: set[int] = set()

    def linear(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        met.add(len(x))
        return torch.nn.functional.linear(x, *others)

    monkeypatch.setattr(bfloat16, "F", SimpleNamespace(linear=linear, pad=F.pad))
    weight = torch.randn(8, 16).bfloat16()
    for rows in range(bfloat16.FEW_ROWS + 1, 5000, 97):
        assert bfloat16.linear(torch.randn(rows, 16).bfloat16(), weight).shape == (rows, 8)
    assert met == set(bfloat16.BLOCK_ROWS)


def test_other_dtypes_are_left_to_torch(emulated: None) -> None:
    x, weight = torch.randn(100, 16), torch.randn(5, 16)
    assert torch.equal(bfloat16.linear(x, weight), F.linear(x, weight))


def test_modules_use_it_for_a_while_and_gradients_never_do(emulated: None) -> None:
    calls = []
    original = bfloat16.linear

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(args)
        return original(*args)

    module = torch.nn.Linear(16, 8, dtype=torch.bfloat16)
    x = torch.randn(64, 16).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "linear", counted)
        with bfloat16.fast_linears():
            module(x).sum().backward()
            assert not calls
            with torch.no_grad():
                module(x)
        with torch.no_grad():
            module(x)
    assert len(calls) == 1
    assert module.weight.grad is not None

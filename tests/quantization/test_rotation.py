"""Rotations of inputs, against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcsharp_sdk.quantization import quantise_rtn
from mcsharp_sdk.quantization.grid import dequantise
from mcsharp_sdk.quantization.rotation import (
    LARGEST_ODD,
    rotate,
    rotate_both_,
    turned_back,
)
from mcsharp_sdk.quantization.search import GridSettings


def dense(columns: int) -> Tensor:
    """H by its elements: Hartley transform of the odd part, signs by common bits of the rest."""
    power = columns & -columns
    odd = columns // power
    blocks = 1 if odd <= LARGEST_ODD else odd
    odd //= blocks

    def element(i: int, j: int) -> float:
        if i // (odd * power) != j // (odd * power):
            return 0.0
        i, j = i % (odd * power), j % (odd * power)
        angle = 2 * math.pi * (i // power) * (j // power) / odd
        sign = (-1) ** ((i % power) & (j % power)).bit_count()
        return sign * (math.cos(angle) + math.sin(angle)) / (odd * power) ** 0.5

    rows = [[element(i, j) for j in range(columns)] for i in range(columns)]
    return torch.tensor(rows, dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(1, 96))
def test_it_is_a_symmetric_orthogonal_matrix(columns: int) -> None:
    turn = rotate(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(turn, dense(columns), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turn @ turn.T, torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(turn, turn.T)


def test_an_odd_part_that_is_too_large_is_left_out() -> None:
    columns = 4 * (LARGEST_ODD + 2)
    turn = rotate(torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(turn, dense(columns), rtol=1e-10, atol=1e-10)
    assert int((turn != 0).sum(1).max()) == 4


def test_no_column_of_a_turned_matrix_stands_out() -> None:
    """Mixtral's and DeepSeek's sizes: every column goes into every other."""
    for columns in (1408, 4096, 14336):
        turned = rotate(torch.eye(1, columns).mul(columns**0.5))
        assert float(turned.abs().max()) <= 2**0.5 + 1e-4


@pytest.mark.parametrize("columns", [24, 600])
def test_hessians_of_turned_inputs(columns: int) -> None:
    inputs = torch.randn(2, 50, columns, dtype=torch.float64)
    turned = rotate(inputs)
    found = rotate_both_(inputs.mT @ inputs)
    torch.testing.assert_close(found, turned.mT @ turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_turned_back(dtype: torch.dtype) -> None:
    weight = torch.randn(1, 6, 48)
    found = quantise_rtn(rotate(weight), [8], GridSettings(16)).expert(0)
    expected = dequantise(found, torch.float32).double() @ dense(48)
    back = turned_back(found, dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), expected, rtol=1e-2, atol=1e-2)
    assert float((back.float() - weight[0]).abs().max()) < 0.05

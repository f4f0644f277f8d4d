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
    expert_signs,
    rotate,
    rotate_both_,
    turned_back,
)
from mcsharp_sdk.quantization.search import GridSettings


def dense(columns: int, signs: Tensor) -> Tensor:
    """D·H·D by its elements: Hartley transform of the odd part, signs by common bits else."""
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
    plain = torch.tensor(rows, dtype=torch.float64)
    return signs.double()[:, None] * plain * signs.double()


@settings(deadline=None)
@given(st.integers(1, 96), st.integers(0, 5))
def test_it_is_a_symmetric_orthogonal_matrix(columns: int, expert: int) -> None:
    signs = expert_signs(6, columns)[expert]
    turn = rotate(torch.eye(columns, dtype=torch.float64), signs)
    torch.testing.assert_close(turn, dense(columns, signs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turn @ turn.T, torch.eye(columns, dtype=torch.float64))
    torch.testing.assert_close(turn, turn.T)


def test_an_odd_part_that_is_too_large_is_left_out() -> None:
    columns = 4 * (LARGEST_ODD + 2)
    signs = expert_signs(1, columns)[0]
    turn = rotate(torch.eye(columns, dtype=torch.float64), signs)
    torch.testing.assert_close(turn, dense(columns, signs), rtol=1e-10, atol=1e-10)
    assert int((turn != 0).sum(1).max()) == 4


def test_no_column_of_a_turned_matrix_stands_out() -> None:
    """Mixtral's and DeepSeek's sizes: every column goes into every other."""
    for columns in (1408, 4096, 14336):
        rows = torch.eye(1, columns).mul(columns**0.5)
        turned = rotate(rows, expert_signs(1, columns)[0])
        assert float(turned.abs().max()) <= 2**0.5 + 1e-4


def test_signs_are_part_of_the_format() -> None:
    """MurmurHash3's finaliser in plain integers; the values do not depend on how many there are."""

    def sign(expert: int, column: int) -> float:
        mixed = (expert * 0x9E3779B1 + column) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * factor % 2**32
        return -1.0 if mixed >> 31 else 1.0

    signs = expert_signs(9, 257)
    assert signs.tolist() == [[sign(e, k) for k in range(257)] for e in range(9)]
    assert torch.equal(expert_signs(4, 100), signs[:4, :100])
    alike = expert_signs(64, 4096) @ expert_signs(64, 4096).T / 4096
    assert float((alike - torch.eye(64)).abs().max()) < 0.1


@pytest.mark.parametrize("columns", [24, 600])
def test_the_hessian_of_turned_inputs(columns: int) -> None:
    inputs, signs = torch.randn(50, columns, dtype=torch.float64), expert_signs(2, columns)[1]
    turned = rotate(inputs, signs)
    found = inputs.T @ inputs
    rotate_both_(found, signs)
    torch.testing.assert_close(found, turned.T @ turned)


def test_rows_may_have_signs_of_their_own() -> None:
    rows, signs = torch.randn(3, 40), expert_signs(3, 40)
    together = rotate(rows, signs[[2, 0, 2]])
    for row, expert, found in zip(rows, (2, 0, 2), together, strict=True):
        torch.testing.assert_close(rotate(row, signs[expert]), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_turned_back(dtype: torch.dtype) -> None:
    weight, signs = torch.randn(1, 6, 48), expert_signs(1, 48)[0]
    found = quantise_rtn(rotate(weight, signs), [8], GridSettings(16)).expert(0)
    expected = dequantise(found, torch.float32).double() @ dense(48, signs)
    back = turned_back(found, dtype, signs)
    assert back.dtype == dtype
    torch.testing.assert_close(back.double(), expected, rtol=1e-2, atol=1e-2)
    assert float((back.float() - weight[0]).abs().max()) < 0.05

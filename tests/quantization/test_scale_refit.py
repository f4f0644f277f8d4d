"""Scales fitted to chosen codes, against least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcsharp_sdk.quantization import GridSettings, factorise, quantise_gptq
from mcsharp_sdk.quantization.grid import QuantizedBatch, zero_points
from mcsharp_sdk.quantization.hessian import damped
from mcsharp_sdk.quantization.scale_refit import refit_scales


def quantised(
    columns: int, group_size: int, bits: list[int], rows: int = 17
) -> tuple[Tensor, Tensor, QuantizedBatch]:
    """Weights, damped Hessians, and the weights quantised."""
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(len(bits), rows, columns, generator=generator)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(len(bits), 3 * columns, columns, generator=generator) @ mix
    hessians = 2 * inputs.transpose(1, 2) @ inputs
    factor = factorise(hessians)
    batch = quantise_gptq(weights, factor, bits, GridSettings(group_size=group_size))
    return weights, damped(hessians, factor), batch


def errors(weights: Tensor, batch: QuantizedBatch, hessians: Tensor) -> Tensor:
    """Δ H Δᵀ of each row, [E, R] float64."""
    change = (weights - batch.dequantise()).double()
    return torch.einsum("erk,ekl,erl->er", change, hessians.double(), change)


@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (70, 16), (40, 64)])
def test_scales_are_the_least_squares_ones_for_the_codes(columns: int, group_size: int) -> None:
    bits = [1, 2, 3, 4]
    weights, hessians, batch = quantised(columns, group_size, bits)
    fitted = refit_scales(weights, batch, hessians)
    assert torch.equal(fitted.codes, batch.codes)
    assert torch.equal(fitted.zeros, batch.zeros)
    changed = 0
    for expert, width in enumerate(bits):
        zeros = zero_points(batch.zeros[expert], width).double()
        root = torch.linalg.cholesky(hessians[expert].double())
        for row in range(weights.shape[1]):
            parts = zeros[row].repeat_interleave(group_size)[:columns]
            levels = batch.codes[expert, row].double() - parts
            columns_of = torch.zeros(columns, zeros.shape[1], dtype=torch.float64)
            for column in range(columns):
                columns_of[column, column // group_size] = levels[column]
            best = torch.linalg.lstsq(
                root.T @ columns_of, (root.T @ weights[expert, row].double()).unsqueeze(1)
            ).solution[:, 0]
            if torch.equal(fitted.scales[expert, row], batch.scales[expert, row]):
                continue
            changed += 1
            torch.testing.assert_close(
                fitted.scales[expert, row].double(), best, rtol=2e-3, atol=1e-6
            )
    assert changed > 0.9 * weights.shape[0] * weights.shape[1]


def test_no_row_gets_worse_and_signs_stay() -> None:
    weights, hessians, batch = quantised(128, 16, [1, 2, 2, 3], rows=600)
    fitted = refit_scales(weights, batch, hessians)
    before, after = (errors(weights, b, hessians) for b in (batch, fitted))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.99 * float(before.sum())
    assert torch.equal(fitted.scales.sign(), batch.scales.sign())


def test_a_row_that_would_change_a_sign_keeps_its_scales() -> None:
    weights, hessians, batch = quantised(32, 16, [2])
    fitted = refit_scales(-weights, batch, hessians)
    assert torch.equal(fitted.scales, batch.scales)

"""Scales fitted to chosen codes, against least squares in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantised_matrices import quantised_by_gptq, row_errors
from torch import Tensor

from mcsharp_sdk.quantization.grid import (
    QuantizedWeight,
    zero_points,
)
from mcsharp_sdk.quantization.scale_refit import refit_scales


def least_squares(weight: Tensor, one: QuantizedWeight, root: Tensor) -> Tensor:
    """Scales of one row [G] whose weights come nearest, H being root · rootᵀ, in float64."""
    columns = len(weight)
    zeros = zero_points(one.zeros, one.bits).double().repeat_interleave(one.group_size)[:columns]
    groups = torch.arange(columns) // one.group_size
    levels = torch.zeros(columns, one.zeros.shape[0], dtype=torch.float64)
    levels[torch.arange(columns), groups] = one.codes.double() - zeros
    wanted = (root.T @ weight.double()).unsqueeze(1)
    return torch.linalg.lstsq(root.T @ levels, wanted).solution[:, 0]


@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (70, 16), (40, 64)])
def test_scales_are_the_least_squares_ones_for_the_codes(columns: int, group_size: int) -> None:
    bits = [1, 2, 3, 4]
    weights, hessians, batch = quantised_by_gptq(columns, group_size, bits)
    changed = 0
    for expert in range(len(bits)):
        before = batch.expert(expert)
        fitted = refit_scales(weights[expert], before, hessians[expert])
        assert torch.equal(fitted.codes, before.codes)
        assert torch.equal(fitted.zeros, before.zeros)
        root = torch.linalg.cholesky(hessians[expert].double())
        for row, weight in enumerate(weights[expert]):
            if torch.equal(fitted.scales[row], before.scales[row]):
                continue
            changed += 1
            one = replace(before, codes=before.codes[row], zeros=before.zeros[row])
            best = least_squares(weight, one, root)
            torch.testing.assert_close(fitted.scales[row].double(), best, rtol=2e-3, atol=1e-6)
    assert changed > 0.9 * weights.shape[0] * weights.shape[1]


def test_no_row_gets_worse_and_signs_stay() -> None:
    weights, hessians, batch = quantised_by_gptq(128, 16, [1, 2, 3], rows=600)
    for weight, hessian, index in zip(weights, hessians, range(3), strict=True):
        start = batch.expert(index)
        fitted = refit_scales(weight, start, hessian)
        before, after = (row_errors(weight, one, hessian) for one in (start, fitted))
        assert bool((after <= before * (1 + 1e-6)).all())
        assert float(after.sum()) < 0.99 * float(before.sum())
        assert torch.equal(fitted.scales.sign(), start.scales.sign())


def test_a_row_that_would_change_a_sign_keeps_its_scales() -> None:
    weights, hessians, batch = quantised_by_gptq(32, 16, [2])
    fitted = refit_scales(-weights[0], batch.expert(0), hessians[0])
    assert torch.equal(fitted.scales, batch.scales[0])

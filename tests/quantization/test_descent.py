"""Coordinate descent on codes, against trying every code of every weight in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from quantised_matrices import quantised_by_gptq, row_errors
from torch import Tensor

from mcsharp_sdk.quantization.descent import refine, sweep
from mcsharp_sdk.quantization.grid import (
    QuantizedWeight,
    dequantise,
    zero_points,
)


def swept_by_hand(weight: Tensor, one: QuantizedWeight, hessian: Tensor) -> Tensor:
    """Codes [R, K] where each in turn is the best of all there are, in float64."""
    columns = weight.shape[1]
    scales = one.scales.double().repeat_interleave(one.group_size, 1)[:, :columns]
    zeros = zero_points(one.zeros, one.bits).double()
    zeros = zeros.repeat_interleave(one.group_size, 1)[:, :columns]
    codes = one.codes.double()
    for column in range(columns):
        found = []
        for code in range(2**one.bits):
            tried = codes.clone()
            tried[:, column] = code
            change = scales * (tried - zeros) - weight.double()
            found.append(((change @ hessian.double()) * change).sum(1))
        codes[:, column] = torch.stack(found).argmin(0).double()
    return codes.to(torch.uint8)


@pytest.mark.parametrize(("columns", "group_size"), [(150, 32), (20, 64), (129, 16)])
def test_each_code_is_the_best_given_all_others(columns: int, group_size: int) -> None:
    weights, hessians, batch = quantised_by_gptq(columns, group_size, [1, 2, 3], rows=6)
    for expert in range(3):
        before = batch.expert(expert)
        found = sweep(weights[expert], before, hessians[expert])
        expected = swept_by_hand(weights[expert], before, hessians[expert])
        # Where two codes are equally good to the last bit of a float, either may be taken.
        assert float((found.codes == expected).double().mean()) > 0.995
        assert torch.equal(found.scales, before.scales)
        assert torch.equal(found.zeros, before.zeros)


def test_rounds_lower_the_error_of_every_row_further_than_gptq() -> None:
    weights, hessians, batch = quantised_by_gptq(192, 32, [1, 2, 3], rows=64)
    for weight, hessian, index in zip(weights, hessians, range(3), strict=True):
        start = batch.expert(index)
        found = [start, *(refine(weight, start, hessian, rounds) for rounds in range(4))]
        error = [row_errors(weight, one, hessian) for one in found]
        for before, after in pairwise(error):
            assert bool((after <= before * (1 + 1e-5)).all())
        assert float(error[2].sum()) < 0.97 * float(error[0].sum())


def test_weights_on_the_grid_stay_where_they_are() -> None:
    _, hessians, batch = quantised_by_gptq(64, 16, [2, 3], rows=10)
    for index in range(2):
        start = batch.expert(index)
        found = refine(dequantise(start), start, hessians[index], 2)
        assert torch.equal(found.codes, start.codes)
        torch.testing.assert_close(found.scales, start.scales, rtol=2e-3, atol=0)

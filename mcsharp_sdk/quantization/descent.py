"""Better codes by coordinate descent, when all of them are chosen.

GPTQ chooses a code by what the columns before it left, and never again. Here column after column is
chosen anew given all others: the change δ of column k changes tr(Δ H Δᵀ) least with
δ = −(Δ H)_k / H_kk, so the code nearest to that is taken, and the gradient Δ H kept up to date. No
step raises the error. Sweeps alternate with a fit of the scales (``scale_refit``). Coordinate
descent for quantisation is from QuantEase (arXiv 2309.01885); starting from GPTQ, grids with their
own scales per group, and fitting these in turn are ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import (
    QuantizedWeight,
    dequantise,
    top_code,
)
from mcsharp_sdk.quantization.scale_refit import refit_scales

BLOCK = 128
"""Columns whose changes to the whole gradient are applied together."""

RUN = 16
"""Columns whose changes to the gradient of their block are applied together."""


def refine(
    weight: Tensor, quantised: QuantizedWeight, hessian: Tensor, rounds: int
) -> QuantizedWeight:
    """Fit scales, and so many times choose codes and fit scales; zero points stay.

    Parameters
    ----------
    weight : [R, K], what the codes stand for, any float dtype.
    quantised : one matrix, [R, K].
    hessian : fp32 [K, K], damped, with a positive diagonal.
    rounds : 0 fits scales alone.

    Returns
    -------
    QuantizedWeight with tr(Δ H Δᵀ) no larger, up to rounding.
    """
    quantised = refit_scales(weight, quantised, hessian)
    for _ in range(rounds):
        quantised = refit_scales(weight, sweep(weight, quantised, hessian), hessian)
    return quantised


def sweep(weight: Tensor, quantised: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """Choose every code once more, the others being what they are; parameters as above."""
    columns = _Columns(weight, quantised, hessian)
    for start in range(0, weight.shape[1], BLOCK):
        columns.choose(start, min(start + BLOCK, weight.shape[1]))
    return replace(quantised, codes=columns.codes.T.to(torch.uint8))


class _Columns:
    """The columns of one matrix; everything is transposed, [K, R], so that they are contiguous."""

    def __init__(self, weight: Tensor, quantised: QuantizedWeight, hessian: Tensor) -> None:
        self.size, self.top = quantised.group_size, top_code(quantised.bits)
        self.hessian = hessian
        self.scales = quantised.scales.float().T.contiguous()
        self.codes = quantised.codes.T.float()
        change = dequantise(quantised).sub_(weight)
        self.gradient = hessian @ change.T

    def choose(self, start: int, stop: int) -> None:
        """Choose the codes of some columns, and bring the gradient up to date."""
        hessian = self.hessian[start:stop, start:stop]
        gradient = self.gradient[start:stop].clone()
        changes = torch.empty_like(gradient)
        for first in range(0, stop - start, RUN):
            last = min(first + RUN, stop - start)
            for place in range(first, last):
                change = self._step(start + place, gradient[place], hessian[place, place])
                gradient[place + 1 : last].addr_(hessian[place + 1 : last, place], change)
                changes[place] = change
            gradient[last:].addmm_(hessian[last:, first:last], changes[first:last])
        self.gradient.addmm_(self.hessian[:, start:stop], changes)

    def _step(self, column: int, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Choose a column's codes; the change of its weights, [R]."""
        scale, old = self.scales[column // self.size], self.codes[column]
        new = (old - gradient / (curvature * scale)).round_().clamp_(0, self.top)
        change = (new - old).mul_(scale)
        self.codes[column] = new
        return change

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

from mcsharp_sdk.quantization.gptq import walk_columns
from mcsharp_sdk.quantization.grid import (
    QuantizedWeight,
    dequantise,
    top_code,
)
from mcsharp_sdk.quantization.scale_refit import refit_scales


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
    for group in range(quantised.scales.shape[1]):
        columns.choose(group)
    return replace(quantised, codes=columns.codes.T.to(torch.uint8))


class _Columns:
    """The columns of one matrix; everything is transposed, [K, R], so that they are contiguous."""

    def __init__(self, weight: Tensor, quantised: QuantizedWeight, hessian: Tensor) -> None:
        self.size, self.hessian = quantised.group_size, hessian
        self.scales = quantised.scales.float().T.contiguous()
        self.codes = quantised.codes.T.contiguous().float()
        self.top = self.scales.new_full((1, len(weight)), top_code(quantised.bits))
        self.gradient = hessian @ dequantise(quantised).sub_(weight).T

    def choose(self, group: int) -> None:
        """Choose the codes of a group of columns, and bring the gradient up to date.

        In units of the scale a column's best value is t_j = c_j − y_j − Σ_i L_ji (t_i − e_i − c_i),
        over the columns i before it: c are the codes as they were, y = Δ H / (H_jj scale),
        L_ji = H_ij / H_jj, and e_i = t_i minus the code it is rounded to. Solved for t that is
        t_j = t'_j + Σ_i V_ji e_i with t' = c − (I + L)⁻¹ y and V = (I + L)⁻¹ L: a walk along
        columns that passes errors on, as GPTQ's. (I + L is as good as D + L of the Hessian, whose
        symmetric part is above D/2, so nothing grows.)
        """
        part = slice(group * self.size, (group + 1) * self.size)
        own, scale, old = self.hessian[part, part], self.scales[group], self.codes[part]
        diagonal = own.diagonal().unsqueeze(1)
        before = own.tril(-1) / diagonal
        wanted = torch.cat([self.gradient[part] / (diagonal * scale), before], dim=1)
        solved = torch.linalg.solve_triangular(before, wanted, upper=False, unitriangular=True)
        away, passed_on = solved.split([old.shape[1], len(old)], dim=1)
        exact = (old - away).contiguous().unsqueeze(0)
        updates = passed_on.T.neg().contiguous().unsqueeze(0)
        new = walk_columns(exact, updates, self.top, torch.empty_like(exact))[0].float()
        self.gradient.addmm_(self.hessian[:, part], (new - old).mul_(scale))
        self.codes[part] = new

"""The best scales for codes that are chosen: least squares in closed form.

With codes and zero points as they are, a row of the dequantised weight is Σ_g s_g·c_g, where c_g
holds code − zero in the columns of group g. The scales s that make (w − Σ s_g c_g) H (…)ᵀ least
solve A·s = b with A_gh = c_gᵀ H c_h and b_g = c_gᵀ H w: all groups of a row together, while GPTQ
chose each when it came to its first column.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import QuantizedWeight, group_count, zero_points
from mcsharp_sdk.quantization.search import LARGEST_SCALE, SMALLEST_SCALE

ROWS_AT_A_TIME = 512
"""Rows whose systems are held at a time."""


def refit_scales(weight: Tensor, quantised: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """Scales that make tr(Δ H Δᵀ) least for the codes and zero points of ``quantised``.

    A row keeps its scales where these would not lower its error once they are rounded to fp16, or
    where one would change its sign, which is part of the zero point.

    Parameters
    ----------
    weight : [R, K], what the codes stand for, any float dtype.
    quantised : one matrix, [R, K].
    hessian : fp32 [K, K], damped as it was for the codes.

    Returns
    -------
    QuantizedWeight that shares codes and zero points with ``quantised``.
    """
    scales = quantised.scales.clone()
    zeros = zero_points(quantised.zeros, quantised.bits)
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        levels = _levels(quantised.codes[rows], zeros[rows], quantised.group_size)
        scales[rows] = _refitted(
            weight[rows].float(), levels, scales[rows], hessian, quantised.group_size
        )
    return replace(quantised, scales=scales)


def _levels(codes: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """code − zero, fp32 [R, K]."""
    return codes - zeros.repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]


def _refitted(
    weight: Tensor, levels: Tensor, old: Tensor, hessian: Tensor, group_size: int
) -> Tensor:
    """Scales of some rows, fp16 [R, G]."""
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    system = torch.empty(rows, groups, groups, dtype=torch.float64, device=weight.device)
    wanted = _group_sums((weight @ hessian).mul_(levels), group_size).double()
    for group, part in enumerate(levels.split(group_size, dim=1)):
        first = group * group_size
        product = part @ hessian[first : first + part.shape[1], first:]
        system[:, group, group:] = _group_sums(product.mul_(levels[:, first:]), group_size)
        system[:, group:, group] = system[:, group, group:]
    # A group of zeros only has no say: its scale stays.
    idle = system.diagonal(dim1=1, dim2=2) <= 0
    system.diagonal(dim1=1, dim2=2)[idle] = 1.0
    before = old.double()
    wanted = torch.where(idle, before, wanted)
    found, _ = torch.linalg.solve_ex(system, wanted)
    new = found.to(torch.float16)
    fits = torch.isfinite(new) & (new.sign() == old.sign())
    fits &= (new.abs() >= SMALLEST_SCALE) & (new.abs() <= LARGEST_SCALE)
    better = _error(system, wanted, new.double()) < _error(system, wanted, before)
    return torch.where((fits.all(1) & better).unsqueeze(1), new, old)


def _group_sums(columns: Tensor, group_size: int) -> Tensor:
    """Sums over each group of columns, [R, G]; the last group may be short."""
    whole = columns.shape[1] // group_size * group_size
    sums = columns[:, :whole].unflatten(1, (-1, group_size)).sum(2)
    if whole < columns.shape[1]:
        sums = torch.cat([sums, columns[:, whole:].sum(1, keepdim=True)], dim=1)
    return sums


def _error(system: Tensor, wanted: Tensor, scales: Tensor) -> Tensor:
    """sᵀ A s − 2 bᵀ s of each row, the part of its error that depends on the scales, [R]."""
    product = (system @ scales.unsqueeze(-1)).squeeze(-1)
    return ((product - 2 * wanted) * scales).sum(1)

"""HQQ: half-quadratic quantisation (Badri and Shaji, 2023), without calibration.

The zero point of a group is moved so that few weights have large errors: with p < 1 the norm
Σ |W − Q(W)|^p is lowered by turns of a shrinkage W_e of the errors and the zero point that fits
W − W_e best. Scales are those of the group's range, as in the authors' method. The zero point ends
on this package's grid (quarter levels near the middle), where theirs is any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsharp_sdk.quantization.compiled import zero_point_search
from mcsharp_sdk.quantization.grid import QuantizedBatch, top_code
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings, GroupGrid, grid_of

NORM = 0.7
"""p of the norm."""

PRICE, PRICE_GROWTH = 10.0, 1.01
"""β of the first turn, and what each turn multiplies it by."""

TURNS = 20

LEAST_ERROR = 1e-8
"""Smaller errors are taken for this in powers, of which one is negative."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantise_hqq(weights: Tensor, bits: Sequence[int], grid: GridSettings) -> QuantizedBatch:
    """Quantise the same linear layer of several experts; see :func:`quantise_rtn`.

    Of ``grid`` only the group size counts.
    """
    return quantise_rtn(weights, bits, grid, fit=fit_half_quadratic)


def fit_half_quadratic(
    weights: Tensor,
    bits: int,
    importance: Tensor,
    settings: GridSettings,
    matrix_magnitude: Tensor | None = None,
) -> GroupGrid:
    """Scale and zero point of one group of columns for every row, [n, R] each.

    Parameters
    ----------
    weights : fp32 [n, g, R], the group's columns, transposed.
    bits : one width for all.
    importance, settings, matrix_magnitude : not looked at.
    """
    top = top_code(bits)
    compiled = zero_point_search(weights.device.type)
    if compiled is None:
        scale, zero = search_by_torch(weights, top)
    else:
        prices = [PRICE * PRICE_GROWTH**turn for turn in range(TURNS)]
        scale, zero = compiled(weights, top, NORM, (LEAST_ERROR, SMALLEST_SCALE), prices)
    return grid_of(scale.unsqueeze(-2), (zero - top / 2).unsqueeze(-2), top)


def search_by_torch(weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale of the range and best zero point, [n, R] each, on any device and processor."""
    low = weights.amin(-2, keepdim=True).clamp_(max=0)
    high = weights.amax(-2, keepdim=True).clamp_(min=0)
    scale = ((high - low) / top).clamp_min_(SMALLEST_SCALE)
    exact = weights / scale
    zero, price = -low / scale, PRICE
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(TURNS):
        codes = (exact + zero).round_().clamp_(0, top)
        change = weights - (codes - zero) * scale
        error = change.abs().clamp_min_(LEAST_ERROR)
        powered = error.pow(NORM)
        size = powered.mean(-2, keepdim=True)
        best = torch.where(size < least, zero, best)
        least = torch.minimum(size, least)
        kept = shrunk(change, error, powered, price)
        zero = (codes - exact + kept / scale).mean(-2, keepdim=True)
        price *= PRICE_GROWTH
    return scale.squeeze(-2), best.squeeze(-2)


def shrunk(change: Tensor, error: Tensor, powered: Tensor, price: float) -> Tensor:
    """What is left of errors after shrinkage: near the minimum of |x|^p/p + price/2·(x − change)².

    Parameters
    ----------
    error, powered : ``change`` without its sign, and that to the power of p.
    """
    return change * (1 - powered / (error.square() * price)).clamp_min_(0)

"""What grids that a search has found are worth."""

from __future__ import annotations

from torch import Tensor

from mcsharp_sdk.quantization.grid import top_code
from mcsharp_sdk.quantization.search import GroupGrid


def squared_error(weights: Tensor, bits: int, importance: Tensor, found: GroupGrid) -> Tensor:
    """Σ_k d_k (w_k − scale·(code_k − zero))² of each row, float64 [n, R]."""
    scales, zeros = (tensor.double().unsqueeze(-2) for tensor in (found.scales, found.zeros))
    codes = (weights.double() / scales + zeros).round().clamp(0, top_code(bits))
    squares = (weights.double() - scales * (codes - zeros)).square()
    return (importance.double().unsqueeze(-1) * squares).sum(-2)


def share_as_good(
    weights: Tensor, bits: int, importance: Tensor, found: GroupGrid, expected: GroupGrid
) -> float:
    """Share of rows whose errors are the same in both, up to 1e-4 of themselves.

    Not all need be: sums in another order may choose another of two equally good grids, and go on
    from there.
    """
    errors = [squared_error(weights, bits, importance, grid) for grid in (found, expected)]
    return float(((errors[0] - errors[1]).abs() <= 1e-4 * errors[1] + 1e-12).float().mean())


def share_of_equal_grids(found: GroupGrid, expected: GroupGrid) -> float:
    """Share of rows that have the same scale and the same zero point in both."""
    same = (found.scales == expected.scales) & (found.zeros == expected.zeros)
    return float(same.float().mean())

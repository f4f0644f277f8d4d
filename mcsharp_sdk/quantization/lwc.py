"""LWC: learnable weight clipping (OmniQuant, arXiv 2308.13137, Eq. 2), with round to nearest.

The range of each row and group is h = σ(γ)·max − σ(β)·min, and γ and β are learned by gradient
through the rounding (straight-through). OmniQuant learns them on the output of a whole decoder
layer; here it is that of the matrix, tr(ΔW H ΔWᵀ), so that experts are quantised like by the other
quantisers. Rates, steps and the choice of the best step are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.quantization.grid import (
    ZERO_STEP,
    QuantizedBatch,
    check_widths,
    group_count,
    top_code,
)
from mcsharp_sdk.quantization.search import GridSettings, GroupGrid, grid_of

START = 4.0
"""γ and β of the first step: σ(4) = 0.98 of the range."""

RATE = 0.1
STEPS = 60


def quantise_lwc(
    weights: Tensor, hessians: Tensor, bits: Sequence[int], grid: GridSettings
) -> QuantizedBatch:
    """Quantise the same linear layer of several experts with learned clipping.

    Parameters
    ----------
    weights : [E, R, K], any float dtype; not changed.
    hessians : fp32 [E, K, K].
    bits : width of each expert, length E.
    grid : only its group size counts.

    Returns
    -------
    QuantizedBatch, [E, R, K].

    Raises
    ------
    ValueError
        If shapes do not agree or a width is not supported.
    """
    experts, _, columns = weights.shape
    widths = check_widths(bits, experts)
    if hessians.shape != (experts, columns, columns):
        raise ValueError(
            f"hessians must be [{experts}, {columns}, {columns}], got {list(hessians.shape)}"
        )
    parts = [
        _quantise_one(weight.float(), hessian, width, grid.group_size)
        for weight, hessian, width in zip(weights, hessians, widths, strict=True)
    ]
    codes, scales, zeros = (torch.stack(part) for part in zip(*parts, strict=True))
    return QuantizedBatch(codes, scales, zeros, widths, grid.group_size)


class _Clipping:
    """One matrix, cut into groups [R, G, g], and the range of each row and group."""

    def __init__(self, weight: Tensor, bits: int, group_size: int) -> None:
        self.top = top_code(bits)
        self.columns = weight.shape[1]
        missing = group_count(self.columns, group_size) * group_size - self.columns
        self.groups = F.pad(weight, (0, missing)).unflatten(1, (-1, group_size))
        self.low = self.groups.amin(-1).clamp_(max=0)
        self.high = self.groups.amax(-1).clamp_(min=0)

    def range(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of the zero point, [R, G], from γ and β, [2, R, G]."""
        upper, lower = torch.sigmoid(strength)
        high, low = upper * self.high, lower * self.low
        scale = ((high - low) / self.top).clamp_min(1e-8)
        return scale, -low / scale - self.top / 2

    def rounded(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The quantised matrix [R, K]; gradients pass through the roundings."""
        limit = self.top * ZERO_STEP
        steps = _through((offset / ZERO_STEP).round() * ZERO_STEP, offset)
        zero = (steps.clamp(-limit, limit) + self.top / 2).unsqueeze(-1)
        scale = scale.unsqueeze(-1)
        exact = self.groups / scale + zero
        codes = _through(exact.round(), exact).clamp(0, self.top)
        return ((codes - zero) * scale).flatten(1)[:, : self.columns]

    def codes(self, found: GroupGrid) -> Tensor:
        """uint8 [R, K] on a finished grid of [1, R·G]."""
        shape = (*self.low.shape, 1)
        scales, zeros = found.scales.view(shape), found.zeros.view(shape)
        codes = (self.groups / scales + zeros).round_().clamp_(0, self.top)
        return codes.to(torch.uint8).flatten(1)[:, : self.columns].contiguous()


def _quantise_one(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, K], scales and zero-point codes [R, G] of one matrix."""
    clipping = _Clipping(weight, bits, group_size)
    strength = _learned(clipping, weight, hessian)
    scale, offset = clipping.range(strength)
    found = grid_of(scale.reshape(1, 1, -1), offset.reshape(1, 1, -1), clipping.top)
    scales = found.scales.view(scale.shape).to(torch.float16)
    return clipping.codes(found), scales, found.zero_codes(bits).view(scale.shape)


def _learned(clipping: _Clipping, weight: Tensor, hessian: Tensor) -> Tensor:
    """γ and β, [2, R, G], of the step with the least error of each row."""
    curvature = hessian / hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    with torch.enable_grad():
        like = clipping.low
        strength = like.new_full((2, *like.shape), START).requires_grad_()
        best = strength.detach().clone()
        least = like.new_full((len(weight),), torch.inf)
        optimiser = torch.optim.Adam([strength], lr=RATE)
        for _ in range(STEPS):
            change = clipping.rounded(*clipping.range(strength)) - weight
            errors = ((change @ curvature) * change).sum(-1)
            better = errors.detach() < least
            best = torch.where(better.view(1, -1, 1), strength.detach(), best)
            least = torch.minimum(errors.detach(), least)
            optimiser.zero_grad()
            # Rows do not touch each other, and Adam does not see their scale.
            errors.sum().backward()
            optimiser.step()
    return best


def _through(rounded: Tensor, exact: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``exact``."""
    return exact + (rounded - exact).detach()

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
    zero_codes,
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
        """Scale and zero point as a code would be, [R, G], from γ and β, [2, R, G]."""
        scale, offset = self.exact_range(strength)
        limit = self.top * ZERO_STEP
        steps = _through((offset / ZERO_STEP).round() * ZERO_STEP, offset)
        return scale, steps.clamp(-limit, limit) + self.top / 2

    def exact_range(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of the zero point from the middle, [R, G], not on any grid."""
        upper, lower = torch.sigmoid(strength)
        high, low = upper * self.high, lower * self.low
        scale = ((high - low) / self.top).clamp_min(1e-8)
        return scale, -low / scale - self.top / 2

    def rounded(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """What rounding changes, [R, G, g], and which codes are clipped: 1 or 0."""
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        nearest = (self.groups / scale).add_(zero).round_()
        codes = nearest.clamp(0, self.top)
        clipped = nearest.ne_(codes)
        return codes.sub_(zero).mul_(scale).sub_(self.groups), clipped

    def slopes(
        self, scale: Tensor, change: Tensor, clipped: Tensor, pull: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How an error falls or rises with scale and zero point, [R, G].

        Through the rounding a weight that is not clipped moves by change / scale with the scale,
        and not at all with the zero point; one that is clipped by (weight + change) / scale, and by
        minus the scale.

        Parameters
        ----------
        change, clipped : as ``rounded`` gives them.
        pull : how it does with each quantised weight, [R, G, g].
        """
        pulled = (pull * change).sum(-1)
        pull = pull * clipped
        return (pulled + (pull * self.groups).sum(-1)) / scale, -scale * pull.sum(-1)

    def matrix(self, groups: Tensor) -> Tensor:
        """[R, K] of what is cut into groups."""
        return groups.flatten(1)[:, : self.columns]

    def cut(self, matrix: Tensor) -> Tensor:
        """[R, K] cut into groups, the last one filled up with zeros."""
        missing = self.groups[0].numel() - self.columns
        return F.pad(matrix, (0, missing)).view_as(self.groups)

    def codes(self, found: GroupGrid) -> Tensor:
        """uint8 [R, K] on a finished grid of [1, R·G]."""
        shape = (*self.low.shape, 1)
        scales, zeros = found.scales.view(shape), found.zeros.view(shape)
        codes = (self.groups / scales + zeros).round_().clamp_(0, self.top)
        return self.matrix(codes.to(torch.uint8)).contiguous()


def _quantise_one(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, K], scales and zero-point codes [R, G] of one matrix."""
    clipping = _Clipping(weight, bits, group_size)
    strength = _learned(clipping, hessian)
    scale, offset = clipping.exact_range(strength)
    found = grid_of(scale.reshape(1, 1, -1), offset.reshape(1, 1, -1), clipping.top)
    scales = found.scales.view(scale.shape).to(torch.float16)
    return clipping.codes(found), scales, zero_codes(found.zeros, bits).view(scale.shape)


def _learned(clipping: _Clipping, hessian: Tensor) -> Tensor:
    """γ and β, [2, R, G], of the step with the least error of each row."""
    curvature = hessian / hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    like = clipping.low
    strength = like.new_full((2, *like.shape), START).requires_grad_()
    best = strength.detach().clone()
    least = like.new_full((len(like),), torch.inf)
    optimiser = torch.optim.Adam([strength], lr=RATE)
    for _ in range(STEPS):
        with torch.enable_grad():
            scale, zero = clipping.range(strength)
        with torch.no_grad():
            errors, slopes = _errors(clipping, scale, zero, curvature)
        better = errors < least
        best = torch.where(better.view(1, -1, 1), strength.detach(), best)
        least = torch.minimum(errors, least)
        optimiser.zero_grad()
        # Rows do not touch each other, and Adam does not see their scale.
        torch.autograd.backward((scale, zero), slopes)
        optimiser.step()
    return best


def _errors(
    clipping: _Clipping, scale: Tensor, zero: Tensor, curvature: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Error of each row, ΔW H ΔWᵀ, and its slopes with scales and zero points."""
    change, clipped = clipping.rounded(scale, zero)
    rows = clipping.matrix(change)
    pull = rows @ curvature
    errors = (pull * rows).sum(-1)
    return errors, clipping.slopes(scale, change, clipped, clipping.cut(pull.mul_(2)))


def _through(rounded: Tensor, exact: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``exact``."""
    return exact + (rounded - exact).detach()

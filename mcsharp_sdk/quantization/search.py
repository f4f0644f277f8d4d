"""Choosing the scale and the zero point of a group of columns.

The error of a group is Σ_k d_k (w_k − scale·(code_k − zero))², d_k the importance of column k. Its
minimum over scale and zero point has no closed form; it is searched in two steps: scales from the
full range of the group down to a share of it, then, from the best, in turn the neighbouring zero
points and the least-squares scale for the codes as they are. Scales are rounded to fp16 before they
are judged, so what is stored is what was chosen. Our choice; the papers search the range alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mcsharp_sdk.quantization.compiled import GroupSearch, group_search
from mcsharp_sdk.quantization.grid import ZERO_STEP, top_code

BinaryScale = Literal["optimised", "released", "paper"]

CHUNK_ELEMENTS = 1 << 17
"""Weights that torch searches at a time: temporaries stay in a processor's second-level cache."""

GPU_CHUNK_ELEMENTS = 1 << 24
"""The same on a GPU: enough work for each of many small operations, in temporaries of 64 MiB."""

SMALLEST_SCALE = 2.0**-24
"""The smallest fp16 number above 0. It is subnormal: below 2**-14 all are multiples of it."""

LARGEST_SCALE = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class GridSettings:
    """How scales and zero points are chosen.

    Attributes
    ----------
    group_size : columns that share a scale and a zero point.
    clip_ratios : shares of the group's range that are tried as the grid's range.
    refinements : rounds of neighbouring zero points and least-squares scale; 0 leaves both out.
    neighbours : zero points tried around the best, in units of the scale.
    binary : the scale at 1 bit. "released": ± the mean magnitude of each row and group, as the
        authors' code has it; "paper": ± the mean magnitude of the matrix (MC, arXiv 2410.06270,
        Eq. 8-9); "optimised": the least-squares scale with a zero point, like other widths.
    """

    group_size: int = 128
    clip_ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35)
    refinements: int = 2
    neighbours: tuple[float, ...] = (-0.5, -0.25, 0.25, 0.5)
    binary: BinaryScale = "optimised"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if not self.clip_ratios or not all(0 < ratio <= 1 for ratio in self.clip_ratios):
            raise ValueError(f"clip_ratios must lie in (0, 1], got {self.clip_ratios}")


@dataclass(frozen=True)
class GroupGrid:
    """Scale (fp32, exactly an fp16 number, never 0) and zero point of each row, [n, R]."""

    scales: Tensor
    zeros: Tensor


def fit_group(
    weights: Tensor,
    bits: int,
    importance: Tensor,
    settings: GridSettings,
    matrix_magnitude: Tensor | None = None,
) -> GroupGrid:
    """Search scale and zero point of one group of columns for every row.

    Parameters
    ----------
    weights : fp32 [n, g, R], the group's columns, transposed.
    bits : one width for all.
    importance : fp32 [n or 1, g], d_k >= 0.
    settings : the search.
    matrix_magnitude : fp32 [n, R], mean |w| of the matrix that each row is of; needed for 1 bit in
        the "paper" manner only.
    """
    if bits == 1 and settings.binary != "optimised":
        magnitude = weights.abs().mean(-2)
        if settings.binary == "paper":
            if matrix_magnitude is None:
                raise ValueError("the paper's 1-bit scale needs the mean magnitude of the matrix")
            magnitude = matrix_magnitude
        scales = _storable(2 * magnitude)
        return GroupGrid(scales, torch.full_like(scales, 0.5))
    compiled = group_search(weights.device.type, weights.shape[1])
    if compiled is None:
        return search_by_torch(weights, bits, importance, settings)
    return _search_compiled(compiled, weights, bits, importance, settings)


def row_magnitudes(
    weight: Tensor, settings: GridSettings, matrix_of_row: Tensor | None = None
) -> Tensor | None:
    """Mean |w| of the matrix that each row is of, fp32 [R]; None where the search needs none.

    Parameters
    ----------
    weight : [R, K], one matrix, or several stacked or interleaved by rows.
    matrix_of_row : int64 [R], which of them each row is of; there is one if left out.
    """
    if settings.binary != "paper":
        return None
    rows = torch.linalg.vector_norm(weight, 1, dim=1, dtype=torch.float32) / weight.shape[1]
    if matrix_of_row is None:
        return rows.mean().expand(len(rows))
    matrix_of_row = matrix_of_row.to(rows.device)
    means = torch.bincount(matrix_of_row, rows) / torch.bincount(matrix_of_row)
    return means[matrix_of_row]


def _search_compiled(
    search: GroupSearch, weights: Tensor, bits: int, importance: Tensor, settings: GridSettings
) -> GroupGrid:
    top = top_code(bits)
    scales, offsets = search(
        weights,
        importance,
        (top, ZERO_STEP),
        (SMALLEST_SCALE, LARGEST_SCALE),
        (settings.clip_ratios, settings.neighbours, settings.refinements),
    )
    return grid_of(scales.unsqueeze(-2), offsets.unsqueeze(-2), top)


def search_by_torch(
    weights: Tensor, bits: int, importance: Tensor, settings: GridSettings
) -> GroupGrid:
    """``fit_group`` on any device and processor, at any width with a zero point."""
    n, columns, rows = weights.shape
    scales, zeros = weights.new_empty(n, rows), weights.new_empty(n, rows)
    elements = CHUNK_ELEMENTS if weights.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(elements // (n * columns), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scales[:, part], zeros[:, part] = _search(weights[..., part], bits, importance, settings)
    return GroupGrid(scales, zeros)


class _Best:
    """The best scale and zero-point offset so far of each row, all [n, 1, R]."""

    def __init__(self, weights: Tensor, bits: int, importance: Tensor) -> None:
        self.weights = weights
        self.top = top_code(bits)
        self.importance = importance.unsqueeze(-2)
        self.buffers = (torch.empty_like(weights), torch.empty_like(weights))
        self.error = weights.new_full((weights.shape[0], 1, weights.shape[2]), torch.inf)
        self.scale = torch.ones_like(self.error)
        self.offset = torch.zeros_like(self.error)

    def consider(self, scale: Tensor, offset: Tensor) -> None:
        """Keep the candidate where it lowers the error."""
        exact, rounded = self._codes(scale, offset)
        error = (self.importance @ exact.sub_(rounded).square_()).mul_(scale).mul_(scale)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)

    def refit(self, scale: Tensor, offset: Tensor) -> None:
        """Try the least-squares scale for the codes that a grid gives."""
        _, levels = self._codes(scale, offset)
        levels -= offset + self.top / 2
        norm = self.importance @ torch.mul(levels, levels, out=self.buffers[0])
        fit = self.importance @ levels.mul_(self.weights)
        self.consider(_storable(fit / norm.clamp_min_(torch.finfo(norm.dtype).tiny)), offset)

    def _codes(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        exact, rounded = self.buffers
        torch.addcmul(offset + self.top / 2, self.weights, scale.reciprocal(), out=exact)
        torch.round(exact, out=rounded).clamp_(0, self.top)
        return exact, rounded


def _search(
    weights: Tensor, bits: int, importance: Tensor, settings: GridSettings
) -> tuple[Tensor, Tensor]:
    weights = weights.contiguous()
    best = _Best(weights, bits, importance)
    if bits == 1:
        _start_binary(best)
    else:
        _start_from_range(best, settings.clip_ratios)
    for _ in range(settings.refinements):
        scale, offset = best.scale, best.offset
        for distance in settings.neighbours:
            best.consider(scale, _on_offset_grid(offset + distance, best.top))
        best.refit(best.scale, best.offset)
    found = grid_of(best.scale, best.offset, best.top)
    return found.scales, found.zeros


def grid_of(scale: Tensor, offset: Tensor, top: int) -> GroupGrid:
    """The grid nearest to a positive scale and an offset of the zero point, both [n, 1, R].

    Parameters
    ----------
    offset : distance of the zero point from the middle of the grid, in units of the scale.
    top : the largest code.
    """
    scale, offset = _storable(scale), _on_offset_grid(offset, top)
    # The sign of the scale holds the sign of the offset (grid.py).
    signed = torch.where(offset < 0, -scale, scale)
    return GroupGrid(signed.squeeze(-2), (offset.abs() + top / 2).squeeze(-2))


def _start_from_range(best: _Best, ratios: tuple[float, ...]) -> None:
    low = best.weights.amin(-2, keepdim=True).clamp_(max=0)
    high = best.weights.amax(-2, keepdim=True).clamp_(min=0)
    for ratio in ratios:
        scale = _storable((high - low) * (ratio / best.top))
        best.consider(scale, _on_offset_grid((high + low) / (-2 * scale), best.top))


def _start_binary(best: _Best) -> None:
    total = best.importance.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    scale = _storable(2 * (best.importance @ best.weights.abs()) / total)
    for offset in (0.0, -ZERO_STEP, ZERO_STEP):
        best.refit(scale, torch.full_like(scale, offset))


def _on_offset_grid(offset: Tensor, top: int) -> Tensor:
    limit = top * ZERO_STEP
    return (offset / ZERO_STEP).round_().mul_(ZERO_STEP).clamp_(-limit, limit)


def _storable(scale: Tensor) -> Tensor:
    """Rounded to a positive finite fp16 number; fp32."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()

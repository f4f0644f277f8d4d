"""Round-to-nearest: the grid and the search of GPTQ, without compensation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import (
    QuantizedBatch,
    check_widths,
    group_count,
    top_code,
    zero_codes,
)
from mcsharp_sdk.quantization.search import GridSettings, GroupGrid, fit_group, row_magnitudes

ROWS = 512
"""Rows that are worked on at a time: what is made of them stays in the processor's caches."""

GroupFit = Callable[[Tensor, int, Tensor, GridSettings, Tensor | None], GroupGrid]
"""Chooses scale and zero point of a group; arguments as of :func:`fit_group`."""


def quantise_rtn(
    weights: Tensor,
    bits: Sequence[int],
    grid: GridSettings,
    *,
    importance: Tensor | None = None,
    matrix_of_row: Tensor | None = None,
    fit: GroupFit = fit_group,
) -> QuantizedBatch:
    """Quantise the same linear layer of several experts, each weight to its nearest level.

    Parameters
    ----------
    weights : [E, R, K], any float dtype; not changed.
    bits : width of each expert, length E.
    grid : group size and search.
    importance : [E or 1, K], weight of each column in the search, e.g. the diagonal of the Hessian;
        all equal if left out.
    matrix_of_row : int64 [R], as of :func:`row_magnitudes`.
    fit : how scale and zero point of a group are chosen.

    Returns
    -------
    QuantizedBatch, [E, R, K].

    Raises
    ------
    ValueError
        If shapes do not agree or a width is not supported.
    """
    experts, rows, columns = weights.shape
    widths = check_widths(bits, experts)
    if importance is None:
        importance = weights.new_ones(1, columns)
    if importance.shape not in {(experts, columns), (1, columns)}:
        raise ValueError(
            f"importance must be [{experts} or 1, {columns}], got {tuple(importance.shape)}"
        )
    importance = importance.float().expand(experts, -1)
    groups = group_count(columns, grid.group_size)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    scales = torch.empty(experts, rows, groups, dtype=torch.float16, device=weights.device)
    zeros = torch.empty(experts, rows, groups, dtype=torch.uint8, device=weights.device)
    for expert, width in enumerate(widths):
        magnitude = row_magnitudes(weights[expert], grid, matrix_of_row)
        for start in range(0, rows, ROWS):
            some = slice(start, start + ROWS)
            codes[expert, some], scales[expert, some], zeros[expert, some] = _rounded(
                weights[expert, some],
                width,
                importance[expert],
                grid,
                None if magnitude is None else magnitude[some],
                fit,
            )
    return QuantizedBatch(codes, scales, zeros, widths, grid.group_size)


def _rounded(
    weights: Tensor,
    width: int,
    importance: Tensor,
    grid: GridSettings,
    magnitude: Tensor | None,
    fit: GroupFit,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, K], scales and codes of zero points, [R, groups], of some rows of a matrix."""
    # Always a copy, which is worked on in place: of one row the transpose is contiguous.
    transposed = weights.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    scales, zeros = [], []
    for first, part in _grouped(transposed, grid.group_size):
        count, size, _ = part.shape
        weighed = importance[first * grid.group_size :][: count * size].reshape(count, size)
        of_matrix = None if magnitude is None else magnitude.expand(count, -1)
        fitted = fit(part, width, weighed, grid, of_matrix)
        part /= fitted.scales.unsqueeze(1)
        part += fitted.zeros.unsqueeze(1)
        scales.append(fitted.scales.T)
        zeros.append(zero_codes(fitted.zeros, width).T)
    codes = transposed.round_().clamp_(0, top_code(width)).byte().T
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)


def _grouped(transposed: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Views of all whole groups of columns, [n, g, R], and of the last one if it is shorter.

    Each with the number of its first group.
    """
    whole = len(transposed) // size
    if whole:
        yield 0, transposed[: whole * size].unflatten(0, (whole, size))
    if whole * size < len(transposed):
        yield whole, transposed[whole * size :].unsqueeze(0)

"""Round-to-nearest: the grid and the search of GPTQ, without compensation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mcsharp_sdk.quantization.grid import (
    QuantizedBatch,
    check_widths,
    group_count,
    top_code,
    zero_codes,
)
from mcsharp_sdk.quantization.search import GridSettings, GroupGrid, fit_group

GroupFit = Callable[[Tensor, int, Tensor, GridSettings, Tensor], GroupGrid]
"""Chooses scale and zero point of a group; arguments as of :func:`fit_group`."""


def quantise_rtn(
    weights: Tensor,
    bits: Sequence[int],
    grid: GridSettings,
    *,
    importance: Tensor | None = None,
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
        transposed = weights[expert].float().T.unsqueeze(0)
        magnitude = transposed.abs().mean().expand(1, rows)
        for group in range(groups):
            part = slice(group * grid.group_size, (group + 1) * grid.group_size)
            fitted = fit(
                transposed[:, part], width, importance[None, expert, part], grid, magnitude
            )
            exact = transposed[0, part] / fitted.scales + fitted.zeros
            codes[expert, :, part] = exact.round_().clamp_(0, top_code(width)).T
            scales[expert, :, group] = fitted.scales[0]
            zeros[expert, :, group] = zero_codes(fitted.zeros[0], width)
    return QuantizedBatch(codes, scales, zeros, widths, grid.group_size)

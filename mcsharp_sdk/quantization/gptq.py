"""GPTQ for all experts of a layer at once (arXiv 2210.17323), each at its own width.

Column by column, q_i = Q(w_i), e = (w_i − q_i)/U_ii, w_j −= e·U_ij for j > i. Weights are held
transposed, [experts, K, R], so that a column is contiguous; experts that share U become rows of
one matrix. Updates are lazy at three levels: columns of a run of ``RUN``, of a block of ``BLOCK``,
and the rest. Within a group the work is done in units of the scale, t = w/scale + zero, so that a
column costs a rounding, a clamp and a subtraction.

Working set besides the arguments: 4 bytes per weight for the transposed copy, and 2 for the codes.
Pass fewer experts at a time to need less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mcsharp_sdk.quantization.compiled import FEWEST_ROWS, ColumnLoop, column_loop
from mcsharp_sdk.quantization.grid import (
    QuantizedBatch,
    check_widths,
    group_count,
    top_code,
    zero_codes,
)
from mcsharp_sdk.quantization.inverse_factor import InverseFactor
from mcsharp_sdk.quantization.search import GridSettings, fit_group, row_magnitudes

BLOCK = 128
"""Columns whose updates to all later columns are applied together."""

COPIED_ROWS = 1024
"""Rows that are transposed at a time."""

MOST_BLOCKWISE_BITS = 3
"""Widest experts that can do without updates inside a block."""

RUN = 16
"""Columns whose updates to the rest of their group are applied together."""


def quantise_gptq(
    weights: Tensor,
    factor: InverseFactor,
    bits: Sequence[int],
    grid: GridSettings,
    *,
    compensate_within_block: bool = True,
    matrix_of_row: Tensor | None = None,
) -> QuantizedBatch:
    """Quantise the same linear layer of several experts with error compensation.

    Parameters
    ----------
    weights : [E, R, K], any float dtype; not changed.
    factor : inverse factors of the experts, or a single one that all share.
    bits : width of each expert, length E.
    grid : group size and search. Scale and zero point of a group are chosen on the compensated
        weights when its first column is reached, weighting column k by 1/U_kk², the cost of an
        error there once later columns have made up for it.
    compensate_within_block : False leaves out the updates inside a block of 128 columns for the
        experts of ``MOST_BLOCKWISE_BITS`` and less, as the authors' released code does.
    matrix_of_row : int64 [R], as of :func:`~mcsharp_sdk.quantization.search.row_magnitudes`.

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
    upper = factor.upper
    if upper.shape not in {(experts, columns, columns), (1, columns, columns)}:
        raise ValueError(
            f"weights {tuple(weights.shape)} need a factor of [{experts} or 1, {columns}, "
            f"{columns}], got {tuple(upper.shape)}"
        )
    order = sorted(range(experts), key=lambda expert: widths[expert])
    blockwise = [not compensate_within_block and widths[e] <= MOST_BLOCKWISE_BITS for e in order]
    magnitudes = [row_magnitudes(weights[expert], grid, matrix_of_row) for expert in order]
    state = _start(weights, upper, order, [widths[e] for e in order], blockwise, grid, magnitudes)
    for start, stop in _blocks(columns, grid.group_size):
        _quantise_block(state, start, stop)
    return _finish(state, order, widths, grid.group_size)


@dataclass(frozen=True)
class _State:
    """Work in progress; experts sorted by width, B matrices (1 if they share U and its use)."""

    weights: Tensor  # fp32 [B, K, rows], updated in place
    upper: Tensor  # fp32 [B, K, K]: U, in another order
    matrices: list[int]  # places of the B matrices in ``upper``
    blockwise: list[bool]  # of the B matrices: those without updates inside a block
    importance: Tensor  # fp32 [B, K]: 1/U_ii²
    codes: Tensor  # uint8 [B, K, rows]
    scales: Tensor  # fp32 [E, G, R]
    zeros: Tensor  # fp32 [E, G, R]
    widths: list[int]
    top: Tensor  # fp32 [B, rows]: the largest code
    magnitudes: list[Tensor | None]  # of the E experts, fp32 [R], where the search needs them
    grid: GridSettings

    def updates(self, start: int, stop: int) -> Tensor:
        """Rows i of U divided by U_ii, [B, stop - start, K - start], from column ``start`` on."""
        rows = self.upper[:, start:stop, start:]
        rows = rows[self.matrices] if len(self.matrices) > 1 else rows
        return rows / rows.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def inside(self, updates: Tensor) -> Tensor | None:
        """Of the updates of a block, those inside it, [B, n, n]; None if there are to be none."""
        if all(self.blockwise):
            return None
        updates = updates[..., : updates.shape[1]]
        if not any(self.blockwise):
            return updates
        return updates.masked_fill(updates.new_tensor(self.blockwise).bool()[:, None, None], 0.0)

    def by_expert(self, columns: Tensor) -> Tensor:
        """View [B, c, rows] as [E, c, R]."""
        if len(columns) == len(self.widths):
            return columns
        return columns.unflatten(-1, (len(self.widths), -1)).squeeze(0).transpose(0, 1)

    def by_matrix(self, rows: Tensor) -> Tensor:
        """View [E, R] as [B, rows]."""
        return rows.reshape(len(self.weights), -1)


def _start(
    weights: Tensor,
    upper: Tensor,
    order: list[int],
    widths: list[int],
    blockwise: list[bool],
    grid: GridSettings,
    magnitudes: list[Tensor | None],
) -> _State:
    experts, rows, columns = weights.shape
    shared = len(upper) == 1 and len(set(blockwise)) == 1
    places = [0] * (1 if shared else experts) if len(upper) == 1 else order
    matrices = len(places)
    transposed = weights.new_empty(
        matrices, columns, experts * rows // matrices, dtype=torch.float32
    )
    importance = upper.new_empty(matrices, columns)
    for place, expert in enumerate(order):
        # One transposing copy per expert: several times faster than of the whole batch.
        target = transposed[0, :, place * rows :][:, :rows] if shared else transposed[place]
        for some, into in zip(
            weights[expert].split(COPIED_ROWS), target.split(COPIED_ROWS, dim=1), strict=True
        ):
            into.copy_(some.float().T)
    for place, matrix in enumerate(places):
        torch.reciprocal(upper[matrix].diagonal().square(), out=importance[place])
    groups = group_count(columns, grid.group_size)
    top = transposed.new_tensor([top_code(width) for width in widths])
    return _State(
        weights=transposed,
        upper=upper,
        matrices=places,
        blockwise=blockwise[:matrices],
        importance=importance,
        codes=torch.empty_like(transposed, dtype=torch.uint8),
        scales=transposed.new_empty(experts, groups, rows),
        zeros=transposed.new_empty(experts, groups, rows),
        widths=widths,
        top=top.unsqueeze(-1).expand(-1, rows).reshape(len(transposed), -1),
        magnitudes=magnitudes,
        grid=grid,
    )


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Cut into blocks of at most BLOCK columns: whole groups, or pieces of one long group."""
    size = max(BLOCK // group_size, 1) * group_size
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        for piece in range(start, stop, BLOCK):
            yield piece, min(piece + BLOCK, stop)


def _quantise_block(state: _State, start: int, stop: int) -> None:
    """Quantise the columns ``start`` to ``stop`` and update all later ones."""
    weights, size = state.weights, state.grid.group_size
    updates = state.updates(start, stop)
    inside = state.inside(updates)
    errors = torch.empty_like(weights[:, start:stop])
    at = start
    while at < stop:
        end = min(stop, (at // size + 1) * size)
        if at % size == 0:
            _fit_groups(state, at // size)
        scales = state.by_matrix(state.scales[:, at // size]).unsqueeze(1)
        zeros = state.by_matrix(state.zeros[:, at // size]).unsqueeze(1)
        exact = weights[:, at:end].mul_(scales.reciprocal()).add_(zeros)
        error = errors[:, at - start : end - start]
        rows = None if inside is None else inside[:, at - start : end - start]
        within = None if rows is None else rows[..., at - start : end - start]
        state.codes[:, at:end] = walk_columns(exact, within, state.top, error)
        error *= scales
        if rows is not None and end < stop:
            _compensate(weights[:, end:stop], rows[..., end - start :], error)
        at = end
    if stop < weights.shape[1]:
        _compensate(weights[:, stop:], updates[..., stop - start :], errors)


def _fit_groups(state: _State, group: int) -> None:
    """Choose scale and zero point of a group, all experts of one width together."""
    columns = slice(group * state.grid.group_size, (group + 1) * state.grid.group_size)
    weights = state.by_expert(state.weights[:, columns])
    importance = state.importance[:, columns]
    for width, run in groupby(range(len(state.widths)), key=state.widths.__getitem__):
        experts = list(run)
        same = slice(experts[0], experts[-1] + 1)
        fitted = fit_group(
            weights[same],
            width,
            importance if len(importance) == 1 else importance[same],
            state.grid,
            _stacked(state.magnitudes[same]),
        )
        state.scales[same, group] = fitted.scales
        state.zeros[same, group] = fitted.zeros


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """[n, R] of n times [R]; None if they are not there."""
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def walk_columns(exact: Tensor, updates: Tensor | None, top: Tensor, error: Tensor) -> Tensor:
    """Round columns one after the other, each passing its error on to those behind it.

    Parameters
    ----------
    exact : fp32 [B, n, rows], contiguous in the last two, in units of the scale; may be changed.
    updates : fp32 [B, n, n]; column j loses e_i · updates_ij. None passes nothing on.
    top : fp32 [B, rows], the largest codes.
    error : as ``exact``; written: e, what rounding took from each column.

    Returns
    -------
    Codes, [B, n, rows], uint8 or fp32.
    """
    return _column_loop(exact)(exact, updates, top, error)


def _column_loop(exact: Tensor) -> ColumnLoop:
    """Compiled for this device where it can be: torch takes several operations for each column."""
    compiled = column_loop(exact.device.type) if exact.shape[-1] >= FEWEST_ROWS else None
    return compiled or _quantise_columns


def _quantise_columns(exact: Tensor, updates: Tensor | None, top: Tensor, error: Tensor) -> Tensor:
    """Codes of columns [B, n, rows] given in units of the scale; their errors go to ``error``."""
    codes = torch.empty_like(exact)
    columns = exact.shape[1]
    for start in range(0, columns, RUN):
        stop = min(start + RUN, columns)
        for i in range(start, stop):
            if updates is not None and i > start:
                _compensate(exact[:, i : i + 1], updates[:, start:i, i : i + 1], error[:, start:i])
            code = torch.round(exact[:, i], out=codes[:, i]).clamp_(min=0)
            torch.minimum(code, top, out=code)
            torch.sub(exact[:, i], code, out=error[:, i])
        if updates is not None and stop < columns:
            _compensate(exact[:, stop:], updates[:, start:stop, stop:], error[:, start:stop])
    return codes


def _compensate(later: Tensor, updates: Tensor, errors: Tensor) -> None:
    """w_j −= Σ_i e_i U_ij/U_ii for later columns j [B, m, rows] of errors [B, n, rows]."""
    later.baddbmm_(updates.transpose(1, 2), errors, alpha=-1)


def _finish(
    state: _State, order: list[int], widths: tuple[int, ...], group_size: int
) -> QuantizedBatch:
    """Back to the experts' order and to rows first."""
    rank = torch.tensor(order).argsort().tolist()
    zeros = torch.empty_like(state.zeros, dtype=torch.uint8)
    for expert, width in enumerate(state.widths):
        zeros[expert] = zero_codes(state.zeros[expert], width)
    codes = state.by_expert(state.codes)
    in_order = codes.new_empty(len(codes), codes.shape[2], codes.shape[1])
    for expert, place in enumerate(rank):
        in_order[expert] = codes[place].T
    return QuantizedBatch(
        in_order,
        state.scales[rank].transpose(1, 2).to(torch.float16).contiguous(),
        zeros[rank].transpose(1, 2).contiguous(),
        widths,
        group_size,
    )

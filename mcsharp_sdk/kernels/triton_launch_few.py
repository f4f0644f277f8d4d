"""Launching the Triton kernels for few tokens. Nothing here waits for the device.

From compute capability 9 on launches overlap: a kernel begins while the one before it still runs,
loads its first weights, and waits for what it has to. All shapes follow from those of the
arguments, so a CUDA graph can record any of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import MatrixStack
from mcsharp_sdk.kernels.triton_decode import grouped_gemv
from mcsharp_sdk.kernels.triton_launch import EMULATE, compiled_widths, overlap, weight_tensors
from mcsharp_sdk.kernels.triton_planes import round_activations
from mcsharp_sdk.quantization.packing import BLOCK


class GemvTile(NamedTuple):
    """What a program of ``grouped_gemv`` does at a time.

    Attributes
    ----------
    rows, quads : how many rows, and how many quads of each.
    warps : in how many warps.
    """

    rows: int
    quads: int
    warps: int


TILES = {8192: GemvTile(8, 32, 2), 4096: GemvTile(32, 16, 4), 0: GemvTile(16, 16, 2)}
"""Columns, most first -> the tile from so many on. Fastest on an H200: see ``docs/gpu.md``."""

SCALED_TILE = GemvTile(16, 16, 4)
"""That for groups that are not whole blocks, whose scales take registers."""


def tile_of(columns: int, group_size: int, rows: int | None = None) -> GemvTile:
    """The tile for a matrix; with other ``rows`` one of as many quads in all."""
    if group_size % BLOCK:
        tile = SCALED_TILE
    else:
        tile = next(tile for fewest, tile in TILES.items() if columns >= fewest)
    if rows is None:
        return tile
    return tile._replace(rows=rows, quads=tile.quads * tile.rows // rows)


def gemv(
    stack: MatrixStack,
    table: Tensor,
    x: Tensor,
    chosen: Tensor,
    *,
    gated: bool,
    dp4a: bool,
    step: int | None = None,
    chained: bool = False,
) -> Tensor:
    """Products of the chosen experts' matrix with their activations, for few slots.

    Parameters
    ----------
    table : of :func:`~mcsharp_sdk.kernels.expert_layer.expert_table`.
    x : [T, K], 16-bit floats, contiguous. The slots of a row lie side by side.
    chosen : int64 [slots], slots a multiple of T: the expert of each.
    gated : give SiLU of the first half of the rows times the second half.
    dp4a : round activations to 8 bits, 128 at a time; otherwise to 15.
    step : rows of a program; by default what :func:`tile_of` gives.
    chained : an earlier call with the same ``chosen`` has made ``x``; weights were there before it.

    Returns
    -------
    [slots, R or R/2] in x's dtype; undefined where a slot is dropped.
    """
    tokens, columns = x.shape
    height = stack.rows // 2 if gated else stack.rows
    out = torch.empty(len(chosen), height, dtype=x.dtype, device=x.device)
    tile = tile_of(columns, stack.group_size, step)
    planes = 1 if dp4a else 2
    widths, weights = compiled_widths(stack), weight_tensors(stack)
    grid = (
        triton.cdiv(height, tile.rows // 2 if gated else tile.rows),
        len(chosen) // tokens,
        tokens,
    )
    whole = columns % BLOCK == 0
    grouped_gemv[grid](
        *_rounded(x, planes, chained=chained),
        out,
        chosen,
        table,
        weights,
        stack.rows,
        columns,
        WIDTHS=widths,
        GROUP=stack.group_size,
        GATED=gated,
        PLANES=planes,
        EMULATE=EMULATE,
        ALIGNED=whole and all(codes.data_ptr() % 16 == 0 for codes, *_ in weights),
        TAIL=not whole,
        BN=tile.rows,
        QUADS=tile.quads,
        num_warps=tile.warps,
        **overlap(x.device),
    )
    return out


def _rounded(x: Tensor, planes: int, *, chained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What ``round_activations`` makes of x [T, K]."""
    tokens, columns = x.shape
    blocks = triton.cdiv(columns, BLOCK)
    size = (tokens, planes, blocks * BLOCK)
    integers = torch.empty(size, dtype=torch.int8, device=x.device)
    scales, sums = (torch.empty(tokens, blocks, device=x.device) for _ in range(2))
    round_activations[(blocks, tokens)](
        x, integers, scales, sums, columns, PLANES=planes, CHAINED=chained, **overlap(x.device)
    )
    return integers, scales, sums

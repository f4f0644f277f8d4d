"""Launching the Triton kernels for many tokens and for weighed sums: grids, tile sizes, scratch.

Products of few are in :mod:`~mcsharp_sdk.kernels.triton_launch_few`. Nothing here waits for the
device. All shapes follow from those of the arguments, so a CUDA graph can record any of it. Tile
sizes that are not given are what was fastest on an H100: see ``docs/gpu.md``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import MatrixStack
from mcsharp_sdk.kernels.triton_combine import combine_slots
from mcsharp_sdk.kernels.triton_dequantise import dequantise_rows
from mcsharp_sdk.kernels.triton_gemm import grouped_gemm
from mcsharp_sdk.kernels.triton_halves import prepare_rows
from mcsharp_sdk.kernels.triton_sort import sort_by_expert
from mcsharp_sdk.quantization.packing import BLOCK

EMULATE = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows neither assembly nor bfloat16."""

OVERLAPPING = (9, 0)
"""Compute capability from which on a kernel can begin before the one before it ends."""

GEMM_ROWS = 64
GEMM_TOKENS = (16, 32, 64, 128)
"""Rows of a program, and tokens of one: the smallest that holds ``SHARE`` times what an expert gets
of the slots on average."""

SHARE = 1.25

CODE_TOKENS = 32
"""Tokens of a program up to which codes themselves are multiplied, instead of weights."""

PREPARED_BLOCKS = 16
"""Blocks of activations that are read at once."""

SORTED_SLOTS = 1024
SORTED_TILES = 128
"""Slots, and tiles of an expert, that a program sorts at once."""

DEQUANTISE_ROWS = 64
COMBINE_COLUMNS = 512

WIDTH_SETS = ((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 8))
"""Mixed widths that kernels are compiled for, so that the layers of a model share a few of them."""


class Tiles(NamedTuple):
    """Slots in the order of their experts, cut into tiles.

    ``order`` int64 [slots]; ``ends`` int32 [experts]: where those of each end in it; ``tiles``
    int32 [n, 3]: expert, first and end position in ``order``; ``height`` is the largest number of
    slots in a tile.
    """

    order: Tensor
    ends: Tensor
    tiles: Tensor
    height: int


def compiled_widths(stack: MatrixStack) -> tuple[int, ...]:
    """The widths that a kernel for the stack is compiled for."""
    if len(stack.widths) == 1:
        return stack.widths
    return next(widths for widths in WIDTH_SETS if set(stack.widths) <= set(widths))


def weight_tensors(stack: MatrixStack) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """The stored tensors of each compiled width; of one that does not occur, any."""
    some = stack.weights[stack.widths[0]]
    chosen = (stack.weights.get(width, some) for width in compiled_widths(stack))
    return tuple((weight.qweight, weight.scales, weight.zeros) for weight in chosen)


def sort_slots(chosen: Tensor, experts: int, height: int | None = None) -> Tiles:
    """Order slots by expert and cut each expert's into tiles, on the device.

    Parameters
    ----------
    chosen : int64 [slots], up to ``experts``, which marks a dropped slot and comes last.
    height : most slots of a tile, one of ``GEMM_TOKENS``; by default what holds an expert's share.
    """
    slots = len(chosen)
    if height is None:
        held = (t for t in GEMM_TOKENS if slots * SHARE <= t * experts)
        height = next(held, GEMM_TOKENS[-1])
    order = torch.empty_like(chosen)
    ends = torch.empty(experts, dtype=torch.int32, device=chosen.device)
    count = slots // height + min(experts, slots)
    tiles = torch.empty(count, 3, dtype=torch.int32, device=chosen.device)
    sort_by_expert[(experts + 1,)](
        chosen,
        order,
        ends,
        tiles,
        slots,
        experts,
        count,
        height,
        BINS=triton.next_power_of_2(experts + 2),
        SLOTS=SORTED_SLOTS,
        TILES=SORTED_TILES,
    )
    return Tiles(order, ends, tiles, height)


def gemm(
    stack: MatrixStack,
    table: Tensor,
    x: Tensor,
    tiles: Tiles,
    *,
    gated: bool,
    to_slots: bool,
) -> Tensor:
    """Products of all experts' matrix with the activations of the slots that chose them.

    Parameters
    ----------
    table, gated : as for :func:`~mcsharp_sdk.kernels.triton_launch_few.gemv`.
    x : [T, K], 16-bit floats, contiguous: one row per token, or per position with ``to_slots``.
    tiles : of :func:`sort_slots`.
    to_slots : the result has a row per slot instead of one per position.

    Returns
    -------
    [slots, R or R/2] in x's dtype; undefined where a slot is dropped.
    """
    slots, columns = len(tiles.order), x.shape[1]
    height = stack.rows // 2 if gated else stack.rows
    out = torch.empty(slots, height, dtype=x.dtype, device=x.device)
    step = GEMM_ROWS // 2 if gated else GEMM_ROWS
    codes = stack.group_size % BLOCK == 0 and tiles.height <= CODE_TOKENS
    prepared = _halves(x) if codes else (x, x, x)
    grouped_gemm[(triton.cdiv(height, step), len(tiles.tiles))](
        x,
        *prepared,
        len(x),
        0,
        out,
        tiles.order,
        tiles.tiles,
        table,
        weight_tensors(stack),
        stack.rows,
        columns,
        slots // len(x),
        WIDTHS=compiled_widths(stack),
        GROUP=stack.group_size,
        GATED=gated,
        TO_SLOTS=to_slots,
        EMULATE=EMULATE,
        TAIL=columns % BLOCK != 0,
        BM=tiles.height,
        BN=GEMM_ROWS,
        STAGES=3 if tiles.height <= CODE_TOKENS else 2,
        CODES=codes,
    )
    return out


def dequantised(
    stack: MatrixStack,
    table: Tensor,
    first: int,
    count: int,
    dtype: torch.dtype,
    *,
    gated: bool = False,
) -> Tensor:
    """Rows ``first`` … ``first + count`` of all experts' matrix, whose columns are whole blocks.

    Parameters
    ----------
    table : as for :func:`~mcsharp_sdk.kernels.triton_launch_few.gemv`.
    dtype : that weights are rounded to.
    gated : behind them also these rows of the second half of all rows.

    Returns
    -------
    [experts, count or 2 · count, K].
    """
    experts, height = len(table) - 1, 2 * count if gated else count
    out = torch.empty(experts, height, stack.columns, dtype=dtype, device=table.device)
    grid = (stack.columns // BLOCK, triton.cdiv(height, DEQUANTISE_ROWS), experts)
    dequantise_rows[grid](
        out,
        0,
        table,
        weight_tensors(stack),
        stack.rows,
        stack.columns,
        first,
        count,
        height,
        WIDTHS=compiled_widths(stack),
        GROUP=stack.group_size,
        EMULATE=EMULATE,
        BN=DEQUANTISE_ROWS,
    )
    return out


def _halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`~mcsharp_sdk.kernels.triton_halves.prepare_rows` makes of x [n, K]."""
    rows, columns = x.shape
    halves = torch.empty(rows, columns, dtype=torch.float16, device=x.device)
    factors = torch.empty(rows, device=x.device)
    sums = torch.empty(columns // BLOCK, rows, device=x.device)
    prepare_rows[(rows,)](x, halves, factors, sums, columns, AT_ONCE=PREPARED_BLOCKS, num_warps=8)
    return halves, factors, sums


def combine(y: Tensor, chosen: Tensor, routing: Tensor, experts: int) -> Tensor:
    """Sum of a token's slots, weighed: y [T·k, H], chosen and routing [T, k] -> [T, H].

    Slots that chose expert number ``experts`` count nothing.
    """
    tokens, slots = chosen.shape
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype, device=y.device)
    combine_slots[(triton.cdiv(y.shape[1], COMBINE_COLUMNS), tokens)](
        y,
        chosen,
        routing,
        out,
        y.shape[1],
        experts,
        slots,
        BH=COMBINE_COLUMNS,
        **overlap(y.device),
    )
    return out


def overlap(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch that may begin before the kernel before it ends, where it can."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlaps(device) else {"OVERLAP": False}


@lru_cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPPING

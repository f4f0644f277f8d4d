"""All routed experts of a layer at once on a GPU, in Triton.

Few tokens go through matrix-vector kernels (:mod:`~mcsharp_sdk.kernels.triton_decode`), many
through a grouped product (:mod:`~mcsharp_sdk.kernels.triton_gemm`): either way the number of
launches does not depend on how many experts or widths there are, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack
from mcsharp_sdk.quantization.packing import packed_bytes

DECODE_TOKENS = 4
"""Tokens up to which each slot reads its expert's weights by itself. A model, not measured."""

WORKSPACE_BYTES = 256 * 2**20
"""Scratch for many tokens; beyond it they are done some at a time."""


def run_experts(
    layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor, *, dp4a: bool = False
) -> Tensor:
    """Weighted sum of the chosen experts.

    Parameters
    ----------
    hidden : [T, H], 16-bit floats; T may be 0.
    chosen : int64 [T, k]; ``layer.experts`` marks a dropped slot, which costs nothing.
    routing : [T, k], any float dtype.
    dp4a : for few tokens, round the inputs of both matrices to 8 bits, 128 at a time.

    Returns
    -------
    [T, H] in hidden's dtype; summed in fp32, over a token's slots in their order.
    """
    tokens, slots = chosen.shape
    if not tokens or not slots:
        return torch.zeros_like(hidden)
    hidden, chosen, routing = hidden.contiguous(), chosen.contiguous(), routing.contiguous()
    if tokens <= DECODE_TOKENS and takes_gemv(layer.gate_up) and takes_gemv(layer.down):
        return _few_tokens(layer, hidden, chosen, routing, dp4a)
    step = max(1, WORKSPACE_BYTES // workspace_bytes(layer, slots, hidden.dtype))
    parts = zip(hidden.split(step), chosen.split(step), routing.split(step), strict=True)
    return torch.cat([_many_tokens(layer, *part) for part in parts])


def workspace_bytes(layer: ExpertLayer, slots: int, dtype: torch.dtype) -> int:
    """Scratch that one token with so many slots takes among many, result not included."""
    gate_up, inner, hidden = layer.gate_up.rows, layer.down.columns, layer.down.rows
    elements = inner + hidden + (gate_up if layer.between is not None else 0)
    return slots * elements * dtype.itemsize


def whole_words(columns: int, bits: int) -> bool:
    """Whether packed rows consist of whole 32-bit words."""
    return packed_bytes(columns, bits) % 4 == 0


def takes_gemv(stack: MatrixStack) -> bool:
    """Whether rows are whole words at every width that occurs, in groups of whole words."""
    words = all(whole_words(stack.columns, width) for width in stack.widths)
    return words and stack.group_size % 4 == 0


def _few_tokens(
    layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor, dp4a: bool
) -> Tensor:
    from mcsharp_sdk.kernels.triton_launch import combine, gemv

    flat = chosen.reshape(-1)
    gated = layer.between is None
    inner = gemv(layer.gate_up, layer.table, hidden, flat, gated=gated, dp4a=dp4a)
    inner = _between(layer, inner, flat)
    y = gemv(layer.down, layer.table, inner, flat, gated=False, dp4a=dp4a)
    return combine(_behind(layer, y, flat), chosen, routing, layer.experts)


def _many_tokens(layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
    from mcsharp_sdk.kernels.triton_launch import combine, gemm, sort_slots

    flat = chosen.reshape(-1)
    tiles = sort_slots(flat, layer.experts)
    gated = layer.between is None
    inner = gemm(layer.gate_up, layer.table, hidden, tiles, gated=gated, to_slots=False)
    if not gated:
        inner = _between(layer, inner, flat[tiles.order])
    y = gemm(layer.down, layer.table, inner, tiles, gated=False, to_slots=True)
    return combine(_behind(layer, y, flat), chosen, routing, layer.experts)


def _between(layer: ExpertLayer, rows: Tensor, expert: Tensor) -> Tensor:
    if layer.between is None:
        return rows
    return layer.between(rows, expert.clamp(max=layer.experts - 1)).contiguous()


def _behind(layer: ExpertLayer, rows: Tensor, expert: Tensor) -> Tensor:
    if layer.behind is None:
        return rows
    return layer.behind(rows, expert.clamp(max=layer.experts - 1)).contiguous()

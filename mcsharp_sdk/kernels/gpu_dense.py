"""Products of all experts of a layer on a GPU for long prompts: dequantised weights, by torch.

So many rows of all experts are dequantised at a time as fit into :data:`DENSE_BYTES`, and torch's
grouped product multiplies by them. Like the kernels, it never waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import LayerCase
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack
from mcsharp_sdk.quantization.packing import BLOCK

DENSE_BYTES = 256 * 2**20
"""Scratch for dequantised weights of all experts; ``LEAST_ROWS`` are taken whatever their size."""

LEAST_ROWS = 128
"""So many rows, or a multiple, are dequantised at a time: half of them may be those of gates."""

CAPABILITY = 9
"""Major number of the compute capability that it was measured on. On others torch refuses the
product, or loops over the experts on the host, depending on its version."""


def fits(case: LayerCase) -> bool:
    """Whether a layer can be run so: bf16, rows of whole blocks, and torch's grouped product."""
    whole = case.hidden % BLOCK == 0 and case.intermediate % BLOCK == 0
    aligned = case.rows % 8 == 0  # torch wants 16 bytes
    return case.dtype == torch.bfloat16 and whole and aligned and _has_product(case.device)


@cache
def _has_product(device: str) -> bool:
    """Whether torch multiplies by groups on all devices of a kind without waiting for them."""
    if device != "cuda" or not hasattr(torch, "_grouped_mm"):
        return False
    found = [torch.cuda.get_device_capability(n)[0] for n in range(torch.cuda.device_count())]
    return set(found) == {CAPABILITY}


def products(
    stack: MatrixStack,
    table: Tensor,
    x: Tensor,
    ends: Tensor,
    *,
    gated: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """Products of all experts' matrix with the activations of the slots that chose them.

    Parameters
    ----------
    table : of :func:`~mcsharp_sdk.kernels.expert_layer.expert_table`.
    x : [slots, K], 16-bit floats, contiguous, by expert.
    ends : int32 [experts], where the slots of each end.
    gated : give SiLU of the first half of the rows times the second half.
    order : int64 [slots], to have the result by slot, which ``gated`` leaves by expert.

    Returns
    -------
    [slots, R or R/2] in x's dtype; undefined where a slot is dropped.
    """
    height = stack.rows // 2 if gated else stack.rows
    step = rows_at_once(stack, len(table) - 1, x.dtype) // (2 if gated else 1)
    out = torch.empty(len(x), height, dtype=x.dtype, device=x.device)
    for first in range(0, height, step):
        part = out[:, first : first + step]
        _multiply(part, first, stack, table, x, ends, gated=gated, order=order)
    return out


def _multiply(
    out: Tensor,
    first: int,
    stack: MatrixStack,
    table: Tensor,
    x: Tensor,
    ends: Tensor,
    *,
    gated: bool,
    order: Tensor | None,
) -> None:
    """Columns of the result from ``first`` on; a call each, so that no two hold their scratch."""
    from mcsharp_sdk.kernels.triton_launch import dequantised

    weights = dequantised(stack, table, first, out.shape[1], x.dtype, gated=gated)
    y = torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)
    if gated:
        gate, up = y.chunk(2, dim=1)
        torch.mul(torch.nn.functional.silu(gate), up, out=out)
    elif order is None:
        out.copy_(y)
    else:
        out.index_copy_(0, order, y)


def rows_at_once(stack: MatrixStack, experts: int, dtype: torch.dtype) -> int:
    """Rows of each expert that are dequantised at a time."""
    fitting = DENSE_BYTES // (experts * stack.columns * dtype.itemsize)
    return max(1, fitting // LEAST_ROWS) * LEAST_ROWS


def workspace_bytes(layer: ExpertLayer, slots: int, dtype: torch.dtype) -> int:
    """Scratch that one token with so many slots takes, result and dequantised weights not included.

    It is what is held at once while the layer is in ``gate_up``, between the matrices, or in
    ``down``.
    """
    gate_up, down = (
        min(stack.rows, rows_at_once(stack, layer.experts, dtype))
        for stack in (layer.gate_up, layer.down)
    )
    inner, projected = layer.down.columns, layer.down.columns
    between = 0
    if layer.between is not None:
        projected = layer.gate_up.rows
        between = 2 * projected + inner
    first = layer.gate_up.columns + projected + gate_up + gate_up // 2
    second = inner + layer.down.rows + down
    return slots * max(first, between, second) * dtype.itemsize

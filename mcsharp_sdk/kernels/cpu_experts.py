"""All routed experts of a layer at once on a CPU: two calls of compiled code.

Small experts take less time to compute than it takes to call for each of them. Products are those
of ``integer_dot`` or ``int8_dot``, for experts of all widths together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, in_parts
from mcsharp_sdk.kernels.gpu_support import HALF_PRECISION
from mcsharp_sdk.kernels.integer_dot import products
from mcsharp_sdk.kernels.matrix import PackedStack

WORKSPACE_BYTES = 128 * 2**20
"""Scratch for many tokens; beyond it they are done some at a time."""

Expert = tuple[int, int, int, int]
"""Width, place among those of its width, and first and last+1 place of its slots in their order."""


def serves(x: Tensor) -> bool:
    """Whether x may be taken: 16-bit floats on a CPU, one token at least."""
    return x.device.type == "cpu" and x.dtype in HALF_PRECISION and len(x) > 0


def run_experts(
    layer: ExpertLayer, hidden: Tensor, chosen: Tensor, routing: Tensor, *, halves: int = 2
) -> Tensor:
    """Weighted sum of the chosen experts.

    Parameters
    ----------
    hidden : [T, H], 16-bit floats.
    chosen : int64 [T, k]; ``layer.experts`` marks a dropped slot, which costs nothing.
    routing : [T, k], any float dtype.
    halves : bytes of an activation that are multiplied: 2, or 1 where an expert gets several rows.

    Returns
    -------
    [T, H] in hidden's dtype; summed in fp32, over a token's slots in their order. Between the
    matrices, too, are fp32 numbers where the layer has no code of its own there.
    """
    at_once = max(1, WORKSPACE_BYTES // workspace_bytes(layer, chosen.shape[1]))
    return in_parts(partial(_at_once, layer, halves), at_once, hidden, chosen, routing)


def workspace_bytes(layer: ExpertLayer, slots: int) -> int:
    """Scratch that one token with so many slots takes.

    In fp32: results of ``gate_up``, inputs of ``down`` and those quantised, results of ``down``, a
    copy of these without dropped slots, and their sum.
    """
    inner, hidden = layer.gate_up.rows + 2 * layer.down.columns, layer.down.rows
    return 4 * (slots * (inner + 2 * hidden) + hidden)


def _at_once(
    layer: ExpertLayer, halves: int, hidden: Tensor, chosen: Tensor, routing: Tensor
) -> Tensor:
    slots = chosen.reshape(-1)
    order, experts = _by_expert(layer.table[slots].tolist())
    if not experts:
        return torch.zeros_like(hidden)
    tokens = _in_pairs(order, order // chosen.shape[1])
    inner = _products(layer.gate_up, hidden, experts, tokens, len(slots), halves)
    if layer.between is None:
        gate, up = inner.chunk(2, -1)
        inner = torch.nn.functional.silu(gate).mul_(up)
    else:
        inner = layer.between(inner.to(hidden.dtype), slots.clamp(max=layer.experts - 1))
    out = _products(layer.down, inner, experts, _in_pairs(order, order), len(slots), halves)
    if layer.behind is not None:
        out = layer.behind(out.to(hidden.dtype), slots.clamp(max=layer.experts - 1)).float()
    return _weighted_sum(out.reshape(*chosen.shape, -1), routing.float(), order).to(hidden.dtype)


def _weighted_sum(out: Tensor, routing: Tensor, used: np.ndarray) -> Tensor:
    """Sum over the slots in use, [T, H]; ``out`` is written over.

    What out, [T, k, H], and routing, [T, k], have for the others may be no number.
    """
    if len(used) < routing.numel():
        dropped = torch.ones(routing.numel(), dtype=torch.bool, device="cpu")
        dropped[used] = False
        dropped = dropped.view(routing.shape)
        out, routing = out.masked_fill(dropped.unsqueeze(-1), 0), routing.masked_fill(dropped, 0)
    return out.mul_(routing.unsqueeze(-1)).sum(1)


def _by_expert(table: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[Expert]]:
    """Slots in use by expert, from each slot's row of the layer's table, and these experts.

    numpy sorts no faster but from hundreds of slots on, and a single token has few.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for slot, (width, place) in enumerate(table):
        if width:  # a dropped one has none
            places.setdefault((width, place), []).append(slot)
    order = np.fromiter(chain.from_iterable(places.values()), np.int64)
    ends = accumulate(map(len, places.values()))
    experts = [
        (width, place, end - len(slots), end)
        for ((width, place), slots), end in zip(places.items(), ends, strict=True)
    ]
    return order, experts


def _in_pairs(order: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64 [N, 2]: slots, which are rows of the results, and rows that they come from."""
    pairs = np.empty((len(order), 2), np.int64)
    pairs[:, 0], pairs[:, 1] = order, rows
    return pairs


def _products(
    stack: MatrixStack,
    x: Tensor,
    experts: Sequence[Expert],
    order: np.ndarray,
    results: int,
    halves: int,
) -> Tensor:
    """What each slot's expert makes of its row of x, fp32 [results, R].

    Parameters
    ----------
    order : int64 [N, 2], by expert: the slot, which is the row of the results, and the row of x.
    """
    memory = {
        width: PackedStack(weight, width, stack.group_size, stack.columns).memory()
        for width, weight in stack.weights.items()
    }
    spans = [
        (*memory[width].addresses(place), width, first, end) for width, place, first, end in experts
    ]
    form = (stack.rows, stack.columns, stack.group_size)
    return products(x, spans, order, form, results, halves)

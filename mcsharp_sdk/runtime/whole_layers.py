"""Kernels that compute all routed experts of a layer at once, where one can."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcsharp_sdk.kernels import cpu_experts, crossovers, gpu_support
from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.expert_layer import (
    ExpertLayer,
    MatrixStack,
    PerSlot,
    expert_table,
    in_parts,
)
from mcsharp_sdk.kernels.gpu_experts import run_experts, tokens_at_once
from mcsharp_sdk.kernels.integer_dot import BYTES
from mcsharp_sdk.kernels.linear import VARIABLE, WHOLE_LAYERS, choose_kernel
from mcsharp_sdk.models.experts import MATRICES, activate, finish
from mcsharp_sdk.quantization.grid import REMOVED
from mcsharp_sdk.quantization.rotation import expert_signs, rotate

if TYPE_CHECKING:
    from mcsharp_sdk.runtime.modules import ExpertBucket

WholeLayer = Callable[..., Tensor]
"""hidden [T, H], top_k_index and top_k_weights [T, k] -> [T, H].

Rows may be slots already: ``of`` tells tokens and slots of a token then, by which a GPU divides the
work.
"""

TRITON, TRITON_DP4A = WHOLE_LAYERS

TURNING_BYTES = {"cuda": 64 * 2**20, "cpu": 2 * 2**20}
"""Kind of device -> scratch for turning rows; beyond it they are turned some at a time. What a CPU
has at once should stay in its cache."""

TURNING_BYTES_PER_COLUMN = 18
"""Of a row being turned: it, its signs and two products in fp32, and the result."""

_KNOWN = "_whole_layer_facts"
_KERNELS = "_whole_layer_kernels"

MANY_TOKENS = 256
"""Tokens of an expert from which on the choice of a kernel is always the same."""


def whole_layer(
    experts: Any, buckets: Sequence[ExpertBucket], hidden: Tensor, weights: Tensor
) -> WholeLayer | None:
    """The function that computes a layer at once on ``hidden``'s device; None if there is none.

    Tensors are looked up anew at each call, since models move. Weights that are offloaded are left
    to the buckets, which fetch them.

    Parameters
    ----------
    experts : the experts module, whose activation, biases and norms count.
    buckets : its packed weights.
    hidden, weights : what it is to be run on, and the routing weights. Gradients are left to the
        buckets.
    """
    if not buckets or _asks_for_gradient(experts, hidden, weights):
        return None
    if (run_layer := _way(experts, buckets, hidden, weights)) is None:
        return None
    if experts.removed and experts.has_bias:  # whose biases are left
        return None
    if any(t.device != hidden.device for bucket in buckets for t in bucket.tensors.values()):
        return None
    gate_up, down = (
        MatrixStack(
            {bucket.bits: bucket.stack(matrix).weight for bucket in buckets},
            buckets[0].group_size,
            buckets[0].columns[matrix],
        )
        for matrix in MATRICES
    )
    table, silu = _facts(experts, buckets, down.columns, hidden.device)
    behind = experts.has_bias or experts.has_post_expert_norm
    layer = ExpertLayer(
        gate_up,
        down,
        table,
        between=_between(experts, silu=silu, rotated=buckets[0].rotated),
        behind=partial(finish, experts) if behind else None,
    )
    run: WholeLayer = partial(run_layer, layer)
    weighs_input, rotated = getattr(experts, "weighs_input", False), buckets[0].rotated
    if weighs_input or rotated:
        run = partial(_with_a_row_each, layer, run, weighs_input=weighs_input, rotated=rotated)
        run = partial(_some_at_a_time, layer, run)
    return partial(_run_without_removed, run, table) if experts.removed else run


def _between(experts: Any, *, silu: bool, rotated: bool) -> PerSlot | None:
    """What comes between the matrices, unless kernels do it themselves."""
    if rotated:
        return lambda projected, expert: _turned(
            activate(experts, projected, expert), expert, experts.num_experts
        )
    return None if silu else partial(activate, experts)


def _asks_for_gradient(experts: Any, hidden: Tensor, weights: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (hidden, weights, *experts.parameters()))


def _way(
    experts: Any, buckets: Sequence[ExpertBucket], hidden: Tensor, weights: Tensor
) -> Callable[..., Tensor] | None:
    """What takes a layer and what a ``WholeLayer`` takes, on ``hidden``'s device, if anything."""
    if gpu_support.serves(hidden):
        return _on_gpu if os.environ.get(VARIABLE, TRITON) in WHOLE_LAYERS else None
    if cpu_experts.serves(hidden):
        slots = len(hidden) * weights.shape[-1]
        kernel = _cpu_kernel(experts, buckets, -(-slots // experts.num_experts), hidden.dtype)
        return partial(_on_cpu, BYTES[kernel]) if kernel else None
    return None


def _on_gpu(
    layer: ExpertLayer,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    of: tuple[int, int] | None = None,
) -> Tensor:
    dp4a = os.environ.get(VARIABLE) == TRITON_DP4A
    return run_experts(layer, hidden, index, weights, dp4a=dp4a, of=of)


def _on_cpu(
    halves: int,
    layer: ExpertLayer,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    of: tuple[int, int] | None = None,
) -> Tensor:
    return cpu_experts.run_experts(layer, hidden, index, weights, halves=halves)


def _cpu_kernel(
    experts: Any, buckets: Sequence[ExpertBucket], tokens: int, dtype: torch.dtype
) -> str:
    """The kernel for whole layers that is chosen for all matrices of a layer, if one is; kept.

    Parameters
    ----------
    tokens : of an expert, on average.
    """
    settings = (crossovers.measured("cpu"), os.environ.get(VARIABLE), torch.get_num_threads())
    known, found = experts.__dict__.get(_KERNELS, (None, {}))
    if known != settings:
        found = {}
        experts.__dict__[_KERNELS] = settings, found
    key = min(tokens, MANY_TOKENS), dtype
    if key not in found:
        chosen = {
            choose_kernel(Case(s.rows, s.columns, s.bits, s.group_size, *key, "cpu"))
            for s in (bucket.stack(matrix) for bucket in buckets for matrix in MATRICES)
        }
        found[key] = chosen.pop() if len(chosen) == 1 and chosen <= set(BYTES) else ""
    return found[key]


def _run_without_removed(
    run: WholeLayer, table: Tensor, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Slots of removed experts, which have no width in the table, are dropped ones."""
    dropped = len(table) - 1
    return run(hidden, index.masked_fill(table[index, 0] == 0, dropped), weights)


def _some_at_a_time(
    layer: ExpertLayer, run: WholeLayer, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """As many tokens, each slot of which has a row, as the workspace has room for."""
    at_once = tokens_at_once(layer, index.shape[1], hidden.dtype, own_rows=True)
    return in_parts(run, at_once, hidden, index, weights)


def _with_a_row_each(
    layer: ExpertLayer,
    run: WholeLayer,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    weighs_input: bool,
    rotated: bool,
) -> Tensor:
    """With a row for each slot: what goes in is weighed, or turned as its expert asks for."""
    rows = hidden.unsqueeze(1).expand(*index.shape, -1).flatten(0, 1)
    slots, factors = index.reshape(-1, 1), weights.reshape(-1, 1)
    if weighs_input:
        rows, factors = (rows * factors).to(hidden.dtype), torch.ones_like(factors)
    if rotated:
        rows = _turned(rows, slots[:, 0], layer.experts)
    out = run(rows, slots, factors.float(), of=(index.shape[0], index.shape[1]))
    return out.view(*index.shape, out.shape[-1]).sum(1)


def _turned(rows: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Rows [n, K] turned as each one's expert, int64 [n], of so many, asks for."""
    signs = expert_signs(experts, rows.shape[-1], rows.device)
    room = TURNING_BYTES[rows.device.type]
    at_once = max(1, room // (TURNING_BYTES_PER_COLUMN * rows.shape[-1]))
    turned = torch.empty_like(rows)
    chosen = expert.clamp(max=experts - 1)
    for out, part, own in zip(*(t.split(at_once) for t in (turned, rows, chosen)), strict=True):
        out.copy_(rotate(part, signs[own]))
    return turned


def _facts(
    experts: Any, buckets: Sequence[ExpertBucket], intermediate: int, device: torch.device
) -> tuple[Tensor, bool]:
    """The layer's table on ``device``, and whether its activation is the kernels' own; kept."""
    known = experts.__dict__.setdefault(_KNOWN, {})
    if device not in known:
        widths = {expert: bucket.bits for bucket in buckets for expert in bucket.experts}
        table = expert_table([widths.get(e, REMOVED) for e in range(experts.num_experts)])
        known[device] = (table.to(device), gates_by_silu(experts, intermediate, device))
    return known[device]


@torch.no_grad()
def gates_by_silu(experts: Any, intermediate: int, device: torch.device | str = "cpu") -> bool:
    """Whether a family's activation is SiLU of the first half times the second half, no bias.

    It is tried out, on numbers of all sizes: families differ in clamps, factors and order, and say
    so only in code.
    """
    if not experts.has_gate or experts.has_bias:
        return False
    numbers = torch.arange(2 * intermediate, dtype=torch.float32, device=device)
    projected = (numbers * 1.7).sin().mul(100).unsqueeze(0)
    gate, up = projected.chunk(2, -1)
    given = experts._apply_gate(projected)
    expected = torch.nn.functional.silu(gate) * up
    return given.shape == expected.shape and torch.allclose(given, expected, rtol=1e-5, atol=1e-6)

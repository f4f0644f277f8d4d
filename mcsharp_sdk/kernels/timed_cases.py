"""Which kernel is fastest for a product, and which tiling for a layer: timed on random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from mcsharp_sdk.kernels.case import Case, LayerCase
from mcsharp_sdk.kernels.crossovers import Steps
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, expert_table
from mcsharp_sdk.kernels.gpu_experts import run_experts, tilings_of
from mcsharp_sdk.kernels.linear import KERNELS, candidates
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.measuring import LAYER_TOKENS, TOKENS, Run, find_steps
from mcsharp_sdk.kernels.soundness import CHECKED_TOKENS, exact_layer, exact_product, sound
from mcsharp_sdk.kernels.tilings import Tiling
from mcsharp_sdk.quantization.grid import PackedWeight, group_count
from mcsharp_sdk.quantization.packing import packed_bytes

COLD_BYTES = 64 * 2**20
"""Matrices of so many bytes in all are taken in turns, so that no cache holds the next one."""

MOST_COPIES = 32
ROUTINGS = 8
"""Choices of experts that a layer is timed with, in turns."""


@torch.inference_mode()
def time_product(case: Case, tokens: tuple[int, ...] = TOKENS) -> Steps:
    """From how many tokens on each kernel is fastest for a product; its own number is ignored.

    Kernels that do not run here, or whose products are wrong, are left out with a warning.

    Raises
    ------
    RunError
        If none is left.
    """
    size = case.rows * packed_bytes(case.columns, case.bits)
    copies = max(2, min(MOST_COPIES, -(-COLD_BYTES // size)))
    weight = random_packed(copies, case.rows, case.columns, case.bits, case.group_size, case.device)
    stack = PackedStack(weight, case.bits, case.group_size, case.columns)
    x = torch.randn(max(tokens), case.columns, device=case.device).to(case.dtype)
    turn = cycle(range(copies))

    def run(name: str, number: int, slot: int | None = None) -> Tensor:
        return KERNELS[name].run(
            x[:number], stack, [next(turn) if slot is None else slot], [number]
        )

    right = sound(
        {name: partial(run, name, slot=0) for name in candidates(case)},
        exact_product(stack, 0, x[: CHECKED_TOKENS[-1]]),
    )
    runs: dict[str, Run] = {name: partial(run, name) for name in right}
    return find_steps(runs, case.device, tokens)


@torch.inference_mode()
def time_layer(case: LayerCase, tokens: tuple[int, ...] = LAYER_TOKENS) -> Steps:
    """From how many tokens on each tiling is fastest for a layer.

    Tilings are left out, and an error is raised, as for :func:`time_product`. Between the matrices
    there is SiLU, or nothing where ``gate_up`` is not twice as high: what a
    family has there is the same for all tilings.
    """
    layer = random_layer(case)
    x = torch.randn(max(tokens), case.hidden, device=case.device).to(case.dtype)
    order = torch.rand(ROUTINGS, max(tokens), case.experts, device=case.device).argsort(-1)
    turn = cycle(order[..., : case.slots].contiguous())
    routing = torch.full((max(tokens), case.slots), 1 / case.slots, device=case.device)

    first = next(turn)

    def run(tiling: Tiling, number: int, chosen: Tensor | None = None) -> Tensor:
        chosen = (next(turn) if chosen is None else chosen)[:number]
        return run_experts(layer, x[:number], chosen, routing[:number], tiling=tiling)

    tilings = tilings_of(case)
    right = sound(
        {name: partial(run, tiling, chosen=first) for name, tiling in tilings.items()},
        exact_layer(layer, *(part[: CHECKED_TOKENS[-1]] for part in (x, first, routing))),
    )
    runs: dict[str, Run] = {name: partial(run, tilings[name]) for name in right}
    return find_steps(runs, case.device, tokens)


def random_layer(case: LayerCase) -> ExpertLayer:
    """Experts with random weights; their widths take turns."""
    bits = [case.widths[expert % len(case.widths)] for expert in range(case.experts)]

    def stack(rows: int, columns: int) -> MatrixStack:
        weights = {
            width: random_packed(
                bits.count(width), rows, columns, width, case.group_size, case.device
            )
            for width in case.widths
        }
        return MatrixStack(weights, case.group_size, columns)

    between: Callable[[Tensor, Tensor], Tensor] | None = None
    if case.rows != 2 * case.intermediate:
        between = _as_they_are
    return ExpertLayer(
        stack(case.rows, case.hidden),
        stack(case.hidden, case.intermediate),
        expert_table(bits).to(case.device),
        between,
    )


def random_packed(
    count: int, rows: int, columns: int, bits: int, group_size: int, device: str
) -> PackedWeight:
    """A stack of random packed matrices, [count, R, K], with outputs of moderate size."""
    groups = group_count(columns, group_size)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    size = torch.rand(count, rows, groups, device=device) + 0.5
    return PackedWeight(
        codes(count, rows, packed_bytes(columns, bits)),
        (size * 2.0**-bits / columns**0.5).half(),
        codes(count, groups, packed_bytes(rows, bits)),
    )


def _as_they_are(rows: Tensor, expert: Tensor) -> Tensor:
    return rows

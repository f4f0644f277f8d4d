"""Triton kernel that sums what the experts of a token give, weighed."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_overlap import let_next_begin, wait_for_last


@triton.jit
def combine_slots(
    y, chosen, routing, out, width, experts, slots_per_row,
    BH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [T, H] = Σ_j routing[t, j] · y[t, j]; slots without an expert count nothing.

    Grid (H tiles, T); y [T·k, H], added up in fp32 in the order of the slots.
    """
    if OVERLAP:
        let_next_begin()
        wait_for_last()
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BH,), tl.float32)
    for j in range(slots_per_row):
        slot = row * slots_per_row + j
        if tl.load(chosen + slot) < experts:
            value = tl.load(y + slot * width + h, mask=h < width, other=0.0).to(tl.float32)
            total += value * tl.load(routing + slot).to(tl.float32)
    tl.store(out + row * width + h, total, mask=h < width)

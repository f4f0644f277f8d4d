"""Triton kernel that sorts slots by expert and cuts each expert's into tiles, in one launch.

A slot is one expert chosen by one token. Each expert has a program that counts all slots and then
looks for its own, so that none waits for another.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_at(chosen, start, slots, others, SLOTS: tl.constexpr):
    """Experts of the slots from ``start`` on, int32; ``others`` behind the last slot."""
    slot = start + tl.arange(0, SLOTS)
    return tl.load(chosen + slot, mask=slot < slots, other=others).to(tl.int32)


@triton.jit
def count_slots(chosen, slots, experts, BINS: tl.constexpr, SLOTS: tl.constexpr):
    """Slots of each expert, int32 [BINS]; of dropped ones, too, and rubbish behind them."""
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, slots, SLOTS):
        counts += tl.histogram(numbers_at(chosen, start, slots, experts + 1, SLOTS), BINS)
    return counts


@triton.jit
def list_slots(order, position, chosen, slots, expert, SLOTS: tl.constexpr):
    """The slots of an expert go to ``order`` from ``position`` on, ascending; the end of them."""
    for start in range(0, slots, SLOTS):
        mine = numbers_at(chosen, start, slots, expert + 1, SLOTS) == expert
        before = tl.cumsum(mine.to(tl.int32), 0) - 1
        slot = (start + tl.arange(0, SLOTS)).to(tl.int64)
        tl.store(order + position + before, slot, mask=mine)
        position += tl.sum(mine.to(tl.int32))
    return position


@triton.jit(do_not_specialize=["slots", "tile_count"])
def sort_by_expert(
    chosen, order, ends, tiles, slots, experts, tile_count, height,
    BINS: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Order, ends and tiles of the slots of each expert; grid (experts + 1), BINS more than that.

    ``chosen`` [slots] has the expert of each, or ``experts`` where a slot is dropped. ``order``
    [slots] lists the slots by expert, ascending, dropped ones last; ``ends`` [experts] is where
    those of each expert end in it. ``tiles`` [tile_count, 3] has as many tiles of at most
    ``height`` slots as each expert needs, as in
    :func:`~mcsharp_sdk.kernels.triton_gemm.grouped_gemm`; the rest are empty.
    """
    expert = tl.program_id(0)
    number = tl.arange(0, BINS)
    counts = count_slots(chosen, slots, experts, BINS, SLOTS)
    first = tl.sum(tl.where(number < expert, counts, 0))
    end = list_slots(order, first, chosen, slots, expert, SLOTS)
    needed = tl.where(number < experts, tl.cdiv(counts, height), 0)
    tile = tl.sum(tl.where(number < expert, needed, 0))
    last = tile + tl.sum(tl.where(number == expert, needed, 0))
    if expert < experts:
        tl.store(ends + expert, end)
    else:
        first, end, last = end, end, tile_count
    for start in range(tile, last, TILES):
        lane = start + tl.arange(0, TILES)
        begin = tl.minimum(first + (lane - tile) * height, end)
        own = tiles + 3 * lane
        tl.store(own, expert, mask=lane < last)
        tl.store(own + 1, begin, mask=lane < last)
        tl.store(own + 2, tl.minimum(begin + height, end), mask=lane < last)

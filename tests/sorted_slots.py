"""Whether slots are sorted by expert and cut into tiles, told by the definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mcsharp_sdk.kernels.triton_launch import Tiles


def check_sorted(found: Tiles, chosen: Sequence[int], experts: int) -> None:
    """That order, ends and tiles are what the definitions say."""
    order, ends, tiles, height = found
    assert order.tolist() == sorted(range(len(chosen)), key=lambda slot: (chosen[slot], slot))
    counts = [chosen.count(expert) for expert in range(experts)]
    assert ends.tolist() == [sum(counts[: expert + 1]) for expert in range(experts)]
    expected = [
        [expert, first, min(first + height, end)]
        for expert, end in enumerate(ends.tolist())
        for first in range(end - counts[expert], end, height)
    ]
    used, empty = tiles[: len(expected)].tolist(), tiles[len(expected) :].tolist()
    assert used == expected
    assert all(expert == experts and first == end for expert, first, end in empty)
    assert (order.dtype, ends.dtype, tiles.dtype) == (torch.int64, torch.int32, torch.int32)

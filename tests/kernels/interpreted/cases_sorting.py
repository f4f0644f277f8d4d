"""Sorting of slots in Triton's interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

import pytest
import torch
from sorted_slots import check_sorted

from mcsharp_sdk.kernels.triton_launch import SORTED_SLOTS, SORTED_TILES, sort_slots


@pytest.mark.parametrize("height", [None, 16, 128])
@pytest.mark.parametrize("experts", [1, 4, 61])
@pytest.mark.parametrize("slots", [0, 1, 17, 130, SORTED_SLOTS + 1])
def test_slots_are_sorted_by_expert_and_cut_into_tiles(
    slots: int, experts: int, height: int | None
) -> None:
    generator = torch.Generator().manual_seed(slots)
    chosen = torch.randint(0, experts + 1, (slots,), generator=generator)
    check_sorted(sort_slots(chosen, experts, height), chosen.tolist(), experts)


@pytest.mark.parametrize("only", [0, 2, 4])
def test_all_slots_may_choose_the_same_expert_or_be_dropped(only: int) -> None:
    slots = 16 * (SORTED_TILES + 1)
    check_sorted(sort_slots(torch.full((slots,), only), 4, 16), [only] * slots, 4)

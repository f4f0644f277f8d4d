"""Evenly spaced tokens against exact fractions, also of more tokens than float32 can count."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.routed_inputs import RoutedInputs

MANY = 2**24 + 4
"""The last of so many tokens has a number that float32 rounds up."""


@given(st.integers(0, 2**40), st.integers(1, 100))
def test_numbers_are_the_whole_parts_of_exact_fractions(count: int, most: int) -> None:
    chosen = min(count, most)
    steps = Fraction(count - 1, max(1, chosen - 1))
    found = evenly_spaced(count, most)
    assert found.dtype == torch.int64
    assert found.tolist() == [floor(place * steps) for place in range(chosen)]


@pytest.mark.parametrize("most", [1, 2, 1024, 4096])
def test_all_of_many_numbers_are_below_their_count(most: int) -> None:
    found = evenly_spaced(MANY, most)
    assert found[0] == 0
    assert found[-1] == (MANY - 1 if most > 1 else 0)
    assert len(found.unique()) == most


def test_the_last_of_many_tokens_is_sampled() -> None:
    rows = torch.zeros(1, 1).expand(MANY, 1)
    index = torch.zeros(1, 1, dtype=torch.int64).expand(MANY, 1)
    hidden, _ = RoutedInputs(rows, rows, index, rows, (MANY,), 1).sample(4096)
    assert len(hidden) == 4096

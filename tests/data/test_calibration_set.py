"""Calibration sets: tokens of several sources and lengths."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mcsharp_sdk.data.calibration import SEQUENCES, EmbeddedSource, share_sequences
from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.errors import InputError


def group(sequences: int, length: int, source: int) -> SampleGroup:
    return SampleGroup({"input_ids": torch.full((sequences, length), source)}, source)


MIXED = CalibrationSet((group(3, 5, 0), group(2, 7, 1), group(1, 40, 1)), ("a", "b"))


def test_tokens_and_sequences_are_counted() -> None:
    assert MIXED.num_tokens == sum(g.tokens.numel() for g in MIXED.groups) == 69
    assert MIXED.num_sequences == 6


@given(st.integers(1, 100))
def test_batches_are_the_set_in_order_and_no_larger_than_asked(tokens: int) -> None:
    batches = list(MIXED.batches(tokens))
    together = torch.cat([b.tokens.flatten() for b in batches])
    assert torch.equal(together, torch.cat([g.tokens.flatten() for g in MIXED.groups]))
    assert all(b.tokens.numel() <= tokens or len(b.tokens) == 1 for b in batches)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1), st.integers(1, 100))
@example([(1, 40), (1, 7), (1, 7)], 10)
def test_the_first_sequences_are_whole_and_fit_if_any_does(
    sizes: list[tuple[int, int]], tokens: int
) -> None:
    groups = tuple(group(sequences, length, 0) for sequences, length in sizes)
    first = CalibrationSet(groups, ("a",)).first(tokens)
    lengths = [length for n, length in sizes for _ in range(n)]
    fitting = sum(1 for i in range(1, len(lengths) + 1) if sum(lengths[:i]) <= tokens)
    assert [g.tokens.shape[1] for g in first.groups for _ in g.tokens] == lengths[: max(1, fitting)]


def test_a_plain_text_is_one_group_and_no_text_is_none() -> None:
    assert CalibrationSet.of_tokens(torch.ones(2, 3, dtype=torch.int64)).num_tokens == 6
    assert CalibrationSet.of_tokens(torch.empty(0, 0, dtype=torch.int64)).groups == ()


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"input_ids": torch.ones(3, dtype=torch.int64)},
        {"input_ids": torch.ones(1, 3)},
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "pixel_values": torch.ones(2)},
    ],
)
def test_other_inputs_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError):
        SampleGroup(inputs)


def test_the_size_is_told_per_source() -> None:
    assert MIXED.describe() == "3 x 5 calibration tokens of a and 3 sequences of 54 " + (
        "calibration tokens of b"
    )


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_shares_add_up_and_are_within_one_of_exact(weights: list[float]) -> None:
    shared = share_sequences([EmbeddedSource(weight=w) for w in weights])
    total = sum(Fraction(w) for w in weights)
    exact = [SEQUENCES * Fraction(w) / total for w in weights]
    for source, part in zip(shared, exact, strict=True):
        assert source.sequences == 1 if part < 1 else abs(source.sequences - part) <= 1
    if all(part >= 1 for part in exact):
        assert sum(source.sequences for source in shared) == SEQUENCES


def test_a_source_with_its_own_number_takes_no_share() -> None:
    sources = [EmbeddedSource(sequences=7), EmbeddedSource(weight=3.0), EmbeddedSource()]
    assert [s.sequences for s in share_sequences(sources)] == [7, 96, 32]

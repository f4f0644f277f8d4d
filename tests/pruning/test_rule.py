"""The weight rule and renormalisation against a token-by-token reading of the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.pruning import ranked, renormalise, slot_thresholds, weight_rule

# Powers of two: products are exact, so ties are ties in any precision.
_weight = st.sampled_from([1 / 64, 0.125, 0.25, 0.5, 1.0, 2.0])
_share = st.sampled_from([0.0, 0.125, 0.5, 1.0])


@st.composite
def routed(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Weights of some tokens with many ties, and thresholds."""
    k = draw(st.integers(1, 6))
    tokens = draw(st.lists(st.lists(_weight, min_size=k, max_size=k), min_size=1, max_size=5))
    return tokens, draw(st.lists(_share, min_size=k - 1, max_size=k - 1))


def slow_order(token: list[float]) -> list[int]:
    return sorted(range(len(token)), key=lambda slot: (-token[slot], slot))


def slow_rule(token: list[float], thresholds: list[float]) -> list[bool]:
    order = slow_order(token)
    keep = [True] * len(token)
    for rank in range(1, len(token)):
        keep[order[rank]] = token[order[rank]] >= thresholds[rank - 1] * token[order[0]]
    return keep


@given(routed())
def test_the_rule_follows_its_definition_in_any_order_of_slots(
    case: tuple[list[list[float]], list[float]],
) -> None:
    tokens, thresholds = case
    weights = torch.tensor(tokens, dtype=torch.float64)
    assert ranked(weights).tolist() == [slow_order(token) for token in tokens]
    assert weight_rule(weights, thresholds).tolist() == [slow_rule(t, thresholds) for t in tokens]


@given(routed())
def test_thresholds_of_zero_drop_nothing(case: tuple[list[list[float]], list[float]]) -> None:
    weights = torch.tensor(case[0])
    assert weight_rule(weights, [0.0] * (weights.shape[1] - 1)).all()


@given(routed())
def test_a_wrong_number_of_thresholds_is_refused(
    case: tuple[list[list[float]], list[float]],
) -> None:
    with pytest.raises(InputError, match="thresholds, not"):
        weight_rule(torch.tensor(case[0]), [*case[1], 0.5])


def test_a_quantile_of_the_ratios_drops_that_share() -> None:
    weights = torch.rand(1001, 4, generator=torch.Generator().manual_seed(0))
    for quantile in (0.0, 0.25, 0.5, 0.9):
        thresholds = slot_thresholds(weights, quantile)
        keep = weight_rule(weights, thresholds).gather(1, ranked(weights)).float().mean(0)
        assert keep[0] == 1
        assert keep[1:] == pytest.approx([1 - quantile] * 3, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_at_its_threshold_is_kept(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for token in torch.randn(200, 1, 4, generator=generator).softmax(-1).to(dtype):
        assert weight_rule(token, slot_thresholds(token, 0.5)).all()


def test_tokens_without_any_weight_drop_nothing() -> None:
    assert weight_rule(torch.zeros(2, 3), [1.0, 0.5]).all()
    assert slot_thresholds(torch.zeros(2, 3), 0.5) == [1.0, 1.0]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_slot_thresholds_are_the_quantiles_of_torch(ratios: list[float], quantile: float) -> None:
    second = torch.tensor(ratios)
    found = slot_thresholds(torch.stack([second, torch.ones_like(second)], 1), quantile)
    expected = torch.quantile(second.double(), quantile).item()
    assert found == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize(("tokens", "quantile"), [(0, 0.5), (3, 1.5), (3, -0.1)])
def test_impossible_quantiles_are_refused(tokens: int, quantile: float) -> None:
    with pytest.raises(InputError):
        slot_thresholds(torch.ones(tokens, 2), quantile)


@given(routed(), st.data())
def test_renormalising_keeps_the_sum_and_the_proportions(
    case: tuple[list[list[float]], list[float]], data: st.DataObject
) -> None:
    weights = torch.tensor(case[0])
    one = st.lists(st.booleans(), min_size=weights.shape[1], max_size=weights.shape[1])
    keep = torch.tensor([data.draw(one) for _ in weights])
    result = renormalise(weights, keep)
    for token, kept, found in zip(weights, keep, result, strict=True):
        assert (found[~kept] == 0).all()
        if kept.all():
            assert torch.equal(found, token)
        elif kept.any():
            assert found.sum().item() == pytest.approx(token.sum().item(), rel=1e-5)
            factors = found[kept] / token[kept]
            assert factors.tolist() == pytest.approx([factors[0].item()] * len(factors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_renormalising_keeps_the_dtype(dtype: torch.dtype) -> None:
    weights = torch.tensor([[0.6, 0.3, 0.1]]).to(dtype)
    all_, some = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    assert torch.equal(renormalise(weights, all_), weights)
    result: Tensor = renormalise(weights, some)
    assert result.dtype == dtype
    assert result.float().tolist() == [pytest.approx([6 / 7, 0, 1 / 7], rel=0.01)]

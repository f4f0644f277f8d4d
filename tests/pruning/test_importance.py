"""Token metrics and choices against loops over the tokens, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.pruning import METRICS, least_important, most_important, token_importance

BATCH, LENGTH, HIDDEN = 3, 7, 12


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def received() -> Tensor:
    return torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def valid() -> Tensor:
    """No padding, padding on the left, padding on the right."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, :3] = False
    mask[2, 5:] = False
    return mask


def slow_importance(metric: str, x: list[float], received: float, later: int) -> float:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    fourth = sum((value - mean) ** 4 for value in x) / len(x)
    return {
        "attention": sum(map(abs, x)) * received / later,
        "kurtosis": fourth / variance**2,
        "variance": variance,
        "mean": sum(map(abs, x)) / len(x),
    }[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_follows_its_definition(
    metric: str, hidden: Tensor, received: Tensor, valid: Tensor
) -> None:
    found = token_importance(metric, hidden, received, valid)
    assert found.dtype == torch.float32
    for b in range(BATCH):
        places = [j for j in range(LENGTH) if valid[b, j]]
        for number, j in enumerate(places, 1):
            expected = slow_importance(
                metric,
                hidden[b, j].tolist(),
                received[b, j].item(),
                len(places) - number + 1,
            )
            assert found[b, j].item() == pytest.approx(expected, rel=1e-4)
    assert (found[~valid] == 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-6, 1.0, 1e5, 1e10, 1e20, 1e37])
@pytest.mark.parametrize("metric", METRICS)
def test_hidden_states_of_any_size_have_a_finite_importance(
    metric: str, scale: float, hidden: Tensor, received: Tensor
) -> None:
    hidden *= scale
    found = token_importance(metric, hidden, received, torch.ones(BATCH, LENGTH, dtype=torch.bool))
    for b in range(BATCH):
        for j in range(LENGTH):
            exact = slow_importance(
                metric, hidden[b, j].tolist(), received[b, j].item(), LENGTH - j
            )
            within_range = min(exact, torch.finfo(torch.float32).max)
            assert found[b, j].item() == pytest.approx(within_range, rel=1e-4, abs=1e-37)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_but_zeros_has_a_finite_importance(metric: str) -> None:
    hidden, valid = torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    assert (token_importance(metric, hidden, torch.ones(1, 2), valid) == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_vector_has_a_finite_importance(metric: str) -> None:
    hidden, valid = torch.full((1, 2, 4), 0.5), torch.ones(1, 2, dtype=torch.bool)
    assert token_importance(metric, hidden, torch.ones(1, 2), valid).isfinite().all()


def test_unknown_metrics_and_missing_attention_are_refused(hidden: Tensor, valid: Tensor) -> None:
    with pytest.raises(InputError, match="no token metric 'size'; there are attention, kurtosis"):
        token_importance("size", hidden, None, valid)
    with pytest.raises(InputError, match="needs the attention"):
        token_importance("attention", hidden, None, valid)


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], float]:
    length = draw(st.integers(1, 9))
    numbers = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=length, max_size=length)
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    rows = draw(st.integers(1, 3))
    share = draw(st.sampled_from([0.0, 0.02, 0.25, 0.5, 0.9, 1.0]))
    return (
        draw(st.lists(numbers, min_size=rows, max_size=rows)),
        draw(st.lists(flags, min_size=rows, max_size=rows)),
        share,
    )


@given(scored())
def test_the_most_and_least_important_are_chosen_per_sequence(
    case: tuple[list[list[float]], list[list[bool]], float],
) -> None:
    importance, valid, share = case
    for choose, sign in ((most_important, -1), (least_important, 1)):
        found = choose(torch.tensor(importance), torch.tensor(valid), share)
        for scores, there, chosen in zip(importance, valid, found.tolist(), strict=True):
            places = [j for j, is_there in enumerate(there) if is_there]
            best = sorted(places, key=lambda j, s=scores: (sign * s[j], j))  # type: ignore[misc]
            expected = set(best[: math.ceil(share * len(places))])
            assert {j for j, yes in enumerate(chosen) if yes} == expected


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up() -> None:
    valid = torch.ones(1, 100, dtype=torch.bool)
    assert 0.07 * 100 > 7
    assert most_important(torch.rand(1, 100), valid, 0.07).sum() == 7


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        most_important(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool), share)

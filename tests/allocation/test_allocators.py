"""Costs and baselines."""

from __future__ import annotations

import numpy as np
import pytest

from mcsharp_sdk.allocation import (
    ALLOCATORS,
    Exponents,
    Factors,
    InfeasibleBudget,
    allocation_cost,
    solve_bit_allocation,
)
from mcsharp_sdk.allocation.baselines import Budget, spend_all, spread_evenly, widen_whole_layers
from mcsharp_sdk.errors import InputError

PMQ = Exponents(alpha=1.0, beta=1.5, gamma=2.0)


def factors(count: tuple[float, ...] = (6.0, 3.0, 1.0), error: float | np.ndarray = 1.0) -> Factors:
    weights = np.array([1.0, 2.0, 1.0])[: len(count)]
    errors = np.broadcast_to(error, (len(count), 3)) * np.array([4.0, 2.0, 1.0])
    return Factors((1, 2, 3), np.array(count), weights, errors)


def test_cost_is_the_product_of_powers_of_shares_and_errors() -> None:
    cost = allocation_cost(factors(), PMQ)
    assert cost[1].tolist() == pytest.approx([0.3 * 0.5**1.5 * e**2 for e in (4, 2, 1)])


def test_zero_to_the_power_of_zero_is_one() -> None:
    unused = factors(count=(0.0, 0.0, 0.0), error=0.0)
    cost = allocation_cost(unused, Exponents(alpha=0.0, beta=0.0, gamma=0.0))
    assert cost.tolist() == [[1.0, 1.0, 1.0]] * 3


def test_an_expert_that_nobody_selected_costs_nothing() -> None:
    assert allocation_cost(factors(count=(1.0, 0.0, 3.0)), PMQ)[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (factors(count=(0.0, 0.0, 0.0)), "activation_count is zero for every expert"),
        (factors(error=1e200), "too large"),
        (Factors((1, 2), np.ones(2), np.ones(2)), "needs quantisation errors"),
    ],
)
def test_costs_that_cannot_be_had_are_refused(given: Factors, message: str) -> None:
    with pytest.raises(InputError, match=message):
        allocation_cost(given, PMQ)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_keeps_the_budget_and_the_required_widths(name: str) -> None:
    rng = np.random.default_rng(0)
    error = rng.random((16, 1)) * [[1.0, 0.3, 0.1]]
    given = Factors((1, 2, 3), rng.random(16), rng.random(16), error, error, 0.5)
    allocator = ALLOCATORS[name]  # type: ignore[index]
    required = {3: 2, 2: 1} if allocator.keeps_required else {}
    cost = allocator.cost(given, PMQ, np.random.default_rng(1))
    found = allocator.spend(cost, (1, 2, 3), Budget(35, at_least=required)).tolist()
    assert sum(found) == (32 if allocator.whole_model else 35)  # whole layers: here there is one
    assert all(found.count(w) >= n for w, n in required.items())


@pytest.mark.parametrize(("name", "source"), [("frequency", 0), ("routing_weight", 1)])
def test_rankings_give_the_wider_widths_to_the_more_important(name: str, source: int) -> None:
    importance = np.array([0.02, 0.5, 0.03, 0.25, 0.1, 0.1])
    values = [np.ones(6), np.ones(6)]
    values[source] = importance
    allocator = ALLOCATORS[name]  # type: ignore[index]
    given = Factors((1, 2, 3), values[0], values[1])
    cost = allocator.cost(given, PMQ, np.random.default_rng(0))
    found = allocator.spend(cost, (1, 2, 3), Budget(12))
    assert (np.diff(found[np.argsort(importance, kind="stable")]) >= 0).all()
    assert set(found.tolist()) == {1, 2, 3}


def test_f_norm_looks_at_the_error_alone() -> None:
    one, two = factors(), factors(count=(1.0, 1.0, 8.0))
    cost = ALLOCATORS["f_norm"].cost
    rng = np.random.default_rng(0)
    assert cost(one, PMQ, rng).tolist() == cost(two, PMQ, rng).tolist() == [[16.0, 4.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("experts", "budget", "given"),
    [
        (8, 16, [2] * 8),
        (8, 20, [3, 2, 3, 2, 3, 2, 3, 2]),
        (8, 18, [3, 2, 2, 2, 3, 2, 2, 2]),
        (4, 30, [3] * 4),
        (3, 4, [2, 1, 1]),
    ],
)
def test_uniform_spreads_what_is_left_evenly(experts: int, budget: int, given: list[int]) -> None:
    assert spread_evenly(np.zeros((experts, 3)), (1, 2, 3), Budget(budget)).tolist() == given


def test_uniform_refuses_an_exact_budget_that_it_cannot_meet() -> None:
    with pytest.raises(InfeasibleBudget, match="exactly 9 bits"):
        spread_evenly(np.zeros((3, 3)), (1, 2, 4), Budget(9, "exact"))


def by_layer(*scores: float, experts: int = 8) -> np.ndarray:
    """Costs of layers with these scores."""
    return np.repeat(scores, experts)[:, None] * np.ones(3)


@pytest.mark.parametrize(
    ("target", "widths", "given"),
    [
        (2.5, (2, 4), [2, 4, 2, 2]),  # the papers' quarter of the layers
        (2.5, (1, 2, 3), [2, 3, 2, 3]),
        (1.5, (1, 2, 3), [1, 2, 1, 2]),
        (2.0, (1, 2, 3), [2, 2, 2, 2]),
        (2.7, (1, 2, 3), [2, 3, 2, 3]),  # 1.6 of a third layer: left
        (3.0, (1, 2, 3), [3, 3, 3, 3]),
    ],
)
def test_block_scores_widen_the_layers_that_change_most(
    target: float, widths: tuple[int, ...], given: list[int]
) -> None:
    cost = by_layer(0.2, 0.9, 0.1, 0.5)[:, : len(widths)]
    budget = Budget(int(target * 32), layers=[8] * 4)
    found = widen_whole_layers(cost, widths, budget).reshape(4, 8)
    assert found.tolist() == [[width] * 8 for width in given]


def test_block_scores_tell_layers_of_equal_score_apart() -> None:
    cost = by_layer(0.5, 0.5, 0.1, 0.05)[:, :2]
    found = widen_whole_layers(cost, (2, 4), Budget(80, layers=[8] * 4)).reshape(4, 8)
    assert found.tolist() == [[width] * 8 for width in (4, 2, 2, 2)]


def test_bits_that_a_layer_is_too_large_for_go_to_the_next_that_is_not() -> None:
    cost = np.repeat([0.9, 0.1, 0.5, 0.2], [8, 2, 4, 4])[:, None] * np.ones(2)
    found = widen_whole_layers(cost, (2, 4), Budget(2 * 18 + 13, layers=[8, 2, 4, 4]))
    assert found.tolist() == [*[2] * 8, *[4] * 2, *[4] * 4, *[2] * 4]


def test_block_scores_refuse_an_exact_budget_that_whole_layers_cannot_meet() -> None:
    budget = Budget(36, "exact", layers=[8, 8])
    with pytest.raises(InfeasibleBudget, match="whole layers of 2 or 3 bits"):
        widen_whole_layers(by_layer(0.2, 0.9), (1, 2, 3), budget)


def test_hessian_and_block_score_costs_need_their_statistics() -> None:
    for name in ("hessian", "block_score_predictor", "block_score_oracle"):
        with pytest.raises(InputError, match="the cost needs"):
            ALLOCATORS[name].cost(factors(), PMQ, np.random.default_rng(0))


def test_random_spends_the_whole_budget_and_depends_on_its_costs_alone() -> None:
    draws = [np.random.default_rng(seed).random((8, 3)) for seed in (0, 0, 1)]
    budget = Budget(20, at_least={3: 1})
    one, again, other = (spend_all(d, (1, 2, 3), budget).tolist() for d in draws)
    assert one == again != other
    assert sum(one) == sum(other) == 20


def test_pmq_is_better_by_its_own_cost_than_any_baseline() -> None:
    rng = np.random.default_rng(3)
    given = Factors((1, 2, 3), rng.random(8), rng.random(8), rng.random((8, 1)) * [[1.0, 0.4, 0.1]])
    cost = allocation_cost(given, PMQ)

    def paid(found: np.ndarray) -> float:
        return float(cost[np.arange(8), found - 1].sum())

    best = paid(solve_bit_allocation(cost, (1, 2, 3), 16))
    for allocator in (a for a in ALLOCATORS.values() if a.needs in (None, "quant_error")):
        own = allocator.cost(given, PMQ, np.random.default_rng(0))
        assert best <= paid(allocator.spend(own, (1, 2, 3), Budget(16))) + 1e-15

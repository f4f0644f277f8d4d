"""The allocation solver against all assignments, compared as fractions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.allocation import InfeasibleBudget, check_budget, solve_bit_allocation
from mcsharp_sdk.allocation.solver import BudgetRule, feasible_totals
from mcsharp_sdk.errors import InputError

RULES = st.sampled_from(["at_most", "exact"])
WIDE = st.floats(min_value=-12, max_value=12).map(lambda power: 10.0**power)
TIED = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, 1.0 + 2**-52, 1e12])
ANY_FLOAT = st.floats(min_value=0, allow_infinity=False, allow_nan=False)


def assignments(
    experts: int, widths: Sequence[int], budget: int, rule: BudgetRule, at_least: Mapping[int, int]
) -> Iterator[tuple[int, ...]]:
    for chosen in itertools.product(widths, repeat=experts):
        total = sum(chosen)
        enough = all(chosen.count(w) >= n for w, n in at_least.items())
        if enough and (total == budget if rule == "exact" else total <= budget):
            yield chosen


def brute_force(cost: np.ndarray, widths: Sequence[int], *limits: object) -> tuple[int, ...] | None:
    """Least exact cost, then bits, then bits at high indices, then widest first; None if none."""

    def rank(chosen: tuple[int, ...]) -> tuple[object, ...]:
        paid = sum(Fraction(float(row[widths.index(w)])) for row, w in zip(cost, chosen))  # noqa: B905
        at_high_indices = sum(e * w for e, w in enumerate(chosen))
        return paid, sum(chosen), at_high_indices, tuple(-w for w in chosen)

    return min(assignments(len(cost), widths, *limits), key=rank, default=None)  # type: ignore[arg-type]


@st.composite
def programs(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int, dict[int, int]]:
    experts = draw(st.integers(1, 5))
    widths = draw(
        st.sampled_from([[1, 2, 3], [2], [1, 3], [2, 4], [1, 2, 3, 4], [2, 3, 6], [0, 1, 2, 3]])
    )
    values = draw(st.sampled_from([WIDE, TIED, ANY_FLOAT, st.just(0.0)]))
    cell = st.lists(values, min_size=len(widths), max_size=len(widths))
    cost = np.array(draw(st.lists(cell, min_size=experts, max_size=experts)))
    required = st.sampled_from([*widths, 5])  # none has 5: only 0 experts can
    at_least = draw(st.dictionaries(required, st.integers(0, 2), max_size=2))
    budget = draw(st.integers(widths[0] * experts - 1, widths[-1] * experts + 1))
    return cost, widths, budget, at_least


@settings(max_examples=50, deadline=None)
@given(programs(), RULES)
def test_solver_equals_brute_force_for_any_budget_and_cost(
    program: tuple[np.ndarray, list[int], int, dict[int, int]], rule: BudgetRule
) -> None:
    cost, widths, budget, at_least = program
    best = brute_force(cost, widths, budget, rule, at_least)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve_bit_allocation(cost, widths, budget, budget_rule=rule, at_least=at_least)
    else:
        found = solve_bit_allocation(cost, widths, budget, budget_rule=rule, at_least=at_least)
        assert tuple(found.tolist()) == best


@pytest.mark.parametrize("rule", ["at_most", "exact"])
@pytest.mark.parametrize("budget", range(11, 24))
def test_every_budget_of_eight_experts_equals_brute_force(rule: BudgetRule, budget: int) -> None:
    cost = 10.0 ** np.random.default_rng(budget).uniform(-12, 12, size=(8, 3))
    limits = (budget, rule, {3: 1, 2: 1})
    found = solve_bit_allocation(cost, [1, 2, 3], budget, budget_rule=rule, at_least=limits[2])
    assert tuple(found.tolist()) == brute_force(cost, [1, 2, 3], *limits)


def test_a_difference_in_the_last_digit_of_a_small_cost_decides_beside_a_huge_one() -> None:
    small = 1e-12
    cost = np.array([[1e12, 1e12], [small, 0.0], [np.nextafter(small, 1), 0.0]])
    assert solve_bit_allocation(cost, [1, 2], 4).tolist() == [1, 1, 2]


def test_ties_use_few_bits_and_widen_the_lower_expert() -> None:
    equal = np.array([[2.0, 1.0, 1.0]] * 4)
    assert solve_bit_allocation(equal, [1, 2, 3], 10).tolist() == [2, 2, 2, 2]
    assert solve_bit_allocation(equal, [1, 2, 3], 6).tolist() == [2, 2, 1, 1]
    required = solve_bit_allocation(np.zeros((4, 3)), [1, 2, 3], 9, at_least={3: 1, 2: 1})
    assert required.tolist() == [3, 2, 1, 1]


def dynamic_program(cost: np.ndarray, widths: Sequence[int], budget: int) -> float:
    """Least cost of using exactly 0 .. budget bits, one expert after the other."""
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for row in cost:
        after = np.full(budget + 1, np.inf)
        for value, width in zip(row, widths, strict=True):
            after[width:] = np.minimum(after[width:], best[: budget + 1 - width] + value)
        best = after
    return float(best.min())


@pytest.mark.parametrize("shape", ["falling", "scattered", "tied"])
def test_256_experts_are_solved_at_once_and_as_well_as_by_dynamic_programming(shape: str) -> None:
    rng = np.random.default_rng(0)
    cost = {
        "falling": np.exp(2 * rng.normal(size=(256, 1)) + 0.2 * rng.normal(size=(256, 3)))
        * np.array([1.0, 0.25, 0.06]),
        "scattered": 10.0 ** rng.uniform(-12, 12, size=(256, 3)),
        "tied": rng.integers(0, 5, size=(256, 3)).astype(float),
    }[shape]
    solve_bit_allocation(cost[:8], [1, 2, 3], 16)  # imports CP-SAT
    started = time.perf_counter()
    found = solve_bit_allocation(cost, [1, 2, 3], 480, at_least={3: 1, 2: 1})
    assert time.perf_counter() - started < 5
    paid = cost[np.arange(256), found - 1].sum()
    assert paid == pytest.approx(dynamic_program(cost, [1, 2, 3], 480), rel=1e-12)


def test_required_widths_that_nobody_wants_are_given_where_they_cost_least() -> None:
    rng = np.random.default_rng(1)
    importance = rng.uniform(1, 2, size=(64, 1))
    cost = importance * np.array([1.0, 0.25, 0.2])
    found = solve_bit_allocation(cost, [1, 2, 3], 80, at_least={3: 4})
    # A 3-bit expert takes the place of two 2-bit ones: 4 of 3 bits leave 8 upgrades to 2 bits.
    ranked = np.argsort(-importance[:, 0])
    assert sorted(np.flatnonzero(found == 3)) == sorted(ranked[:4])
    assert sorted(np.flatnonzero(found == 2)) == sorted(ranked[4:12])


@given(
    st.integers(1, 6),
    st.sampled_from([[1, 2, 3], [1, 3], [2, 5]]),
    st.dictionaries(st.sampled_from([1, 2]), st.integers(0, 2)),
)
@settings(max_examples=30, deadline=None)
def test_feasible_totals_are_those_of_all_assignments(
    experts: int, widths: list[int], counts: dict[int, int]
) -> None:
    at_least = {w: n for w, n in counts.items() if w in widths}
    every = assignments(experts, widths, experts * widths[-1], "at_most", at_least)
    assert feasible_totals(experts, widths, at_least) == sorted({sum(a) for a in every})


@pytest.mark.parametrize(
    ("budget", "rule", "at_least", "message"),
    [
        (10, "at_most", {3: 1, 2: 1}, "at most 10 bits; 11 to 23 bits are possible"),
        (24, "exact", {3: 1, 2: 1}, "exactly 24 bits; 11 to 23 bits are possible"),
        (9, "at_most", {3: 1, 2: 1}, "an average of 1.375 to 2.875"),
        (12, "at_most", {4: 1}, "4 is not among the widths"),
        (24, "at_most", {3: 9}, "more experts are required than there are"),
    ],
)
def test_an_impossible_budget_is_told_with_what_is_possible(
    budget: int, rule: BudgetRule, at_least: dict[int, int], message: str
) -> None:
    with pytest.raises(InfeasibleBudget, match=message) as raised:
        check_budget(8, [1, 2, 3], budget, budget_rule=rule, at_least=at_least)
    assert raised.value.exit_code == 2


def test_a_budget_in_a_gap_is_told_with_its_neighbours() -> None:
    with pytest.raises(InfeasibleBudget, match="next to 9 are 8 and 10 bits"):
        check_budget(4, [2, 4], 9, budget_rule="exact")
    assert check_budget(4, [2, 4], 9) == 8


@pytest.mark.parametrize(
    ("cost", "widths"),
    [
        ([[1.0, np.nan]], [1, 2]),
        ([[1.0, -1.0]], [1, 2]),
        ([[1.0, np.inf]], [1, 2]),
        ([[1.0]], [1, 2]),
        ([[1.0, 1.0]], [2, 1]),
        ([[1.0, 1.0]], [2, 2]),
        (np.zeros((0, 2)), [1, 2]),
        ([[1.0, 1.0]], [-1, 1]),
    ],
)
def test_wrong_costs_and_widths_are_refused(cost: list[list[float]], widths: list[int]) -> None:
    with pytest.raises(InputError):
        solve_bit_allocation(np.array(cost), widths, 10)


@pytest.mark.parametrize("rule", ["exactly", "atmost", "", None])
def test_an_unknown_budget_rule_is_refused(rule: Any) -> None:
    with pytest.raises(InputError, match="budget_rule .* is none of at_most and exact"):
        solve_bit_allocation(np.ones((4, 3)), [1, 2, 3], 8, budget_rule=rule)


@pytest.mark.parametrize("budget", [8.5, float("nan"), float("inf"), "8", None])
def test_a_budget_is_a_whole_number(budget: Any) -> None:
    with pytest.raises(InputError, match="a budget is a whole number of bits, not"):
        solve_bit_allocation(np.ones((4, 3)), [1, 2, 3], budget)


@pytest.mark.parametrize("budget", [7.0, np.int64(7), np.float32(7)])
def test_a_whole_budget_may_be_of_any_type(budget: Any) -> None:
    cost = np.array([[3.0, 2.0, 1.0]] * 4)
    assert solve_bit_allocation(cost, [1, 2, 3], budget).sum() == 7

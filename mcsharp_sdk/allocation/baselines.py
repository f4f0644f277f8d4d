"""Ways to allocate bits, by name: PMQ and what the papers compare it with.

An allocator is a cost and a way to spend the budget. All get the same budget and, but for
``uniform``, the same required widths, so that a difference between them is one of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mcsharp_sdk.allocation.significance import (
    Exponents,
    Factors,
    FloatArray,
    allocation_cost,
    shares,
)
from mcsharp_sdk.allocation.solver import (
    NONE_REQUIRED,
    BudgetRule,
    InfeasibleBudget,
    check_budget,
    solve_bit_allocation,
)

AllocatorName = Literal["pmq", "uniform", "random", "frequency", "routing_weight", "f_norm"]
CostRule = Callable[[Factors, Exponents, np.random.Generator], FloatArray]


class Spending(Protocol):
    """Turns (experts, widths) costs into one width per expert, within a budget."""

    def __call__(
        self,
        cost: NDArray[np.float64],
        widths: Sequence[int],
        budget: int,
        *,
        budget_rule: BudgetRule = "at_most",
        at_least: Mapping[int, int] = NONE_REQUIRED,
    ) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Allocator:
    """A named way to choose widths.

    Attributes
    ----------
    summary : one line for the reader.
    cost : (E, W) cost from the factors of one layer.
    spend : how widths follow from costs.
    needs_errors : whether the cost uses quantisation errors.
    keeps_required : whether the required widths (``at_least``) are met.
    """

    summary: str
    cost: CostRule
    spend: Spending = solve_bit_allocation
    needs_errors: bool = False
    keeps_required: bool = True


def error_norm_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """ε^γ: the quantisation error alone, whoever uses the expert."""
    return allocation_cost(factors, Exponents(alpha=0.0, beta=0.0, gamma=exponents.gamma))


def frequency_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """φ · 4^-b: how often it is used, times an error that falls like rounding noise."""
    return _falling(shares("activation_count", factors.activation_count), factors.widths)


def routing_weight_cost(
    factors: Factors, exponents: Exponents, rng: np.random.Generator
) -> FloatArray:
    """w · 4^-b: the same with the routing weight for the frequency."""
    return _falling(shares("routing_weight_sum", factors.routing_weight_sum), factors.widths)


def random_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """Independent uniform costs: any assignment can win, and chance alone decides."""
    return rng.random((len(factors.activation_count), len(factors.widths)))


def no_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """Zeros: nothing is known of the experts."""
    return np.zeros((len(factors.activation_count), len(factors.widths)))


def spread_evenly(
    cost: NDArray[np.float64],
    widths: Sequence[int],
    budget: int,
    *,
    budget_rule: BudgetRule = "at_most",
    at_least: Mapping[int, int] = NONE_REQUIRED,
) -> NDArray[np.int64]:
    """The same width for all, as wide as the budget allows; the costs do not matter.

    Bits that are left over give some experts the next wider width, evenly spaced by index from
    expert 0 on. ``at_least`` is not looked at: uniform 2 bits means 2 bits everywhere.

    Raises
    ------
    InfeasibleBudget
        If the narrowest width is over the budget, or ``budget_rule`` is "exact" and the leftover
        bits do not come out even.
    """
    experts = len(cost)
    most = check_budget(experts, widths, budget, budget_rule=budget_rule)
    width = max(w for w in widths if w * experts <= most)
    wider = min((w for w in widths if w > width), default=width + 1)
    upgraded = (most - width * experts) // (wider - width)
    given = np.where(np.arange(experts) * upgraded % experts < upgraded, wider, width)
    if budget_rule == "exact" and given.sum() != budget:
        raise InfeasibleBudget(
            f"{experts} experts of {width} or {wider} bits cannot use exactly {budget} bits; "
            f"{given.sum()} are the most below"
        )
    return given.astype(np.int64)


def spend_all(
    cost: NDArray[np.float64],
    widths: Sequence[int],
    budget: int,
    *,
    budget_rule: BudgetRule = "at_most",
    at_least: Mapping[int, int] = NONE_REQUIRED,
) -> NDArray[np.int64]:
    """Least cost with as many bits as the budget allows, for costs unrelated to the width."""
    most = check_budget(len(cost), widths, budget, budget_rule=budget_rule, at_least=at_least)
    return solve_bit_allocation(cost, widths, most, budget_rule="exact", at_least=at_least)


def _pmq_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    return allocation_cost(factors, exponents)


def _falling(importance: FloatArray, widths: Sequence[int]) -> FloatArray:
    return importance[:, None] * 4.0 ** -np.asarray(widths, dtype=np.float64)


ALLOCATORS: Mapping[AllocatorName, Allocator] = {
    "pmq": Allocator(
        "significance times error, φ^α · w^β · ε^γ (MC)", _pmq_cost, needs_errors=True
    ),
    "uniform": Allocator(
        "the same width for all, leftover bits spread evenly",
        no_cost,
        spread_evenly,
        keeps_required=False,
    ),
    "random": Allocator("seeded chance, the whole budget spent", random_cost, spend_all),
    "frequency": Allocator("how often the expert is selected, φ · 4^-b", frequency_cost),
    "routing_weight": Allocator("its summed routing weight, w · 4^-b", routing_weight_cost),
    "f_norm": Allocator("its quantisation error alone, ε^γ", error_norm_cost, needs_errors=True),
}

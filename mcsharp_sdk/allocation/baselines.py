"""Ways to allocate bits, by name: PMQ and what the papers compare it with.

An allocator is a cost and a way to spend the budget. All get the same budget and, but for
``uniform``, the same required widths, so that a difference between them is one of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
    BudgetRule,
    InfeasibleBudget,
    check_budget,
    solve_bit_allocation,
)
from mcsharp_sdk.errors import InputError

AllocatorName = Literal[
    "pmq",
    "uniform",
    "random",
    "frequency",
    "routing_weight",
    "f_norm",
    "hessian",
    "block_score_predictor",
    "block_score_oracle",
]
Need = Literal["quant_error", "hessian_error", "predicted_block_cosine", "block_cosine"]
"""A statistic that only some allocators need."""
CostRule = Callable[[Factors, Exponents, np.random.Generator], FloatArray]


@dataclass(frozen=True)
class Budget:
    """What the widths of some experts have to meet.

    Attributes
    ----------
    bits : of all experts together.
    rule : whether ``at_most`` or ``exact``-ly so many are used.
    at_least : width -> how many experts must have it.
    layers : how many of the experts each layer has, in order; empty if there is one layer.
    """

    bits: int
    rule: BudgetRule = "at_most"
    at_least: Mapping[int, int] = field(default_factory=dict)
    layers: Sequence[int] = ()


Spending = Callable[[FloatArray, Sequence[int], Budget], NDArray[np.int64]]
"""Turns (experts, widths) costs into one of the widths per expert, within a budget."""


def spend_best(cost: FloatArray, widths: Sequence[int], budget: Budget) -> NDArray[np.int64]:
    """Least cost, wherever the experts stand."""
    return solve_bit_allocation(
        cost, widths, budget.bits, budget_rule=budget.rule, at_least=budget.at_least
    )


@dataclass(frozen=True)
class Allocator:
    """A named way to choose widths.

    Attributes
    ----------
    summary : one line for the reader.
    cost : (E, W) cost from the factors of one layer.
    spend : how widths follow from costs.
    needs : which statistic the cost uses besides how often and how strongly experts are used.
    keeps_required : whether the required widths (``at_least``) are met.
    whole_model : it compares layers, so that there is one budget for all of them.
    blind : it looks at no statistics at all.
    """

    summary: str
    cost: CostRule
    spend: Spending = spend_best
    needs: Need | None = None
    keeps_required: bool = True
    whole_model: bool = False
    blind: bool = False

    @property
    def solves(self) -> bool:
        """Whether widths are found by the integer program."""
        return self.spend in (spend_best, spend_all)


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


def hessian_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """Ω = (Tr H / n) · ‖Q(W) − W‖², summed over the expert's matrices (HAWQ-V2, 1911.03852)."""
    if factors.hessian_error is None:
        raise InputError("the cost needs Hessian errors")
    return factors.hessian_error


def block_score_cost(
    factors: Factors, exponents: Exponents, rng: np.random.Generator
) -> FloatArray:
    """1 − cosine, at every width: how much the layer changes what goes through it."""
    if factors.block_cosine is None:
        raise InputError("the cost needs the cosine between the layer's input and output")
    score = max(1.0 - factors.block_cosine, 0.0)
    return np.full((len(factors.activation_count), len(factors.widths)), score)


def random_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """Independent uniform costs: any assignment can win, and chance alone decides."""
    return rng.random((len(factors.activation_count), len(factors.widths)))


def no_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    """Zeros: nothing is known of the experts."""
    return np.zeros((len(factors.activation_count), len(factors.widths)))


def spread_evenly(cost: FloatArray, widths: Sequence[int], budget: Budget) -> NDArray[np.int64]:
    """The same width for all, as wide as the budget allows; the costs do not matter.

    Bits that are left over give some experts the next wider width, evenly spaced by index from
    expert 0 on. What is required is not looked at: uniform 2 bits means 2 bits everywhere.

    Raises
    ------
    InfeasibleBudget
        If the narrowest width is over the budget, or its rule is "exact" and the leftover bits do
        not come out even.
    """
    experts = len(cost)
    most = check_budget(experts, widths, budget.bits, budget_rule=budget.rule)
    width = max(w for w in widths if w * experts <= most)
    wider = min((w for w in widths if w > width), default=width + 1)
    upgraded = (most - width * experts) // (wider - width)
    given = np.where(np.arange(experts) * upgraded % experts < upgraded, wider, width)
    if budget.rule == "exact" and given.sum() != budget.bits:
        raise InfeasibleBudget(
            f"{experts} experts of {width} or {wider} bits cannot use exactly {budget.bits} bits; "
            f"{given.sum()} are the most below"
        )
    return given.astype(np.int64)


def widen_whole_layers(
    cost: FloatArray, widths: Sequence[int], budget: Budget
) -> NDArray[np.int64]:
    """The same width for all experts of a layer, the wider one where the cost is higher.

    With widths 2 and 4 and a budget of 2.5 bits, a quarter of the layers has 4 bits and the rest 2,
    as in the papers. The cost is the same for all experts and widths of a layer; of equal layers
    the first is widened first. Where bits do not suffice for a layer, they go to the next one that
    they do suffice for.

    Raises
    ------
    InfeasibleBudget
        If the narrowest width is over the budget, or its rule is "exact" and bits are left.
    """
    experts = len(cost)
    most = check_budget(experts, widths, budget.bits)
    width = max(w for w in widths if w * experts <= most)
    wider = min((w for w in widths if w > width), default=width)
    given, left = np.full(experts, width, dtype=np.int64), most - width * experts
    members = np.split(np.arange(experts), np.cumsum(budget.layers)[:-1])
    for layer in sorted(members, key=lambda found: -cost[found[0], 0]):
        price = (wider - width) * len(layer)
        if price <= left:
            given[layer] = wider
            left -= price
    if budget.rule == "exact" and given.sum() != budget.bits:
        raise InfeasibleBudget(
            f"whole layers of {width} or {wider} bits cannot use exactly {budget.bits} bits; "
            f"{given.sum()} are the most below"
        )
    return given


def spend_all(cost: FloatArray, widths: Sequence[int], budget: Budget) -> NDArray[np.int64]:
    """Least cost with as many bits as the budget allows, for costs unrelated to the width."""
    required = budget.at_least
    most = check_budget(len(cost), widths, budget.bits, budget_rule=budget.rule, at_least=required)
    return solve_bit_allocation(cost, widths, most, budget_rule="exact", at_least=required)


def _pmq_cost(factors: Factors, exponents: Exponents, rng: np.random.Generator) -> FloatArray:
    return allocation_cost(factors, exponents)


def _falling(importance: FloatArray, widths: Sequence[int]) -> FloatArray:
    return importance[:, None] * 4.0 ** -np.asarray(widths, dtype=np.float64)


ALLOCATORS: Mapping[AllocatorName, Allocator] = {
    "pmq": Allocator(
        "significance times error, φ^α · w^β · ε^γ (MC)", _pmq_cost, needs="quant_error"
    ),
    "uniform": Allocator(
        "the same width for all, leftover bits spread evenly",
        no_cost,
        spread_evenly,
        keeps_required=False,
        blind=True,
    ),
    "random": Allocator(
        "seeded chance, the whole budget spent", random_cost, spend_all, blind=True
    ),
    "frequency": Allocator("how often the expert is selected, φ · 4^-b", frequency_cost),
    "routing_weight": Allocator("its summed routing weight, w · 4^-b", routing_weight_cost),
    "f_norm": Allocator("its quantisation error alone, ε^γ", error_norm_cost, needs="quant_error"),
    "hessian": Allocator(
        "mean curvature times squared change of the weights (HAWQ-V2)",
        hessian_cost,
        needs="hessian_error",
    ),
    "block_score_predictor": Allocator(
        "wide where a predictor says that a layer changes its input most",
        block_score_cost,
        widen_whole_layers,
        needs="predicted_block_cosine",
        keeps_required=False,
        whole_model=True,
    ),
    "block_score_oracle": Allocator(
        "the same by the true cosine",
        block_score_cost,
        widen_whole_layers,
        needs="block_cosine",
        keeps_required=False,
        whole_model=True,
    ),
}

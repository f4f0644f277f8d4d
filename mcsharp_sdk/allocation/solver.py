"""One width per expert, at least cost, under a budget of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mcsharp_sdk.allocation.exact_program import Program, solve_exactly
from mcsharp_sdk.errors import InputError

BudgetRule = Literal["at_most", "exact"]
NONE_REQUIRED: Mapping[int, int] = MappingProxyType({})


class InfeasibleBudget(InputError):
    """No assignment of widths meets the budget and what is required."""


def solve_bit_allocation(
    cost: NDArray[np.float64],
    widths: Sequence[int],
    budget: int,
    *,
    budget_rule: BudgetRule = "at_most",
    at_least: Mapping[int, int] = NONE_REQUIRED,
) -> NDArray[np.int64]:
    """Give each expert one bit width so that the summed cost is least (MC, 2410.06270, Eq. 4).

    The optimum is exact: costs are compared as the rational numbers that the floats are, without
    rounding, whatever their range. The result does not depend on the machine.

    Parameters
    ----------
    cost : (experts, widths) float64, finite, >= 0
        Cost of quantising expert ``e`` at ``widths[j]`` bits, any unit.
    widths : candidate bit widths, ascending; 0 stands for an expert that is removed.
    budget : total bits of all experts.
    budget_rule : whether the solution uses ``at_most`` the budget or ``exact``-ly that many bits.
    at_least : width -> how many experts must have it.

    Returns
    -------
    (experts,) int64, the width of each expert. Ties go to the fewest bits, then to the lower expert
    index: of the assignments with the least cost and bits, the one with the least Σ index · width,
    and of these the one with the wider width at the first expert where they differ.

    Raises
    ------
    InfeasibleBudget
        If no assignment meets the budget and ``at_least``; the message gives the feasible range.
    InputError
        If ``cost``, ``widths``, ``budget`` or ``budget_rule`` are not as described.
    RunError
        If CP-SAT does not prove the optimum.
    """
    cost = np.asarray(cost, dtype=np.float64)
    _check_shape(cost, widths)
    budget = _whole(budget)
    check_budget(len(cost), widths, budget, budget_rule=budget_rule, at_least=at_least)
    required = {width: count for width, count in at_least.items() if count}
    program = Program(tuple(widths), budget, budget_rule == "exact", required)
    chosen = solve_exactly(cost, program)
    return np.asarray(widths, dtype=np.int64)[chosen]


def check_budget(
    experts: int,
    widths: Sequence[int],
    budget: int,
    *,
    budget_rule: BudgetRule = "at_most",
    at_least: Mapping[int, int] = NONE_REQUIRED,
) -> int:
    """Largest number of bits that an assignment within the budget can use.

    Raises
    ------
    InfeasibleBudget
        If there is none; the message gives the feasible range.
    InputError
        If there is no such rule.
    """
    if budget_rule not in get_args(BudgetRule):
        raise InputError(f"budget_rule {budget_rule!r} is none of {_listed(get_args(BudgetRule))}")
    what = f"{experts} experts of {_listed(widths, 'or')} bits"
    required = {width: count for width, count in at_least.items() if count}
    if required:
        what += " with at least " + _listed([f"{n} of {w} bits" for w, n in required.items()])
    stray = [w for w in required if w not in widths]
    if stray:
        raise InfeasibleBudget(f"{what}: {_listed(stray)} is not among the widths")
    totals = feasible_totals(experts, widths, required)
    if not totals:
        raise InfeasibleBudget(f"{what}: more experts are required than there are")
    within = [t for t in totals if t <= budget]
    if within and (budget_rule == "at_most" or within[-1] == budget):
        return within[-1]
    least, most = totals[0], totals[-1]
    message = (
        f"{what} cannot use {budget_rule.replace('_', ' ').replace('exact', 'exactly')} "
        f"{budget} bits; {least} to {most} bits are possible, "
        f"an average of {least / experts:.6g} to {most / experts:.6g}"
    )
    if least < budget < most:
        above = next(t for t in totals if t > budget)
        message += f"; next to {budget} are {within[-1]} and {above} bits"
    raise InfeasibleBudget(message)


def feasible_totals(experts: int, widths: Sequence[int], at_least: Mapping[int, int]) -> list[int]:
    """Every number of bits, ascending, that some assignment with ``at_least`` uses."""
    # A set of totals is kept as the set bits of one integer.
    free = experts - sum(at_least.values())
    if free < 0:
        return []
    totals = 1 << sum(width * count for width, count in at_least.items())
    for _ in range(free):
        totals = reduce(or_, (totals << width for width in widths))
    return [total for total in range(totals.bit_length()) if totals >> total & 1]


def _check_shape(cost: NDArray[np.float64], widths: Sequence[int]) -> None:
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 0:
        raise InputError(f"widths {list(widths)} must be ascending, different and not negative")
    if cost.ndim != 2 or cost.shape[1] != len(widths) or not len(cost):
        raise InputError(f"cost has shape {cost.shape}, not (experts, {len(widths)})")
    if not (np.isfinite(cost) & (cost >= 0)).all():
        raise InputError("costs must be finite and not negative")


def _whole(budget: float) -> int:
    """The budget as a whole number, also from another kind of number."""
    whole: int | None
    try:
        whole = int(budget)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != budget:
        raise InputError(f"a budget is a whole number of bits, not {budget!r}")
    return whole


def _listed(values: Sequence[object], last: str = "and") -> str:
    words = [str(v) for v in values]
    return f" {last} ".join([w for w in (", ".join(words[:-1]), words[-1]) if w])

"""The integer program behind the allocation, solved without rounding.

Minimise Σ_e key(e, x_e) over one width x_e per expert, where the total of the widths meets a budget
and some widths are required at least so often. Three ideas make the optimum exact and quick:

1. *Integer keys.* Every float64 is an integer times a power of two, so costs become Python integers
   that lose nothing. The rule for ties is added below the last digit of the cost: then no two
   assignments have the same key, and the optimum is one.
2. *Prices.* With a price λ >= 0 per bit of budget and a prize μ_w >= 0 per required width, the key
   of any assignment is a constant plus a sum of terms that are never negative: the excess of each
   choice over that expert's best at these prices, λ · unused bits, μ_w · surplus of width w.
   So a choice whose excess is above the value of some assignment is in no better one. Only the
   choices of small excess, the core, go to the solver (Pisinger 1995 for the multiple-choice
   knapsack); if its optimum is no more than the smallest excess left out, it is the optimum of all.
3. *Digit planes.* CP-SAT takes 64-bit numbers, the excesses have hundreds of bits. They are
   minimised from the top digits down: with N terms, the digits still unseen add up to less than N
   units of the last digit seen, so the assignments that can still win are those whose value so far
   is less than N above the least. That surplus is carried into the next, lower plane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcsharp_sdk.allocation.prices import Prices, Program, Table, excess_over_best, find_prices
from mcsharp_sdk.errors import RunError

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

OPEN_CHOICES = 24
"""Choices beyond one per expert in the first core: few enough for milliseconds."""
OBJECTIVE_BITS = 40
"""Size of one objective: CP-SAT reports bounds as floats, and proves small numbers sooner."""
ATTEMPTS = ((64, 1.0), (100_000, 20.0))
"""Digits to which prizes are found, deterministic time of one plane; first quick, then thorough."""


class Term(NamedTuple):
    """``price * variable`` of the objective, the variable being 0 .. ``most``."""

    price: int
    variable: cp_model.IntVar
    most: int


def solve_exactly(cost: NDArray[np.float64], program: Program) -> list[int]:
    """Index of the best width of each expert; the program must have a solution.

    Parameters
    ----------
    cost : (experts, widths) float64, finite, >= 0.

    Raises
    ------
    RunError
        If CP-SAT stops without a proof.
    """
    keys = _unique_keys(_exact_integers(cost), program.widths)
    for digits, effort in ATTEMPTS:
        try:
            return _solve_priced(keys, find_prices(keys, program, digits), program, effort)
        except _GaveUp:
            continue
    raise RunError("no bit allocation could be proved to be the best; require fewer widths")


class _GaveUp(Exception):
    """CP-SAT reached its limit before it had a proof."""


def _solve_priced(keys: Table, prices: Prices, program: Program, effort: float) -> list[int]:
    """Solve for a small core, and for larger ones until nothing outside can be better."""
    excess = excess_over_best(keys, prices, program)
    ranked = sorted(value for row in excess for value in row)
    open_choices = OPEN_CHOICES
    limit = _smallest(ranked, len(excess) + open_choices)
    while True:
        chosen = _solve_core(excess, limit, prices, program, effort)
        if chosen is not None:
            value = _value(chosen, excess, prices, program)
            if value <= limit or limit == ranked[-1]:
                return chosen
            limit = value
        elif limit == ranked[-1]:
            raise RunError("the bit allocation has no solution")
        else:
            open_choices *= 2
            limit = _smallest(ranked, len(excess) + open_choices)


def _smallest(ranked: list[int], count: int) -> int:
    """Largest of the ``count`` smallest values."""
    return ranked[min(count, len(ranked)) - 1]


def _exact_integers(cost: NDArray[np.float64]) -> Table:
    """Costs in units of one common power of two, as integers without loss."""
    mantissa, exponent = np.frexp(cost)
    digits = (mantissa * 2.0**53).astype(np.int64)
    lowest = int(exponent[cost > 0].min()) if (cost > 0).any() else 0
    return [
        [int(d) << max(int(e) - lowest, 0) for d, e in zip(digit_row, exponent_row, strict=True)]
        for digit_row, exponent_row in zip(digits, exponent, strict=True)
    ]


def _unique_keys(cost: Table, widths: tuple[int, ...]) -> Table:
    """Cost, then total bits, then Σ index · bits, then the order from expert 0 on, in one integer.

    The last makes keys unique; the one before it keeps the core small where costs are tied. All
    keys are multiples of the least common multiple of the differences between widths, so that key
    per bit is a whole number.
    """
    experts, choices = len(cost), len(widths)
    order_unit = math.lcm(*(b - a for a in widths for b in widths if b > a))
    index_unit = order_unit * choices**experts
    bits_unit = index_unit * (1 + widths[-1] * experts * (experts - 1) // 2)
    cost_unit = bits_unit * (1 + widths[-1] * experts)
    return [
        [
            value * cost_unit
            + width * bits_unit
            + expert * width * index_unit
            + (choices - 1 - j) * choices ** (experts - 1 - expert) * order_unit
            for j, (value, width) in enumerate(zip(row, widths, strict=True))
        ]
        for expert, row in enumerate(cost)
    ]


def _value(chosen: list[int], excess: Table, prices: Prices, program: Program) -> int:
    """Key of an assignment above the constant: excess, priced unused bits and surplus widths."""
    given = [program.widths[j] for j in chosen]
    value = sum(row[j] for row, j in zip(excess, chosen, strict=True))
    value += prices.bit * (program.budget - sum(given))
    return value + sum(
        prices.width[w] * (given.count(w) - count) for w, count in program.at_least.items()
    )


def _solve_core(
    excess: Table, limit: int, prices: Prices, program: Program, effort: float
) -> list[int] | None:
    """Best assignment among the choices of at most ``limit`` excess; None if there is none."""
    from ortools.sat.python import cp_model  # here, because it takes half a second to import

    core = [[j for j, value in enumerate(row) if value <= limit] for row in excess]
    model = cp_model.CpModel()
    picks = {
        (e, j): model.new_bool_var(f"expert {e} at {program.widths[j]}")
        for e, row in enumerate(core)
        for j in row
        if len(row) > 1
    }
    terms = [Term(excess[e][j], variable, 1) for (e, j), variable in picks.items()]
    for e, row in enumerate(core):
        if len(row) > 1:
            model.add_exactly_one(picks[e, j] for j in row)
    terms += _constrain(model, core, picks, prices, program)
    solver = _minimise(model, terms, effort)
    if solver is None:
        return None
    return [
        next(j for j in row if len(row) == 1 or solver.boolean_value(picks[e, j]))
        for e, row in enumerate(core)
    ]


def _constrain(
    model: cp_model.CpModel,
    core: Table,
    picks: Mapping[tuple[int, int], cp_model.IntVar],
    prices: Prices,
    program: Program,
) -> list[Term]:
    """Add budget and required widths to the model; the terms that price what is left over."""
    settled = [program.widths[row[0]] for row in core if len(row) == 1]
    left = program.budget - sum(settled)
    most = 0 if program.exact else max(left, 0)
    unused = model.new_int_var(0, most, "unused bits")
    model.add(sum(program.widths[j] * v for (_, j), v in picks.items()) + unused == left)
    terms = [] if program.exact else [Term(prices.bit, unused, most)]
    for width, count in program.at_least.items():
        takers = [v for (_, j), v in picks.items() if program.widths[j] == width]
        most = max(len(takers) + settled.count(width) - count, 0)
        surplus = model.new_int_var(0, most, f"surplus of {width}")
        model.add(sum(takers) + settled.count(width) == count + surplus)
        terms.append(Term(prices.width[width], surplus, most))
    return terms


def _minimise(
    model: cp_model.CpModel, terms: list[Term], effort: float
) -> cp_model.CpSolver | None:
    """Least Σ price · variable, exactly, plane by plane; None if the model has no solution."""
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    # Its own handler would leave Ctrl-C killing the process at once, for the rest of the run.
    solver.parameters.catch_sigint_signal = False
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.absolute_gap_limit = 0
    solver.parameters.max_deterministic_time = effort
    units = sum(term.most for term in terms)
    unseen = max((term.price.bit_length() for term in terms), default=0)
    plane = OBJECTIVE_BITS - units.bit_length() - 1
    objective: Any = 0
    carry: cp_model.IntVar | None = None
    while True:
        step = min(plane, unseen)
        unseen -= step
        digits = [(term.price >> unseen) & ((1 << step) - 1) for term in terms]
        objective = sum(d * t.variable for d, t in zip(digits, terms, strict=True))
        if carry is not None:
            objective += carry * (1 << step)
        model.minimize(objective)
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return None
        if status != cp_model.OPTIMAL:
            raise _GaveUp(solver.status_name(status))
        least = solver.value(objective)
        if round(solver.best_objective_bound) != least:
            raise RunError(f"CP-SAT proved {solver.best_objective_bound:.0f}, but found {least}")
        if unseen == 0:
            return solver
        model.clear_hints()
        for term in terms:
            model.add_hint(term.variable, solver.value(term.variable))
        carry = model.new_int_var(0, units, "carry")
        model.add(objective == least + carry)

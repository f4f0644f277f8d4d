"""Multipliers of an allocation's budget and required widths, from its linear relaxation.

At good prices nearly every expert's choice in the best assignment is its cheapest, so that few
choices are left to search (Pisinger 1995, for the multiple-choice knapsack).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Table = list[list[int]]
"""Per expert, an integer for each width."""

PRICE_ROUNDS = 2
"""Rounds over the prizes where there are several."""


@dataclass(frozen=True)
class Program:
    """Candidate widths, ascending; bits to use; width -> experts that must have it."""

    widths: tuple[int, ...]
    budget: int
    exact: bool
    at_least: Mapping[int, int]


class Prices(NamedTuple):
    """Multipliers of the budget (per bit) and of the required widths (per expert)."""

    bit: int
    width: dict[int, int]


def find_prices(keys: Table, program: Program, digits: int) -> Prices:
    """Good multipliers; any would be right, these leave a small core.

    Parameters
    ----------
    keys : per expert, what each width costs.
    program : budget and required widths.
    digits : binary digits to which prizes are found.
    """
    prizes = dict.fromkeys(program.at_least, 0)
    for _ in range(PRICE_ROUNDS if len(prizes) > 1 else 1):
        for width in prizes:
            prizes[width] = _prize(width, prizes, keys, program, digits)
    return _with_prizes(prizes, keys, program)


def _prize(
    width: int, prizes: Mapping[int, int], keys: Table, program: Program, digits: int
) -> int:
    """Least prize, to some digits, at which as many experts take ``width`` as are required."""
    j = program.widths.index(width)

    def enough(prize: int) -> bool:
        prices = _with_prizes({**prizes, width: prize}, keys, program)
        takers = sum(row[j] == 0 for row in excess_over_best(keys, prices, program))
        return takers >= program.at_least[width]

    if enough(0):
        return 0
    low, high = 0, 1
    ceiling = 2 * len(keys) * max(map(max, keys))
    while high < ceiling and not enough(high):
        low, high = high, high << 8
    while high - low > max(1, high >> digits):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _with_prizes(prizes: Mapping[int, int], keys: Table, program: Program) -> Prices:
    """These prizes and the price per bit that goes with them."""
    offsets = [prizes.get(w, 0) for w in program.widths]
    rewarded = [[key - o for key, o in zip(row, offsets, strict=True)] for row in keys]
    return Prices(_price_of_bit(rewarded, program), dict(prizes))


def _price_of_bit(keys: Table, program: Program) -> int:
    """Dual of the budget in the linear relaxation: key saved per bit by the last upgrade bought."""
    used, upgrades = 0, []
    for row in keys:
        hull = _lower_hull(row, program.widths)
        used += hull[0][0]
        for (width, key), (wider, lower) in itertools.pairwise(hull):
            upgrades.append(((key - lower) // (wider - width), wider - width))
    upgrades.sort(reverse=True)
    for saved, bits in upgrades:
        used += bits
        if used > program.budget:
            return saved if program.exact else max(saved, 0)
    return upgrades[-1][0] if program.exact and upgrades else 0


def _lower_hull(row: list[int], widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width, key) corners of the lower convex hull of one expert's keys."""
    hull: list[tuple[int, int]] = []
    for w, k in zip(widths, row, strict=True):
        while len(hull) > 1:
            (w0, k0), (w1, k1) = hull[-2:]
            if (k1 - k0) * (w - w1) < (k - k1) * (w1 - w0):
                break
            hull.pop()
        hull.append((w, k))
    return hull


def excess_over_best(keys: Table, prices: Prices, program: Program) -> Table:
    """What each choice costs above the expert's best choice at these prices."""
    offsets = [w * prices.bit - prices.width.get(w, 0) for w in program.widths]
    priced = [[key + o for key, o in zip(row, offsets, strict=True)] for row in keys]
    return [[value - min(row) for value in row] for row in priced]

"""What a width of 0 bits, an expert removed, would save in each layer.

    python benchmarks/zero_bits.py STATISTICS.json … [--budgets 2.5 2.0 1.5]

STATISTICS is a file that ExpertStats wrote. Printed is the least sum of squared errors under a
budget of bits per layer with widths of 0 to 3, over that with 1 to 3, which PMQ chooses from. An
expert of 0 bits costs the square of its drop error: its output is missing, its weight as well, so
this is the routed mass that would be lost. Errors are taken to add up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from method_runs import markdown, mean_and_spread
from widths_per_matrix import least_error

from mcsharp_sdk.artifacts import ExpertStatistics, LayerStatistics

WIDTHS = (1, 2, 3)


def costs_of(layer: LayerStatistics) -> list[dict[int, float]]:
    """For each expert, width -> squared error; 0 bits stand for its removal."""
    if layer.drop_error is None:
        raise SystemExit(f"layer {layer.layer}: the statistics have no drop_error")
    errors = layer.errors_at(WIDTHS)
    return [
        {0: float(drop) ** 2, **{w: float(e) ** 2 for w, e in zip(WIDTHS, own, strict=True)}}
        for drop, own in zip(layer.drop_error, errors, strict=True)
    ]


def ratio(costs: Sequence[dict[int, float]], bits: float) -> float:
    """Least error with 0 to 3 bits by that with 1 to 3."""
    sizes, budget = [1] * len(costs), int(bits * len(costs))
    usual = [{w: cost[w] for w in WIDTHS} for cost in costs]
    return least_error(costs, sizes, budget) / least_error(usual, sizes, budget)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("statistics", type=Path, nargs="+")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 2.0, 1.5])
    given = parser.parse_args()
    rows = []
    for file in given.statistics:
        layers = [costs_of(layer) for layer in ExpertStatistics.load(file).layers]
        for budget in given.budgets:
            found = [ratio(layer, budget) for layer in layers]
            felt = sum(one < 0.99 for one in found)
            rows.append(
                [file.stem, f"{budget:g}", mean_and_spread(found), f"{felt} of {len(found)}"]
            )
    print(markdown(["statistics", "bits", "error, mean (range)", "layers with 1 % less"], rows))


if __name__ == "__main__":
    main()

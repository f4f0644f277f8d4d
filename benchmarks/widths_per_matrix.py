"""What widths per matrix, and a width of 4 bits, would save in a layer's experts.

    python benchmarks/widths_per_matrix.py MODEL CALIBRATION.txt [--layers 12 24] \\
        [--budgets 2.5 2.0 1.5]

Printed is the least sum of errors under a budget, with widths of 1 to 4 bits per expert, of 1 to 3
and of 1 to 4 per matrix, over that of 1 to 3 bits per expert, which PMQ chooses from. A matrix's
error is the squared one of its expert's weighted output on the calibration text, with that matrix
alone quantised; errors are taken to add up. Each layer gets its inputs from the original model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence

import torch
from layer_experts import Expert, add_arguments, gated, read_arguments, read_layers
from method_runs import markdown
from one_layer import quantised

from mcsharp_sdk.quantization import GridSettings, dequantise


def least_error(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: int) -> float:
    """Least sum of one cost each, width × size summing to at most ``budget``; by all budgets."""
    best = {0: 0.0}
    for cost, size in zip(costs, sizes, strict=True):
        grown: dict[int, float] = {}
        for spent, total in best.items():
            for width, more in cost.items():
                now = spent + width * size
                if now <= budget and total + more < grown.get(now, math.inf):
                    grown[now] = total + more
        best = grown
    return min(best.values())


def matrix_costs(expert: Expert, grid: GridSettings) -> list[dict[int, float]]:
    """Width -> squared error of the output on the calibration text if one matrix has it."""
    own, tokens = expert.matrices, expert.calibration
    wanted = expert.output(own, tokens)
    inputs = (tokens.hidden, gated(tokens.hidden, own[0]))
    found: list[dict[int, float]] = []
    for position in range(2):
        costs = {}
        for bits in (1, 2, 3, 4):
            q = quantised(own[position], inputs[position], bits, grid, 1.0, None)
            changed = dequantise(q, torch.float32)
            both = (changed, own[1]) if position == 0 else (own[0], changed)
            costs[bits] = float((expert.output(both, tokens) - wanted).square().sum())
        found.append(costs)
    return found


def saved_by_widths(costs: Sequence[Sequence[dict[int, float]]], bits: float) -> list[float]:
    """Least error with 1 to 4 bits per expert, 1 to 3 and 1 to 4 per matrix, by that of 1 to 3."""
    budget, narrow = int(bits * len(costs)) * 3, (1, 2, 3)
    experts = [{b: sum(c[b] for c in both) for b in both[0]} for both in costs]
    matrices = [cost for both in costs for cost in both]

    def least(
        each: Sequence[dict[int, float]], sizes: Sequence[int], widths: Sequence[int]
    ) -> float:
        return least_error([{b: c[b] for b in widths} for c in each], sizes, budget)

    whole, parts = [3] * len(experts), [2, 1] * len(experts)
    usual, all_widths = least(experts, whole, narrow), (1, 2, 3, 4)
    others = (
        least(experts, whole, all_widths),
        least(matrices, parts, narrow),
        least(matrices, parts, all_widths),
    )
    return [other / usual for other in others]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 2.0, 1.5])
    given = parser.parse_args()
    source, windows = read_arguments(given)
    grid, rows = GridSettings(given.group_size), []
    for index, experts in read_layers(source, windows, given.layers):
        costs = [matrix_costs(expert, grid) for expert in experts]
        for budget in given.budgets:
            ratios = saved_by_widths(costs, budget)
            rows.append([str(index), f"{budget:g}", *(f"{ratio:.3f}" for ratio in ratios)])
    head = ["layer", "bits", "1 to 4 per expert", "1 to 3 per matrix", "1 to 4 per matrix"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()

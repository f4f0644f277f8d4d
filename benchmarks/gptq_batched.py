"""How much faster is GPTQ over all experts of a layer than a loop over its matrices?

Both use the same grid search and settings on the same generated layer, in turns in one process, so
the ratio holds on a busy machine; the seconds do not.

    python benchmarks/gptq_batched.py [--experts 8 --hidden 576 --intermediate 1536 --rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mcsharp_sdk.quantization import GridSettings, factorise, quantise_gptq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "quantization"))
from textbook_gptq import textbook_gptq

DAMPING = 0.05


def generated_layer(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights [E, R, K] and Hessians [E, K, K] of correlated inputs."""
    weights = torch.randn(experts, rows, columns) * 0.02
    mix = torch.eye(columns) + torch.randn(columns, columns) * 0.05
    inputs = torch.randn(experts, 2 * columns, columns) @ mix
    return weights, 2 * inputs.transpose(1, 2) @ inputs


def batched(weights: Tensor, hessians: Tensor, widths: list[int], grid: GridSettings) -> Tensor:
    factor = factorise(hessians, damping=DAMPING)
    return quantise_gptq(weights, factor, widths, grid).dequantise()


def per_matrix(weights: Tensor, hessians: Tensor, widths: list[int], grid: GridSettings) -> Tensor:
    return torch.stack(
        [
            textbook_gptq(weights[expert], hessians[expert], width, grid, DAMPING)
            for expert, width in enumerate(widths)
        ]
    )


def seconds(function: Callable[..., Tensor], *arguments: object) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def relative_error(weights: Tensor, result: Tensor, hessians: Tensor) -> float:
    change = weights - result
    return float(((change @ hessians) * change).sum() / ((weights @ hessians) * weights).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    grid = GridSettings(group_size=options.group_size)
    widths = [1 + expert % 3 for expert in range(options.experts)]
    shapes = {
        "gate_up": (2 * options.intermediate, options.hidden),
        "down": (options.hidden, options.intermediate),
    }
    print(f"{options.experts} experts, widths 1-3, {options.threads} threads")
    print(f"{'layer':8} {'loop s':>8} {'batched s':>10} {'ratio':>6} {'error loop':>11} batched")
    for name, (rows, columns) in shapes.items():
        weights, hessians = generated_layer(options.experts, rows, columns)
        loops, batches = [], []
        for _ in range(options.rounds):
            spent, one = seconds(per_matrix, weights, hessians, widths, grid)
            loops.append(spent)
            spent, all_ = seconds(batched, weights, hessians, widths, grid)
            batches.append(spent)
        ratio = statistics.median(a / b for a, b in zip(loops, batches, strict=True))
        errors = [relative_error(weights, result, hessians) for result in (one, all_)]
        print(
            f"{name:8} {min(loops):8.2f} {min(batches):10.2f} {ratio:6.2f} "
            f"{errors[0]:11.5f} {errors[1]:.5f}"
        )


if __name__ == "__main__":
    main()

"""How long does GPTQ take for the experts of a layer on a GPU, and where does the time go?

Hessians in fp32 and in TF32, their factors, and the columns with one launch per block against one
launch per operation, all in one process, beside the time that the Hessians take at the speed of one
large matmul.

    python benchmarks/gpu_gptq.py [--shape mixtral-8x7b --tokens 32768 --experts 2]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from gpu_timing import SHAPES, leave_without_gpu, matmul_flops_per_second, milliseconds
from torch import Tensor

from mcsharp_sdk.quantization import GridSettings, accumulate, factorise, gptq, quantise_gptq

ROUNDS = 3


def hessians_of(inputs: list[Tensor], precision: str) -> Tensor:
    """One Hessian per expert, [E, K, K], in the given precision of products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    columns = inputs[0].shape[-1]
    hessians = torch.zeros(len(inputs), columns, columns, device=inputs[0].device)
    for hessian, x in zip(hessians, inputs, strict=True):
        accumulate(hessian, x)
    torch.set_float32_matmul_precision(before)
    return hessians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--tokens", type=int, default=32768, help="per expert")
    parser.add_argument("--experts", type=int, default=2, help="quantised together")
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    hidden, inner, _, _ = SHAPES[options.shape]
    grid, widths = GridSettings(), [2 + expert % 2 for expert in range(options.experts)]
    print(f"{options.shape}, {options.experts} experts, {options.tokens} tokens each; ms")
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        weights = torch.randn(options.experts, rows, columns, device="cuda") * 0.02
        mix = (
            torch.eye(columns, device="cuda") + torch.randn(columns, columns, device="cuda") * 0.01
        )
        inputs = [
            (torch.randn(options.tokens, columns, device="cuda") @ mix).bfloat16()
            for _ in range(options.experts)
        ]
        hessians = hessians_of(inputs, "highest")
        factor = factorise(hessians)
        loops = {"one launch per block": gptq._column_loop}
        loops["one launch per operation"] = lambda exact: gptq._quantise_columns

        def quantise(loop: object) -> None:
            gptq._column_loop = loop  # type: ignore[assignment]
            quantise_gptq(weights, factor, widths, grid)  # noqa: B023

        spent = milliseconds(
            {
                "Hessians, fp32": lambda: hessians_of(inputs, "highest"),  # noqa: B023
                "Hessians, TF32": lambda: hessians_of(inputs, "high"),  # noqa: B023
                "factors": lambda: factorise(hessians),  # noqa: B023
                **{f"columns, {n}": partial(quantise, loop) for n, loop in loops.items()},
            },
            rounds=ROUNDS,
        )
        gptq._column_loop = loops["one launch per block"]
        work = 2 * options.experts * options.tokens * columns**2
        for precision, label in (("highest", "fp32"), ("high", "TF32")):
            rate = matmul_flops_per_second(torch.float32, precision)
            spent[f"Hessians, {label}, at one matmul's speed"] = work / rate * 1e3
        difference = hessians_of(inputs, "high") - hessians
        for what, time in spent.items():
            print(f"{name:8} {what:42} {time:10.1f}")
        print(f"{name:8} TF32 Hessians differ by {float(difference.norm() / hessians.norm()):.1e}")


if __name__ == "__main__":
    main()

"""How long does GPTQ take for the experts of a layer on a GPU, and where does the time go?

Hessians of 16-bit inputs, in fp32 and in TF32, their factors, and the columns with one launch per
block against one launch per operation, all in one process, beside the time that the Hessians take
at the speed of one large matmul. At the end, what these parts sum to for all layers and experts of
the model.

    python benchmarks/gpu_gptq.py [--shape mixtral-8x7b --tokens 65536 --experts 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from gpu_timing import (
    SHAPES,
    Shape,
    fp32_products,
    leave_without_gpu,
    matmul_flops_per_second,
    milliseconds,
)
from torch import Tensor

from mcsharp_sdk.quantization import (
    GridSettings,
    InverseFactor,
    accumulate,
    factorise,
    gptq,
    quantise_gptq,
)

ROUNDS = 1
"""Behind two runs to warm up: parts take up to seconds."""

TOKENS = 65536
"""Per expert: what 128 sequences of 2048 give Mixtral's on average."""

PRECISIONS = {"fp32": "highest", "TF32": "high"}
"""Name -> torch's name of how products of fp32 are computed."""

EXACT = "of 16-bit inputs"
"""As ``compress`` does them: exact products of 16-bit floats, added up in fp32."""

LOOPS = {
    "one launch per block": gptq._column_loop,
    "one launch per operation": lambda exact: gptq._quantise_columns,
}
"""Name -> what chooses how GPTQ walks the columns."""

PARTS = (f"Hessians, {EXACT}", "factors", "columns, one launch per block")
"""What quantising takes, of all that is measured."""

GOALS = {"mixtral-8x7b": 600.0}
"""Seconds in which a model should be quantised."""


def random_inputs(experts: int, tokens: int, columns: int) -> list[Tensor]:
    """Correlated inputs of each expert, [T, K] bf16."""
    mix = torch.eye(columns, device="cuda") + torch.randn(columns, columns, device="cuda") * 0.01
    return [(torch.randn(tokens, columns, device="cuda") @ mix).bfloat16() for _ in range(experts)]


def hessians_of(inputs: list[Tensor], precision: str) -> Tensor:
    """One Hessian per expert, [E, K, K], with products in the given precision."""
    columns = inputs[0].shape[-1]
    hessians = torch.zeros(len(inputs), columns, columns, device=inputs[0].device)
    with fp32_products(PRECISIONS.get(precision, "highest")):
        for hessian, x in zip(hessians, inputs, strict=True):
            accumulate(hessian, x if precision == EXACT else x.float())
    return hessians


def quantise(weights: Tensor, factor: InverseFactor, loop: str) -> None:
    """Grids and codes of matrices [E, R, K] at 2 and 3 bits in turn."""
    widths = [2 + expert % 2 for expert in range(len(weights))]
    before = gptq._column_loop
    gptq._column_loop = LOOPS[loop]
    try:
        quantise_gptq(weights, factor, widths, GridSettings())
    finally:
        gptq._column_loop = before


def measure(weights: Tensor, inputs: list[Tensor]) -> dict[str, float]:
    """Part of GPTQ -> its ms, for matrices [E, R, K] of experts with these inputs."""
    hessians = hessians_of(inputs, "fp32")
    factor = factorise(hessians)
    parts: dict[str, Callable[[], object]] = {
        f"Hessians, {name}": partial(hessians_of, inputs, name) for name in (EXACT, *PRECISIONS)
    }
    parts["factors"] = partial(factorise, hessians)
    parts |= {f"columns, {loop}": partial(quantise, weights, factor, loop) for loop in LOOPS}
    spent = milliseconds(parts, rounds=ROUNDS)
    operations = 2 * sum(len(x) * x.shape[-1] ** 2 for x in inputs)
    rate = matmul_flops_per_second(torch.bfloat16)
    spent[f"Hessians, {EXACT}, at one matmul's speed"] = operations / rate * 1e3
    for name, precision in PRECISIONS.items():
        rate = matmul_flops_per_second(torch.float32, precision)
        spent[f"Hessians, {name}, at one matmul's speed"] = operations / rate * 1e3
    return spent


def difference(inputs: list[Tensor], precision: str) -> float:
    """Of the Hessians in a precision from those in fp32, as a part of these."""
    hessians = hessians_of(inputs, "fp32")
    return float((hessians_of(inputs, precision) - hessians).norm() / hessians.norm())


def model_seconds(
    spent: Sequence[Mapping[str, float]], experts: int, shape: Shape
) -> dict[str, float]:
    """What a model's experts take, by what some experts of one layer took.

    Parameters
    ----------
    spent : for each matrix, part -> ms for so many experts.
    experts : how many were measured together.

    Returns
    -------
    Part -> seconds for all matrices of all experts of all layers.
    """
    times = shape.layers * shape.experts / experts
    return {part: times * sum(ms[part] for ms in spent) / 1e3 for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="per expert")
    parser.add_argument("--experts", type=int, default=2, help="quantised together")
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    print(f"{options.shape}, {options.experts} experts, {options.tokens} tokens each; ms")
    spent = []
    for matrix, (rows, columns) in shape.matrices.items():
        weights = torch.randn(options.experts, rows, columns, device="cuda") * 0.02
        inputs = random_inputs(options.experts, options.tokens, columns)
        spent.append(measure(weights, inputs))
        for part, ms in spent[-1].items():
            print(f"{matrix:8} {part:42} {ms:10.1f}")
        for name in (EXACT, "TF32"):
            print(f"{matrix:8} Hessians, {name}, differ by {difference(inputs, name):.1e}")
    seconds = model_seconds(spent, options.experts, shape)
    report_model(seconds, shape, options.tokens, GOALS.get(options.shape))


def report_model(
    seconds: Mapping[str, float], shape: Shape, tokens: int, goal: float | None
) -> None:
    """Print the estimate for the whole model, and its ratio to the goal where there is one."""
    total = sum(seconds.values())
    print(
        f"estimate from one layer's parts: {shape.layers} layers x {shape.experts} experts, all "
        f"three matrices, {tokens} tokens per expert; s"
    )
    for part, time in {**seconds, "sum": total}.items():
        print(f"{part:51} {time:10.1f}")
    if goal is not None:
        print(f"{f'sum / goal of {goal:.0f} s':51} {total / goal:10.2f}")
    print("not in it: reading, attention and the experts' own passes over the tokens, writing")


if __name__ == "__main__":
    main()

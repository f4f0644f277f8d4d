"""How fast are products with packed weights on a CPU, against the dense product in bf16?

Every kernel, and onnxruntime's MatMulNBits beside them where it is installed, multiplies the same
activations by a random matrix of the shape of an expert's, in turns with the dense product in one
process. Matrices are rotated so that no cache holds them. Printed are medians over the rounds of
milliseconds, and of dense time over time ("x"). With one thread it is the thread's CPU time, so
that other programs on the machine disturb it less; with more it is the time on the wall.

    python benchmarks/cpu_kernels.py [--rows 14336 --columns 4096 --bits 1 2 3 4 --threads 1]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcsharp_sdk.kernels import KERNELS, Case, PackedMatrix, choose_kernel
from mcsharp_sdk.quantization.grid import PackedWeight, dequantise_packed, group_count
from mcsharp_sdk.quantization.packing import packed_bytes

Call = Callable[[Tensor], object]

LIBRARY = "onnxruntime"
LIBRARY_BITS = (2, 4)
"""Widths of MatMulNBits with 8-bit activations that compare like with like."""


def random_matrix(rows: int, columns: int, bits: int, group_size: int) -> PackedMatrix:
    """Random codes and zero points, scales around 0.01."""
    groups = group_count(columns, group_size)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8)

    weight = PackedWeight(
        codes(rows, packed_bytes(columns, bits)),
        (torch.rand(rows, groups) * 0.01 + 0.005).half(),
        codes(groups, packed_bytes(rows, bits)),
    )
    return PackedMatrix(weight, bits, group_size, columns)


def dense(matrix: PackedMatrix) -> Tensor:
    packed = matrix.weight
    return dequantise_packed(
        packed.qweight,
        packed.scales,
        packed.zeros,
        bits=matrix.bits,
        group_size=matrix.group_size,
        columns=matrix.columns,
        dtype=torch.bfloat16,
    )


def library_call(rows: int, columns: int, bits: int, group_size: int, threads: int) -> Call:
    """onnxruntime's product with 8-bit activations and whole-number zero points."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    groups, random = columns // group_size, np.random.default_rng(0)
    parts: dict[str, Any] = {
        "codes": random.integers(0, 256, (rows, groups, group_size * bits // 8), dtype=np.uint8),
        "scales": random.random((rows, groups), dtype=np.float32),
        "zeros": random.integers(0, 256, (rows, -(-groups * bits // 8)), dtype=np.uint8),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *parts],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=group_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(value, name) for name, value in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x.float().numpy()})


def kernel_call(name: str, matrices: list[PackedMatrix], first: int) -> Call:
    """Products with the matrices in turns, from one that no other kernel has just read."""
    turn = cycle([matrix.stack() for matrix in matrices[first:] + matrices[:first]])
    return lambda x: KERNELS[name].run(x, next(turn), [0], [len(x)])


def rotated(calls: list[Call]) -> Call:
    turn = cycle(calls)
    return lambda x: next(turn)(x)


def in_turns(calls: Mapping[str, Call], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; a first round to warm up does not count.

    The order differs by round: what comes after a dense product finds caches full of it.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            start = clock()
            calls[name](x)
            if number:
                spent[name].append(clock() - start)
    return spent


def compare(options: argparse.Namespace, bits: int, weights: list[Tensor]) -> None:
    shape = (options.rows, options.columns, bits, options.group_size)
    matrices = [random_matrix(*shape) for _ in range(options.copies)]
    one = Case(*shape, tokens=1, dtype=torch.bfloat16, device="cpu")
    fit = [name for name, kernel in KERNELS.items() if not kernel.refuses(one)]
    names = [name for name in fit if name != "chunked" or options.chunked]
    calls: dict[str, Call] = {"dense": rotated([weight_call(weight) for weight in weights])}
    calls |= {name: kernel_call(name, matrices, place) for place, name in enumerate(names)}
    if find_spec(LIBRARY) and bits in LIBRARY_BITS:
        made = [library_call(*shape, options.threads) for _ in range(options.copies)]
        calls[LIBRARY] = rotated(made)
    print(f"\n{bits} bits\n{'tokens':>6} {'dense ms':>9}", *(f"{n:>18}" for n in list(calls)[1:]))
    for tokens in options.tokens:
        x = torch.randn(tokens, options.columns).to(torch.bfloat16)
        spent = in_turns(calls, x, options.rounds)
        case = Case(options.rows, options.columns, bits, options.group_size, tokens, x.dtype, "cpu")
        cells = [cell(spent[name], spent["dense"]) for name in list(calls)[1:]]
        line = " ".join(f"{text:>18}" for text in cells)
        base = 1000 * statistics.median(spent["dense"])
        print(f"{tokens:6} {base:9.2f} {line}  takes {choose_kernel(case)}", flush=True)


def weight_call(weight: Tensor) -> Call:
    return lambda x: torch.nn.functional.linear(x, weight)


def cell(spent: list[float], base: list[float]) -> str:
    ratio = statistics.median(b / s for s, b in zip(spent, base, strict=True))
    return f"{1000 * statistics.median(spent):.2f} ms {ratio:.2f}x"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=14336)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--copies", type=int, default=4, help="matrices that are rotated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunked", action="store_true", help="also the kernel in plain torch")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(
        f"{options.rows} x {options.columns}, group {options.group_size}, bf16 activations, "
        f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    )
    shape = (options.rows, options.columns, options.bits[0], options.group_size)
    weights = [dense(random_matrix(*shape)) for _ in range(2)]
    for bits in options.bits:
        compare(options, bits, weights)


if __name__ == "__main__":
    main()

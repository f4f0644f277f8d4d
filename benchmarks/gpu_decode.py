"""How fast is a layer of mixed-width experts on a GPU when tokens come one by one?

Ours with 16-bit and with 8-bit activations, dense bf16, torch's 4-bit product, and the time that
reading the packed weights takes at the speed of a copy, all in turns in one process and as CUDA
graphs. Each call uses other experts than the one before, so that no cache holds them.

    python benchmarks/gpu_decode.py [--shape mixtral-8x7b --bits 2 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from gpu_timing import (
    SHAPES,
    FourBitPeer,
    copied_bytes_per_second,
    dense_weights,
    graphed,
    leave_without_gpu,
    milliseconds,
    random_layer,
)
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer
from mcsharp_sdk.kernels.gpu_experts import run_experts

TOKENS = 8
"""Tokens in a graph, one after the other."""

Step = Callable[[Tensor, Tensor, Tensor], object]
Product = Callable[[Tensor], Tensor]


def packed_bytes_read(layer: ExpertLayer, chosen: Tensor) -> int:
    """Bytes of the weights of all chosen experts."""
    widths = layer.table[:-1, 0].tolist()
    total = 0
    for expert in chosen.flatten().tolist():
        for stack in (layer.gate_up, layer.down):
            weight = stack.weights[widths[expert]]
            parts = (weight.qweight, weight.scales, weight.zeros)
            total += sum(part[0].nbytes for part in parts)
    return total


def bf16_products(weight: Tensor) -> list[Product]:
    """x -> x · Wᵀ of each expert."""
    return [partial(torch.nn.functional.linear, weight=matrix) for matrix in weight]


def one_after_the_other(first: Sequence[Product], second: Sequence[Product], order: Tensor) -> Step:
    """Chosen experts in turn, token after token; their numbers are known to the host."""
    tokens = cycle(order.tolist())

    def step(x: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for slot, expert in enumerate(next(tokens)):
            gate, up = first[expert](x).chunk(2, -1)
            y = second[expert](torch.nn.functional.silu(gate) * up)
            out += routing[:, slot : slot + 1].to(x.dtype) * y
        return out

    return step


def every_token(step: Step, tokens: Sequence[tuple[Tensor, Tensor]], routing: Tensor) -> None:
    for x, chosen in tokens:
        step(x, chosen, routing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="of the experts")
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    hidden, inner, experts, slots = SHAPES[options.shape]
    layer = random_layer(options.shape, options.bits)
    tokens = torch.randn(TOKENS, 1, hidden, device="cuda", dtype=torch.bfloat16)
    order = torch.stack([torch.randperm(experts)[:slots] for _ in range(TOKENS)])
    chosen = [row.view(1, -1).cuda() for row in order]
    routing = torch.full((1, slots), 1 / slots, device="cuda")

    dense_up, dense_down = (bf16_products(weight) for weight in dense_weights(layer))
    peer_up, peer_down = (
        [FourBitPeer(rows, columns) for _ in range(experts)]
        for rows, columns in ((2 * inner, hidden), (hidden, inner))
    )
    steps: dict[str, Step] = {
        "ours, 16-bit activations": lambda x, c, r: run_experts(layer, x, c, r),
        "ours, 8-bit activations": lambda x, c, r: run_experts(layer, x, c, r, dp4a=True),
        "dense bf16": one_after_the_other(dense_up, dense_down, order),
        "torch int4, group 128": one_after_the_other(peer_up, peer_down, order),
    }
    graphs = {
        name: graphed(partial(every_token, step, list(zip(tokens, chosen, strict=True)), routing))
        for name, step in steps.items()
    }
    report(milliseconds(graphs), packed_bytes_read(layer, order), options.shape, options.bits)


def report(spent: dict[str, float], bytes_read: int, shape: str, bits: list[int]) -> None:
    limit = bytes_read / copied_bytes_per_second() * 1e3
    spent = {**spent, "reading the packed weights": limit}
    print(f"{shape}, widths {bits}, one token at a time; a layer's experts")
    print(f"{'':28} {'µs/token':>9} {'x dense':>8} {'share of bandwidth':>19}")
    for name, time in spent.items():
        share = f"{limit / time:.0%}" if name.startswith(("ours", "reading")) else ""
        ratio = spent["dense bf16"] / time
        print(f"{name:28} {time / TOKENS * 1e3:9.1f} {ratio:8.2f} {share:>19}")


if __name__ == "__main__":
    main()

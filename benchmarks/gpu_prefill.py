"""How fast is a layer of mixed-width experts on a GPU for a long prompt?

Ours, dense bf16 expert by expert, torch's 4-bit product, and the time that the products take at the
speed of one large bf16 matmul, all in turns in one process.

    python benchmarks/gpu_prefill.py [--shape mixtral-8x7b --bits 2 3 --tokens 128 1024 4096]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gpu_timing import (
    SHAPES,
    FourBitPeer,
    dense_weights,
    leave_without_gpu,
    matmul_flops_per_second,
    milliseconds,
    random_layer,
)
from torch import Tensor

from mcsharp_sdk.kernels.gpu_experts import run_experts

Product = Callable[[int, Tensor], Tensor]


def expert_by_expert(
    first: Product, second: Product, x: Tensor, chosen: Tensor, routing: Tensor, experts: int
) -> Tensor:
    """Each expert on the tokens that chose it."""
    out = torch.zeros_like(x)
    for expert in range(experts):
        token, slot = torch.where(chosen == expert)
        gate, up = first(expert, x[token]).chunk(2, -1)
        y = second(expert, torch.nn.functional.silu(gate) * up)
        out.index_add_(0, token, y * routing[token, slot].to(x.dtype).unsqueeze(-1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="of the experts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096])
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    hidden, inner, experts, slots = SHAPES[options.shape]
    layer = random_layer(options.shape, options.bits)
    gate_up, down = dense_weights(layer)
    first = [FourBitPeer(2 * inner, hidden) for _ in range(experts)]
    second = [FourBitPeer(hidden, inner) for _ in range(experts)]
    flops = matmul_flops_per_second(torch.bfloat16)
    print(f"{options.shape}, widths {options.bits}; a layer's experts")
    print(f"{'tokens':>6} {'':24} {'ms':>8} {'x dense':>8} {'share of matmul speed':>22}")
    for count in options.tokens:
        x = torch.randn(count, hidden, device="cuda", dtype=torch.bfloat16)
        chosen = torch.rand(count, experts, device="cuda").argsort(-1)[:, :slots]
        routing = torch.full(chosen.shape, 1 / slots, device="cuda")
        common = (x, chosen, routing)

        def dense(common: tuple[Tensor, Tensor, Tensor] = common) -> Tensor:
            return expert_by_expert(
                lambda e, t: t @ gate_up[e].T, lambda e, t: t @ down[e].T, *common, experts
            )

        def peer(common: tuple[Tensor, Tensor, Tensor] = common) -> Tensor:
            return expert_by_expert(
                lambda e, t: first[e](t), lambda e, t: second[e](t), *common, experts
            )

        def ours(common: tuple[Tensor, Tensor, Tensor] = common) -> Tensor:
            return run_experts(layer, *common)

        spent = milliseconds({"ours": ours, "dense bf16": dense, "torch int4, group 128": peer})
        limit = 6 * count * slots * hidden * inner / flops * 1e3
        for name, time in {**spent, "one large matmul's speed": limit}.items():
            print(
                f"{count:6} {name:24} {time:8.2f} {spent['dense bf16'] / time:8.2f} "
                f"{limit / time:22.0%}"
            )


if __name__ == "__main__":
    main()

"""How fast is a layer of mixed-width experts on a GPU for a long prompt?

Ours, dense bf16 expert by expert and by torch's grouped product, the 4-bit products of torch and,
where it is installed, of GPTQModel, and two limits: the time that the products take at the speed
of one large bf16 matmul, and the time that reading the packed weights of the chosen experts,
reading the activations and writing the results takes at the speed of a copy. All in turns in one
process; each row has its share of the higher limit.

    python benchmarks/gpu_prefill.py [--shape mixtral-8x7b --bits 2 3 --tokens 128 1024 4096]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial

import torch
from gpu_peers import Products, dense_products, four_bit_peers
from gpu_timing import (
    SHAPES,
    Shape,
    copied_bytes_per_second,
    dense_weights,
    expert_bytes,
    leave_without_gpu,
    matmul_flops_per_second,
    milliseconds,
    random_layer,
)
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer
from mcsharp_sdk.kernels.gpu_experts import run_experts

ACTIVATION_BYTES = 2


def expert_by_expert(products: Products, x: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
    """Each expert on the tokens that chose it."""
    out = torch.zeros_like(x)
    for expert in range(len(products.gate_up)):
        token, slot = torch.where(chosen == expert)
        if len(token):
            y = products.expert(expert, x[token])
            out.index_add_(0, token, y * routing[token, slot].to(x.dtype).unsqueeze(-1))
    return out


def dense_at_once(
    gate_up: Tensor, down: Tensor, x: Tensor, chosen: Tensor, routing: Tensor
) -> Tensor:
    """All experts in bf16, [E, 2I, H] and [E, H, I], by torch's grouped product."""
    order = torch.argsort(chosen.flatten(), stable=True)
    numbers = torch.arange(1, len(gate_up) + 1, device=x.device)
    ends = torch.searchsorted(chosen.flatten()[order], numbers).to(torch.int32)
    token = order // chosen.shape[1]
    gate, up = torch._grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    y = torch._grouped_mm(inner, down.transpose(1, 2), offs=ends)
    weights = routing.flatten()[order].to(x.dtype).unsqueeze(-1)
    return torch.zeros_like(x).index_add_(0, token, y * weights)


def random_prompt(shape: Shape, count: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H] bf16, the experts that they chose [T, k] int64, and their weights fp32."""
    x = torch.randn(count, shape.hidden, device=device, dtype=torch.bfloat16)
    chosen = torch.rand(count, shape.experts, device=device).argsort(-1)[:, : shape.slots]
    return x, chosen, torch.full(chosen.shape, 1 / shape.slots, device=device)


def limits(
    layer: ExpertLayer, chosen: Tensor, flops_per_second: float, bytes_per_second: float
) -> dict[str, float]:
    """Least ms that a layer can take, by its products and by the bytes that it must move.

    Parameters
    ----------
    chosen : int64 [T, k], the tokens' experts. Packed weights count once for each expert that is
        chosen at all; of the activations only the layer's input and output count, in 16 bits.
    """
    weights = sum(stack.rows * stack.columns for stack in (layer.gate_up, layer.down))
    operations = 2 * weights * chosen.numel()
    activations = 2 * len(chosen) * layer.gate_up.columns * ACTIVATION_BYTES
    moved = expert_bytes(layer, chosen.unique().tolist()) + activations
    return {
        "limit: products at a matmul's speed": operations / flops_per_second * 1e3,
        "limit: bytes at a copy's speed": moved / bytes_per_second * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="of the experts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 4096])
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    layer = random_layer(shape, options.bits)
    weights = dense_weights(layer)
    others = {"dense bf16": dense_products(weights), **four_bit_peers(shape)}
    speeds = matmul_flops_per_second(torch.bfloat16), copied_bytes_per_second()
    print(f"{options.shape}, widths {options.bits}; a layer's experts")
    for count in options.tokens:
        prompt = random_prompt(shape, count)
        runs = {"ours": partial(run_experts, layer, *prompt)}
        runs |= {name: partial(expert_by_expert, p, *prompt) for name, p in others.items()}
        runs["dense bf16, all at once"] = partial(dense_at_once, *weights, *prompt)
        report(count, milliseconds(runs), limits(layer, prompt[1], *speeds))


def report(tokens: int, spent: Mapping[str, float], least: Mapping[str, float]) -> None:
    """Print a row for each; all in ms."""
    rows, binding = {**spent, **least}, max(least.values())
    column = max(len(name) for name in rows)
    print(
        f"{f'{tokens} tokens':{column}} {'ms':>9} {'x dense':>8} {'share of the higher limit':>26}"
    )
    for name, time in rows.items():
        ratio = spent["dense bf16"] / time
        share = f"{binding / time:.0%}" if name in spent else ""
        print(f"{name:{column}} {time:9.3f} {ratio:8.2f} {share:>26}")


if __name__ == "__main__":
    main()

"""How fast is a layer of mixed-width experts on a GPU when tokens come one by one?

Ours with 16-bit and with 8-bit activations, dense bf16, the 4-bit products of torch and, where it
is installed, of GPTQModel, and the time that reading the packed weights takes at the speed of a
copy, all in turns in one process and as CUDA graphs. Each call uses other experts than the one
before, so that no cache holds them.

    python benchmarks/gpu_decode.py [--shape mixtral-8x7b --bits 2 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gpu_peers import Products, dense_products, four_bit_peers
from gpu_timing import (
    SHAPES,
    Shape,
    copied_bytes_per_second,
    dense_weights,
    expert_bytes,
    graphed,
    graphed_if_possible,
    leave_without_gpu,
    milliseconds,
    random_layer,
)
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer
from mcsharp_sdk.kernels.gpu_experts import run_experts

TOKENS = 8
"""Tokens in a graph, one after the other."""


@dataclass(frozen=True)
class Token:
    """A token and the experts that it chose.

    Attributes
    ----------
    x : [1, H] bf16.
    chosen : int64 [1, k], on the GPU.
    experts : the same, for the host.
    routing : fp32 [1, k].
    """

    x: Tensor
    chosen: Tensor
    experts: list[int]
    routing: Tensor


Step = Callable[[Token], Tensor]


def random_tokens(shape: Shape, device: str = "cuda") -> list[Token]:
    """Tokens with experts drawn for each."""
    routing = torch.full((1, shape.slots), 1 / shape.slots, device=device)
    tokens = []
    for _ in range(TOKENS):
        x = torch.randn(1, shape.hidden, device=device, dtype=torch.bfloat16)
        experts = torch.randperm(shape.experts)[: shape.slots]
        tokens.append(Token(x, experts.unsqueeze(0).to(device), experts.tolist(), routing))
    return tokens


def own_steps(layer: ExpertLayer) -> dict[str, Step]:
    """Row's name -> ours, all experts of a token at once."""
    return {
        "ours, 16-bit activations": lambda t: run_experts(layer, t.x, t.chosen, t.routing),
        "ours, 8-bit activations": lambda t: run_experts(
            layer, t.x, t.chosen, t.routing, dp4a=True
        ),
    }


def one_after_the_other(products: Products, token: Token) -> Tensor:
    """The chosen experts in turn; their numbers are known to the host."""
    out = torch.zeros_like(token.x)
    for slot, expert in enumerate(token.experts):
        weight = token.routing[:, slot : slot + 1].to(token.x.dtype)
        out += weight * products.expert(expert, token.x)
    return out


def every_token(step: Step, tokens: Sequence[Token]) -> None:
    for token in tokens:
        step(token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="of the experts")
    options = parser.parse_args()
    leave_without_gpu()
    torch.manual_seed(0)
    shape = SHAPES[options.shape]
    layer, tokens = random_layer(shape, options.bits), random_tokens(shape)
    steps = own_steps(layer)
    steps["dense bf16"] = partial(one_after_the_other, dense_products(dense_weights(layer)))
    runs: dict[str, Callable[[], object]] = {
        name: graphed(partial(every_token, step, tokens)) for name, step in steps.items()
    }
    # Peers come last, so that a recording that fails comes after ours.
    for peer, products in four_bit_peers(shape).items():
        run = partial(every_token, partial(one_after_the_other, products), tokens)
        name, timed = graphed_if_possible(peer, run)
        runs[name] = timed
    chosen = [expert for token in tokens for expert in token.experts]
    limit = expert_bytes(layer, chosen) / copied_bytes_per_second() * 1e3
    print(f"{options.shape}, widths {options.bits}, one token at a time; a layer's experts")
    report(milliseconds(runs), limit, shape.layers)


def report(spent: Mapping[str, float], limit: float, layers: int) -> None:
    """Print a row for each; all in ms for all tokens. Tokens per second are those of the experts of
    all layers, without attention and the rest of the model."""
    spent = {**spent, "reading the packed weights": limit}
    column = max(len(name) for name in spent)
    print(
        f"{'':{column}} {'µs/token':>9} {'tokens/s':>9} {'x dense':>8} {'share of bandwidth':>19}"
    )
    for name, time in spent.items():
        share = f"{limit / time:.0%}" if name.startswith(("ours", "reading")) else ""
        ratio = spent["dense bf16"] / time
        per_second = 1e3 * TOKENS / (time * layers)
        print(
            f"{name:{column}} {time / TOKENS * 1e3:9.1f} {per_second:9.0f} {ratio:8.2f} {share:>19}"
        )


if __name__ == "__main__":
    main()

"""What ways of quantising do to the outputs of a layer's experts, on texts of other kinds too.

    python benchmarks/one_layer.py MODEL CALIBRATION.txt EVALUATION.txt … \
        [--layers 12 24] [--bits 2] [--ways refined hadamard …]

Each layer gets its inputs from the original model. Printed is ‖Δ‖²/‖Y‖², with Δ the error of the
routed experts' summed output Y, on the calibration text and on the others, of

| way | |
|---|---|
| gptq | error compensation with damping 0.01, the default |
| refined | and `refinements: 2` |
| by tokens | and `token_damping: 1.0` |
| scales by gradient | and the scales of both matrices of an expert trained on its output (Adam) |
| rotated | *by tokens*, with inputs of both matrices, or one, turned by a random rotation |
| alike for all | the same rotation for all experts, as against one for each |
| hadamard | by `rotation: hadamard` |

For experts with a gate and SiLU. ``widths_per_matrix.py`` asks the same layers about widths.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from layer_experts import (
    Expert,
    Matrices,
    Tokens,
    add_arguments,
    gated,
    read_arguments,
    read_layers,
    summed,
)
from method_runs import markdown
from torch import Tensor

from mcsharp_sdk.quantization import (
    GridSettings,
    QuantizedWeight,
    accumulate,
    dequantise,
    factorise,
    quantise_gptq,
)
from mcsharp_sdk.quantization.descent import refine
from mcsharp_sdk.quantization.grid import zero_points
from mcsharp_sdk.quantization.inverse_factor import damped
from mcsharp_sdk.quantization.rotation import expert_signs, rotate

DAMPING, ROUNDS = 0.01, 2
EPOCHS, BATCH, RATE = 2, 512, 0.01
"""Of training scales."""


def hessian(inputs: Tensor) -> Tensor:
    found = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    accumulate(found, inputs)
    return found


Way = Callable[[Expert, int, GridSettings], Matrices]
"""An expert, a width and a grid -> what its matrices become."""


def quantised(
    weight: Tensor, inputs: Tensor, bits: int, grid: GridSettings, share: float, rounds: int | None
) -> QuantizedWeight:
    """GPTQ of a matrix, with ``share`` as ``token_damping``, refined if there are ``rounds``."""
    own = hessian(inputs).unsqueeze(0)
    factor = factorise(own, damping=DAMPING + share * weight.shape[1] / len(inputs))
    found = quantise_gptq(weight.unsqueeze(0), factor, [bits], grid).expert(0)
    return found if rounds is None else refine(weight, found, damped(own, factor, 0), rounds)


def pair(
    expert: Expert, bits: int, grid: GridSettings, share: float, rounds: int | None
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Both matrices, the second on what the first makes of the tokens."""
    (gate_up, down), x = expert.matrices, expert.calibration.hidden
    first = quantised(gate_up, x, bits, grid, share, rounds)
    inputs = gated(x, dequantise(first, torch.float32))
    return first, quantised(down, inputs, bits, grid, share, rounds)


def one_by_one(share: float, rounds: int | None) -> Way:
    def way(expert: Expert, bits: int, grid: GridSettings) -> Matrices:
        first, second = pair(expert, bits, grid, share, rounds)
        return dequantise(first, torch.float32), dequantise(second, torch.float32)

    return way


def scales_by_gradient(expert: Expert, bits: int, grid: GridSettings) -> Matrices:
    """Refined, then a factor for each scale is trained on the expert's weighted output."""
    found = pair(expert, bits, grid, 1.0, ROUNDS)
    tokens, wanted = expert.calibration, expert.output(expert.matrices, expert.calibration)
    levels = [q.codes - _wide(zero_points(q.zeros, q.bits), q) for q in found]
    factors = [torch.ones_like(q.scales, dtype=torch.float32).requires_grad_() for q in found]

    def matrices() -> Matrices:
        both = [
            _wide(q.scales.float() * factor, q) * level
            for q, factor, level in zip(found, factors, levels, strict=True)
        ]
        return both[0], both[1]

    adam = torch.optim.Adam(factors, lr=RATE)
    steps = EPOCHS * math.ceil(len(wanted) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    unit = wanted.square().mean()
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(wanted)).split(BATCH):
                output = expert.output(matrices(), Tokens(*(part[batch] for part in tokens)))
                loss = (output - wanted[batch]).square().mean() / unit
                adam.zero_grad()
                loss.backward()
                adam.step()
                schedule.step()
    first, second = matrices()
    return first.detach(), second.detach()


def _wide(per_group: Tensor, q: QuantizedWeight) -> Tensor:
    """[R, G] -> [R, K]."""
    return per_group.repeat_interleave(q.group_size, dim=1)[:, : q.codes.shape[1]]


def rotated(turn_of: Callable[[int, int], Tensor], matrices: Sequence[int] = (0, 1)) -> Way:
    """Matrices quantised in another basis of their inputs, [K, K] by columns and expert."""

    def way(expert: Expert, bits: int, grid: GridSettings) -> Matrices:
        found: list[Tensor] = []
        x = expert.calibration.hidden
        for position, weight in enumerate(expert.matrices):
            inputs = gated(x, found[0]) if found else x
            turn = torch.eye(weight.shape[1])
            if position in matrices:
                turn = turn_of(weight.shape[1], expert.number)
            q = quantised(weight @ turn, inputs @ turn, bits, grid, 1.0, ROUNDS)
            found.append(dequantise(q, torch.float32) @ turn.T)
        return found[0], found[1]

    return way


def random_rotation(columns: int, expert: int) -> Tensor:
    generator = torch.Generator().manual_seed(expert)
    return torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q


def hadamard(columns: int, expert: int) -> Tensor:
    return rotate(torch.eye(columns), expert_signs(expert + 1, columns)[expert])


WAYS: Mapping[str, Way] = {
    "gptq": one_by_one(0.0, None),
    "refined": one_by_one(0.0, ROUNDS),
    "by tokens": one_by_one(1.0, ROUNDS),
    "scales by gradient": scales_by_gradient,
    "rotated": rotated(random_rotation),
    "rotated, first": rotated(random_rotation, (0,)),
    "rotated, second": rotated(random_rotation, (1,)),
    "alike for all": rotated(lambda columns, _: random_rotation(columns, 0)),
    "hadamard": rotated(hadamard),
}


def errors(experts: Sequence[Expert], chosen: Sequence[Matrices], tokens: int) -> list[float]:
    """‖Δ‖²/‖Y‖² on each text, of ``tokens`` tokens in all."""
    own, found = [expert.matrices for expert in experts], []
    like = torch.empty(tokens, own[0][0].shape[1])
    for text in experts[0].texts:
        wanted = summed(experts, own, text, like)
        error = summed(experts, chosen, text, like) - wanted
        found.append(float(error.square().sum() / wanted.square().sum()))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    given = parser.parse_args()
    torch.manual_seed(0)
    source, windows = read_arguments(given)
    grid, tokens = GridSettings(given.group_size), sum(ids.numel() for ids in windows.values())
    rows: list[list[str]] = []
    for index, experts in read_layers(source, windows, given.layers):
        for name in given.ways:
            chosen = [WAYS[name](expert, given.bits, grid) for expert in experts]
            found = errors(experts, chosen, tokens)
            rows.append([str(index), name, *(f"{error:.4f}" for error in found)])
            print(" ".join(rows[-1]), flush=True)
    print(f"\n{markdown(['layer', f'{given.bits} bits', *windows], rows)}\n")


if __name__ == "__main__":
    main()

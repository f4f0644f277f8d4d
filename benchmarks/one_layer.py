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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from method_runs import markdown
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.data.tokenise import load_tokenizer, token_stream
from mcsharp_sdk.models.expert_runs import ExpertRuns, run_experts
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
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

Matrices = tuple[Tensor, Tensor]
"""gate_up [2I, H] and down [H, I] of an expert, fp32."""


class Tokens(NamedTuple):
    """Tokens of an expert: their places, what reaches it [n, H] fp32, routing weights [n, 1]."""

    place: Tensor
    hidden: Tensor
    routing: Tensor


@dataclass(frozen=True)
class Expert:
    """An expert with its tokens of each text; the first text is the calibration."""

    number: int
    matrices: Matrices
    texts: Mapping[str, Tokens]

    @property
    def calibration(self) -> Tokens:
        return next(iter(self.texts.values()))

    def output(self, matrices: Matrices, tokens: Tokens) -> Tensor:
        """What it adds to its tokens, [n, H]."""
        return gated(tokens.hidden, matrices[0]) @ matrices[1].T * tokens.routing


def gated(hidden: Tensor, gate_up: Tensor) -> Tensor:
    """Inputs of the down projection."""
    gate, up = (hidden @ gate_up.T).chunk(2, -1)
    return F.silu(gate) * up


def read_layers(
    source: SourceModel, windows: Mapping[str, Tensor], wanted: Sequence[int]
) -> Iterator[tuple[int, list[Expert]]]:
    """The experts of some layers, with windows [n, length] of texts run through the original."""
    whole = CalibrationSet.of_tokens(torch.cat(list(windows.values())))
    for layer in stream_layers(source, whole):
        if layer.index in wanted:
            runs = ExpertRuns.of_layer(layer)
            experts = [_expert(runs, expert, windows) for expert in runs.experts]
            _check(experts, run_experts(layer))
            yield layer.index, experts
        if layer.index == max(wanted):
            return


def _expert(runs: ExpertRuns, expert: int, windows: Mapping[str, Tensor]) -> Expert:
    place, routing = runs.tokens.of(expert)
    matrices = tuple(runs.weights.read(name, expert).float() for name in ("gate_up", "down"))
    texts, start = {}, 0
    for name, ids in windows.items():
        own = (place >= start) & (place < start + ids.numel())
        hidden = runs.tokens.hidden[place[own]].float()
        texts[name] = Tokens(place[own], hidden, routing[own].float().unsqueeze(-1))
        start += ids.numel()
    found = Expert(expert, (matrices[0], matrices[1]), texts)
    if not len(found.calibration.place):
        raise SystemExit(f"no token reaches expert {expert}: give more --sequences")
    return found


def summed(
    experts: Sequence[Expert], chosen: Sequence[Matrices], text: str, like: Tensor
) -> Tensor:
    """Outputs of all experts with these matrices on a text, at its places in ``like``."""
    out = torch.zeros_like(like, dtype=torch.float32)
    for expert, matrices in zip(experts, chosen, strict=True):
        tokens = expert.texts[text]
        out.index_add_(0, tokens.place, expert.output(matrices, tokens))
    return out


def _check(experts: Sequence[Expert], outputs: Tensor) -> None:
    """End where the model's experts do not work as :func:`gated` has it."""
    own = [expert.matrices for expert in experts]
    found = torch.zeros_like(outputs, dtype=torch.float32)
    for text in experts[0].texts:
        found += summed(experts, own, text, outputs)
    if (found - outputs.float()).norm() > 0.02 * found.norm():
        raise SystemExit("the model's experts are not SiLU-gated with routing weights at the end")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What :func:`read_arguments` reads."""
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="*")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--sequences", type=int, default=48, help="of the calibration text")
    parser.add_argument("--tokens", type=int, default=4096, help="of each other text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)


def read_arguments(given: argparse.Namespace) -> tuple[SourceModel, dict[str, Tensor]]:
    """The model, and windows [n, length] of each text's first tokens."""
    source = SourceModel(given.model)
    tokenizer = load_tokenizer(source.path)
    limits = [given.sequences * given.length] + [given.tokens] * len(given.evaluations)
    return source, {
        file.stem: token_stream(file.read_text(), tokenizer, limit=limit).view(-1, given.length)
        for file, limit in zip([given.calibration, *given.evaluations], limits, strict=True)
    }


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

"""Random packed experts and what they stand for, in float64; experts as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, PerSlot, expert_table
from mcsharp_sdk.models.experts import MATRICES, Matrix
from mcsharp_sdk.quantization.grid import (
    PackedWeight,
    QuantizedWeight,
    dequantise,
    group_count,
    pack_weight,
)
from mcsharp_sdk.runtime.layout import TENSORS, bucket_name, members, tensor_name


def random_stack(
    bits: Sequence[int], rows: int, columns: int, group: int, seed: int = 0
) -> tuple[MatrixStack, Tensor]:
    """One matrix of experts of these widths, and its weights, float64 [experts, rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(columns, group)
    weights: dict[int, PackedWeight] = {}
    exact = torch.empty(len(bits), rows, columns, dtype=torch.float64)
    for width in sorted(set(bits)):
        chosen = [expert for expert, own in enumerate(bits) if own == width]

        def codes(*shape: int, width: int = width, n: int = len(chosen)) -> Tensor:
            return torch.randint(0, 2**width, (n, *shape), generator=generator, dtype=torch.uint8)

        size = torch.rand(len(chosen), rows, groups, generator=generator) + 0.5
        sign = torch.randn(size.shape, generator=generator).sign()
        scales = (size * sign * 0.2 / 2**width).half()
        weight = QuantizedWeight(codes(rows, columns), scales, codes(rows, groups), width, group)
        weights[width] = pack_weight(weight)
        exact[chosen] = dequantise(weight).double()
    return MatrixStack(weights, group, columns), exact


def random_layer(
    bits: Sequence[int],
    hidden: int,
    intermediate: int,
    group: int,
    between: PerSlot | None = None,
    behind: PerSlot | None = None,
) -> tuple[ExpertLayer, Tensor, Tensor]:
    """The experts of a layer, and their two matrices in float64."""
    gate_up, exact_gate_up = random_stack(bits, 2 * intermediate, hidden, group, seed=1)
    down, exact_down = random_stack(bits, hidden, intermediate, group, seed=2)
    layer = ExpertLayer(gate_up, down, expert_table(bits), between, behind)
    return layer, exact_gate_up, exact_down


def silu_layer(
    hidden: Tensor, chosen: Tensor, routing: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts in float64, slot by slot; [T, hidden]."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
        expert = int(chosen[token, slot])
        if expert < len(gate_up):
            gate, up = (gate_up[expert] @ hidden[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            out[token] += routing[token, slot].double() * (down[expert] @ inner)
    return out


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((given.double() - expected).norm() / expected.norm())


def expert_tensors(
    path: str, bits: Sequence[int], packed: Mapping[Matrix, Sequence[PackedWeight]]
) -> dict[str, Tensor]:
    """Name -> tensor of one layer's experts, stacked into buckets.

    Parameters
    ----------
    path : module path of the experts.
    bits : width per expert.
    packed : matrix -> one packed weight per expert; those of removed ones are not looked at.
    """
    return {
        f"{path}.{bucket_name(width)}.{tensor_name(matrix, part)}": torch.stack(
            [getattr(packed[matrix][e], part) for e in experts]
        )
        for width, experts in members(bits).items()
        for matrix in MATRICES
        for part in TENSORS
    }

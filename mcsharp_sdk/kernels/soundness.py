"""Which kernels run on this machine and give right products: asked before they are timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.errors import RunError
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack
from mcsharp_sdk.kernels.matrix import PackedMatrix, PackedStack
from mcsharp_sdk.quantization.grid import dequantise_packed

CHECKED_TOKENS = (1, 3, 5, 48, 200)
"""Numbers of tokens whose products are looked at: each tiling is on both sides of its bounds."""

MOST_OFF = 0.2
"""Furthest that a number may be off, against the root mean square of all: five times as far as
activations of 8 bits bring it, and a wrong code, scale or row brings it further."""

Product = Callable[[int], Tensor]
"""Gives the products with so many tokens."""


def sound(candidates: Mapping[str, Product], expected: Tensor) -> list[str]:
    """Names of the candidates that run here, and whose products are right.

    Of each of the others a warning says why it is left out.

    Parameters
    ----------
    expected : the products of up to ``CHECKED_TOKENS[-1]`` tokens, [T, R], from float32 weights
        and activations.

    Raises
    ------
    RunError
        If there is none.
    """
    faults = {name: _fault(product, expected) for name, product in candidates.items()}
    for name, fault in faults.items():
        if fault:
            warnings.warn(f"{name} is left out: {fault}", RuntimeWarning, stacklevel=2)
    right = [name for name, fault in faults.items() if not fault]
    if not right:
        told = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise RunError(f"no kernel is right on this machine: {told}")
    return right


def _fault(product: Product, expected: Tensor) -> str:
    """What is wrong with a candidate; nothing if it is right."""
    usual = expected.square().mean().sqrt()
    for number in (n for n in CHECKED_TOKENS if n <= len(expected)):
        try:
            off = float((product(number).float() - expected[:number]).abs().max() / usual)
        except Exception as error:  # a compiler, a driver and a launcher raise what they like
            told = (str(error).splitlines() or [""])[0]
            return f"it does not run with {number} tokens ({type(error).__name__}: {told})"
        if not off <= MOST_OFF:  # NaN is not, either
            return f"with {number} tokens a number is off by {off:.2g} of the usual size"
    return ""


def exact_product(stack: PackedStack, slot: int, x: Tensor) -> Tensor:
    """x [N, K] times one matrix of a stack, in float32: [N, R]."""
    return x.float() @ _weight(stack.matrix(slot)).T


def exact_layer(layer: ExpertLayer, x: Tensor, chosen: Tensor, routing: Tensor) -> Tensor:
    """A layer's experts in float32, one by one: x [T, hidden], chosen and routing [T, k].

    Returns
    -------
    float32 [T, hidden].
    """
    out = torch.zeros(len(x), layer.down.rows, device=x.device)
    for expert in range(layer.experts):
        tokens, slots = torch.where(chosen == expert)
        rows = x[tokens].float() @ _weight(_of_expert(layer.gate_up, layer, expert)).T
        if layer.between is None:
            gate, up = rows.chunk(2, dim=-1)
            rows = F.silu(gate) * up
        else:
            rows = layer.between(rows, torch.full_like(tokens, expert))
        rows = rows @ _weight(_of_expert(layer.down, layer, expert)).T
        out.index_add_(0, tokens, rows * routing[tokens, slots].unsqueeze(-1))
    return out


def _of_expert(stack: MatrixStack, layer: ExpertLayer, expert: int) -> PackedMatrix:
    width, place = layer.table[expert].tolist()
    return PackedStack(stack.weights[width], width, stack.group_size, stack.columns).matrix(place)


def _weight(matrix: PackedMatrix) -> Tensor:
    return dequantise_packed(
        matrix.weight.qweight,
        matrix.weight.scales,
        matrix.weight.zeros,
        bits=matrix.bits,
        group_size=matrix.group_size,
        columns=matrix.columns,
        dtype=torch.float32,
    )

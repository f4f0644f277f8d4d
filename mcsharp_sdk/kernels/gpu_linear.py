"""One packed linear layer on a GPU: the kernels for experts, with a single expert."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import MatrixStack, expert_table
from mcsharp_sdk.kernels.gpu_experts import takes_gemv
from mcsharp_sdk.kernels.gpu_support import activations_in_8_bits, serves
from mcsharp_sdk.kernels.matrix import PackedMatrix
from mcsharp_sdk.quantization.grid import PackedWeight

GEMV_TOKENS = 2
"""Tokens up to which each reads the weights by itself. A model, not measured."""


def takes(x: Tensor, matrix: PackedMatrix) -> bool:
    """16-bit activations on a GPU that the kernels know, and no gradient."""
    return serves(x)


def run(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x @ W.T``: x [T, K] 16-bit floats, W packed [R, K]; returns [T, R] in x's dtype."""
    from mcsharp_sdk.kernels.triton_launch import gemm, gemv, sort_slots

    if not len(x):
        return x.new_empty(0, matrix.rows)
    parts = (getattr(matrix.weight, part).unsqueeze(0) for part in ("qweight", "scales", "zeros"))
    stack = MatrixStack({matrix.bits: PackedWeight(*parts)}, matrix.group_size, matrix.columns)
    table = _table(matrix.bits, x.device)
    chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if len(x) <= GEMV_TOKENS and takes_gemv(stack):
        dp4a = activations_in_8_bits()
        return gemv(stack, table, x.contiguous(), chosen, gated=False, dp4a=dp4a)
    tiles = sort_slots(chosen, 1)
    return gemm(stack, table, x.contiguous(), tiles, gated=False, to_slots=False)


@lru_cache(maxsize=64)
def _table(bits: int, device: torch.device) -> Tensor:
    return expert_table([bits]).to(device)

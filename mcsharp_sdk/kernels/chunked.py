"""The kernel that runs everywhere: dequantise some rows, multiply, go on.

Never holds more than ``CHUNK_WEIGHTS`` dequantised weights. It is bound by the dequantisation, so
its cost hardly depends on the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcsharp_sdk.kernels.matrix import PackedMatrix
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.quantization.grid import dequantise_packed, packed_rows
from mcsharp_sdk.quantization.packing import BLOCK

CHUNK_WEIGHTS = 2**20
"""Weights that are dequantised at a time: few enough for the scratch to stay in cache."""


def chunked_linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x @ W.T``: x [T, K] floating point, W packed [R, K]; returns [T, R] in x's dtype."""
    rows = matrix.rows
    step = max(BLOCK, CHUNK_WEIGHTS // matrix.columns // BLOCK * BLOCK)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = packed_rows(matrix.weight, matrix.bits, start, stop)
        weight = dequantise_packed(
            part.qweight,
            part.scales,
            part.zeros,
            bits=matrix.bits,
            group_size=matrix.group_size,
            columns=matrix.columns,
            dtype=x.dtype,
        )
        out[:, start:stop] = linear(x, weight)
    return out

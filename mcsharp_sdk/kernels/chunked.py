"""The kernel that runs everywhere: dequantise some rows in torch, multiply, go on.

Never holds more than ``CHUNK_WEIGHTS`` dequantised weights. It is bound by the dequantisation, so
its cost hardly depends on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mcsharp_sdk.kernels.matrix import PackedMatrix, PackedStack
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.quantization.grid import dequantise_packed, packed_rows
from mcsharp_sdk.quantization.packing import BLOCK

CHUNK_WEIGHTS = 2**20
"""Weights that are dequantised at a time: few enough for the scratch to stay in cache."""


def chunked(x: Tensor, stack: PackedStack, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
    """As :class:`mcsharp_sdk.kernels.linear.Kernel` says."""
    out = x.new_empty(len(x), stack.rows)
    begin = 0
    for slot, count in zip(slots, counts, strict=True):
        tokens = slice(begin, begin + count)
        _multiply(x[tokens], stack.matrix(slot), out[tokens])
        begin += count
    return out


def _multiply(x: Tensor, matrix: PackedMatrix, out: Tensor) -> None:
    """``x @ W.T`` into ``out``."""
    step = max(BLOCK, CHUNK_WEIGHTS // matrix.columns // BLOCK * BLOCK)
    for start in range(0, matrix.rows, step):
        stop = min(start + step, matrix.rows)
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

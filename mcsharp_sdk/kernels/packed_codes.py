"""Reading packed codes in functions that numba compiles; what the compiled kernels share.

The stored format is read as it is, see :mod:`mcsharp_sdk.quantization.packing` and
:mod:`mcsharp_sdk.quantization.grid`: nothing is repacked or kept. Columns are taken in *blocks* of
128, as they are packed. Addresses are int64.

Imported only where numba is installed. What was compiled is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from mcsharp_sdk.kernels.simd import (
    load_byte,
    load_word,
    no_bytes,
    store_byte,
    store_bytes,
    store_word,
)
from mcsharp_sdk.kernels.simd_codes import unpack_block
from mcsharp_sdk.kernels.support import VECTOR
from mcsharp_sdk.quantization.packing import BLOCK


def compiled(function: Callable[..., Any]) -> Any:
    """Compile to run without Python's lock, and cache on disk where there is a folder for it."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


inlined: Any = numba.njit(nogil=True, inline="always")
"""Put into the caller before types are known, so that constants and operations can be handed on."""


@compiled
def packed_row(columns, bits):
    """As ``packed_bytes``."""
    return (columns + 7) // 8 * bits


@compiled
def unpack_short_block(source, bits, columns, target, stride):
    """Codes of a block of fewer than 128 columns, 0 behind them; targets as ``unpack``."""
    padded = (columns + 7) // 8 * 8
    for vector in range(padded // VECTOR, BLOCK // VECTOR):
        store_bytes(target + stride * vector, no_bytes())
    if padded == BLOCK // 2:
        unpack_block(bits, padded, source, target, stride)
        return
    width = 2 if bits == 3 else bits
    # A constant as it stands would be compiled for by itself.
    unpack_plane(source, padded, width, np.int64(0), target, stride)
    if bits == 3:
        further = source + padded // 4
        unpack_plane(further, padded, np.int64(1), np.int64(2), target, stride)


@compiled
def unpack_plane(source, padded, width, low, target, stride):
    """Add codes of a width that divides 8, ``low`` bits up; the first plane is written."""
    length = padded * width // 8
    for place in range(8 // width):
        shift, first = width * place, length * place
        if length % 8:
            unpack_bytes(source, length, shift, width, low, target, stride, first)
        else:
            unpack_words(source, length, shift, width, low, target, stride, first)


@inlined
def unpack_bytes(source, length, shift, width, low, target, stride, first):
    """The codes at one place of each byte to columns from ``first`` on."""
    for byte in range(length):
        code = (load_byte(source + byte) >> shift) & ((1 << width) - 1)
        to = target + stride * ((first + byte) // VECTOR) + (first + byte) % VECTOR
        store_byte(to, (load_byte(to) if low else 0) | (code << low))


@inlined
def unpack_words(source, length, shift, width, low, target, stride, first):
    """As ``unpack_bytes``, eight bytes at a time; ``length`` and ``first`` are multiples of 8."""
    every = ((1 << width) - 1) * 0x0101010101010101
    for byte in range(0, length, 8):
        codes = (load_word(source + byte) >> shift) & every
        to = target + stride * ((first + byte) // VECTOR) + (first + byte) % VECTOR
        store_word(to, (load_word(to) if low else 0) | (codes << low))


@compiled
def unpack(source, bits, columns, target, stride):
    """Codes of a packed row, one a byte, 32 of them every ``stride`` bytes from ``target`` on.

    The last block is filled up with zeros.
    """
    blocks = columns // BLOCK
    for block in range(blocks):
        here, there = source + 16 * bits * block, target + 4 * stride * block
        unpack_block(bits, np.int64(BLOCK), here, there, stride)
    if columns > BLOCK * blocks:
        source, target = source + 16 * bits * blocks, target + 4 * stride * blocks
        unpack_short_block(source, bits, columns - BLOCK * blocks, target, stride)


@compiled
def unpack_zeros(zeros, bits, rows, first, groups, target):
    """Zero-point codes of the rows first to first+127 of a matrix, to uint8 [groups, 128]."""
    for group in range(groups):
        source = zeros + group * packed_row(rows, bits) + first // BLOCK * 16 * bits
        unpack(source, bits, min(BLOCK, rows - first), target + BLOCK * group, np.int64(VECTOR))

"""Powers of two inside Triton kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The smallest e with |value| < 2^e, from LEAST to MOST; value fp32."""
    exponent = ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    return tl.minimum(tl.maximum(exponent, LEAST), MOST)

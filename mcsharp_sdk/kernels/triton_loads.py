"""Loads in assembly inside Triton kernels: each thread loads what it computes with.

For ``tl.load`` the compiler chooses which thread loads what by what lies side by side, and may then
have all that depends on it computed there: Triton 3.6 loaded and multiplied packed weights twice
for the sake of their scales, 3.7 did not. Assembly leaves no choice, in any version. What is loaded
may come from the kernel before, so loads stay where they are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import code_in, padded, scale_pointers, zero_point


@triton.jit
def load_quad(pointers, CACHED: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr):
    """Four int32 from each of ``pointers`` on, as a tuple.

    With ALIGNED they begin at multiples of 16 bytes; without CACHED the first-level cache then
    leaves them out.
    """
    if EMULATE:  # the interpreter knows no assembly
        return (
            tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3),
        )  # fmt: skip
    elif ALIGNED:  # noqa: RET505 - all branches are compiled unless they are left out here
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
            if CACHED
            else "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointers.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            ld.global.b32 $0, [$4]; ld.global.b32 $1, [$4+4];
            ld.global.b32 $2, [$4+8]; ld.global.b32 $3, [$4+12];
            """,
            "=&r,=&r,=&r,=&r,l",  # none is where the address is
            [pointers.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_float(pointers, EMULATE: tl.constexpr):
    """fp32 numbers."""
    if EMULATE:  # the interpreter knows no assembly
        return tl.load(pointers)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];",
            "=f,l",
            [pointers.to(tl.int64)],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_half(pointers, EMULATE: tl.constexpr):
    """fp16 numbers, as fp32."""
    if EMULATE:
        return tl.load(pointers).to(tl.float32)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "ld.global.b16 $0, [$1];",
            "=h,l",
            [pointers.to(tl.int64)],
            dtype=tl.float16,
            is_pure=False,
            pack=1,
        ).to(tl.float32)


@triton.jit
def load_byte(pointers, EMULATE: tl.constexpr):
    """Bytes, as int32."""
    if EMULATE:
        return tl.load(pointers).to(tl.int32)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_scale_and_zero(
    matrix, n, places, g, GROUP: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """Scales and zero points, fp32, of rows ``n`` in groups ``g``; broadcast. ``places`` are those
    of the rows among the codes of zero points."""
    scale = load_half(scale_pointers(matrix, n, g, GROUP), EMULATE)
    codes = matrix[2] + g * (padded(matrix[3]) * BITS // 8)
    low = load_byte(codes + places[0], EMULATE)
    top = load_byte(codes + places[2], EMULATE) if BITS == 3 else low
    return scale, zero_point(code_in(low, top, places, BITS), BITS)

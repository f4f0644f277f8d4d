"""Products of packed codes with few activations inside Triton kernels, exact, in integers.

Weights are read as quads, four 32-bit words of a row, which belong to one block of 128 columns.
Each field of a word, a mask away, is four codes; ``dp4a`` multiplies them with four activations of
8 bits, or of either plane of 15 (:mod:`~mcsharp_sdk.kernels.triton_planes`). Codes stay at their
place in their byte, which multiplies them by a power of two; sums are shifted by it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_loads import load_quad, load_scale_and_zero


@triton.jit
def dp4a(codes, x, total, EMULATE: tl.constexpr):
    """``total`` plus the products of four unsigned bytes with four signed ones."""
    if EMULATE:  # the interpreter knows no assembly
        for byte in tl.static_range(4):
            signed = (x << (24 - 8 * byte)) >> 24
            total += ((codes >> (8 * byte)) & 255) * signed
        return total
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, x, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def whole_codes(word, top, BITS: tl.constexpr):
    """A word as words whose bytes hold whole codes, place by place: itself, or at 3 bits two.

    3 bits come as words of two bits and ``top``, the third bits at the places of the first ones;
    they become nibbles, the even fields in one word and the odd ones in another.
    """
    if BITS == 3:
        even = (word & 0x33333333) | ((top << 2) & 0x44444444)
        odd = ((word >> 2) & 0x33333333) | (top & 0x44444444)
        return even, odd
    else:  # noqa: RET505
        return (word,)


@triton.jit
def quad_codes(
    loaded, words, block, quad, BITS: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """The four words of ``quad`` of ``block``, each as :func:`whole_codes`; int32 [rows, quads].

    ``loaded`` are those words, at 3 bits the first two bits of their codes. ``words`` are pointers
    to rows, [rows, 1]; ``block`` and ``quad`` [1, quads].
    """
    w0, w1, w2, w3 = loaded
    t0, t1, t2, t3 = w0, w1, w2, w3
    if BITS == 3:  # of both quads of a block, moved to where the first bits are
        t0, t1, t2, t3 = load_quad(words + (block * (4 * BITS) + 8), True, ALIGNED, EMULATE)
        t0, t1, t2, t3 = t0 >> quad, t1 >> quad, t2 >> quad, t3 >> quad
    return (
        whole_codes(w0, t0, BITS), whole_codes(w1, t1, BITS),
        whole_codes(w2, t2, BITS), whole_codes(w3, t3, BITS),
    )  # fmt: skip


@triton.jit
def multiplied(
    code, x, total, PLACE: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """``total`` plus four codes of each word, from bit PLACE of its bytes on, times ``x``.

    Products are 2^PLACE times too large.
    """
    CODE: tl.constexpr = (2**BITS - 1) << PLACE
    # An int32 of the same bits, in each byte.
    MASK: tl.constexpr = CODE * 0x01010101 - (2**32 if CODE >= 128 else 0)
    return dp4a(code & MASK, tl.broadcast_to(x, code.shape), total, EMULATE)


@triton.jit
def quad_products(
    codes, x, step,
    BITS: tl.constexpr, PLANES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Sum of the products of each quad, fp32 [rows, quads], from :func:`quad_codes`.

    ``x`` int32 pointers [1, quads] to the first of a quad's chunks; ``step`` from one chunk of a
    block to the next, and 8 times that from one plane to the next.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACED: tl.constexpr = 4 if BITS == 3 else BITS  # bits from one place to the next
    WORDS: tl.constexpr = PLACED // WIDTH
    total = tl.zeros(codes[0][0].shape, tl.int32)
    for u in tl.static_range(8 // PLACED):
        part = tl.zeros(total.shape, tl.int32)
        for i in tl.static_range(PLANES):
            part = part << 8
            for w in tl.static_range(WORDS):
                field = u * WORDS + w
                xs = load_quad(x + (i * 8 + field * WIDTH) * step, True, True, EMULATE)
                for j in tl.static_range(4):
                    part = multiplied(codes[j][w], xs[j], part, u * PLACED, BITS, EMULATE)
        total += part >> (u * PLACED)
    return total.to(tl.float32)


@triton.jit
def scaled_products(
    codes, x, step, matrix, n, places, block, quad,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """As :func:`quad_products`, for groups that are not whole blocks: four columns at a time, with
    scale and zero point of their group; ``n`` and ``places`` are [rows, 1]."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACED: tl.constexpr = 4 if BITS == 3 else BITS
    WORDS: tl.constexpr = PLACED // WIDTH
    total = tl.zeros(codes[0][0].shape, tl.float32)
    for u in tl.static_range(8 // PLACED):
        for w in tl.static_range(WORDS):
            field = u * WORDS + w
            at = x + field * WIDTH * step
            high = load_quad(at, True, True, EMULATE)
            low = load_quad(at + 8 * step, True, True, EMULATE) if PLANES == 2 else high
            planes = (high, low)
            for j in tl.static_range(4):
                product = tl.zeros(total.shape, tl.int32)
                ones = tl.zeros(quad.shape, tl.int32)
                for i in tl.static_range(PLANES):
                    xs = planes[i][j]
                    one = tl.full(xs.shape, 0x01010101, tl.int32)
                    product <<= 8
                    product = multiplied(codes[j][w], xs, product, u * PLACED, BITS, EMULATE)
                    ones = dp4a(one, xs, ones << 8, EMULATE)
                g = (block * 128 + (16 * WIDTH * field + 4 * j) + quad * 16) // GROUP
                scale, zero = load_scale_and_zero(matrix, n, places, g, GROUP, BITS, EMULATE)
                product = (product >> (u * PLACED)).to(tl.float32)
                total += scale * (product - zero * ones.to(tl.float32))
    return total

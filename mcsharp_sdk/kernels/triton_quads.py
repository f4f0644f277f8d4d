"""Products of packed codes with few activations inside Triton kernels, as they come out of memory.

Weights are read as quads, four 32-bit words of a row, which belong to one block of 128 columns.
Part p of a word, a mask away, is multiplied with its activations, which lie in the same order: part
by part, words side by side.

- With 8-bit activations a part is four codes, which ``dp4a`` multiplies exactly, in integers; with
  16-bit ones it is two, every second byte of a field, as fp16 numbers without an exponent
  (:mod:`~mcsharp_sdk.kernels.triton_halves`), and up to 8 products are added up in fp16.
- Codes stay at their place in their byte, so that they are multiplied by a power of two: sums of
  integers are shifted by it, and 16-bit activations are laid out without it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import scale_and_zero
from mcsharp_sdk.kernels.triton_halves import add_halves, multiply_halves


@triton.jit
def load_quad(pointers, KEEP: tl.constexpr, WIDE: tl.constexpr):
    """Four int32 from each of ``pointers`` on, as a tuple.

    With WIDE they begin at multiples of 16 bytes; without KEEP the first-level cache leaves them
    out. What is loaded may come from the kernel before, so loads stay where they are.
    """
    if WIDE:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
            if KEEP
            else "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointers.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return (
            tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3),
        )  # fmt: skip


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
    """Words whose bytes hold whole codes: field t is in number t % 2 of the two.

    3 bits come as words of two bits and ``top``, the third bits at the places of the first ones;
    they become nibbles, the even fields in one word and the odd ones in another.
    """
    if BITS == 3:
        even = (word & 0x33333333) | ((top << 2) & 0x44444444)
        odd = ((word >> 2) & 0x33333333) | (top & 0x44444444)
        return even, odd
    else:  # noqa: RET505
        return word, word


@triton.jit
def quad_codes(words, block, quad, BITS: tl.constexpr, WIDE: tl.constexpr):
    """The four words of ``quad`` of ``block``, each as :func:`whole_codes`; int32 [rows, quads].

    ``words`` are pointers to rows, [rows, 1]; ``block`` and ``quad`` [1, quads].
    """
    w0, w1, w2, w3 = load_quad(words + (block * (4 * BITS) + quad * 4), False, WIDE)
    t0, t1, t2, t3 = w0, w1, w2, w3
    if BITS == 3:  # of both quads of a block, moved to where the first bits are
        t0, t1, t2, t3 = load_quad(words + (block * (4 * BITS) + 8), True, WIDE)
        t0, t1, t2, t3 = t0 >> quad, t1 >> quad, t2 >> quad, t3 >> quad
    return (
        whole_codes(w0, t0, BITS), whole_codes(w1, t1, BITS),
        whole_codes(w2, t2, BITS), whole_codes(w3, t3, BITS),
    )  # fmt: skip


@triton.jit
def multiplied(
    codes, x, total, p: tl.constexpr, BITS: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """``total`` plus part ``p`` of a word times its activations; as they come from ``dp4a``, or as
    pairs of fp16."""
    FIELD: tl.constexpr = p if DP4A else p // 2
    PLACE: tl.constexpr = 4 * (FIELD // 2) if BITS == 3 else BITS * FIELD
    CODE: tl.constexpr = (2**BITS - 1) << PLACE
    code = codes[FIELD % 2]
    x = tl.broadcast_to(x, code.shape)
    if DP4A:
        # An int32 of the same bits: CODE is less than 128 but for the last field.
        MASK: tl.constexpr = CODE * 0x01010101 - (2**32 if CODE >= 128 else 0)
        return dp4a(code & MASK, x, total, EMULATE)
    else:  # noqa: RET505
        return multiply_halves((code >> (8 * (p % 2))) & (CODE * 0x00010001), x, total, EMULATE)


@triton.jit
def place_of(p: tl.constexpr, BITS: tl.constexpr):
    """The place in their byte of the codes of part ``p`` with 8-bit activations."""
    PLACE: tl.constexpr = 4 * (p // 2) if BITS == 3 else BITS * p
    return PLACE


@triton.jit
def added_up(total, p: tl.constexpr, BITS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr):
    """What :func:`multiplied` gives for part ``p``, as fp32."""
    if DP4A:
        return (total >> place_of(p, BITS)).to(tl.float32)
    else:  # noqa: RET505
        return add_halves(total, EMULATE)


@triton.jit
def replaced(items, at: tl.constexpr, item):
    """The tuple of four ``items`` with another in one place."""
    return (
        item if at == 0 else items[0],
        item if at == 1 else items[1],
        item if at == 2 else items[2],
        item if at == 3 else items[3],
    )


@triton.jit
def exact_products(codes, x, BITS: tl.constexpr, EMULATE: tl.constexpr, WIDE: tl.constexpr):
    """Sums of a quad's products with 8-bit activations; see :func:`quad_products`."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    nothing = tl.zeros(codes[0][0].shape, tl.int32)
    total = nothing
    for p in tl.static_range(8 // WIDTH):
        xs = load_quad(x + p * (4 * WIDTH), True, WIDE)
        part = nothing
        for j in tl.static_range(4):
            part = multiplied(codes[j], xs[j], part, p, BITS, True, EMULATE)
        total += part >> place_of(p, BITS)
    return total.to(tl.float32)


@triton.jit
def half_products(codes, x, BITS: tl.constexpr, EMULATE: tl.constexpr, WIDE: tl.constexpr):
    """Sums of a quad's products with 16-bit activations, 8 at a time in fp16; see
    :func:`quad_products`."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PARTS: tl.constexpr = 16 // WIDTH
    CHAIN: tl.constexpr = 8 if PARTS > 8 else PARTS
    JOINED: tl.constexpr = 8 // CHAIN  # words that share a sum
    nothing = tl.zeros(codes[0][0].shape, tl.int32)
    total = tl.zeros(nothing.shape, tl.float32)
    sums = (nothing, nothing, nothing, nothing)
    for p in tl.static_range(PARTS):
        xs = load_quad(x + p * (4 * WIDTH), True, WIDE)
        for j in tl.static_range(4):
            found = multiplied(codes[j], xs[j], sums[j // JOINED], p, BITS, False, EMULATE)
            sums = replaced(sums, j // JOINED, found)
        if p % CHAIN == CHAIN - 1:
            for i in tl.static_range(4 // JOINED):
                total += add_halves(sums[i], EMULATE)
            sums = (nothing, nothing, nothing, nothing)
    return total


@triton.jit
def scaled_products(
    codes, x, matrix, n, block, quad, ok,
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """As :func:`quad_products`, each part with scale and zero point of its group, ``ok`` [1, quads]
    or 0; ``n`` [rows, 1]. For groups that are not whole blocks."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACED: tl.constexpr = 4 if BITS == 3 else BITS  # bits from one place to the next
    ONES: tl.constexpr = 255 // (2**PLACED - 1) * 0x01010101  # a word of codes that are 1
    total = tl.zeros(codes[0][0].shape, tl.float32)
    for p in tl.static_range((8 if DP4A else 16) // WIDTH):
        for j in tl.static_range(4):
            xs = tl.load(x + (p * (4 * WIDTH) + j))
            nothing = tl.zeros(total.shape, tl.int32)
            product = multiplied(codes[j], xs, nothing, p, BITS, DP4A, EMULATE)
            one = xs * 0 + (ONES if ONES < 2**31 else ONES - 2**32)
            ones = multiplied((one, one), xs, xs * 0, p, BITS, DP4A, EMULATE)
            field = p if DP4A else p // 2
            g = (block * 128 + (16 * WIDTH * field + 4 * j) + quad * 16) // GROUP
            scale, zero = scale_and_zero(matrix, n, g, ok, GROUP, BITS)
            product = added_up(product, p, BITS, DP4A, EMULATE)
            total += scale * (product - zero * added_up(ones, p, BITS, DP4A, EMULATE))
    return total

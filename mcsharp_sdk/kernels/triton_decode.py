"""Triton kernels for few tokens: a matrix-vector product per token and expert, in one launch.

Each program computes some rows of one slot, a slot being one expert chosen by one token. Which
width and which weights the expert has is read from a small table on the device, so that one launch
serves all experts of a layer. Codes are multiplied as they come out of the words that are stored:

- with 16-bit activations, a code is put into the mantissa of a float whose exponent makes it
  2^(8 − b·t) + code: one operation a code besides the multiplication. What the constants add up to
  is subtracted once per block;
- with 8-bit activations ``dp4a`` multiplies four codes at a time, exactly, in integers.

A block is one of packing, 128 columns. Groups of whole blocks take the fast way, one scale per row
and block; smaller groups get a scale per code.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import BLOCK, gathered_codes, matrix_at, scale_and_zero
from mcsharp_sdk.kernels.triton_codes import padded as padded_to_bytes

SUMS = tl.constexpr(9)
"""Sums kept of a block of activations: 0 the plain one; b = 1, 2, 4, 8: Σ 2^(8 − b·t) x."""


@triton.jit
def power_of_two(exponent):
    """2^exponent as fp32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def prepare_activations(x, codes, scales, sums, columns, DP4A: tl.constexpr):
    """What the products need to know of each block of x [T, K]; grid (blocks, T).

    ``sums`` fp32 [T, blocks, SUMS]. With DP4A besides: ``codes`` int8 [T, K] and ``scales`` fp32
    [T, blocks], x ≈ scale · code with the block's largest |x| at 127; the sum is that of these.
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    ok = k < columns
    value = tl.load(x + row * columns + k, mask=ok, other=0.0).to(tl.float32)
    at = row * tl.num_programs(0) + tl.program_id(0)
    if DP4A:
        scale = tl.max(tl.abs(value), 0) / 127.0
        code = tl.floor(value / tl.where(scale > 0, scale, 1.0) + 0.5)
        tl.store(codes + row * columns + k, code.to(tl.int8), mask=ok)
        tl.store(scales + at, scale)
        tl.store(sums + at * SUMS, tl.sum(code, 0) * scale)
    else:
        tl.store(sums + at * SUMS, tl.sum(value, 0))
        for power in tl.static_range(4):
            width: tl.constexpr = 1 << power
            field = (k % BLOCK) // (16 * width)
            shifted = value * power_of_two(8 - width * field)
            tl.store(sums + at * SUMS + width, tl.sum(shifted, 0))


@triton.jit
def dp4a(codes, x, total, EMULATE: tl.constexpr):
    """``total`` plus the products of four unsigned bytes with four signed ones."""
    if EMULATE:  # the interpreter knows no assembly
        for byte in tl.static_range(4):
            signed = (x << (24 - 8 * byte)) >> 24
            total += ((codes >> (8 * byte)) & 255) * signed
        return total
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, x, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def part_of_block_dp4a(
    words, x, k, matrix, n, ok,
    BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Products of one part of a block, fp32 [rows, words], in units of the activations' scale.

    ``words`` int32 pointers [rows, 1]; ``x`` int32 pointer to the block's activations; ``k`` its
    first column. Scales and zero points are left out where they belong to the whole block.
    """
    LANES: tl.constexpr = 4 * WIDTH
    lane = tl.arange(0, LANES)
    word = tl.load(words + lane[None, :], mask=ok[:, None], other=0)
    whole = tl.zeros_like(word)
    scaled = tl.zeros(word.shape, tl.float32)
    for t in tl.static_range(8 // WIDTH):
        code = word if WIDTH == 8 else (word >> (WIDTH * t)) & ((2**WIDTH - 1) * 0x01010101)
        xt = tl.load(x + t * LANES + lane)[None, :]
        if GROUP % 128 == 0:
            whole = dp4a(code, tl.broadcast_to(xt, word.shape), whole, EMULATE)
        else:
            g = ((k + 4 * (t * LANES + lane)) // GROUP)[None, :]
            scale, zero = scale_and_zero(matrix, n[:, None], g, ok[:, None], GROUP, BITS)
            product = dp4a(code, tl.broadcast_to(xt, word.shape), tl.zeros_like(word), EMULATE).to(
                tl.float32
            )
            if FIRST:
                ones = tl.full(xt.shape, 0x01010101, tl.int32)
                product -= zero * dp4a(ones, xt, tl.zeros_like(xt), EMULATE).to(tl.float32)
            scaled += scale * product
    return whole.to(tl.float32) if GROUP % 128 == 0 else scaled


@triton.jit
def part_of_block_magic(
    bytes, x, k, matrix, n, ok,
    BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As above, fp32 [rows, bytes], with ``bytes`` uint8 pointers and ``x`` 16-bit floats.

    Where scales belong to the whole block, the constants are still in it: Σ 2^(8 − b·t) x.
    """
    LANES: tl.constexpr = 16 * WIDTH
    lane = tl.arange(0, LANES)
    byte = tl.load(bytes + lane[None, :], mask=ok[:, None], other=0).to(tl.int32) << 15
    total = tl.zeros(byte.shape, tl.float32)
    for t in tl.static_range(8 // WIDTH):
        field = byte & ((2**WIDTH - 1) << (15 + WIDTH * t))
        value = (field | ((135 - WIDTH * t) << 23)).to(tl.float32, bitcast=True)
        xt = tl.broadcast_to(tl.load(x + t * LANES + lane).to(tl.float32)[None, :], byte.shape)
        if GROUP % 128 == 0:
            total = tl.fma(value, xt, total)
        else:
            g = ((k + t * LANES + lane) // GROUP)[None, :]
            scale, zero = scale_and_zero(matrix, n[:, None], g, ok[:, None], GROUP, BITS)
            code = value - 2.0 ** (8 - WIDTH * t)
            if FIRST:
                code -= zero
            total += scale * code * xt
    return total


@triton.jit
def last_columns(
    x, row, matrix, n, ok,
    BITS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products with the columns behind the last full block, fp32 [rows]."""
    columns = matrix[4]
    total = tl.zeros((BN, 32), tl.float32)
    for start in range(columns // BLOCK * BLOCK, columns, 32):
        k = start + tl.arange(0, 32)
        both = ok[:, None] & (k < columns)[None, :]
        code = gathered_codes(row[:, None], k[None, :], columns, both, BITS)
        scale, zero = scale_and_zero(matrix, n[:, None], (k // GROUP)[None, :], both, GROUP, BITS)
        value = tl.load(x + k, mask=k < columns, other=0).to(tl.float32)[None, :]
        total += scale * (code.to(tl.float32) - zero) * value
    return tl.sum(total, 1)


@triton.jit
def dot_rows(
    x, x_scales, x_sums, matrix, n, ok,
    BITS: tl.constexpr, GROUP: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of a matrix times x [K], fp32 [rows]."""
    LO: tl.constexpr = 2 if BITS == 3 else BITS
    LANES: tl.constexpr = 4 if DP4A else 16
    q, _, _, _, columns = matrix
    row = q + n.to(tl.int64) * (padded_to_bytes(columns) * BITS // 8)
    low = tl.zeros((BN, LANES * LO), tl.float32)
    high = tl.zeros((BN, LANES), tl.float32)
    offset = tl.zeros((BN,), tl.float32)
    for block in range(columns // BLOCK):
        k = block * BLOCK
        start = (row + block * (16 * BITS))[:, None]
        if DP4A:
            words = start.to(tl.pointer_type(tl.int32))
            xs = (x + k).to(tl.pointer_type(tl.int32))
            first = part_of_block_dp4a(words, xs, k, matrix, n, ok, BITS, LO, True, GROUP, EMULATE)
            factor = tl.load(x_scales + block)
        else:
            first = part_of_block_magic(start, x + k, k, matrix, n, ok, BITS, LO, True, GROUP)
            factor = 1.0
        scale = tl.full((BN,), 1.0, tl.float32)
        if GROUP % 128 == 0:
            scale, zero = scale_and_zero(matrix, n, k // GROUP, ok, GROUP, BITS)
            shift = zero * tl.load(x_sums + block * SUMS)
            if not DP4A:
                shift += tl.load(x_sums + block * SUMS + LO)
                if BITS == 3:
                    shift += 4.0 * tl.load(x_sums + block * SUMS + 1)
            offset += scale * shift
        low += (scale * factor)[:, None] * first
        if BITS == 3:
            if DP4A:
                second = part_of_block_dp4a(
                    words + 8, xs, k, matrix, n, ok, BITS, 1, False, GROUP, EMULATE
                )
            else:
                second = part_of_block_magic(
                    start + 32, x + k, k, matrix, n, ok, BITS, 1, False, GROUP
                )
            high += (scale * (4.0 * factor))[:, None] * second
    total = tl.sum(low, 1) - offset
    if BITS == 3:
        total += tl.sum(high, 1)
    if TAIL:
        rest = last_columns(x, row, matrix, n, ok, BITS, GROUP, BN)
        total += rest * tl.load(x_scales + columns // BLOCK) if DP4A else rest
    return total


@triton.jit
def grouped_gemv(
    x, x_scales, x_sums, out, chosen, table, weights, rows, columns, slots_per_row,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One matrix of the chosen experts times their activations; grid (row tiles, slots).

    x [T, K] as DP4A wants it, with ``x_scales`` and ``x_sums`` of :func:`prepare_activations`;
    slot i has row i // slots_per_row of it. ``chosen`` [slots] gives the expert, ``table`` int32
    [experts + 1, 2] its width (0: none) and its place among those of that width, ``weights`` the
    stacked tensors of each of ``WIDTHS``. ``out`` is [slots, R], or with GATED [slots, R/2]: SiLU
    of the first half of the rows times the second half.
    """
    slot = tl.program_id(1).to(tl.int64)
    expert = tl.load(chosen + slot)
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    source = slot // slots_per_row
    blocks = tl.cdiv(columns, BLOCK)
    x += source * columns
    x_scales += source * blocks
    x_sums += source * blocks * SUMS
    STEP: tl.constexpr = BN // 2 if GATED else BN
    last = rows // 2 if GATED else rows
    lane = tl.arange(0, BN)
    m = tl.program_id(0) * STEP + lane % STEP
    ok, n = m < last, lane // STEP * last + m
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            total = dot_rows(
                x, x_scales, x_sums, matrix, n, ok,
                WIDTHS[i], GROUP, DP4A, EMULATE, TAIL, BN,
            )  # fmt: skip
    out += slot * last + tl.program_id(0) * STEP
    at = tl.arange(0, STEP)
    if GATED:
        gate, up = tl.split(tl.reshape(total, (2, STEP)).trans(1, 0))
        total = gate * tl.sigmoid(gate) * up
    if width > 0:
        tl.store(out + at, total, mask=tl.program_id(0) * STEP + at < last)


@triton.jit
def combine_slots(
    y, chosen, routing, out, width, experts, slots_per_row, BH: tl.constexpr
):  # fmt: skip
    """out [T, H] = Σ_j routing[t, j] · y[t, j]; slots without an expert count nothing.

    Grid (H tiles, T); y [T·k, H], added up in fp32 in the order of the slots.
    """
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BH,), tl.float32)
    for j in range(slots_per_row):
        slot = row * slots_per_row + j
        if tl.load(chosen + slot) < experts:
            value = tl.load(y + slot * width + h, mask=h < width, other=0.0).to(tl.float32)
            total += value * tl.load(routing + slot).to(tl.float32)
    tl.store(out + row * width + h, total, mask=h < width)

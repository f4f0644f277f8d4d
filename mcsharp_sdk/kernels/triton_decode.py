"""Triton kernels for few tokens: a matrix-vector product per token and expert, in one launch.

Each program computes some rows of one slot, a slot being one expert chosen by one token. Which
width and which weights the expert has is read from a small table on the device, so that one launch
serves all experts of a layer. Codes are multiplied as they come out of memory
(:mod:`~mcsharp_sdk.kernels.triton_quads`); zero points take no part in that, since what they add is
a product of sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from mcsharp_sdk.kernels.triton_codes import (
    BLOCK,
    code_places,
    gathered_codes,
    matrix_at,
    padded,
    scale_and_zero,
    scale_pointers,
)
from mcsharp_sdk.kernels.triton_loads import (
    load_float,
    load_half,
    load_quad,
    load_scale_and_zero,
)
from mcsharp_sdk.kernels.triton_overlap import let_next_begin, wait_for_last
from mcsharp_sdk.kernels.triton_planes import place_in_plane
from mcsharp_sdk.kernels.triton_quads import quad_codes, quad_products, scaled_products


@triton.jit
def block_offsets(
    x_sums, matrix, n, places, first,
    GROUP: tl.constexpr, BITS: tl.constexpr, AT_ONCE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """What zero points take from some blocks from ``first`` on, fp32 [rows, blocks]; for groups of
    whole blocks. ``places`` are those of rows ``n`` [rows, 1] among the codes of zero points."""
    blocks = matrix[4] // BLOCK
    block = (first + tl.arange(0, AT_ONCE))[None, :]
    inside = block < blocks
    block = tl.minimum(block, blocks - 1)
    sums = tl.where(inside, load_float(x_sums + block, EMULATE), 0.0)
    g = block * BLOCK // GROUP
    scale, zero = load_scale_and_zero(matrix, n, places, g, GROUP, BITS, EMULATE)
    return scale * zero * sums


@triton.jit
def last_columns(
    planes, row, matrix, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products with the columns behind the last full block, fp32 [rows], for activations as
    integers."""
    columns = matrix[4]
    total = tl.zeros((BN, 32), tl.float32)
    for start in range(columns // BLOCK * BLOCK, columns, 32):
        k = start + tl.arange(0, 32)
        inside = (k < columns)[None, :]
        code = gathered_codes(row[:, None], k[None, :], columns, inside, BITS)
        scale, zero = scale_and_zero(matrix, n[:, None], (k // GROUP)[None, :], inside, GROUP, BITS)
        value = tl.zeros((32,), tl.float32)
        for i in tl.static_range(PLANES):
            at = place_in_plane(k, columns) + i * (tl.cdiv(columns, BLOCK) * BLOCK)
            value = 256 * value + tl.load(planes + at, mask=k < columns, other=0).to(tl.float32)
        total += scale * (code.to(tl.float32) - zero) * value[None, :]
    return tl.sum(total, 1)


@triton.jit
def quads_from(first, blocks, BITS: tl.constexpr, QUADS: tl.constexpr):
    """Blocks, and quads within them, of QUADS quads from block ``first`` on, [1, QUADS] each, and
    where there are such; elsewhere it is the last block."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    quad = (tl.arange(0, QUADS) % WIDTH)[None, :]
    block = (first + tl.arange(0, QUADS) // WIDTH)[None, :]
    return tl.minimum(block, blocks - 1), quad, block < blocks


@triton.jit
def load_weights(
    matrix, words, n, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, EMULATE: tl.constexpr, ALIGNED: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    """What :func:`block_products` takes from a matrix: words of quads, and their scales where
    groups are whole blocks."""
    block, quad, _ = quads_from(first, matrix[4] // BLOCK, BITS, QUADS)
    # At 3 bits what is behind them in the same lines is read too.
    loaded = load_quad(words + (block * (4 * BITS) + quad * 4), BITS == 3, ALIGNED, EMULATE)
    if GROUP % 128 == 0:
        scales = scale_pointers(matrix, n, block * BLOCK // GROUP, GROUP)
        return loaded, load_half(scales, EMULATE)
    else:  # noqa: RET505 - both branches are compiled unless one is left out here
        return (loaded,)


@triton.jit
def block_products(
    loaded, activations, matrix, words, n, places, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, EMULATE: tl.constexpr,
    ALIGNED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Products of rows ``n`` [rows, 1] in QUADS quads from block ``first`` on, fp32 [rows, QUADS];
    0 behind the last block. ``loaded`` of :func:`load_weights`, ``words`` int32 pointers to the
    rows, ``places`` theirs among the codes of zero points, which are left out where groups are
    whole blocks."""
    planes, x_scales, _ = activations
    columns = matrix[4]
    block, quad, inside = quads_from(first, columns // BLOCK, BITS, QUADS)
    factor = tl.where(inside, load_float(x_scales + block, EMULATE), 0.0)
    codes = quad_codes(loaded[0], words, block, quad, BITS, ALIGNED, EMULATE)
    step = tl.cdiv(columns, BLOCK) * 4  # from one chunk of a block to the next, in int32
    x = planes.to(tl.pointer_type(tl.int32)) + block * 4 + quad * step
    if GROUP % 128 == 0:
        return factor * loaded[1] * quad_products(codes, x, step, BITS, PLANES, EMULATE)
    else:  # noqa: RET505
        return factor * scaled_products(
            codes, x, step, matrix, n, places, block, quad, BITS, GROUP, PLANES, EMULATE
        )


@triton.jit
def dot_rows(
    activations, matrix, n,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, EMULATE: tl.constexpr,
    OVERLAP: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr,
    QUADS: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of a matrix times the activations of a slot, fp32 [rows].

    QUADS quads of each row at a time, of one block or of several. What :func:`load_weights` gives
    is loaded while the quads before are multiplied, and the first of it while the kernel before may
    still run; but not with TAIL, where there may be no whole block.
    """
    AT_ONCE: tl.constexpr = QUADS // (2 if BITS == 3 else BITS)
    planes, x_scales, x_sums = activations
    _, _, _, rows, columns = matrix
    blocks = columns // BLOCK
    row = matrix[0] + n.to(tl.int64) * (padded(columns) * BITS // 8)
    words = row.to(tl.pointer_type(tl.int32))[:, None]
    numbers = n[:, None]
    places = code_places(numbers, rows, BITS)
    products = tl.zeros((BN, QUADS), tl.float32)
    offsets = tl.zeros((BN, AT_ONCE), tl.float32)
    if not TAIL:
        loaded = load_weights(matrix, words, numbers, 0, BITS, GROUP, EMULATE, ALIGNED, QUADS)
    if OVERLAP:
        wait_for_last()
    for first in range(0, blocks, AT_ONCE):
        at = first if TAIL else first + AT_ONCE
        following = load_weights(matrix, words, numbers, at, BITS, GROUP, EMULATE, ALIGNED, QUADS)
        if TAIL:
            loaded = following
        products += block_products(
            loaded, activations, matrix, words, numbers, places, first,
            BITS, GROUP, PLANES, EMULATE, ALIGNED, QUADS,
        )  # fmt: skip
        if GROUP % 128 == 0:
            offsets += block_offsets(
                x_sums, matrix, numbers, places, first, GROUP, BITS, AT_ONCE, EMULATE
            )
        loaded = following
    total = tl.sum(products, 1) - tl.sum(offsets, 1)
    if TAIL:
        rest = last_columns(planes, row, matrix, n, BITS, GROUP, PLANES, BN)
        total += rest * tl.load(x_scales + blocks)
    return total


@triton.jit
def grouped_gemv(
    planes, x_scales, x_sums, out, chosen, table, weights, rows, columns,
    WIDTHS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PLANES: tl.constexpr,
    EMULATE: tl.constexpr, OVERLAP: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr,
    BN: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """One matrix of the chosen experts times their activations; grid (row tiles, k, T).

    ``planes``, ``x_scales`` and ``x_sums`` are those of :func:`round_activations` for x [T, K].
    ``chosen`` [T · k] gives the expert of each slot, ``table`` int32 [experts + 1, 2] its width
    (0: none) and its place among those of that width, ``weights`` the stacked tensors of each of
    ``WIDTHS``. ``out`` is [T · k, R], or with GATED [T · k, R/2]: SiLU of the first half of the
    rows times the second half.

    With ALIGNED the rows of weights begin at multiples of 16 bytes. With OVERLAP it may be launched
    before ``round_activations`` has ended, but not before ``chosen`` and ``weights`` are there.
    """
    if OVERLAP:
        let_next_begin()
    source = tl.program_id(2).to(tl.int64)
    slot = source * tl.num_programs(1) + tl.program_id(1)
    # Experts are chosen anew for each token: not what a nearer cache had before.
    expert = tl.load(chosen + slot, cache_modifier=".cg")
    width, place = tl.load(table + 2 * expert), tl.load(table + 2 * expert + 1)
    blocks = tl.cdiv(columns, BLOCK)
    activations = (
        planes + source * (PLANES * BLOCK * blocks),
        x_scales + source * blocks,
        x_sums + source * blocks,
    )
    STEP: tl.constexpr = BN // 2 if GATED else BN
    height = rows // 2 if GATED else rows
    lane = tl.arange(0, BN)
    m = tl.program_id(0) * STEP + lane % STEP
    n = lane // STEP * height + tl.minimum(m, height - 1)
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        if width == WIDTHS[i]:
            matrix = matrix_at(weights[i], place, rows, columns, GROUP, WIDTHS[i])
            total = dot_rows(
                activations, matrix, n,
                WIDTHS[i], GROUP, PLANES, EMULATE, OVERLAP, ALIGNED, TAIL, BN, QUADS,
            )  # fmt: skip
    if OVERLAP:  # also where there was nothing to do: what waits for this kernel counts on it
        wait_for_last()
    out += slot * height + tl.program_id(0) * STEP
    at = tl.arange(0, STEP)
    if GATED:
        gate, up = tl.split(tl.reshape(total, (2, STEP)).trans(1, 0))
        total = gate * tl.sigmoid(gate) * up
    if width > 0:
        tl.store(out + at, total, mask=tl.program_id(0) * STEP + at < height)

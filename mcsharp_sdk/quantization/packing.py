"""Byte-planar packing of 1-, 2-, 3-, 4- and 8-bit codes.

The columns are cut into blocks of ``BLOCK`` = 128, whatever the quantisation group size. The last
block holds what is left, padded with zero codes to a multiple of 8. A b-bit part (b = 1, 2, 4, 8)
of a block of T columns takes T·b/8 bytes; field t of byte c (bits b·t to b·t+b-1) holds the code of
column (T·b/8)·t + c. A width that is no power of two is stored as several parts, low bits first:
3 bits = a 2-bit part followed by a 1-bit part. Full blocks therefore take exactly b bits per code,
and one shift and mask of consecutive bytes yields consecutive columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128
"""Columns per block."""

PARTS: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bit width -> widths of the parts that it is stored in, low bits first."""


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes that ``columns`` codes of ``bits`` bits take in one row.

    Raises
    ------
    ValueError
        If the width is not supported or ``columns`` is negative.
    """
    _check_width(bits)
    if columns < 0:
        raise ValueError(f"columns must not be negative, got {columns}")
    return _padded(columns) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Parameters
    ----------
    codes : uint8 [..., K], each below 2**bits.
    bits : width of a code.

    Returns
    -------
    uint8 [..., packed_bytes(K, bits)], contiguous.

    Raises
    ------
    ValueError
        If the width is not supported, ``codes`` is not uint8, or a code does not fit.
    """
    _check_width(bits)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        given = f"a tensor of {codes.dtype}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"codes must be uint8 in a torch tensor, got {given}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    columns = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, _padded(columns) - columns))
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(columns, bits)))
    for code_block, packed_block in zip(
        _blocks(codes, BLOCK), _blocks(packed, BLOCK * bits // 8), strict=True
    ):
        _pack_blocks(code_block, bits, packed_block)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`.

    Parameters
    ----------
    packed : uint8 [..., packed_bytes(columns, bits)]
    bits : width of a code.
    columns : number of codes in a row, K.

    Returns
    -------
    uint8 [..., K]; a view of a longer buffer where K is not a multiple of 8.

    Raises
    ------
    ValueError
        If the width is not supported, ``packed`` is not uint8 or has another row length.
    """
    expected = packed_bytes(columns, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise ValueError(
            f"{columns} columns of {bits} bits are {expected} bytes of uint8, "
            f"got {packed.shape[-1]} of {packed.dtype}"
        )
    codes = packed.new_empty((*packed.shape[:-1], _padded(columns)))
    for packed_block, code_block in zip(
        _blocks(packed, BLOCK * bits // 8), _blocks(codes, BLOCK), strict=True
    ):
        _unpack_blocks(packed_block, bits, code_block)
    return codes[..., :columns]


def _check_width(bits: int) -> None:
    if bits not in PARTS:
        raise ValueError(f"no packing for {bits} bits; supported widths are {sorted(PARTS)}")


def _padded(columns: int) -> int:
    return -(-columns // 8) * 8


def _blocks(rows: Tensor, length: int) -> Iterator[Tensor]:
    """Views [..., n, length] of the full blocks and [..., 1, rest] of the last, short one."""
    total = rows.shape[-1]
    full = total // length * length
    if full:
        yield rows[..., :full].unflatten(-1, (full // length, length))
    if full < total:
        yield rows[..., full:].unsqueeze(-2)


def _fields(codes: Tensor, packed: Tensor, bits: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Of each part: lowest bit, width, codes [..., n, fields, c], bytes [..., n, c]."""
    columns = codes.shape[-1]
    low, start = 0, 0
    for width in PARTS[bits]:
        length = columns * width // 8
        yield (
            low,
            width,
            codes.unflatten(-1, (8 // width, length)),
            packed.narrow(-1, start, length),
        )
        low, start = low + width, start + length


def _pack_blocks(codes: Tensor, bits: int, packed: Tensor) -> None:
    for low, width, fields, part in _fields(codes, packed, bits):
        for t in range(8 // width):
            part |= ((fields[..., t, :] >> low) & (2**width - 1)) << (width * t)


def _unpack_blocks(packed: Tensor, bits: int, codes: Tensor) -> None:
    for low, width, fields, part in _fields(codes, packed, bits):
        # A later part goes through contiguous scratch: `|=` on strided fields is five times slower.
        target = torch.empty_like(fields) if low else fields
        for t in range(8 // width):
            torch.bitwise_and(part >> (width * t), 2**width - 1, out=target[..., t, :])
        if low:
            codes |= (target << low).flatten(-2)

"""The grid: how a code, a scale and a zero-point code make a weight.

    weight = scale · (code − zero),   zero = (2^bits − 1)/2 + ZERO_STEP · zero_code

Each row has one fp16 scale and one zero-point code of ``bits`` bits per group of ``group_size``
columns; the last group may be shorter. The scale may be negative: its sign says to which side of
the grid's middle the zero point lies. So a code of b bits reaches zero points on both sides of the
middle, in steps much finer than a level, and code 0 is the symmetric grid (at 1 bit: ±scale/2).
Against whole-number zero points this lowers the 2-bit GPTQ error by about an eighth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsharp_sdk.quantization.packing import PARTS, pack, packed_bytes, unpack

ZERO_STEP = 0.25
"""Distance of neighbouring zero points, in units of the scale. Part of the format."""

WIDTHS: tuple[int, ...] = tuple(PARTS)
"""The bit widths that can be quantised to and stored."""

REMOVED = 0
"""The width of an expert that is removed: its weights count as zeros, and are not stored."""


def top_code(bits: int) -> int:
    """Largest code of a width; ValueError if the width is not supported."""
    if bits not in WIDTHS:
        raise ValueError(f"no grid of {bits} bits; supported widths are {list(WIDTHS)}")
    return int(2**bits) - 1


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns`` columns; the last may be short.

    ValueError if ``group_size`` is not positive.
    """
    if group_size < 1:
        raise ValueError(f"a group has 1 column or more, not {group_size}")
    return -(-columns // group_size)


def zero_points(zero_codes: Tensor, bits: int) -> Tensor:
    """Zero points in units of the scale, fp32, from their codes (uint8, any shape)."""
    return zero_codes.float().mul_(ZERO_STEP).add_(top_code(bits) / 2)


def zero_codes(zeros: Tensor, bits: int) -> Tensor:
    """Codes, uint8, of zero points on the grid, in units of the scale; any shape."""
    return ((zeros - top_code(bits) / 2) / ZERO_STEP).round().to(torch.uint8)


@dataclass(frozen=True)
class QuantizedWeight:
    """Weights at one bit width, not yet packed.

    Attributes
    ----------
    codes : uint8 [..., R, K], each below 2**bits.
    scales : fp16 [..., R, G], G = ceil(K / group_size); may be negative.
    zeros : uint8 [..., R, G], zero-point codes, each below 2**bits.
    bits : the width.
    group_size : columns that share a scale and a zero point.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int


@dataclass(frozen=True)
class QuantizedBatch:
    """Weights of several experts, each at its own width.

    Attributes
    ----------
    codes : uint8 [E, R, K]
    scales : fp16 [E, R, G]
    zeros : uint8 [E, R, G], zero-point codes.
    bits : the width of each expert, length E.
    group_size : columns that share a scale and a zero point.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: tuple[int, ...]
    group_size: int

    def __len__(self) -> int:
        return len(self.bits)

    def expert(self, index: int) -> QuantizedWeight:
        """One expert's weight, [R, K]."""
        return QuantizedWeight(
            self.codes[index],
            self.scales[index],
            self.zeros[index],
            self.bits[index],
            self.group_size,
        )

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All experts' weights, [E, R, K]."""
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for index in range(len(self)):
            out[index] = dequantise(self.expert(index))
        return out


@dataclass(frozen=True)
class PackedWeight:
    """Weights at one width as stored.

    Attributes
    ----------
    qweight : uint8 [..., R, packed_bytes(K, bits)], packed along the columns.
    scales : fp16 [..., R, G]
    zeros : uint8 [..., G, packed_bytes(R, bits)], zero-point codes packed along the rows.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor


def dequantise(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that the codes stand for, [..., R, K]; fp32 arithmetic, rounded once."""
    zeros = zero_points(weight.zeros, weight.bits)
    return _scale_codes(weight.codes, weight.scales.float(), zeros, weight.group_size, dtype)


def pack_weight(weight: QuantizedWeight) -> PackedWeight:
    """Pack codes along the columns and zero-point codes along the rows."""
    return PackedWeight(
        pack(weight.codes, weight.bits),
        weight.scales.contiguous(),
        pack(weight.zeros.transpose(-1, -2), weight.bits),
    )


def unpack_weight(
    packed: PackedWeight, *, bits: int, group_size: int, columns: int
) -> QuantizedWeight:
    """Inverse of :func:`pack_weight`; ``columns`` is K, the rows follow from the scales."""
    rows = packed.scales.shape[-2]
    zeros = unpack(packed.zeros, bits, rows).transpose(-1, -2)
    return QuantizedWeight(
        unpack(packed.qweight, bits, columns), packed.scales, zeros, bits, group_size
    )


def dequantise_packed(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights from their stored form, for one matrix, a batch of them, or a slice of rows.

    Parameters
    ----------
    qweight, scales, zeros : as in :class:`PackedWeight`. For the rows r0 to r1 of a matrix (r0 a
        multiple of 128, r1 too or the end) give ``qweight[..., r0:r1, :]``,
        ``scales[..., r0:r1, :]`` and ``zeros[..., packed_bytes(r0, bits):packed_bytes(r1, bits)]``.
    columns : K.
    dtype : of the result; arithmetic is fp32.

    Returns
    -------
    [..., R, K] of ``dtype``.
    """
    weight = unpack_weight(
        PackedWeight(qweight, scales, zeros), bits=bits, group_size=group_size, columns=columns
    )
    return dequantise(weight, dtype)


def packed_rows(packed: PackedWeight, bits: int, start: int, stop: int) -> PackedWeight:
    """Views of the rows ``start`` to ``stop``, both multiples of 128 or the end."""
    return PackedWeight(
        packed.qweight[..., start:stop, :],
        packed.scales[..., start:stop, :],
        packed.zeros[..., packed_bytes(start, bits) : packed_bytes(stop, bits)],
    )


def check_widths(bits: Sequence[int], experts: int) -> tuple[int, ...]:
    """``bits`` as a tuple, one supported width per expert; ValueError otherwise."""
    widths = tuple(int(width) for width in bits)
    if len(widths) != experts:
        raise ValueError(f"{experts} experts need as many widths, got {len(widths)}")
    for width in widths:
        top_code(width)
    return widths


def _scale_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """scale · (code − zero) group by group; scales and zeros fp32 [..., R, G]."""
    columns = codes.shape[-1]
    full = columns // group_size
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if full:
        split = (full, group_size)
        body = out[..., : full * group_size].unflatten(-1, split)
        torch.sub(
            codes[..., : full * group_size].unflatten(-1, split),
            zeros[..., :full, None],
            out=body,
        )
        body.mul_(scales[..., :full, None])
    if full * group_size < columns:
        tail = out[..., full * group_size :]
        torch.sub(codes[..., full * group_size :], zeros[..., full:], out=tail)
        tail.mul_(scales[..., full:])
    return out.to(dtype)

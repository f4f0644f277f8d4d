"""Grid and storage of quantised weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.quantization import (
    PackedWeight,
    QuantizedWeight,
    dequantise,
    dequantise_packed,
    pack_weight,
    packed_rows,
    unpack_weight,
)
from mcsharp_sdk.quantization.grid import zero_codes, zero_points


def random_weight(
    bits: int, shape: tuple[int, ...], group_size: int, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    *lead, columns = shape
    grid = (*lead, -(-columns // group_size))
    return QuantizedWeight(
        torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator),
        torch.randn(grid, generator=generator).half(),
        torch.randint(0, 2**bits, grid, dtype=torch.uint8, generator=generator),
        bits,
        group_size,
    )


def stored_bytes(packed: PackedWeight) -> int:
    tensors = (packed.qweight, packed.scales, packed.zeros)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 150), st.integers(1, 150), st.integers(1, 140)
)
def test_dequantising_is_the_formula_weight_by_weight(
    bits: int, rows: int, columns: int, group_size: int
) -> None:
    weight = random_weight(bits, (rows, columns), group_size)
    row, column = rows // 2, columns - 1
    group = column // group_size
    zero = (2**bits - 1) / 2 + 0.25 * int(weight.zeros[row, group])
    expected = float(weight.scales[row, group]) * (int(weight.codes[row, column]) - zero)
    assert float(dequantise(weight)[row, column]) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 150), st.integers(1, 150), st.integers(1, 140)
)
def test_packing_keeps_every_number(bits: int, rows: int, columns: int, group_size: int) -> None:
    weight = random_weight(bits, (2, rows, columns), group_size)
    packed = pack_weight(weight)
    back = unpack_weight(packed, bits=bits, group_size=group_size, columns=columns)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.zeros, weight.zeros)
    assert torch.equal(back.scales, weight.scales)
    groups = math.ceil(columns / group_size)
    codes, zeros = (math.ceil(count / 8) * bits for count in (columns, rows))
    assert stored_bytes(packed) == 2 * (rows * codes + rows * groups * 2 + groups * zeros)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_of_zero_points_are_those_that_they_come_from(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    assert torch.equal(zero_codes(zero_points(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_can_be_dequantised_in_pieces(bits: int) -> None:
    weight = random_weight(bits, (300, 200), 64)
    packed = pack_weight(weight)
    pieces = []
    for start in range(0, 300, 128):
        piece = packed_rows(packed, bits, start, min(start + 128, 300))
        pieces.append(
            dequantise_packed(
                piece.qweight,
                piece.scales,
                piece.zeros,
                bits=bits,
                group_size=64,
                columns=200,
                dtype=torch.bfloat16,
            )
        )
    assert torch.equal(torch.cat(pieces), dequantise(weight).bfloat16())


def test_stored_bits_are_width_plus_scale_and_zero_point_per_group() -> None:
    bits = stored_bytes(pack_weight(random_weight(2, (64, 256), 64))) * 8 / (64 * 256)
    assert bits == 2 + 16 / 64 + 2 / 64


def test_packed_weight_of_wrong_length_is_refused() -> None:
    packed = pack_weight(random_weight(2, (16, 100), 32))
    short = PackedWeight(packed.qweight[:, :-1], packed.scales, packed.zeros)
    with pytest.raises(ValueError, match="100 columns of 2 bits"):
        unpack_weight(short, bits=2, group_size=32, columns=100)

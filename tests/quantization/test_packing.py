"""The packed layout, against a definition of one code at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.quantization.packing import PARTS, pack, packed_bytes, unpack

WIDTHS = sorted(PARTS)


def code_by_definition(row: list[int], column: int, bits: int, columns: int) -> int:
    """The code of one column, read from packed bytes as the format's definition says."""
    block, k = divmod(column, 128)
    length = min(128, -(-columns // 8) * 8 - 128 * block)
    start = block * 128 * bits // 8
    code, low = 0, 0
    for part in {1: [1], 2: [2], 3: [2, 1], 4: [4], 8: [8]}[bits]:
        part_bytes = length * part // 8
        field, byte = divmod(k, part_bytes)
        value = row[start + byte] >> (field * part) & ((1 << part) - 1)
        code |= value << low
        low, start = low + part, start + part_bytes
    return code


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 300), st.integers(1, 3), st.integers(0, 2**31))
def test_any_number_of_columns_survives_packing(
    bits: int, columns: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (2, rows, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 8, 65, 128, 131, 384])
def test_layout_is_the_defined_one(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (columns,), dtype=torch.uint8)
    packed = pack(codes, bits).tolist()
    read = [code_by_definition(packed, column, bits, columns) for column in range(columns)]
    assert read == codes.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_full_blocks_take_exactly_the_nominal_bits(bits: int) -> None:
    assert packed_bytes(4096, bits) * 8 == 4096 * bits


def test_leading_dimensions_may_be_strided() -> None:
    codes = torch.randint(0, 8, (5, 7, 130), dtype=torch.uint8)
    turned = codes.transpose(0, 1)
    assert torch.equal(pack(turned, 3), pack(turned.contiguous(), 3))
    packed = pack(codes, 3)[:, 2:5]
    assert torch.equal(unpack(packed, 3, 130), codes[:, 2:5])


def test_what_cannot_be_packed_is_refused() -> None:
    codes = torch.full((4,), 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="code of 4 does not fit into 2 bits"):
        pack(codes, 2)
    with pytest.raises(ValueError, match="no packing for 5 bits"):
        pack(codes, 5)
    with pytest.raises(ValueError, match="must be uint8"):
        pack(codes.int(), 4)
    with pytest.raises(ValueError, match="9 columns of 2 bits are 4 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 2, 9)

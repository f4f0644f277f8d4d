"""Kernels against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.kernels import KERNELS, PackedMatrix, packed_linear
from mcsharp_sdk.quantization.grid import (
    WIDTHS,
    QuantizedWeight,
    dequantise,
    group_count,
    pack_weight,
)


def _random_matrix(
    rows: int, columns: int, bits: int, group: int, seed: int = 0
) -> tuple[PackedMatrix, torch.Tensor]:
    """A random packed matrix and what it stands for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(columns, group)
    top = 2**bits

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)

    scales = (torch.rand(rows, groups, generator=generator) + 0.5).half() * 0.1
    weight = QuantizedWeight(codes(rows, columns), scales, codes(rows, groups), bits, group)
    packed = PackedMatrix(pack_weight(weight), bits, group, columns)
    return packed, dequantise(weight).double()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    rows=st.sampled_from([1, 7, 128, 200]),
    columns=st.sampled_from([1, 33, 128, 192, 300]),
    group=st.sampled_from([16, 64, 128]),
    tokens=st.integers(0, 9),
)
def test_a_kernel_agrees_with_float64(
    kernel: str, bits: int, rows: int, columns: int, group: int, tokens: int
) -> None:
    matrix, exact = _random_matrix(rows, columns, bits, group)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    if not KERNELS[kernel].takes(x, matrix):
        return
    torch.testing.assert_close(
        KERNELS[kernel].run(x, matrix), (x.double() @ exact.t()).float(), rtol=1e-4, atol=1e-4
    )


def test_rows_beyond_one_chunk_are_all_computed() -> None:
    matrix, exact = _random_matrix(700, 4096, 2, 128)
    x = torch.randn(3, 4096)
    expected = (x.double() @ exact.t()).float()
    torch.testing.assert_close(packed_linear(x, matrix), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leading_dimensions_and_dtype_are_kept(dtype: torch.dtype) -> None:
    matrix, _ = _random_matrix(16, 64, 3, 64)
    out = packed_linear(torch.randn(2, 5, 64).to(dtype), matrix)
    assert out.shape == (2, 5, 16)
    assert out.dtype == dtype

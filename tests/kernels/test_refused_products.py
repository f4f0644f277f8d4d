"""Arguments that do not fit together are refused before a kernel reads or writes memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_linear import random_stack

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.kernels import Case, PackedMatrix, choose_kernel, packed_linear, packed_linears
from mcsharp_sdk.quantization.grid import PackedWeight, group_count
from mcsharp_sdk.quantization.packing import pack

STACK, _ = random_stack(2, 16, 256, 2, 64)
X = torch.ones(5, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize("counts", [[1, 1], [6, 0], [7, -2], [5], [2, 2, 1], []])
def test_counts_that_do_not_share_the_rows(counts: list[int]) -> None:
    with pytest.raises(InputError, match=r"counts \[.*\] do not share 5 rows among 2 matrices"):
        packed_linears(X, STACK, counts)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"bits": 4}, r"of 4 bits.*codes of uint8 \[1, 16, 128\].*not uint8 \[1, 16, 64\]"),
        ({"group_size": 32}, r"groups of 32.*scales of float16 \[1, 16, 8\]"),
        ({"group_size": 128}, r"groups of 128.*scales of float16 \[1, 16, 2\]"),
        ({"columns": 512}, r"16 x 512 weights.*codes of uint8 \[1, 16, 128\]"),
        ({"bits": 5}, "no packing for 5 bits"),
        ({"group_size": 0}, "a group has 1 column or more, not 0"),
    ],
)
def test_a_matrix_whose_tensors_are_of_another_form(form: dict[str, int], message: str) -> None:
    matrix: PackedMatrix = replace(STACK.matrix(0), **form)
    x = torch.ones(2, matrix.columns, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=message):
        packed_linear(x, matrix)


@pytest.mark.parametrize(
    "changed",
    [
        {"qweight": STACK.weight.qweight.int()},
        {"zeros": STACK.weight.zeros[:, :2]},
        {"scales": STACK.weight.scales.int()},
        {"scales": STACK.weight.scales[0]},
        {"scales": STACK.weight.scales.to("meta")},
        {"qweight": STACK.weight.qweight[:1]},
    ],
)
def test_a_stack_with_tensors_of_another_kind(changed: dict[str, Any]) -> None:
    parts = {part: getattr(STACK.weight, part) for part in ("qweight", "scales", "zeros")}
    with pytest.raises(InputError, match="scales"):
        packed_linears(X, replace(STACK, weight=PackedWeight(**{**parts, **changed})), [2, 3])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_activations_that_are_no_floats(dtype: torch.dtype, monkeypatch: Any) -> None:
    message = rf"activations are {dtype}; products take float16, bfloat16, float32, float64"
    with pytest.raises(InputError, match=message):
        choose_kernel(Case(16, 256, 2, 64, 5, dtype, "cpu"))
    monkeypatch.setenv("MCSHARP_KERNEL", "chunked")
    with pytest.raises(InputError, match=message):
        packed_linear(X.to(dtype), STACK.matrix(0))


@pytest.mark.parametrize("shape", [(5, 128), (2, 512), (128,), ()])
def test_activations_of_another_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"activations have shape \[.*\], not \[..., 256\]"):
        packed_linear(torch.ones(shape), STACK.matrix(0))


def test_activations_of_another_form_or_place() -> None:
    with pytest.raises(InputError, match=r"shape \[1, 5, 256\].*takes \[tokens, columns\] on cpu"):
        packed_linears(X[None], STACK, [2, 3])
    with pytest.raises(InputError, match="are on meta.*on cpu, where the matrices are"):
        packed_linear(X.to("meta"), STACK.matrix(0))


def test_what_fits_is_multiplied() -> None:
    assert packed_linear(X[0], STACK.matrix(0)).shape == (16,)
    assert packed_linear(X[:0], STACK.matrix(0)).shape == (0, 16)
    assert packed_linears(X, STACK, [5, 0]).shape == (5, 16)


def test_codes_of_numpy_and_groups_of_no_columns_are_named() -> None:
    codes: Any = np.zeros((2, 8), np.uint8)
    with pytest.raises(ValueError, match="codes must be uint8 in a torch tensor, got ndarray"):
        pack(codes, 2)
    with pytest.raises(ValueError, match="got a tensor of torch.int64"):
        pack(torch.zeros(2, 8, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="a group has 1 column or more, not 0"):
        group_count(10, 0)

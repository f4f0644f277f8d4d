"""Packed modules as operators that ``torch.compile`` takes as they are.

Kernels are chosen and launched by Python code that a compiler cannot follow. As operators of known
results they are steps of one graph, which can be recorded as a CUDA graph too. Without a compiler
modules are called directly.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mcsharp_sdk.kernels import PackedMatrix, packed_linear
from mcsharp_sdk.quantization.grid import PackedWeight

_experts: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def are_wanted(x: Tensor) -> bool:
    """Whether a compiler is looking, at a forward with no backward behind it."""
    return torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled())


def number_of(experts: Any) -> int:
    """A number that stands for an experts module, which has ``weighted_sum``, while it lives."""
    number = next(_numbers)
    _experts[number] = experts
    return number


@torch.library.custom_op("mcsharp::packed_linear", mutates_args=())
def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """x [..., K] times a packed matrix [R, K] -> [..., R], in x's dtype."""
    return packed_linear(
        x, PackedMatrix(PackedWeight(qweight, scales, zeros), bits, group_size, columns)
    )


@linear.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[-2])


@torch.library.custom_op("mcsharp::packed_experts", mutates_args=())
def experts(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, number: int) -> Tensor:
    """Weighted sum of the chosen experts of the module with this number, [T, hidden]."""
    return _experts[number].weighted_sum(hidden, top_k_index, top_k_weights).contiguous()


@experts.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)

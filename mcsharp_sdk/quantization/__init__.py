"""Quantisation as plain functions on tensors: grid, packing, Hessians, GPTQ, round-to-nearest.

Numbers are taken to be finite, and not looked at for it: what NaN or infinite weights become means
nothing. Weights of a model are checked when they are read, by
:func:`mcsharp_sdk.models.weight_checks.check_finite`.
"""

from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.grid import (
    WIDTHS,
    PackedWeight,
    QuantizedBatch,
    QuantizedWeight,
    dequantise,
    dequantise_packed,
    group_count,
    pack_weight,
    packed_rows,
    unpack_weight,
)
from mcsharp_sdk.quantization.hessian import (
    accumulate,
    complete_,
    diagonal_importance,
    squared_output_error,
)
from mcsharp_sdk.quantization.inverse_factor import InverseFactor, factorise
from mcsharp_sdk.quantization.packing import pack, packed_bytes, unpack
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings

__all__ = [
    "WIDTHS",
    "GridSettings",
    "InverseFactor",
    "PackedWeight",
    "QuantizedBatch",
    "QuantizedWeight",
    "accumulate",
    "complete_",
    "dequantise",
    "dequantise_packed",
    "diagonal_importance",
    "factorise",
    "group_count",
    "pack",
    "pack_weight",
    "packed_bytes",
    "packed_rows",
    "quantise_gptq",
    "quantise_rtn",
    "squared_output_error",
    "unpack",
    "unpack_weight",
]

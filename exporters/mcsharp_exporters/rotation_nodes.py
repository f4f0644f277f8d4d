"""Rows turned in a graph, as ``quantization.rotation`` turns the inputs of experts."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from mcsharp_exporters.model_nodes import ModelNodes
from mcsharp_exporters.packed_product import Operand
from mcsharp_sdk.quantization.rotation import expert_signs, rotation_factors


def turned(graph: ModelNodes, rows: Operand, expert: str, experts: int) -> Operand:
    """Rows (pairs, columns) times T of each one's expert, int64 (pairs,), of so many; in float32.

    Signs are stored as 8-bit numbers, and once for all layers, as the factors are.
    """
    factors = rotation_factors(rows.columns, torch.float32)
    a, b = map(len, factors)
    left, right = (graph.constant_once(factor.numpy()) for factor in factors)
    stored = graph.constant_once(expert_signs(experts, rows.columns).numpy().astype(np.int8))
    own = graph.add("Gather", stored, expert, axis=0)
    signs = graph.add("Cast", own, to=TensorProto.FLOAT)
    mixed = graph.add("Mul", graph.in_float32(rows.value), signs)
    # Products of two dimensions: there may be no rows, which onnxruntime takes in no others.
    for factor, size, other in ((right, b, a), (left, a, b)):  # both are symmetric
        flat = graph.add("Reshape", mixed, graph.integers(-1, size))
        product = graph.add("MatMul", flat, factor)
        apart = graph.add("Reshape", product, graph.integers(-1, other, size))
        mixed = graph.add("Transpose", apart, perm=[0, 2, 1])
    whole = graph.add("Reshape", mixed, graph.integers(-1, rows.columns))
    return Operand(graph, graph.from_float32(graph.add("Mul", whole, signs)), rows.columns)

"""Linear layers and norms of a whole model's graph, packed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mcsharp_exporters.model_nodes import ModelNodes
from mcsharp_exporters.model_tensors import LayerTensors, Weight, join_rows, take_rows
from mcsharp_exporters.packed_product import Operand, packed_products


def linear(
    graph: ModelNodes, operand: Operand, weights: Sequence[Weight], what: str, *biases: Tensor
) -> str:
    """x Wᵀ + b for matrices that stand below each other: (tokens, all their rows).

    Parameters
    ----------
    weights : matrices [R, K]; those of one width are multiplied at once.
    what : names the weights in an error.
    biases : none, or one [R] per matrix.
    """
    outputs = [_product(graph, operand, weight, what) for weight in join_rows(list(weights))]
    output = outputs[0] if len(outputs) == 1 else graph.add("Concat", *outputs, axis=-1)
    if not biases:
        return output
    return graph.add("Add", output, graph.weight(torch.cat(biases), f"bias of {what}"))


def linear_layers(
    graph: ModelNodes,
    layer: LayerTensors,
    operand: Operand,
    *paths: str,
    rows: Tensor | None = None,
) -> str:
    """Linear layers of a decoder layer that read the same input, side by side.

    Parameters
    ----------
    rows : of a single layer, the order in which its outputs are wanted.
    """
    weights = [layer.linear(path) for path in paths]
    biases = [bias for path in paths if (bias := layer.bias(path)) is not None]
    if biases and len(biases) < len(paths):
        zeros = [torch.zeros(rows_of(weight), dtype=biases[0].dtype) for weight in weights]
        found = [layer.bias(path) for path in paths]
        biases = [zero if b is None else b for zero, b in zip(zeros, found, strict=True)]
    if rows is not None:
        weights = [take_rows(weights[0], rows)]
        biases = [bias[rows] for bias in biases]
    return linear(graph, operand, weights, f"layer {layer.index}: {paths[0]}", *biases)


def rows_of(weight: Weight) -> int:
    """R of a matrix [R, K]."""
    return len(weight) if isinstance(weight, Tensor) else len(weight.codes)


def gated_mlp(graph: ModelNodes, layer: LayerTensors, operand: Operand, path: str) -> str:
    """down(silu(gate(x)) · up(x)) of the module at ``path``: (tokens, hidden)."""
    width = layer.module(f"{path}.gate_proj").out_features
    both = linear_layers(graph, layer, operand, f"{path}.gate_proj", f"{path}.up_proj")
    gate, up = graph.parts(both, width, width)
    inner = Operand(graph, graph.add("Mul", graph.silu(gate), up), width)
    return linear_layers(graph, layer, inner, f"{path}.down_proj")


def norm(graph: ModelNodes, value: str, weight: Tensor, module: Any, what: str) -> str:
    """Root-mean-square norm over the last axis, computed in float32.

    Parameters
    ----------
    module : the norm, which knows its epsilon.
    """
    exact = graph.in_float32(value)
    square = graph.add("Pow", exact, graph.scalar(2.0))
    mean = graph.add("ReduceMean", square, graph.integers(-1), keepdims=1)
    root = graph.add("Sqrt", graph.add("Add", mean, graph.scalar(module.variance_epsilon)))
    normal = graph.from_float32(graph.add("Div", exact, root))
    return graph.add("Mul", normal, graph.weight(weight, what))


def layer_norm(graph: ModelNodes, layer: LayerTensors, value: str, path: str) -> str:
    """The norm at ``path`` of a decoder layer."""
    weight = layer.tensor(f"{path}.weight")
    return norm(graph, value, weight, layer.module(path), f"layer {layer.index}: {path}")


def _product(graph: ModelNodes, operand: Operand, weight: Weight, what: str) -> str:
    if isinstance(weight, Tensor):
        return graph.add("Gemm", operand.value, plain_matrix(graph, weight, what), transB=1)
    (product,) = packed_products(graph, [weight])
    sums = operand.sums(product.block) if product.correction else None
    return product.apply(graph, operand.value, sums)


def plain_matrix(graph: ModelNodes, weight: Tensor, what: str) -> str:
    """Store a matrix that is not packed; its value in the model's precision."""
    graph.matrices.plain_weights += weight.numel()
    graph.matrices.plain_bytes += weight.nbytes
    return graph.weight(weight, what)

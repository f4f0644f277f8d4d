"""A mixture of experts in a whole model's graph: one dispatch, packed experts, one sum.

Tokens are sorted by expert with one ``NonZero`` and handed out with one ``Split``. An expert that
no token chose gets no rows, so its products cost next to nothing; a dropped slot has weight 0 and
is not handed out at all, and neither is one of an expert that is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper
from torch import Tensor

from mcsharp_exporters.linear_nodes import gated_mlp, linear_layers, plain_matrix
from mcsharp_exporters.model_nodes import ModelNodes
from mcsharp_exporters.model_tensors import LayerTensors, Weight
from mcsharp_exporters.packed_product import Operand, PackedProduct, packed_products
from mcsharp_exporters.pruning_graph import LayerPruning
from mcsharp_exporters.rotation_nodes import turned
from mcsharp_exporters.router_graph import route_nodes
from mcsharp_sdk.models.experts import Matrix
from mcsharp_sdk.models.routing import Router

SHARED_EXPERTS = ("shared_experts", "shared_expert")
"""Names, beside the routed experts, of an MLP that every token goes through."""

SHARED_GATE = "shared_expert_gate"
"""A linear layer whose sigmoid scales the shared expert's output (qwen2_moe)."""

ZERO = numpy_helper.from_array(np.zeros(1, np.float32))
"""What ``ConstantOfShape`` fills with."""


def mixture(graph: ModelNodes, layer: LayerTensors, hidden: Operand, pruning: LayerPruning) -> str:
    """The output of a layer's mixture of experts, (tokens, hidden)."""
    router = layer.router()
    pruning.check(router)
    stored = layer.stored_experts
    handed = _hand_out(graph, router, stored, hidden, pruning)
    chosen = _ExpertRows(graph, handed.counts, stored)
    rows = Operand(graph, graph.add("Gather", hidden.value, handed.tokens, axis=0), hidden.columns)
    if layer.source.layout.rotated:
        rows = turned(graph, rows, handed.experts, router.experts)
    both = chosen.multiply(layer, "gate_up", rows)
    width = layer.module(layer.source.topology.moe[layer.index].experts).intermediate_dim
    gate, up = graph.parts(both, width, width)
    inner = Operand(graph, graph.add("Mul", graph.silu(gate), up), width)
    if layer.source.layout.rotated:
        inner = turned(graph, inner, handed.experts, router.experts)
    output = graph.in_float32(chosen.multiply(layer, "down", inner))
    weighed = graph.add("Mul", output, graph.add("Unsqueeze", handed.weights, graph.integers(1)))
    places = graph.add("Unsqueeze", handed.tokens, graph.integers(1))
    nothing = graph.add("ConstantOfShape", graph.add("Shape", hidden.value), value=ZERO)
    total = graph.add("ScatterND", nothing, places, weighed, reduction="add")
    return _with_shared(graph, layer, hidden, graph.from_float32(total))


@dataclass(frozen=True)
class _Handed:
    """Which tokens go to which expert.

    ``tokens`` int64 (pairs,) sorted by expert, ``experts`` int64 (pairs,), ``weights`` float32
    (pairs,), ``counts`` int64 (stored experts,).
    """

    tokens: str
    experts: str
    weights: str
    counts: str


def _hand_out(
    graph: ModelNodes,
    router: Router,
    stored: Sequence[int],
    hidden: Operand,
    pruning: LayerPruning,
) -> _Handed:
    exact = graph.in_float32(hidden.value)
    weight = graph.stored(router.weight.t())
    weight = graph.add("Cast", weight, to=TensorProto.FLOAT)
    indices, weights = route_nodes(graph, router, exact, weight, pruning)[:2]
    tokens = graph.add("Shape", hidden.value, end=1)
    shape = graph.add("Concat", tokens, graph.integers(router.experts), axis=0)
    nothing = graph.add("ConstantOfShape", shape, value=ZERO)
    by_token = graph.add("ScatterElements", nothing, indices, weights, axis=1)
    by_expert = graph.add("Transpose", by_token, perm=[1, 0])
    if len(stored) < router.experts:
        by_expert = graph.add("Gather", by_expert, graph.integers(*stored), axis=0)
    pairs = graph.add("NonZero", by_expert)
    places, token = (
        graph.add("Gather", pairs, graph.constant(np.array(row, np.int64)), axis=0)
        for row in range(2)
    )
    numbers = graph.constant_once(np.array(stored, np.int64))
    unused = graph.add("Equal", by_expert, graph.scalar(0.0))
    used = graph.add("Cast", graph.add("Not", unused), to=TensorProto.INT64)
    return _Handed(
        tokens=token,
        experts=graph.add("Gather", numbers, places, axis=0),
        weights=graph.add("GatherND", by_expert, graph.add("Transpose", pairs, perm=[1, 0])),
        counts=graph.add("ReduceSum", used, graph.integers(1), keepdims=0),
    )


@dataclass(frozen=True)
class _ExpertRows:
    """The rows of each expert that is stored, in order of expert."""

    graph: ModelNodes
    counts: str
    experts: Sequence[int]

    def multiply(self, layer: LayerTensors, matrix: Matrix, rows: Operand) -> str:
        """Each expert's rows times its matrix: (pairs, rows of the matrix)."""
        products = self._store([layer.expert(matrix, e) for e in self.experts], layer, matrix)
        values = self._split(rows.value)
        packed = [p for p in products if isinstance(p, PackedProduct)]
        sums: Sequence[str | None] = [None] * len(products)
        if any(p.correction for p in packed):
            sums = self._split(rows.sums(packed[0].block))
        outputs = [
            product.apply(self.graph, value, total)
            if isinstance(product, PackedProduct)
            else self.graph.add("Gemm", value, product, transB=1)
            for product, value, total in zip(products, values, sums, strict=True)
        ]
        return self.graph.add("Concat", *outputs, axis=0)

    def _store(
        self, weights: list[Weight], layer: LayerTensors, matrix: Matrix
    ) -> Sequence[PackedProduct | str]:
        """All packed, or none is."""
        packed = [weight for weight in weights if not isinstance(weight, Tensor)]
        if packed:
            gone = layer.source.topology.moe[layer.index].num_experts - len(packed)
            self.graph.matrices.weights += gone * packed[0].codes.numel()  # at 0 bits
            return packed_products(self.graph, packed)
        what = f"layer {layer.index}: {matrix} of expert"
        return [
            plain_matrix(self.graph, weight, f"{what} {e}")
            for e, weight in zip(self.experts, weights, strict=True)
            if isinstance(weight, Tensor)
        ]

    def _split(self, value: str) -> list[str]:
        return self.graph.add_many("Split", [value, self.counts], len(self.experts), axis=0)


def _with_shared(graph: ModelNodes, layer: LayerTensors, hidden: Operand, routed: str) -> str:
    """The routed experts' output, and beside it that of shared ones where there are any."""
    owner = layer.source.topology.moe[layer.index].experts.rpartition(".")[0]
    for name in SHARED_EXPERTS:
        if layer.has(f"{owner}.{name}"):
            shared = gated_mlp(graph, layer, hidden, f"{owner}.{name}")
            if layer.has(f"{owner}.{SHARED_GATE}"):
                gate = linear_layers(graph, layer, hidden, f"{owner}.{SHARED_GATE}")
                shared = graph.add("Mul", graph.add("Sigmoid", gate), shared)
            routed = graph.add("Add", routed, shared)
    return routed

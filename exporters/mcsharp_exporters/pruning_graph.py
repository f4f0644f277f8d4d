"""A layer's expert pruning in ONNX operators: what :mod:`mcsharp_sdk.pruning` computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mcsharp_exporters.graph_names import PROTECTED
from mcsharp_exporters.graph_nodes import GraphNodes
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.routing import Router
from mcsharp_sdk.pruning.top_any import RMS_EPSILON
from mcsharp_sdk.runtime.pruning_modes import PruningMode

FIRST_WEIGHT, FIRST_BIAS = "first.weight", "first.bias"
SECOND_WEIGHT, SECOND_BIAS = "second.weight", "second.bias"


@dataclass(frozen=True, eq=False)
class LayerPruning:
    """How one layer's router prunes.

    Attributes
    ----------
    mode : ``off``, ``rule``, ``learned``, or ``both``: learned, but tokens that are protected keep
        all experts.
    thresholds : one per rank from 1 (k - 1 of them), of mode ``rule``; None if the rule leaves the
        layer alone.
    network : of modes ``learned`` and ``both``: the parameters of a
        :class:`mcsharp_sdk.pruning.top_any.TopAnyNetwork` by name; None if the layer has none.
    protects : modes ``rule`` and ``both`` protect tokens; otherwise weights and network decide.
    """

    mode: PruningMode = "off"
    thresholds: tuple[float, ...] | None = None
    network: Mapping[str, Tensor] | None = None
    protects: bool = True

    @property
    def takes_protected(self) -> bool:
        """Whether the graph has the input ``protected``, be the layer itself pruned or not."""
        return self.protects and self.mode in ("rule", "both")

    @property
    def units(self) -> int | None:
        """Width of the network."""
        return None if self.network is None else self.network[FIRST_WEIGHT].shape[0]

    def check(self, router: Router) -> None:
        """Raise InputError unless thresholds and network fit the router."""
        here, k = f"pruning of layer {router.layer}", router.top_k
        if self.thresholds is not None and len(self.thresholds) != k - 1:
            raise InputError(
                f"{here}: {len(self.thresholds)} thresholds, but {k} experts per token need {k - 1}"
            )
        if self.network is None:
            return
        found = {name: list(tensor.shape) for name, tensor in self.network.items()}
        units = found.get(FIRST_WEIGHT, [0])[0]
        wanted = {
            FIRST_WEIGHT: [units, router.hidden_size + k],
            FIRST_BIAS: [units],
            SECOND_WEIGHT: [k, units],
            SECOND_BIAS: [k],
        }
        if found != wanted:
            raise InputError(f"{here}: its network has {found}, expected {wanted}")
        broken = [name for name, tensor in self.network.items() if not tensor.isfinite().all()]
        if broken:
            raise InputError(f"{here}: {broken[0]} of its network is not finite")


def prune(
    graph: GraphNodes, pruning: LayerPruning, hidden: str, weights: str, top_k: int, is_sorted: bool
) -> tuple[str, str] | None:
    """Add the nodes that drop experts; None if the layer is not pruned.

    Parameters
    ----------
    hidden : (tokens, hidden) float32.
    weights : (tokens, top_k) float32, as the router gives them.
    is_sorted : the weights are known to fall from slot to slot.

    Returns
    -------
    weights, keep : (tokens, top_k) float32, 0 where dropped and each token's sum as before, and
        (tokens, top_k) bool.
    """
    if pruning.network is None and pruning.thresholds is None:
        return None
    ranking = _Ranking.of(graph, weights, top_k, is_sorted)
    if pruning.network is not None:
        keep = _learned(graph, pruning.network, hidden, ranking)
    else:
        keep = _by_rule(graph, pruning.thresholds or (), weights, ranking)
    if pruning.takes_protected:
        keep = graph.add("Or", keep, graph.add("Unsqueeze", PROTECTED, graph.integers(-1)))
    return _renormalised(graph, weights, keep), keep


@dataclass(frozen=True)
class _Ranking:
    """Values of the graph: weights from the largest down, and the rank of each slot.

    ``by_rank`` is (tokens, top_k) float32, ``ranks`` int64 (tokens, top_k), or (1, top_k) where all
    tokens have the same.
    """

    by_rank: str
    ranks: str

    @classmethod
    def of(cls, graph: GraphNodes, weights: str, top_k: int, is_sorted: bool) -> _Ranking:
        if is_sorted:
            return cls(weights, graph.constant(np.arange(top_k, dtype=np.int64)[None]))
        by_rank, order = graph.top_k(weights, top_k)
        # The inverse of a permutation is what sorts it.
        _, ranks = graph.top_k(order, top_k, largest=False)
        return cls(by_rank, ranks)

    def largest(self, graph: GraphNodes) -> str:
        """(tokens, 1) float32."""
        zero, one, axis = graph.integers(0), graph.integers(1), graph.integers(-1)
        return graph.add("Slice", self.by_rank, zero, one, axis)


def _by_rule(
    graph: GraphNodes, thresholds: Sequence[float], weights: str, ranking: _Ranking
) -> str:
    """Keep mask of :func:`mcsharp_sdk.pruning.weight_rule`."""
    # A first threshold of 0 keeps rank 0 by the same comparison.
    by_rank = graph.constant(np.array([0.0, *thresholds], np.float32))
    least = graph.add("Gather", by_rank, ranking.ranks)
    first = ranking.largest(graph)
    ratios = graph.add("Div", weights, first)
    some = graph.add("Greater", first, graph.scalar(0.0))
    ratios = graph.add("Where", some, ratios, graph.scalar(1.0))
    return graph.add("Not", graph.add("Less", ratios, least))


def _learned(
    graph: GraphNodes, network: Mapping[str, Tensor], hidden: str, ranking: _Ranking
) -> str:
    """Keep mask of :func:`mcsharp_sdk.pruning.keep_mask`."""
    features = graph.add("Concat", _normalised(graph, hidden), _shares(graph, ranking), axis=-1)
    inner = _linear(graph, features, network[FIRST_WEIGHT], network[FIRST_BIAS])
    inner = graph.add("Mul", inner, graph.add("Sigmoid", inner))
    logits = _linear(graph, inner, network[SECOND_WEIGHT], network[SECOND_BIAS])
    # One less than the number of experts that are kept: the rank of the last of them.
    _, last = graph.top_k(logits, 1)
    return graph.add("LessOrEqual", ranking.ranks, last)


def _normalised(graph: GraphNodes, hidden: str) -> str:
    """Hidden states over their root mean square."""
    square = graph.add("Mul", hidden, hidden)
    mean = graph.add("ReduceMean", square, graph.integers(-1), keepdims=1)
    root = graph.add("Sqrt", graph.add("Add", mean, graph.scalar(RMS_EPSILON)))
    return graph.add("Div", hidden, root)


def _shares(graph: GraphNodes, ranking: _Ranking) -> str:
    """Weights by rank over their sum."""
    total = graph.add("ReduceSum", ranking.by_rank, graph.integers(-1), keepdims=1)
    tiny = graph.scalar(float(np.finfo(np.float32).tiny))
    return graph.add("Div", ranking.by_rank, graph.add("Max", total, tiny))


def _linear(graph: GraphNodes, inputs: str, weight: Tensor, bias: Tensor) -> str:
    return graph.add("Gemm", inputs, graph.float32(weight), graph.float32(bias), transB=1)


def _renormalised(graph: GraphNodes, weights: str, keep: str) -> str:
    """As :func:`mcsharp_sdk.pruning.renormalise`.

    Where a token keeps everything both sums are the same, and their quotient is 1.
    """
    nothing = graph.scalar(0.0)
    kept = graph.add("Where", keep, weights, nothing)
    before, after = (
        graph.add("ReduceSum", values, graph.integers(-1), keepdims=1) for values in (weights, kept)
    )
    scale = graph.add("Div", before, after)
    scale = graph.add("Where", graph.add("Greater", after, nothing), scale, nothing)
    return graph.add("Mul", kept, scale)

"""One router as an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from mcsharp_exporters.graph_names import (
    HIDDEN_STATES,
    INDICES,
    KEEP,
    PROTECTED,
    WEIGHTS,
    DtypeName,
)
from mcsharp_exporters.graph_nodes import DTYPES, IR_VERSION, OPSET, GraphNodes
from mcsharp_exporters.pruning_graph import LayerPruning, prune
from mcsharp_exporters.router_manifest import FORMAT_VERSION
from mcsharp_sdk._version import __version__
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import RouterSettings
from mcsharp_sdk.models.routing import Router


def router_graph(
    router: Router, dtype: DtypeName = "fp32", pruning: LayerPruning | None = None
) -> onnx.ModelProto:
    """Write a router down in ONNX operators (opset 21, IR 10, default domain only).

    Parameters
    ----------
    router : any layer's.
    dtype : of the input and of the stored weight matrix. Both are cast to float32 before the
        projection, and all that follows is float32; biases, and the network of a learned pruning,
        are stored in float32.
    pruning : what the router drops; None for nothing.

    Returns
    -------
    onnx.ModelProto
        Input ``hidden_states`` (tokens, hidden) of ``dtype``, tokens free and possibly 0; with
        pruning by ``rule`` or ``both`` also ``protected`` (tokens) bool: tokens that keep all
        experts. Outputs ``topk_indices`` (tokens, top_k) int64, ``topk_weights`` (tokens, top_k)
        float32 and ``keep_mask`` (tokens, top_k) bool; a dropped slot keeps its index, its weight
        is 0. Of equal scores TopK takes the lower index first. ``metadata_props`` say which layer
        it is, how it routes and how it prunes.

    Raises
    ------
    InputError
        If weights do not fit into ``dtype``, or the pruning does not fit the router.
    """
    pruning = pruning or LayerPruning()
    pruning.check(router)
    graph = GraphNodes()
    hidden = HIDDEN_STATES
    if dtype != "fp32":
        hidden = graph.add("Cast", hidden, to=TensorProto.FLOAT)
    weight = _weight(graph, router, dtype)
    indices, weights, kept = route_nodes(graph, router, hidden, weight, pruning)
    keep = kept or _keep_all(graph, indices)
    for value, name in ((indices, INDICES), (weights, WEIGHTS), (keep, KEEP)):
        graph.name_output(value, name)
    return _model(graph, router, dtype, pruning)


def route_nodes(
    graph: GraphNodes, router: Router, hidden: str, weight: str, pruning: LayerPruning
) -> tuple[str, str, str | None]:
    """Add the nodes that choose and prune experts.

    Parameters
    ----------
    hidden : (tokens, hidden) float32.
    weight : (hidden, experts) float32, the router's weight.

    Returns
    -------
    indices, weights, keep : (tokens, top_k) int64, float32 and bool; ``keep`` is None if nothing
        is ever dropped. A dropped slot has weight 0.
    """
    indices, weights = _choose(graph, router, _logits(graph, router, hidden, weight))
    weights = _scaled(graph, router.settings, weights)
    is_sorted = _falls_from_slot_to_slot(router.settings)
    pruned = prune(graph, pruning, hidden, weights, router.top_k, is_sorted)
    return indices, *(pruned or (weights, None))


def inputs_of(router: Router, pruning: LayerPruning) -> dict[str, list[int | str]]:
    """Names and shapes of a graph's inputs."""
    inputs: dict[str, list[int | str]] = {HIDDEN_STATES: ["tokens", router.hidden_size]}
    return {**inputs, PROTECTED: ["tokens"]} if pruning.takes_protected else inputs


def _scaled(graph: GraphNodes, settings: RouterSettings, weights: str) -> str:
    """Renormalised and scaled weights."""
    if settings.renormalise:
        total = graph.add("ReduceSum", weights, graph.integers(-1), keepdims=1)
        if settings.epsilon:
            total = graph.add("Add", total, graph.scalar(settings.epsilon))
        if settings.least_sum:
            total = graph.add("Max", total, graph.scalar(settings.least_sum))
        weights = graph.add("Div", weights, total)
    if settings.scale != 1.0:
        weights = graph.add("Mul", weights, graph.scalar(settings.scale))
    return weights


def _falls_from_slot_to_slot(settings: RouterSettings) -> bool:
    """Whether the weights are the very values that TopK sorted, but for a common factor."""
    chosen_by_weight = not settings.correction_bias and not settings.score_chosen_only
    return chosen_by_weight and settings.sparse_mixing is None


def _keep_all(graph: GraphNodes, indices: str) -> str:
    """True for every slot, by a comparison: that needs no Shape node, which onnxruntime would
    move to the CPU."""
    return graph.add("GreaterOrEqual", indices, graph.constant(np.zeros((), np.int64)))


def _weight(graph: GraphNodes, router: Router, dtype: DtypeName) -> str:
    """The weight (hidden, experts), stored in ``dtype``, in float32."""
    weight = "router_weight"
    graph.constants.append(_stored(weight, router, dtype))
    return weight if dtype == "fp32" else graph.add("Cast", weight, to=TensorProto.FLOAT)


def _logits(graph: GraphNodes, router: Router, hidden: str, weight: str) -> str:
    """Logits (tokens, experts) float32 of float32 hidden states."""
    logits = graph.add("MatMul", hidden, weight)
    if router.bias is not None:
        logits = graph.add("Add", logits, graph.float32(router.bias))
    return logits


def _choose(graph: GraphNodes, router: Router, logits: str) -> tuple[str, str]:
    """Indices and raw weights, both (tokens, top_k)."""
    settings = router.settings
    score = _SCORES[settings.scoring]
    if settings.sparse_mixing is not None:
        return _sparse_mixer(graph, logits, settings.top_k, settings.sparse_mixing)
    if settings.score_chosen_only:
        chosen, indices = graph.top_k(logits, settings.top_k)
        return indices, score(graph, chosen)
    scores = score(graph, logits)
    preference = scores
    if router.correction_bias is not None:
        preference = graph.add("Add", scores, graph.float32(router.correction_bias))
    if settings.groups > 1:
        preference = _without_lost_groups(graph, settings, preference)
    best, indices = graph.top_k(preference, settings.top_k)
    if router.correction_bias is None:
        return indices, best
    return indices, graph.add("GatherElements", scores, indices, axis=1)


def _sparse_mixer(graph: GraphNodes, logits: str, top_k: int, jitter: float) -> tuple[str, str]:
    """As :func:`mcsharp_sdk.models.routing.sparse_mixer`."""
    lowest = graph.scalar(float("-inf"))
    magnitude = graph.add("Abs", logits)
    left = logits
    indices, weights = [], []
    for _ in range(top_k):
        best, index = graph.top_k(left, 1)
        distance = graph.add(
            "Div", graph.add("Sub", best, logits), graph.add("Max", magnitude, best)
        )
        is_far = graph.add("Greater", distance, graph.scalar(2 * jitter))
        scores = _softmax(graph, graph.add("Where", is_far, lowest, left))
        indices.append(index)
        weights.append(graph.add("GatherElements", scores, index, axis=1))
        left = graph.add("ScatterElements", left, index, graph.add("Add", best, lowest), axis=1)
    joined = (graph.add("Concat", *values, axis=-1) for values in (indices, weights))
    return next(joined), next(joined)


def _without_lost_groups(graph: GraphNodes, settings: RouterSettings, preference: str) -> str:
    """``preference`` (tokens, experts) with -inf at the experts of groups that are not kept."""
    size = settings.experts // settings.groups
    grouped = graph.add("Reshape", preference, graph.integers(0, settings.groups, size))
    worth = _GROUP_SCORES[settings.group_score](graph, grouped)
    best, kept = graph.top_k(worth, settings.kept_groups)
    infinite = graph.add("Add", best, graph.scalar(float("inf")))
    marked = graph.add("ScatterElements", worth, kept, infinite, axis=1)
    is_kept = graph.add("Unsqueeze", graph.add("IsInf", marked), graph.integers(-1))
    allowed = graph.add("Where", is_kept, grouped, graph.scalar(float("-inf")))
    return graph.add("Reshape", allowed, graph.integers(0, settings.experts))


# Scores of groups (tokens, groups). Reduce operators would be shorter, but onnxruntime's leave
# the dimension in when there are no tokens.


def _best(graph: GraphNodes, grouped: str) -> str:
    best, _ = graph.top_k(grouped, 1)
    return graph.add("Squeeze", best, graph.integers(-1))


def _best_two(graph: GraphNodes, grouped: str) -> str:
    best, _ = graph.top_k(grouped, 2)
    first, second = graph.add_many("Split", [best], 2, axis=-1, num_outputs=2)
    return graph.add("Squeeze", graph.add("Add", first, second), graph.integers(-1))


def _softmax(graph: GraphNodes, logits: str) -> str:
    return graph.add("Softmax", logits, axis=-1)


def _sigmoid(graph: GraphNodes, logits: str) -> str:
    """1 / (1 + exp(-x)): onnxruntime's own on the CPU is off by 1e-5 of small values."""
    growing = graph.add("Exp", graph.add("Neg", logits))
    return graph.add("Reciprocal", graph.add("Add", growing, graph.scalar(1.0)))


_SCORES: Mapping[str, Callable[[GraphNodes, str], str]] = {"softmax": _softmax, "sigmoid": _sigmoid}
_GROUP_SCORES: Mapping[str, Callable[[GraphNodes, str], str]] = {
    "max": _best,
    "top2_sum": _best_two,
}


def _stored(name: str, router: Router, dtype: DtypeName) -> onnx.TensorProto:
    """The weight as (hidden, experts) of ``dtype``, as the projection reads it."""
    kinds = DTYPES[dtype]
    weight = router.weight.detach().cpu()
    stored = weight.to(kinds.torch).T.contiguous()
    if not torch.isfinite(stored).all():
        cause = f"do not fit into {dtype}" if weight.isfinite().all() else "are not finite"
        raise InputError(f"router of layer {router.layer}: weights {cause}")
    raw = stored.view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, kinds.onnx, list(stored.shape), raw, raw=True)


def _model(
    graph: GraphNodes, router: Router, dtype: DtypeName, pruning: LayerPruning
) -> onnx.ModelProto:
    slots: list[int | str] = ["tokens", router.top_k]
    kinds = {HIDDEN_STATES: DTYPES[dtype].onnx, PROTECTED: TensorProto.BOOL}
    inputs = inputs_of(router, pruning).items()
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"router_layer_{router.layer}",
            [_value(name, kinds[name], shape) for name, shape in inputs],
            [
                _value(INDICES, TensorProto.INT64, slots),
                _value(WEIGHTS, TensorProto.FLOAT, slots),
                _value(KEEP, TensorProto.BOOL, slots),
            ],
            initializer=graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mcsharp_sdk",
        producer_version=__version__,
    )
    helper.set_model_props(model, _metadata(router, dtype, pruning))
    return model


def _value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _metadata(router: Router, dtype: DtypeName, pruning: LayerPruning) -> dict[str, str]:
    """What a reader of the file alone should know; values that are no strings as JSON."""
    facts = {
        "format_version": FORMAT_VERSION,
        "sdk_version": __version__,
        "layer": router.layer,
        "hidden_size": router.hidden_size,
        "dtype": dtype,
        **asdict(router.settings),
        "pruning": pruning.mode,
        "thresholds": pruning.thresholds,
        "network_units": pruning.units,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}

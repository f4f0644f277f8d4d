"""One router as an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mcsharp_sdk import __version__
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import RouterSettings
from mcsharp_sdk.models.routing import Router

DtypeName = Literal["fp32", "fp16", "bf16"]

OPSET, IR_VERSION = 21, 10

HIDDEN_STATES = "hidden_states"
INDICES, WEIGHTS, KEEP = "topk_indices", "topk_weights", "keep_mask"
OUTPUTS = (INDICES, WEIGHTS, KEEP)


@dataclass(frozen=True)
class Dtype:
    """A storage dtype by its names in torch and ONNX."""

    torch: torch.dtype
    onnx: int


DTYPES: Mapping[DtypeName, Dtype] = {
    "fp32": Dtype(torch.float32, TensorProto.FLOAT),
    "fp16": Dtype(torch.float16, TensorProto.FLOAT16),
    "bf16": Dtype(torch.bfloat16, TensorProto.BFLOAT16),
}


def router_graph(router: Router, dtype: DtypeName = "fp32") -> onnx.ModelProto:
    """Write a router down in ONNX operators (opset 21, IR 10, default domain only).

    Parameters
    ----------
    router : any layer's.
    dtype : of the input and of the stored weight matrix. Both are cast to float32 before the
        projection, and all that follows is float32; biases are stored in float32.

    Returns
    -------
    onnx.ModelProto
        Input ``hidden_states`` (tokens, hidden) of ``dtype``, tokens free and possibly 0. Outputs
        ``topk_indices`` (tokens, top_k) int64, ``topk_weights`` (tokens, top_k) float32 and
        ``keep_mask`` (tokens, top_k) bool. Of equal scores TopK takes the lower index first.
        ``metadata_props`` say which layer it is and how it routes.

    Raises
    ------
    InputError
        If weights do not fit into ``dtype``.
    """
    graph = _Nodes()
    indices, weights = _choose(graph, router, _logits(graph, router, dtype))
    settings = router.settings
    if settings.renormalise:
        total = graph.add("ReduceSum", weights, graph.integers(-1), keepdims=1)
        if settings.epsilon:
            total = graph.add("Add", total, graph.scalar(settings.epsilon))
        weights = graph.add("Div", weights, total)
    if settings.scale != 1.0:
        weights = graph.add("Mul", weights, graph.scalar(settings.scale))
    # Every slot that holds an expert is kept. A comparison needs no Shape node, which
    # onnxruntime would move to the CPU.
    keep = graph.add("GreaterOrEqual", indices, graph.constant(np.zeros((), np.int64)))
    for made, name in ((indices, INDICES), (weights, WEIGHTS), (keep, KEEP)):
        graph.nodes.append(helper.make_node("Identity", [made], [name]))
    return _model(graph, router, dtype)


@dataclass
class _Nodes:
    """Nodes and constants in the making; every value gets a name of its own."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.add_many(operator, inputs, 1, **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> list[str]:
        names = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    def top_k(self, values: str, k: int) -> tuple[str, str]:
        best, indices = self.add_many("TopK", [values, self.integers(k)], 2, axis=-1)
        return best, indices

    def constant(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))


def _logits(graph: _Nodes, router: Router, dtype: DtypeName) -> str:
    """Logits (tokens, experts) float32."""
    hidden, weight = HIDDEN_STATES, "router_weight"
    graph.constants.append(_stored(weight, router, dtype))
    if dtype != "fp32":
        hidden = graph.add("Cast", hidden, to=TensorProto.FLOAT)
        weight = graph.add("Cast", weight, to=TensorProto.FLOAT)
    logits = graph.add("MatMul", hidden, weight)
    if router.bias is not None:
        logits = graph.add("Add", logits, graph.constant(_float32(router.bias)))
    return logits


def _choose(graph: _Nodes, router: Router, logits: str) -> tuple[str, str]:
    """Indices and raw weights, both (tokens, top_k)."""
    settings = router.settings
    score = _SCORES[settings.scoring]
    if settings.score_chosen_only:
        chosen, indices = graph.top_k(logits, settings.top_k)
        return indices, score(graph, chosen)
    scores = score(graph, logits)
    preference = scores
    if router.correction_bias is not None:
        preference = graph.add("Add", scores, graph.constant(_float32(router.correction_bias)))
    if settings.groups > 1:
        preference = _without_lost_groups(graph, settings, preference)
    best, indices = graph.top_k(preference, settings.top_k)
    if router.correction_bias is None:
        return indices, best
    return indices, graph.add("GatherElements", scores, indices, axis=1)


def _without_lost_groups(graph: _Nodes, settings: RouterSettings, preference: str) -> str:
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


def _best(graph: _Nodes, grouped: str) -> str:
    best, _ = graph.top_k(grouped, 1)
    return graph.add("Squeeze", best, graph.integers(-1))


def _best_two(graph: _Nodes, grouped: str) -> str:
    best, _ = graph.top_k(grouped, 2)
    first, second = graph.add_many("Split", [best], 2, axis=-1, num_outputs=2)
    return graph.add("Squeeze", graph.add("Add", first, second), graph.integers(-1))


def _softmax(graph: _Nodes, logits: str) -> str:
    return graph.add("Softmax", logits, axis=-1)


def _sigmoid(graph: _Nodes, logits: str) -> str:
    return graph.add("Sigmoid", logits)


_SCORES: Mapping[str, Callable[[_Nodes, str], str]] = {"softmax": _softmax, "sigmoid": _sigmoid}
_GROUP_SCORES: Mapping[str, Callable[[_Nodes, str], str]] = {"max": _best, "top2_sum": _best_two}


def _float32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()


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


def _model(graph: _Nodes, router: Router, dtype: DtypeName) -> onnx.ModelProto:
    slots: list[int | str] = ["tokens", router.top_k]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"router_layer_{router.layer}",
            [_value(HIDDEN_STATES, DTYPES[dtype].onnx, ["tokens", router.hidden_size])],
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
    helper.set_model_props(model, _metadata(router, dtype))
    return model


def _value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _metadata(router: Router, dtype: DtypeName) -> dict[str, str]:
    """What a reader of the file alone should know; values that are no strings as JSON."""
    facts = {
        "sdk_version": __version__,
        "layer": router.layer,
        "hidden_size": router.hidden_size,
        "dtype": dtype,
        **asdict(router.settings),
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}

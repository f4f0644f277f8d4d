"""A whole model as one ONNX graph, and which models can be one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from mcsharp_exporters.attention_nodes import (
    GROUPED,
    HEAD_MULTIPLE,
    LATENT,
    AttentionKind,
    CacheShape,
    Sequence,
    attend,
)
from mcsharp_exporters.graph_names import (
    ATTENTION_MASK,
    CACHED,
    INPUT_IDS,
    LOGITS,
    PAST,
    PRESENT,
)
from mcsharp_exporters.graph_nodes import IR_VERSION, OPSET
from mcsharp_exporters.linear_nodes import gated_mlp, layer_norm, norm
from mcsharp_exporters.mixture_nodes import mixture
from mcsharp_exporters.model_nodes import CONTRIB, ModelNodes
from mcsharp_exporters.model_tensors import LayerTensors, ModelTensors
from mcsharp_exporters.packed_product import BLOCK_SIZES, Operand
from mcsharp_exporters.router_pruning import RouterPruning
from mcsharp_sdk._version import __version__
from mcsharp_sdk.errors import InputError, InputProblems, Problem

FAMILIES: Mapping[str, AttentionKind] = {
    "mixtral": GROUPED,
    "olmoe": GROUPED,
    "qwen2_moe": GROUPED,
    "qwen3_moe": GROUPED,
    "deepseek_v2": LATENT,
}
"""model_type -> attention of the families that can be exported."""

FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def check_family(config: Any) -> None:
    """Raise InputProblems, with all that is in the way, unless such a model can be a graph."""
    if problems := family_problems(config):
        raise InputProblems(f"onnx_model of {config.model_type}", problems)


def family_problems(config: Any) -> list[Problem]:
    """What of a model of this config a graph cannot do."""
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return [
            Problem(
                "",
                f"{config.model_type} cannot be exported as one ONNX graph; {known} can. Its "
                "routers may be: see the exporter onnx_routers",
            )
        ]
    return list(_problems(config))


def _problems(config: Any) -> Iterator[Problem]:
    if config.hidden_act != "silu":
        yield Problem("hidden_act", f"is {config.hidden_act!r}; only 'silu' can be exported")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in FIXED_ROPES:
        known = ", ".join(FIXED_ROPES)
        yield Problem("rope_type", f"{rope!r} changes with the length of the text; known: {known}")
    rotated = getattr(config, "qk_rope_head_dim", 0)
    if rotated % HEAD_MULTIPLE:
        yield Problem(
            "qk_rope_head_dim", f"is {rotated}; onnxruntime takes multiples of {HEAD_MULTIPLE}"
        )
    size = FAMILIES[config.model_type].cache(config).head_size
    if size % HEAD_MULTIPLE:
        yield Problem("head size", f"is {size}; onnxruntime takes multiples of {HEAD_MULTIPLE}")


def check_group_size(size: int) -> None:
    """Raise InputError unless onnxruntime multiplies with weights in groups of this size."""
    if size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise InputError(
            f"weights are quantised in groups of {size}; onnxruntime takes groups of {known}: "
            f"set group_size to one of them in the recipe (stage GPTQQuantize)"
        )


def cache_shape(config: Any) -> CacheShape:
    """Shape of each layer's cache."""
    return FAMILIES[config.model_type].cache(config)


def model_graph(
    source: ModelTensors,
    graph: ModelNodes,
    pruning: RouterPruning,
    track: Callable[[Iterable[int], str], Iterable[int]],
) -> onnx.ModelProto:
    """Write a model down in ONNX operators and onnxruntime's own.

    Parameters
    ----------
    source : a model that ``check_family`` lets pass; read one decoder layer at a time.
    graph : empty; its large tensors are written as they come.
    pruning : how experts are dropped.
    track : wraps the decoder layers, with a description, to show progress.

    Returns
    -------
    onnx.ModelProto
        Inputs ``input_ids`` (batch, sequence) int64, ``attention_mask`` (batch, total) int64 and
        per layer ``past_key_values.N.key`` and ``.value`` (batch, heads, past, head_size); outputs
        ``logits`` (batch, sequence, vocabulary) and per layer ``present.N.key`` and ``.value``.
    """
    outer = dict(source.outer())
    sequence = _sequence(graph, source)
    table = graph.stored(_outer(source, outer, EMBEDDINGS))
    tokens = graph.add("Reshape", INPUT_IDS, graph.integers(-1))
    hidden = graph.add("Gather", table, tokens, axis=0)
    hidden = graph.in_precision(hidden, outer[EMBEDDINGS].dtype)
    for index in track(range(source.topology.num_layers), "writing ONNX"):
        hidden = _decoder_layer(graph, source.read_layer(index), hidden, sequence, pruning)
    module = source.model.get_submodule(NORM.removesuffix(".weight"))
    hidden = norm(graph, hidden, _outer(source, outer, NORM), module, NORM)
    logits = _head(graph, source, outer, hidden, table)
    graph.name_output(graph.add("Reshape", logits, sequence.shape), LOGITS)
    return _model(source, graph)


def _outer(source: ModelTensors, outer: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in outer:
        raise InputError(f"{source.path} lacks {name}")
    return outer[name]


def _decoder_layer(
    graph: ModelNodes,
    layer: LayerTensors,
    hidden: str,
    sequence: Sequence,
    pruning: RouterPruning,
) -> str:
    """Hidden states behind a decoder layer, (tokens, hidden)."""
    config = layer.source.config
    width, kind = config.hidden_size, FAMILIES[config.model_type]
    normal = Operand(graph, layer_norm(graph, layer, hidden, "input_layernorm"), width)
    hidden = graph.add("Add", hidden, attend(graph, kind, layer, normal, sequence))
    normal = Operand(graph, layer_norm(graph, layer, hidden, "post_attention_layernorm"), width)
    if layer.index in layer.source.topology.moe:
        output = mixture(graph, layer, normal, pruning.of_layer(layer.index))
    else:
        output = gated_mlp(graph, layer, normal, "mlp")
    return graph.add("Add", hidden, output)


def _sequence(graph: ModelNodes, source: ModelTensors) -> Sequence:
    one = graph.integers(1)
    mask_shape = graph.add("Shape", ATTENTION_MASK)
    total = graph.add("Gather", mask_shape, graph.constant(np.array(1, np.int64)), axis=0)
    tokens = graph.add("ReduceSum", ATTENTION_MASK, one, keepdims=0)
    last = graph.add("Sub", tokens, one)
    cosines, sines = _rotary_tables(graph, source)
    return Sequence(
        shape=graph.add("Concat", graph.add("Shape", INPUT_IDS), graph.integers(-1), axis=0),
        last=graph.add("Cast", last, to=TensorProto.INT32),
        total=graph.add("Cast", total, to=TensorProto.INT32),
        cosines=cosines,
        sines=sines,
    )


def _rotary_tables(graph: ModelNodes, source: ModelTensors) -> tuple[str, str]:
    """Cosines and sines of every position, which onnxruntime makes when it opens the model."""
    rotary = source.model.get_submodule("model.rotary_emb")
    positions = source.config.max_position_embeddings
    numbers = graph.add(
        "Range",
        *(graph.constant(np.array(value, np.int64)) for value in (0, positions, 1)),
    )
    column = graph.add(
        "Unsqueeze", graph.add("Cast", numbers, to=TensorProto.FLOAT), graph.integers(1)
    )
    angles = graph.add("Mul", column, graph.float32(rotary.inv_freq[None]))
    tables = []
    for function in ("Cos", "Sin"):
        table = graph.add(function, angles)
        if rotary.attention_scaling != 1:
            table = graph.add("Mul", table, graph.scalar(float(rotary.attention_scaling)))
        tables.append(graph.from_float32(table))
    return tables[0], tables[1]


def _head(
    graph: ModelNodes,
    source: ModelTensors,
    outer: Mapping[str, Tensor],
    hidden: str,
    table: str,
) -> str:
    """Logits (tokens, vocabulary); a head tied to the embeddings is stored once."""
    if HEAD not in outer and source.config.tie_word_embeddings:
        weight = graph.in_precision(table, outer[EMBEDDINGS].dtype)
        return graph.add("Gemm", hidden, weight, transB=1)
    weight = graph.weight(_outer(source, outer, HEAD), HEAD)
    return graph.add("Gemm", hidden, weight, transB=1)


def _model(source: ModelTensors, graph: ModelNodes) -> onnx.ModelProto:
    config, kind = source.config, graph.dtype.onnx
    cache = cache_shape(config)
    inputs = [
        helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info(ATTENTION_MASK, TensorProto.INT64, ["batch", "total"]),
    ]
    logits: list[str | int] = ["batch", "sequence", config.vocab_size]
    outputs = [helper.make_tensor_value_info(LOGITS, kind, logits)]
    for layer in range(source.topology.num_layers):
        for part in CACHED:
            for values, name, length in ((inputs, PAST, "past"), (outputs, PRESENT, "total")):
                shape: list[str | int] = ["batch", cache.heads, length, cache.head_size]
                named = name.format(layer=layer, part=part)
                values.append(helper.make_tensor_value_info(named, kind, shape))
    return helper.make_model(
        helper.make_graph(
            graph.nodes, config.model_type, inputs, outputs, initializer=graph.constants
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        ir_version=IR_VERSION,
        producer_name="mcsharp_sdk",
        producer_version=__version__,
    )

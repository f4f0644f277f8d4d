"""Attention with a key-value cache, as onnxruntime's ``GroupQueryAttention`` computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mcsharp_exporters.graph_names import CACHED, PAST, PRESENT
from mcsharp_exporters.linear_nodes import layer_norm, linear_layers
from mcsharp_exporters.model_nodes import CONTRIB, ModelNodes
from mcsharp_exporters.model_tensors import LayerTensors
from mcsharp_exporters.packed_product import Operand

ATTENTION = "self_attn"
"""Path of the attention within a decoder layer."""

HEAD_MULTIPLE = 16
"""``GroupQueryAttention`` takes heads whose size is a multiple of this."""


@dataclass(frozen=True)
class CacheShape:
    """A layer's cache: (batch, heads, positions, head_size), of keys and of values."""

    heads: int
    head_size: int


@dataclass(frozen=True)
class Sequence:
    """What attention needs to know of the tokens in the graph.

    Attributes
    ----------
    shape : int64 (3,), batch, sequence and -1, to reshape (tokens, n) with.
    last : int32 (batch,), number of tokens in each row so far, less one.
    total : int32, positions so far.
    cosines, sines : (positions, half the rotated dimensions).
    """

    shape: str
    last: str
    total: str
    cosines: str
    sines: str


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values, each (tokens, heads · head_size); keys and values may be in
    ``queries`` already."""

    queries: str
    keys: str = ""
    values: str = ""


@dataclass(frozen=True)
class AttentionKind:
    """A family's attention.

    Attributes
    ----------
    cache : config -> shape of each layer's cache.
    heads : makes queries, keys and values of a decoder layer's normed hidden states.
    interleaved : rotated pairs are neighbours; otherwise half a head apart.
    """

    cache: Callable[[Any], CacheShape]
    heads: Callable[[ModelNodes, LayerTensors, Operand, Any], Heads]
    interleaved: bool = False


def attend(
    graph: ModelNodes,
    kind: AttentionKind,
    layer: LayerTensors,
    hidden: Operand,
    sequence: Sequence,
) -> str:
    """The output of a layer's attention, (tokens, hidden); its caches are inputs and outputs."""
    config = layer.source.config
    cache, module = kind.cache(config), layer.module(ATTENTION)
    heads = kind.heads(graph, layer, hidden, config)
    in_rows = [
        graph.add("Reshape", value, sequence.shape) if value else ""
        for value in (heads.queries, heads.keys, heads.values)
    ]
    past = [PAST.format(layer=layer.index, part=part) for part in CACHED]
    present = [PRESENT.format(layer=layer.index, part=part) for part in CACHED]
    attended = graph.add_named(
        "GroupQueryAttention",
        [*in_rows, *past, sequence.last, sequence.total, sequence.cosines, sequence.sines],
        present,
        domain=CONTRIB,
        num_heads=config.num_attention_heads,
        kv_num_heads=cache.heads,
        do_rotary=1,
        rotary_interleaved=int(kind.interleaved),
        scale=float(module.scaling),
        local_window_size=_window(config, layer.index),
    )
    width = module.o_proj.in_features
    tokens = _without_padding(graph, attended, config.num_attention_heads, cache.head_size, width)
    return linear_layers(graph, layer, Operand(graph, tokens, width), f"{ATTENTION}.o_proj")


def _without_padding(
    graph: ModelNodes, attended: str, heads: int, head_size: int, width: int
) -> str:
    """(tokens, width) of the attention's output (batch, sequence, heads · head_size)."""
    if width == heads * head_size:
        return graph.add("Reshape", attended, graph.integers(-1, width))
    by_head = graph.add("Reshape", attended, graph.integers(-1, heads, head_size))
    zero, end = graph.integers(0), graph.integers(width // heads)
    filled = graph.add("Slice", by_head, zero, end, graph.integers(2))
    return graph.add("Reshape", filled, graph.integers(-1, width))


def _window(config: Any, layer: int) -> int:
    """Positions that a token sees, itself included; -1 for all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds is not None and kinds[layer] != "sliding_attention"):
        return -1
    return int(window)


def _grouped_cache(config: Any) -> CacheShape:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return CacheShape(config.num_key_value_heads, size)


def _grouped_heads(graph: ModelNodes, layer: LayerTensors, hidden: Operand, config: Any) -> Heads:
    """Of mixtral, olmoe, qwen2_moe and qwen3_moe: norms and clipping where the module has them."""
    paths = [f"{ATTENTION}.{name}_proj" for name in "qkv"]
    joined = linear_layers(graph, layer, hidden, *paths)
    clip, normed = getattr(config, "clip_qkv", None), layer.has(f"{ATTENTION}.q_norm")
    if clip is None and not normed:
        return Heads(joined)
    queries, keys, values = graph.parts(joined, *(layer.module(p).out_features for p in paths))
    if normed:
        queries = _head_norm(graph, layer, queries, f"{ATTENTION}.q_norm")
        keys = _head_norm(graph, layer, keys, f"{ATTENTION}.k_norm")
    if clip is None:
        return Heads(queries, keys, values)
    least, most = graph.number(-clip), graph.number(clip)
    return Heads(*(graph.add("Clip", v, least, most) for v in (queries, keys, values)))


def _head_norm(graph: ModelNodes, layer: LayerTensors, value: str, path: str) -> str:
    """A norm over as many values as it has weights: a head (qwen3_moe), or all of them (olmoe)."""
    size = len(layer.tensor(f"{path}.weight"))
    by_head = graph.add("Reshape", value, graph.integers(0, -1, size))
    normal = layer_norm(graph, layer, by_head, path)
    return graph.add("Reshape", normal, graph.integers(0, -1))


def _latent_cache(config: Any) -> CacheShape:
    longest = max(config.qk_rope_head_dim + config.qk_nope_head_dim, config.v_head_dim)
    return CacheShape(config.num_attention_heads, -(-longest // HEAD_MULTIPLE) * HEAD_MULTIPLE)


def _latent_heads(graph: ModelNodes, layer: LayerTensors, hidden: Operand, config: Any) -> Heads:
    """Of deepseek_v2: keys and values from a latent vector, and one rotated key for all heads.

    ``GroupQueryAttention`` rotates the first dimensions of a head and wants one size for keys and
    values: the rotated ones go first, in queries and keys alike, and what is shorter gets zeros.
    """
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    rotated, plain, size = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
    first = torch.cat([torch.arange(plain, plain + rotated), torch.arange(plain)])
    queries = _latent_queries(graph, layer, hidden, _by_head(heads, rotated + plain, first))
    latent = linear_layers(graph, layer, hidden, f"{ATTENTION}.kv_a_proj_with_mqa")
    shared, key = graph.parts(latent, rank, rotated)
    shared = layer_norm(graph, layer, shared, f"{ATTENTION}.kv_a_layernorm")
    order = torch.cat(
        [
            _by_head(heads, plain + size, torch.arange(plain)),
            _by_head(heads, plain + size, torch.arange(plain, plain + size)),
        ]
    )
    path = f"{ATTENTION}.kv_b_proj"
    both = linear_layers(graph, layer, Operand(graph, shared, rank), path, rows=order)
    keys, values = graph.parts(both, heads * plain, heads * size)
    single = graph.add("Unsqueeze", key, graph.integers(1))
    to_all = graph.add("Expand", single, graph.integers(1, heads, 1))
    own = graph.add("Reshape", keys, graph.integers(-1, heads, plain))
    keys = graph.add("Concat", to_all, own, axis=-1)
    values = graph.add("Reshape", values, graph.integers(-1, heads, size))
    queries = graph.add("Reshape", queries, graph.integers(-1, heads, rotated + plain))
    wanted = _latent_cache(config).head_size
    sizes = (rotated + plain, rotated + plain, size)
    padded = [
        _padded(graph, value, wanted - had, heads * wanted)
        for value, had in zip((queries, keys, values), sizes, strict=True)
    ]
    return Heads(*padded)


def _latent_queries(
    graph: ModelNodes, layer: LayerTensors, hidden: Operand, order: torch.Tensor
) -> str:
    """Queries with their rows in another order, through a latent vector where there is one."""
    if not layer.has(f"{ATTENTION}.q_a_proj"):
        return linear_layers(graph, layer, hidden, f"{ATTENTION}.q_proj", rows=order)
    latent = linear_layers(graph, layer, hidden, f"{ATTENTION}.q_a_proj")
    normal = layer_norm(graph, layer, latent, f"{ATTENTION}.q_a_layernorm")
    rank = layer.module(f"{ATTENTION}.q_b_proj").in_features
    inner = Operand(graph, normal, rank)
    return linear_layers(graph, layer, inner, f"{ATTENTION}.q_b_proj", rows=order)


def _by_head(heads: int, size: int, within: torch.Tensor) -> torch.Tensor:
    """Indices of rows: those of ``within`` of each head of ``size`` rows."""
    return (torch.arange(heads)[:, None] * size + within).flatten()


def _padded(graph: ModelNodes, value: str, missing: int, width: int) -> str:
    """(tokens, width) of a value (tokens, heads, n), with zeros behind each head's."""
    if missing:
        value = graph.add("Pad", value, graph.integers(0, 0, 0, 0, 0, missing))
    return graph.add("Reshape", value, graph.integers(-1, width))


GROUPED = AttentionKind(_grouped_cache, _grouped_heads)
LATENT = AttentionKind(_latent_cache, _latent_heads, interleaved=True)

"""Tiny compressed models on disk whose groups onnxruntime can multiply with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_stacks import expert_tensors
from pruned_models import networks
from tiny_models import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.shards import write_safetensors
from mcsharp_sdk.models.topology import read_topology
from mcsharp_sdk.quantization.grid import pack_weight
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings
from mcsharp_sdk.runtime.layout import PackedLayout, linear_tensors
from mcsharp_sdk.runtime.pruning_layout import LearnedPruning, PruningLayout, RulePruning

GROUP, UNITS = 32, 6
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, sliding window": ("mixtral", {"sliding_window": 6}),
    "mixtral, yarn": (
        "mixtral",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mixtral, tied head": ("mixtral", {"tie_word_embeddings": True}),
    "olmoe": ("olmoe", {"clip_qkv": 0.5}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {"attention_bias": True}),
    "deepseek_v2": ("deepseek_v2", {"qk_rope_head_dim": 16}),
    "deepseek_v2, latent queries": (
        "deepseek_v2",
        {
            "qk_rope_head_dim": 16,
            "q_lora_rank": 24,
            "v_head_dim": 24,
            "topk_method": "group_limited_greedy",
        },
    ),
}
"""Case -> family and settings of a tiny model that can be exported."""


def tiny(family: str, **settings: Any) -> Any:
    """A random model whose tokens differ; its biases are not 0."""
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.15, **settings)
    model: Any = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def compressed(
    folder: Path,
    family: str,
    *,
    widths: Sequence[int] = (1, 2, 3, 4),
    group: int = GROUP,
    pruning: PruningLayout | None = None,
    rotated: bool = False,
    **settings: Any,
) -> Path:
    """Write a tiny model as the safetensors exporter does, experts of each width in every layer.

    Those of 0 bits are removed.
    """
    model = tiny(family, **settings)
    topology = read_topology(model, model.config)
    tensors: dict[str, Tensor] = {}
    experts: dict[int, tuple[int, ...]] = {}
    replaced = []
    for layer, block in topology.moe.items():
        path = f"{topology.layers_path}.{layer}.{block.experts}"
        experts[layer] = tuple(widths[e % len(widths)] for e in range(block.num_experts))
        packed = {}
        for matrix in MATRICES:
            weight = fused_weight(model.get_submodule(path), matrix).detach()
            some_width = [width or 4 for width in experts[layer]]
            batch = quantise_rtn(weight, some_width, GridSettings(group_size=group))
            packed[matrix] = [pack_weight(batch.expert(e)) for e in range(block.num_experts)]
        tensors |= expert_tensors(path, experts[layer], packed)
        replaced.append(f"{path}.")
    linears = {name: 4 for names in topology.linears.values() for name in names}
    for layer, names in topology.linears.items():
        for name in names:
            path = f"{topology.layers_path}.{layer}.{name}"
            weight = model.get_submodule(path).weight.detach()[None]
            batch = quantise_rtn(weight, (4,), GridSettings(group_size=group))
            tensors |= linear_tensors(path, pack_weight(batch.expert(0)))
            replaced.append(f"{path}.weight")
    tied = set(model.all_tied_weights_keys)
    kept = (n for n in model.state_dict() if not n.startswith(tuple(replaced)) and n not in tied)
    tensors |= {name: model.state_dict()[name].clone() for name in kept}
    if pruning is not None and pruning.learned is not None:
        for layer, net in networks(topology, model.config.hidden_size, trained=True).items():
            path = f"{topology.layers_path}.{layer}.{topology.moe[layer].experts}.pruner"
            tensors |= {f"{path}.{name}": tensor for name, tensor in net.state_dict().items()}
    layout = PackedLayout(group, experts, linears, pruning, rotated)
    return _write(folder, tensors, model.config, layout)


def original(folder: Path, family: str, dtype: torch.dtype, **settings: Any) -> Path:
    """Write a tiny model that is not compressed."""
    tiny(family, **settings).to(dtype).save_pretrained(folder)
    return folder


def pruning_of(family: str, mode: Any, metric: str = "none", layers: int = 3) -> PruningLayout:
    """Thresholds that drop about a half, and networks, of every MoE layer."""
    config = tiny_config(family)
    dense = getattr(config, "first_k_dense_replace", 0)
    moe = range(dense, layers)
    thresholds = (0.8, 0.6)[: config.num_experts_per_tok - 1]
    rule = RulePruning(metric, 0.2, 0.2, dict.fromkeys(moe, thresholds))
    return PruningLayout(mode, rule, LearnedPruning(UNITS, tuple(moe)))


def reference(folder: Path) -> Any:
    """The model that transformers loads, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits that transformers computes."""
    with torch.no_grad():
        given = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(ids), attention_mask=given).logits.numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _write(folder: Path, tensors: dict[str, Tensor], config: Any, layout: PackedLayout) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = "mcsharp-00001-of-00001.safetensors"
    write_safetensors(folder / file, tensors, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "mcsharp.safetensors.index.json").write_text(json.dumps(index))
    content = json.loads(config.to_json_string())
    content["quantization_config"] = layout.to_dict()
    (folder / "config.json").write_text(json.dumps(content))
    return folder

"""Tiny models that prune experts, on disk, and a slow reference of what their pruning does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from expert_stacks import expert_tensors
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mcsharp_sdk.models.experts import fused_weight
from mcsharp_sdk.models.shards import write_safetensors
from mcsharp_sdk.models.topology import Topology, read_topology
from mcsharp_sdk.pruning import TopAnyNetwork
from mcsharp_sdk.quantization.grid import pack_weight
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.pruning_layout import LearnedPruning, PruningLayout, RulePruning

GROUP, UNITS, WIDTH = 8, 6, 4


def stock_model(family: str, **overrides: Any) -> tuple[Any, Topology]:
    """A random model whose routing differs much from token to token."""
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.2, **overrides)
    model: Any = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    for name, module in model.named_modules():
        if name.endswith("mlp.gate") and "expert" in type(module).__name__.lower():
            nn.init.normal_(module.weight, std=0.5)
    return model, read_topology(model, model.config)


def pruning_layout(
    topology: Topology, mode: Any = "both", metric: str = "attention", **settings: Any
) -> PruningLayout:
    """Every MoE layer pruned by rule and network, with thresholds that drop about a half."""
    rule = {"protect_ratio": 0.2, "drop_ratio": 0.2, "thresholds": (0.8, 0.6), **settings}
    k = next(iter(topology.moe.values())).top_k
    rule["thresholds"] = dict.fromkeys(topology.moe, rule["thresholds"][: k - 1])
    return PruningLayout(
        mode, RulePruning(metric, **rule), LearnedPruning(UNITS, tuple(topology.moe))
    )


def networks(topology: Topology, hidden_size: int, *, trained: bool) -> dict[int, TopAnyNetwork]:
    """Networks per layer: new ones, which keep everything, or ones that keep this or that."""
    torch.manual_seed(1)
    made = {}
    for layer, block in topology.moe.items():
        made[layer] = TopAnyNetwork(hidden_size, block.top_k, UNITS)
        if trained:
            nn.init.normal_(made[layer].second.weight)
            nn.init.zeros_(made[layer].second.bias)
    return made


def save_pruned(
    folder: Path,
    model: Any,
    topology: Topology,
    pruning: PruningLayout | None,
    nets: Mapping[int, TopAnyNetwork],
    *,
    packed: bool,
) -> Path:
    """Write a model as the exporter does; with ``packed`` its experts are replaced by 4-bit ones.

    ``model`` gets the weights that the packed ones stand for.
    """
    experts = {
        layer: f"{topology.layers_path}.{layer}.{block.experts}"
        for layer, block in topology.moe.items()
    }
    tensors: dict[str, Tensor] = {}
    widths: dict[int, tuple[int, ...]] = {}
    if packed:
        for layer, path in experts.items():
            widths[layer] = (WIDTH,) * topology.moe[layer].num_experts
            tensors |= _packed(model.get_submodule(path), path, widths[layer])
    replaced = tuple(f"{path}." for layer, path in experts.items() if layer in widths)
    state = model.state_dict().items()
    tensors |= {name: t.clone() for name, t in state if not name.startswith(replaced)}
    if pruning is not None and pruning.learned is not None:
        for layer in pruning.learned.layers:
            prefix = f"{experts[layer]}.pruner."
            tensors |= {f"{prefix}{n}": t for n, t in nets[layer].state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = "mcsharp-00001-of-00001.safetensors"
    write_safetensors(folder / file, tensors, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "mcsharp.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads(model.config.to_json_string())
    config["quantization_config"] = PackedLayout(GROUP, widths, {}, pruning).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def _packed(experts: Any, path: str, widths: Sequence[int]) -> dict[str, Tensor]:
    packed = {}
    for matrix in ("gate_up", "down"):
        weight = fused_weight(experts, matrix)  # type: ignore[arg-type]
        batch = quantise_rtn(weight, widths, GridSettings(group_size=GROUP))
        packed[matrix] = [pack_weight(batch.expert(e)) for e in range(len(widths))]
        weight.copy_(batch.dequantise())
    return expert_tensors(path, widths, packed)  # type: ignore[arg-type]


class SlowPruning:
    """Prunes a stock model's experts token by token, in Python, from eager attention maps.

    It is for one sequence at a time, without padding or cache.
    """

    def __init__(
        self, model: Any, topology: Topology, layout: PruningLayout, nets: Mapping[int, Any]
    ) -> None:
        model.set_attn_implementation("eager")
        self.model, self.layout, self.nets = model, layout, nets
        self.mode: str = layout.mode
        self.maps: dict[int, Tensor] = {}
        self.choices: dict[int, Tensor] = {}
        for index, layer in enumerate(model.get_submodule(topology.layers_path)):
            if index not in topology.moe:
                continue
            layer.self_attn.register_forward_hook(
                lambda _m, _a, out, i=index: self.maps.__setitem__(i, out[1])
            )
            experts = layer.get_submodule(topology.moe[index].experts)
            experts.register_forward_pre_hook(lambda m, args, i=index: self._prune(i, m, *args))

    @torch.no_grad()
    def logits(self, sequence: Tensor) -> Tensor:
        """[L, vocabulary] of a sequence [L]; the choices of each layer are in ``choices``."""
        return self.model(sequence[None], use_cache=False, output_attentions=True).logits[0]

    def _prune(
        self, layer: int, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ranked = self._ranked(layer, hidden)
        index, weights = index.clone(), weights.clone()
        for t in range(len(hidden)):
            kept = self._kept(layer, hidden[t], weights[t], ranked.index(t), len(ranked))
            total = sum(weights[t].tolist())
            shares = weights[t].tolist()
            left = sum(shares[slot] for slot in kept)
            for slot in range(len(shares)):
                if slot not in kept:
                    index[t, slot], weights[t, slot] = experts.num_experts, 0.0
                elif len(kept) < len(shares):
                    weights[t, slot] = shares[slot] * total / left
        self.choices[layer] = index
        return hidden, index, weights

    def _kept(self, layer: int, x: Tensor, weights: Tensor, place: int, tokens: int) -> list[int]:
        """Slots that a token keeps; it is the ``place``-th most important of ``tokens``."""
        rule, shares = self.layout.rule, weights.tolist()
        order = sorted(range(len(shares)), key=lambda slot: (-shares[slot], slot))
        if self.mode == "off":
            return order
        assert rule is not None
        if self.mode == "rule" and rule.metric == "drop_insignificant":
            lost = tokens > 1 and tokens - 1 - place < math.ceil(rule.drop_ratio * tokens - 1e-9)
            return [] if lost else order
        protects = self.mode != "learned" and rule.metric != "none" and tokens > 1
        if protects and place < math.ceil(rule.protect_ratio * tokens - 1e-9):
            return order
        if self.mode == "rule":
            least = [0.0, *rule.thresholds[layer]]
            return [s for i, s in enumerate(order) if shares[s] >= least[i] * shares[order[0]]]
        logits = self.nets[layer](x[None], weights[None])[0].tolist()
        return order[: 1 + logits.index(max(logits))]

    def _ranked(self, layer: int, hidden: Tensor) -> list[int]:
        """Tokens by falling importance."""
        rule, n = self.layout.rule, len(hidden)
        assert rule is not None
        if self.mode in ("off", "learned") or rule.metric == "none":
            return list(range(n))
        received = self.maps[layer][0].float().mean(0).sum(0).tolist()
        exact = hidden.double()
        worth = {
            "attention": [exact[j].abs().sum().item() * received[j] / (n - j) for j in range(n)],
            "kurtosis": [_kurtosis(exact[j].tolist()) for j in range(n)],
            "variance": exact.var(-1, correction=0).tolist(),
            "mean": exact.abs().mean(-1).tolist(),
        }
        scores = worth["attention" if rule.metric == "drop_insignificant" else rule.metric]
        return sorted(range(n), key=lambda j: (-scores[j], j))


def _kurtosis(x: list[float]) -> float:
    mean = sum(x) / len(x)
    second = sum((value - mean) ** 2 for value in x) / len(x)
    return sum((value - mean) ** 4 for value in x) / len(x) / second**2

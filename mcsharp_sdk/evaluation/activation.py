"""Which experts a model really uses while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.evaluation.stored import layer_of
from mcsharp_sdk.models.experts import call_arguments, is_experts
from mcsharp_sdk.models.topology import stays_as_it_is


@dataclass
class LayerActivity:
    """Use of one layer's routed experts, counted over all tokens seen.

    Attributes
    ----------
    activated : (experts,) int64, tokens that used each expert; 0 for one that is removed.
    slots : (token, expert) pairs the router's top-k chose, dropped ones included.
    tokens : tokens seen.
    """

    activated: Tensor
    slots: int = 0
    tokens: int = 0

    @property
    def ratio(self) -> float:
        """Activated pairs over tokens·k: 1 unless experts are pruned or removed."""
        return float(self.activated.sum()) / self.slots if self.slots else 1.0

    @property
    def frequency(self) -> list[float]:
        """Share of the tokens that used each expert; sums to k·ratio."""
        return (self.activated.double() / max(1, self.tokens)).tolist()


@dataclass(frozen=True)
class ExpertActivity:
    """Use of all routed experts: decoder layer index -> its activity."""

    layers: dict[int, LayerActivity]

    @property
    def ratio(self) -> float:
        """Activated (token, expert) pairs of all layers over tokens·k; 1 without any experts."""
        slots = sum(layer.slots for layer in self.layers.values())
        activated = sum(int(layer.activated.sum()) for layer in self.layers.values())
        return activated / slots if slots else 1.0


@contextmanager
def watch_experts(model: nn.Module) -> Iterator[ExpertActivity]:
    """Count what every experts module is called with, for as long as the context lasts.

    Those that are never compressed, which only images go through, are not counted.

    A slot counts as dropped if it names no expert (index ``num_experts``) or one that is removed,
    or has weight 0.

    Parameters
    ----------
    model : any model; the result stays empty without experts modules, and of families whose own
        modules do not show which experts they use (original dbrx and llama4).
    """
    activity: dict[int, LayerActivity] = {}
    handles = []
    for name, module in model.named_modules():
        if is_experts(module) and not stays_as_it_is(name):
            experts = int(module.num_experts)  # type: ignore[arg-type]
            layer = activity[layer_of(name)] = LayerActivity(
                torch.zeros(experts, dtype=torch.int64)
            )
            handles.append(module.register_forward_pre_hook(_counter(layer), with_kwargs=True))
    try:
        yield ExpertActivity(activity)
    finally:
        for handle in handles:
            handle.remove()


def _counter(layer: LayerActivity) -> Callable[..., None]:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights = call_arguments(args, kwargs)
        experts = layer.activated.numel()
        kept = index[(index < experts) & (weights != 0)]
        if layer.activated.device != kept.device:
            layer.activated = layer.activated.to(kept.device)
        used = torch.bincount(kept.reshape(-1), minlength=experts)
        used[list(getattr(module, "removed", ()))] = 0
        layer.activated += used
        layer.slots += index.numel()
        layer.tokens += index.shape[0]

    return count

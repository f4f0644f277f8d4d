"""Fit the routers of a quantised model, layer by layer, beside the activations of the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.capture import routed_inputs
from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.routing import Router, Routing, route, router_logits
from mcsharp_sdk.models.stream import advance
from mcsharp_sdk.models.streamed_layer import LayerInputs, StreamedLayer
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.modifiers.original_model import copied_inputs
from mcsharp_sdk.quantization.router_fit import divergence, fit_router

HELD_OUT = 8
"""One token in so many is not fitted on but judged on."""


@dataclass(frozen=True)
class Target:
    """What the original router of a layer makes of the original inputs.

    ``logits`` fp32 [T, E]; ``routing`` its choices, of the same tokens.
    """

    logits: Tensor
    routing: Routing

    def of(self, tokens: Tensor) -> Target:
        """Some of the tokens."""
        return Target(self.logits[tokens], Routing(*(part[tokens] for part in self.routing)))


@dataclass
class RouterFitting:
    """Carries the original activations along with the quantised ones, and fits routers.

    Attributes
    ----------
    tokens, ridge, steps : settings of the stage.
    """

    tokens: int
    ridge: float
    steps: int
    _original: LayerInputs | None = field(default=None, repr=False)

    @torch.no_grad()
    def target_of(self, layer: StreamedLayer) -> Target | None:
        """Run the loaded, original layer on the original activations; None of a dense layer.

        To be called once for each layer in turn, before it gets its quantised weights.
        """
        if self._original is None:
            self._original = copied_inputs(layer.inputs)
        original = StreamedLayer(
            layer.source, layer.index, layer.module, self._original, layer.experts
        )
        if layer.is_last:  # no further layer asks for the activations behind it
            return None if layer.moe is None else _target(layer, routed_inputs(original))
        target = None
        if layer.moe is not None:
            runs = ExpertRuns.of_layer(original)
            target = _target(layer, runs.routed)
            runs.run(runs.experts)
            original.expert_outputs = runs.finish()
        advance(original)
        return target

    @torch.no_grad()
    def fit(self, layer: StreamedLayer, target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Fit the router of a layer that has its quantised weights, in place.

        Returns
        -------
        The router's weight by its full name if it changed, and notes: divergence from the
        original's probabilities in nats and share of the original's choices, before and after, on
        the tokens held out.
        """
        inputs = routed_inputs(layer).router_hidden
        if len(inputs) != len(target.logits):
            raise RunError(
                f"RouterCalibration: decoder layer {layer.index} routes {len(inputs)} tokens, and "
                f"{len(target.logits)} before quantisation"
            )
        fitted_on, judged_on = _split(len(inputs), self.tokens)
        before = layer.source.router(layer.moe)
        weight = fit_router(
            before.weight,
            before.bias,
            inputs[fitted_on],
            target.logits[fitted_on],
            before.settings.scoring,
            ridge=self.ridge,
            steps=self.steps,
        )
        stored = weight.to(layer.source.stored_dtype)
        after = replace(before, weight=stored.to(before.weight.dtype))
        judged = inputs[judged_on], target.of(judged_on)
        notes = {f"{name}_before": value for name, value in _distance(before, *judged).items()}
        found = _distance(after, *judged)
        changed = found["divergence"] < notes["divergence_before"]
        if not changed:
            found = {name: notes[f"{name}_before"] for name in found}
        notes |= {f"{name}_after": value for name, value in found.items()}
        tensors = {_weight_name(layer): stored} if changed else {}
        self.put_back(layer, tensors)
        return tensors, {"changed": changed, **notes}

    @torch.no_grad()
    def put_back(self, layer: StreamedLayer, tensors: Mapping[str, Tensor]) -> None:
        """Give a loaded layer the router that it was fitted, if it was."""
        name = _weight_name(layer)
        if name in tensors:
            layer.source.model.get_parameter(name).copy_(tensors[name])


def _weight_name(layer: StreamedLayer) -> str:
    """Full name of a layer's router weight."""
    path = f"{layer.source.layer_path(layer.index)}.{layer.moe.router}"
    return f"{path}.{router_weight(layer.source.model.get_submodule(path))}"


def _target(layer: StreamedLayer, routed: RoutedInputs) -> Target:
    router, hidden = layer.source.router(layer.moe), routed.router_hidden
    return Target(router_logits(router, hidden), route(router, hidden))


def _split(count: int, most: int) -> tuple[Tensor, Tensor]:
    """Tokens to fit on and tokens to judge on, ``most`` in all, evenly spaced."""
    chosen = evenly_spaced(count, most)
    place = torch.arange(len(chosen))
    held = place % HELD_OUT == HELD_OUT - 1
    if not held.any():  # fewer tokens than one in so many: nothing to hold out
        return chosen, chosen
    return chosen[~held], chosen[held]


def _distance(router: Router, inputs: Tensor, target: Target) -> dict[str, float]:
    """Divergence from the target, and the share of its choices that are made again."""
    logits = router_logits(router, inputs)
    again = route(router, inputs).indices.unsqueeze(-1) == target.routing.indices.unsqueeze(-2)
    return {
        "divergence": float(divergence(target.logits, logits, router.settings.scoring)),
        "same": float(again.any(-1).double().mean()),
    }

"""What allocators are given of the expert statistics."""

from __future__ import annotations

from collections.abc import Sequence

from mcsharp_sdk.allocation.baselines import Need
from mcsharp_sdk.allocation.significance import Factors
from mcsharp_sdk.artifacts import LayerStatistics
from mcsharp_sdk.errors import InputError


def factors_of(layer: LayerStatistics, widths: Sequence[int], need: Need | None) -> Factors:
    """What an allocator needs of a layer; InputError if it was not measured."""
    cosine = None
    if need in ("predicted_block_cosine", "block_cosine"):
        cosine = getattr(layer, need)
        if cosine is None:
            raise InputError(
                f"layer {layer.layer}: no {need.replace('_', ' ')} was measured: "
                "give ExpertStats 'block_scores: true'"
            )
    return Factors(
        widths=tuple(widths),
        activation_count=layer.activation_count,
        routing_weight_sum=layer.routing_weight_sum,
        quant_error=layer.errors_at(widths) if need == "quant_error" else None,
        hessian_error=layer.hessian_errors_at(widths) if need == "hessian_error" else None,
        block_cosine=cosine,
    )


def layer_weights(layers: Sequence[LayerStatistics], wanted: bool | None) -> list[float]:
    """How much the loss feels errors of each layer; ones where that is not to count.

    Parameters
    ----------
    wanted : None for where it was measured in all layers. If true, InputError where it was not.
    """
    known = [layer.loss_sensitivity for layer in layers]
    found = [value for value in known if value is not None]
    if wanted is not False and len(found) == len(layers):
        return found
    if wanted:
        raise InputError(
            f"layer {layers[known.index(None)].layer}: how much the loss feels errors was not "
            "measured: give ExpertStats 'loss_tokens'"
        )
    return [1.0] * len(layers)

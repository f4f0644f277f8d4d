"""About how long stages take on this machine, from the multiplications that they need."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mcsharp_sdk.engine.sizes import LayerSizes, ModelSizes, network_bytes
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.router_calibration import RouterCalibration
from mcsharp_sdk.modifiers.token_protection import TokenProtection
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter

PASS = 1.5
"""Cost of a calibration pass in forwards: attention runs two or three times, experts once."""


def stage_seconds(stages: Sequence[Modifier], sizes: ModelSizes, tokens: int) -> list[float]:
    """Seconds of each stage on so many calibration tokens; 0 for one that is not known.

    The speed of this machine is measured for a moment. What a stage does besides multiplying is
    left out, which for models of a few million weights is most of it.
    """
    rate = _multiplications_per_second(sizes.dtype)
    exact = rate if sizes.dtype == torch.float32 else _multiplications_per_second(torch.float32)
    forward = sum(layer.active_weights for layer in sizes.layers) * tokens / rate
    return [_seconds(stage, sizes, tokens, forward, exact) for stage in stages]


def _seconds(
    stage: Modifier, sizes: ModelSizes, tokens: int, forward: float, exact: float
) -> float:
    """Seconds of one stage, given those of a forward and the rate of products in float32."""
    from mcsharp_sdk.modifiers.expert_measurement import HESSIAN_TOKENS

    work = 0.0
    if isinstance(stage, ExpertStats) and stage.quantizer == "gptq":
        work = sum(_expert_hessians(layer, tokens, HESSIAN_TOKENS) for layer in sizes.layers)
        work += len(stage.bits) * sum(_update_work(layer) for layer in sizes.layers)
    elif isinstance(stage, GPTQQuantize) and stage.quantizer == "gptq":
        work = sum(_expert_hessians(layer, tokens) for layer in sizes.layers)
        work += sum(_linear_hessians(layer, tokens) + _update_work(layer) for layer in sizes.layers)
    elif isinstance(stage, TopAnyRouter):
        work = _training_work(stage, sizes, tokens)
    elif isinstance(stage, RouterCalibration):
        # The original runs beside the quantised model.
        return 2 * PASS * forward + _fitting_work(stage, sizes, tokens) / exact
    elif not isinstance(stage, (ExpertStats, GPTQQuantize, TokenProtection)):
        return 0.0
    if isinstance(stage, ExpertStats) and tokens:
        # Gradients: a forward pass, another for the backward pass, and that at twice the work.
        forward *= 1 + 4 / PASS * min(stage.loss_tokens, tokens) / tokens
    return PASS * forward + work / exact


def _expert_hessians(layer: LayerSizes, tokens: int, most: int | None = None) -> float:
    """Multiplications for the Hessians of a layer's experts, of ``most`` tokens each."""
    routed = tokens * layer.top_k
    if most is not None:
        routed = min(routed, most * layer.experts)
    return float(sum(routed * columns**2 for columns in layer.expert_columns))


def _linear_hessians(layer: LayerSizes, tokens: int) -> float:
    """Multiplications for the Hessians of a layer's other linears."""
    return float(sum(tokens * columns**2 for columns in layer.linear_columns))


def _update_work(layer: LayerSizes) -> float:
    """Multiplications for factorising Hessians and walking the columns, memory traffic included."""
    walking = 6.0
    return float(
        layer.experts
        * sum(
            columns**3 + walking * rows * columns**2
            for rows, columns in zip(layer.expert_rows, layer.expert_columns, strict=True)
        )
    )


def _training_work(stage: TopAnyRouter, sizes: ModelSizes, tokens: int) -> float:
    """Multiplications for training top-any networks to the last step."""
    seen = stage.steps * min(stage.batch_tokens, max(tokens, 1))
    if stage.scope == "block":
        networks = sum(network_bytes(sizes, layer, stage.units) / 4 for layer in sizes.layers)
        return float(3 * networks * seen)
    active = sum(layer.active_weights for layer in sizes.layers)
    # Per step the model unpruned, pruned, pruned again for the gradients, and those of its inputs.
    return float(4 * active * seen)


def _fitting_work(stage: RouterCalibration, sizes: ModelSizes, tokens: int) -> float:
    """Multiplications for fitting routers to the last step."""
    seen = min(tokens, stage.tokens)
    width = sizes.hidden_size
    # Per step a product with the weight, its gradient, and the change of coordinates.
    return float(
        sum(
            seen * width**2 + width**3 + stage.steps * 3 * layer.experts * width * (seen + width)
            for layer in sizes.layers
            if layer.experts
        )
    )


def _multiplications_per_second(dtype: torch.dtype, size: int = 768) -> float:
    """Speed of matrix multiplication in ``dtype`` on this machine, measured for a moment."""
    a = torch.ones(size, size, dtype=dtype)
    _ = linear(a, a)
    start = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - start < 0.05:
        _ = linear(a, a)
        rounds += 1
    return rounds * size**3 / (time.perf_counter() - start)

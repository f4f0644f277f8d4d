"""About how long stages take on this machine: multiplications, and weights that are quantised.

What a stage does besides is left out, which for models of a few million weights is most of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from mcsharp_sdk.engine.sizes import LayerSizes, ModelSizes, network_bytes
from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.models.expert_runs import OVERALL_TOKENS
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.router_calibration import RouterCalibration
from mcsharp_sdk.modifiers.token_protection import TokenProtection
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
from mcsharp_sdk.quantization import lwc
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.grid import PackedWeight, QuantizedBatch, pack_weight
from mcsharp_sdk.quantization.hqq import quantise_hqq
from mcsharp_sdk.quantization.inverse_factor import InverseFactor
from mcsharp_sdk.quantization.rotation import expert_signs, rotate_
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings

PASS = 3.0
"""Cost of a calibration pass in forwards at the speed of one product: attention runs two or three
times, experts once, and both at about half of that speed (benchmarks/plan_accuracy.py)."""

HANDLED = 2e8
"""Weights in a second that are read, copied, hashed and written while they are quantised
(benchmarks/plan_accuracy.py --sequences 0)."""

MEASURED = (512, 1024)
"""Rows and columns of the matrix that quantising is timed on."""


@dataclass(frozen=True)
class Speeds:
    """What this machine does in a second, measured for a moment.

    Attributes
    ----------
    forward : multiplications in the model's dtype.
    exact : multiplications in float32.
    weights : quantiser -> of a matrix that are quantised and packed, updates and steps left out.
    weights_quickly : that are quantised by GPTQ with the coarser search of ExpertStats.
    turned : weights whose columns are turned for a rotation.
    """

    forward: float
    exact: float
    weights: Mapping[str, float]
    weights_quickly: float
    turned: float

    @classmethod
    @cache
    def measure(cls, dtype: torch.dtype, group_size: int) -> Speeds:
        """Of this machine as it is now, with whatever else runs on it; measured once."""
        from mcsharp_sdk.modifiers.expert_measurement import QUICK_SEARCH

        forward = _multiplications_per_second(dtype)
        exact = forward if dtype == torch.float32 else _multiplications_per_second(torch.float32)
        whole, quick = GridSettings(group_size), GridSettings(group_size, **QUICK_SEARCH)
        weights = {
            name: _weights_per_second(partial(_quantise_and_pack, run, whole))
            for name, run in _QUANTISERS.items()
        }
        quickly = _weights_per_second(partial(_gptq, bits=[2], grid=quick))
        return cls(forward, exact, weights, quickly, _weights_per_second(_turn))


def stage_seconds(
    stages: Sequence[Modifier], sizes: ModelSizes, tokens: int, processes: int = 1
) -> list[float]:
    """Seconds of each stage on so many calibration tokens; 0 for one that is not known.

    Parameters
    ----------
    processes : each as fast as this one, and with nothing else to wait for.
    """
    group_size = next((s.group_size for s in stages if isinstance(s, _QUANTISING)), 128)
    speeds = Speeds.measure(sizes.dtype, group_size)
    return [_seconds(stage, sizes, tokens, speeds) / processes for stage in stages]


_QUANTISING = (ExpertStats, GPTQQuantize)


def _seconds(stage: Modifier, sizes: ModelSizes, tokens: int, speeds: Speeds) -> float:
    """Seconds of one stage."""
    from mcsharp_sdk.modifiers.expert_measurement import HESSIAN_TOKENS

    active = sum(layer.active_weights for layer in sizes.layers)
    forward = PASS * active * tokens / speeds.forward
    work, searching = 0.0, 0.0
    if isinstance(stage, ExpertStats):
        widths = len(stage.bits)
        searching = widths * sizes.expert_weights / speeds.weights_quickly
        if stage.quantizer == "gptq":
            work = sum(_expert_hessians(layer, tokens, HESSIAN_TOKENS) for layer in sizes.layers)
            work += sum(_expert_updates(layer, widths) for layer in sizes.layers)
        measured = min(tokens, stage.error_tokens)
        forward += measured * (widths + 1) * sizes.expert_weights / speeds.forward
        # Gradients: a forward pass, another for the backward pass, and that at twice the work.
        forward += 4 * active * min(stage.loss_tokens, tokens) / speeds.forward
    elif isinstance(stage, GPTQQuantize):
        linears = 0 if stage.other_bits is None else sizes.linear_weights
        weights = sizes.expert_weights + linears
        searching = weights / speeds.weights[stage.quantizer] + weights / HANDLED
        if stage.rotated:  # and back, for what is run with them
            searching += (2 if tokens else 1) * sizes.expert_weights / speeds.turned
        work = sum(_quantising_work(stage, layer, tokens) for layer in sizes.layers)
        if stage.propagates:
            # The original runs beside; its experts' first matrices on other tokens once more.
            forward += (PASS + 0.5) * active * tokens / speeds.forward
    elif isinstance(stage, TopAnyRouter):
        work = _training_work(stage, sizes, tokens)
    elif isinstance(stage, RouterCalibration):
        forward *= 2  # the original runs beside the quantised model
        work = _fitting_work(stage, sizes, tokens)
    elif not isinstance(stage, TokenProtection):
        return 0.0
    return forward + work / speeds.exact + searching


def _quantising_work(stage: GPTQQuantize, layer: LayerSizes, tokens: int) -> float:
    """Multiplications for quantising a layer; every quantiser gets Hessians of what tokens tell."""
    if not tokens:
        return 0.0
    work = _expert_hessians(layer, tokens) + _told_errors(layer)
    if stage.quantizer == "gptq":
        work += _expert_updates(layer, 1)
        if stage.refinements is not None:
            rounds = 1 + 2 * stage.refinements  # scales, and then codes and scales in turn
            work += (rounds + 1) * _sweep(layer)
    if stage.quantizer == "lwc":
        work += lwc.STEPS * _sweep(layer)
    if stage.propagates:
        work += _making_up(layer, tokens)
    if stage.other_bits is not None:
        work += _linear_work(stage, layer, tokens)
    return work


def _expert_hessians(layer: LayerSizes, tokens: int, most: int | None = None) -> float:
    """Multiplications for the Hessians of a layer's experts, ``most`` as of ``expert_hessians``."""
    routed = tokens * layer.top_k // max(1, layer.experts)
    found = 0.0
    for columns in (matrix.columns for matrix in layer.expert):
        every = 1 if most is None else max(1, routed // max(most, columns))
        # Few tokens are completed by those of all experts.
        taken = routed // every + (min(tokens, OVERALL_TOKENS) if routed < columns else 0)
        # Half of a symmetric product is computed.
        found += layer.experts * taken * columns**2 / 2
    return found


def _linear_work(stage: GPTQQuantize, layer: LayerSizes, tokens: int) -> float:
    """Multiplications for a layer's other linears; those that share an input share a Hessian."""
    inputs = _inputs_of_linears(layer)
    hessians = sum(tokens * columns**2 / 2 for columns in inputs)
    factors = sum(columns**3 for columns in inputs) if stage.quantizer == "gptq" else 0
    products = sum(linear.weights * linear.columns for linear in layer.linears)
    return float(hessians + factors + _PRODUCTS.get(stage.quantizer, 0) * products)


def _inputs_of_linears(layer: LayerSizes) -> list[int]:
    """Columns of each input of a layer's linears; those of one part and size share it."""
    return [columns for _, columns in {(linear.part, linear.columns) for linear in layer.linears}]


_PRODUCTS: Mapping[str, float] = {"gptq": 0.5, "lwc": lwc.STEPS}
"""Quantiser -> how often it multiplies weights, or as many numbers, with their Hessian."""


def _expert_updates(layer: LayerSizes, widths: int) -> float:
    """Multiplications for factorising the experts' Hessians, and for updates at each width."""
    factors = layer.experts * sum(matrix.columns**3 for matrix in layer.expert)
    return factors + widths * _sweep(layer) / 2


def _making_up(layer: LayerSizes, tokens: int) -> float:
    """Multiplications for making up for the errors of a layer's inputs."""
    grams = tokens * layer.top_k * sum(matrix.columns**2 for matrix in layer.expert)
    grams += tokens * sum(columns**2 for columns in _inputs_of_linears(layer))
    return grams + 3 * _sweep(layer)


def _sweep(layer: LayerSizes) -> float:
    """Multiplications of a layer's experts, or as many numbers, with their Hessians."""
    return float(layer.experts * sum(matrix.weights * matrix.columns for matrix in layer.expert))


def _told_errors(layer: LayerSizes) -> float:
    """Multiplications for the errors of a layer's experts that the report tells."""
    from mcsharp_sdk.modifiers.matrix_quantisation import ERROR_ROWS

    of_one = sum(2 * ERROR_ROWS * matrix.columns**2 for matrix in layer.expert)
    return float(layer.experts * of_one)


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


def _gptq(weights: Tensor, bits: Sequence[int], grid: GridSettings) -> QuantizedBatch:
    columns = weights.shape[-1]
    factor = InverseFactor(torch.eye(columns).unsqueeze(0), (0.01,), (), ())
    return quantise_gptq(weights, factor, bits, grid)


Quantiser = Callable[[Tensor, Sequence[int], GridSettings], QuantizedBatch]

_QUANTISERS: Mapping[str, Quantiser] = {
    "gptq": _gptq,
    "rtn": quantise_rtn,
    "hqq": quantise_hqq,
    "lwc": quantise_rtn,  # what it does before and after its steps
}
"""Quantiser -> what it does besides multiplications, for timing."""


def _turn(matrix: Tensor) -> Tensor:
    return rotate_(matrix[0], expert_signs(1, matrix.shape[2])[0])


def _quantise_and_pack(quantise: Quantiser, grid: GridSettings, matrix: Tensor) -> PackedWeight:
    return pack_weight(quantise(matrix, [2], grid).expert(0))


def _weights_per_second(work: Callable[[Tensor], object]) -> float:
    """Weights of a matrix [1, R, K] that something is done with here, measured for a moment."""
    rows, columns = MEASURED
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, rows, columns, generator=generator)
    work(weights[..., :32].contiguous())
    start = time.perf_counter()
    rounds = 0
    while not rounds or time.perf_counter() - start < 0.02:
        work(weights)
        rounds += 1
    return rounds * rows * columns / (time.perf_counter() - start)

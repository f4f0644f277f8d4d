"""Quantisation errors at the output of the whole model (MC, arXiv 2410.06270, Eq. 3).

The model is held in memory, and everything behind a layer runs again for each of its experts and
widths: for small models. It is in float32: of hidden states that each layer rounds to 16 bits, the
rounding would count as an error of the expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcsharp_sdk.artifacts import LayerStatistics
from mcsharp_sdk.models.embedding import embed
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.expert_weights import LoadedExperts
from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.streamed_layer import LayerInputs, StreamedLayer
from mcsharp_sdk.quantization.grid import REMOVED

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.modifiers.expert_measurement import ExpertMeasurement, QuantisedPair


@torch.no_grad()
def measure_model_errors(
    context: RunContext, measurement: ExpertMeasurement, measured: list[LayerStatistics]
) -> list[LayerStatistics]:
    """Fill in ``quant_error``: ‖F(θ) − F(θ[e → Q(e, b)])‖_F over the last hidden states.

    ``drop_error`` is the same with zeros for the expert.

    F is taken before the final norm and head, over as many whole sequences as ``error_tokens``
    allows, at least one.
    """
    source = SourceModel(context.model.path, context.model.device, torch.float32)
    calibration = context.calibration
    few = calibration.first(measurement.error_tokens)
    last = source.topology.num_layers
    inputs, probe = embed(source, calibration, context.scratch()), embed(source, few)
    source.load(f"{source.topology.layers_path}.")
    reference = _run_layers(source, probe, 0, last)
    removal = REMOVED, dict.fromkeys(MATRICES, torch.zeros(()))
    filled = []
    for index in context.track(range(last), "measuring model errors"):
        statistics = next((s for s in measured if s.layer == index), None)
        if statistics is not None:
            module = source.layer(index)
            experts = LoadedExperts(module.get_submodule(source.topology.moe[index].experts))
            layer = StreamedLayer(source, index, module, inputs, experts)
            count = statistics.num_experts
            errors = {width: np.zeros(count) for width in (REMOVED, *measurement.widths)}
            runs = ExpertRuns.of_layer(layer)
            for expert, variants in measurement.quantised_experts(runs):
                for width, weights in itertools.chain([removal], variants):
                    with _replaced(experts.module, expert, weights):
                        output = _run_layers(source, probe, index, last)
                    errors[width][expert] = float((output - reference).norm())
            dropped = errors.pop(REMOVED)
            _name_unreached(context, statistics, dropped, few.num_tokens)
            filled.append(replace(statistics, quant_error=errors, drop_error=dropped))
        inputs.advance(source.layer(index), index)
        probe.advance(source.layer(index), index)
    source.free(f"{source.topology.layers_path}.")
    return filled


def _name_unreached(
    context: RunContext, measured: LayerStatistics, dropped: NDArray[np.float64], tokens: int
) -> None:
    """Warn of experts that some tokens select, but none of those that errors are measured on."""
    unreached = np.flatnonzero((dropped == 0) & (measured.activation_count > 0)).tolist()
    if unreached:
        context.report.warn(
            f"layer {measured.layer}: all errors are 0 for experts that none of the first {tokens} "
            f"tokens reach, on which errors at the model's output are measured: "
            f"{', '.join(map(str, unreached))}; give ExpertStats more 'error_tokens'"
        )


def _run_layers(source: SourceModel, like: LayerInputs, start: int, stop: int) -> Tensor:
    """[T, hidden] behind layer ``stop - 1``, from what is in front of layer ``start``."""
    passing = replace(like, hidden=[batch.clone() for batch in like.hidden])
    for index in range(start, stop):
        passing.advance(source.layer(index), index)
    return torch.cat([batch.flatten(0, 1) for batch in passing.hidden])


@contextmanager
def _replaced(experts: Any, expert: int, weights: QuantisedPair) -> Iterator[None]:
    """Give an expert other weights for a while."""
    own = {matrix: fused_weight(experts, matrix)[expert].clone() for matrix in MATRICES}
    for matrix in MATRICES:
        fused_weight(experts, matrix)[expert] = weights[matrix]
    try:
        yield
    finally:
        for matrix in MATRICES:
            fused_weight(experts, matrix)[expert] = own[matrix]

"""What a recipe will do to a model, told from headers alone, before any weight is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk.engine.sizes import LayerSizes, ModelSizes, model_sizes, packed_bytes_of
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.routing import router_settings
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.recipe.document import Location
from mcsharp_sdk.recipe.schema import Recipe

INTERPRETER_BYTES = 650 * 10**6
"""Resident memory of Python with torch and transformers imported, before a model is opened."""

LOADING_OVERHEAD = 1.3
"""Peak memory of loading a layer, in layers: fused tensors are stacked from single ones."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it is, and about how long it takes on this machine, in seconds."""

    stage: str
    summary: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    model, layers, moe_layers, experts, top_k : what was found.
    stages : in order.
    bytes_before, bytes_after : of all weights; the second estimated from the widths.
    nominal_bits : mean width of all weights that will be quantised.
    peak_memory : bytes, estimated.
    """

    model: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    stages: Sequence[StagePlan]
    bytes_before: int
    bytes_after: int
    nominal_bits: float | None
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def plan(
    recipe: Recipe | str | os.PathLike[str],
    model: str | os.PathLike[str],
    overrides: Sequence[str] = (),
) -> Plan:
    """Tell what ``compress`` would do, without reading weights.

    Raises
    ------
    InputError
        If the recipe is wrong, or it and the model do not fit; all problems together.
    """
    from mcsharp_sdk.engine.run import as_recipe

    return make_plan(as_recipe(recipe, overrides), SourceModel(Path(model)))


def check_model(recipe: Recipe, model: str | os.PathLike[str] | SourceModel) -> None:
    """Check that a recipe fits a model.

    Raises
    ------
    InputProblems
        With everything that does not fit, each with its place in the recipe.
    """
    source = model if isinstance(model, SourceModel) else SourceModel(Path(model))
    misfits = [
        *_stage_misfits(recipe, source),
        *_routing_misfits(recipe, source),
        *_calibration_misfits(recipe, source),
    ]
    if misfits:
        raise recipe.error(misfits)


Misfit = tuple[Location, str]


def _stage_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    experts = source.topology.experts_per_layer()
    for position, stage in enumerate(recipe.stages):
        for problem in stage.check_experts(experts):
            yield ("stages", position, problem.where), problem.message


def _routing_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    try:
        router_settings(source.config)
    except InputError as error:
        for position, stage in enumerate(recipe.stages):
            if stage.reads_routing:
                yield ("stages", position), str(error)
        for position, exporter in enumerate(recipe.exports):
            if exporter.reads_routing:
                yield ("exports", position), str(error)


def _calibration_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if recipe.calibration is not None and limit and recipe.calibration.length > limit:
        length = recipe.calibration.length
        message = f"{length} tokens are more than the model's {limit} positions"
        yield ("calibration", "length"), message


def make_plan(recipe: Recipe, source: SourceModel) -> Plan:
    """The plan for an opened model.

    Raises
    ------
    InputProblems
        If recipe and model do not fit.
    """
    check_model(recipe, source)
    sizes = model_sizes(source)
    bits = _intended_bits(recipe, source)
    blocks = list(source.topology.moe.values())
    after, nominal = _after(recipe, sizes, bits)
    return Plan(
        model=source.path.name,
        layers=source.topology.num_layers,
        moe_layers=len(blocks),
        experts=blocks[0].num_experts,
        top_k=blocks[0].top_k,
        stages=_stage_plans(recipe, sizes, bits),
        bytes_before=sizes.bytes,
        bytes_after=after,
        nominal_bits=nominal,
        peak_memory=_peak_memory(recipe, sizes),
    )


def _quantiser(recipe: Recipe) -> GPTQQuantize | None:
    return next((s for s in recipe.stages if isinstance(s, GPTQQuantize)), None)


def _intended_bits(recipe: Recipe, source: SourceModel) -> float | None:
    """Mean width of the experts, as far as the recipe says it."""
    quantiser = _quantiser(recipe)
    if quantiser is not None and quantiser.bits is not None:
        return quantiser.given_map(source.topology.experts_per_layer()).nominal_bits
    allocation = next((s for s in recipe.stages if isinstance(s, BitAllocation)), None)
    return allocation.target_bits if allocation is not None else None


def _after(recipe: Recipe, sizes: ModelSizes, bits: float | None) -> tuple[int, float | None]:
    """Bytes of all weights afterwards, and the mean width of those that are quantised."""
    quantiser = _quantiser(recipe)
    if quantiser is None or bits is None:
        return sizes.bytes, None
    group, other = quantiser.group_size, quantiser.other_bits
    quantised = {bits: sizes.expert_weights}
    kept = sizes.bytes - sizes.expert_bytes
    if other is not None:
        quantised[other] = quantised.get(other, 0) + sizes.linear_weights
        kept -= sizes.linear_bytes
    packed = sum(packed_bytes_of(n, width, group) for width, n in quantised.items())
    count = sum(quantised.values())
    return kept + packed, sum(width * n for width, n in quantised.items()) / count


def _peak_memory(recipe: Recipe, sizes: ModelSizes) -> int:
    """Interpreter, one layer while it loads, the quantiser's working set, and activations."""
    from mcsharp_sdk.modifiers.layer_quantisation import WORKING_SET_BYTES

    activations = 0
    if recipe.calibration is not None:
        tokens = recipe.calibration.sequences * recipe.calibration.length
        # Hidden states before a layer, and once more in front of its experts.
        activations = 2 * tokens * sizes.hidden_size * sizes.dtype_bytes
    layer = max(sizes.layers, key=lambda s: s.bytes)
    working = max(WORKING_SET_BYTES, layer.expert_working_set)
    loading = int(layer.bytes * LOADING_OVERHEAD)
    return INTERPRETER_BYTES + max(loading, layer.bytes + working) + activations


def _stage_plans(recipe: Recipe, sizes: ModelSizes, bits: float | None) -> list[StagePlan]:
    rate = _multiplications_per_second(sizes.dtype)
    exact = rate if sizes.dtype == torch.float32 else _multiplications_per_second(torch.float32)
    tokens = 0
    if recipe.calibration is not None:
        tokens = recipe.calibration.sequences * recipe.calibration.length
    forward = sum(layer.active_weights for layer in sizes.layers) * tokens / rate
    hessian = sum(_hessian_work(layer, tokens) for layer in sizes.layers) / exact
    update = sum(_update_work(layer) for layer in sizes.layers) / exact
    plans = []
    for stage in recipe.stages:
        seconds = 0.0
        if isinstance(stage, ExpertStats):
            measured = hessian + update * len(stage.bits) if stage.quantizer == "gptq" else 0.0
            seconds = forward * (2 + len(stage.bits)) + measured
        elif isinstance(stage, GPTQQuantize):
            seconds = forward * 3 + (hessian + update if stage.quantizer == "gptq" else 0.0)
        plans.append(StagePlan(stage.type, _summary(stage, bits), seconds))
    return plans


def _hessian_work(layer: LayerSizes, tokens: int) -> float:
    """Multiplications for the Hessians of all matrices of a layer."""
    routed = tokens * layer.top_k
    return float(sum(routed * columns**2 for columns in layer.expert_columns)) + float(
        sum(tokens * columns**2 for columns in layer.linear_columns)
    )


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


def _multiplications_per_second(dtype: torch.dtype, size: int = 768) -> float:
    """Speed of matrix multiplication in ``dtype`` on this machine, measured for a moment."""
    a = torch.ones(size, size, dtype=dtype)
    _ = a @ a
    start = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - start < 0.05:
        _ = a @ a
        rounds += 1
    return rounds * size**3 / (time.perf_counter() - start)


def _summary(stage: Any, bits: float | None) -> str:
    """A line about a stage with the settings that matter most."""
    told: Mapping[str, Any] = {
        name: getattr(stage, name)
        for name in ("mode", "quantizer", "allocator", "target_bits", "group_size", "other_bits")
        if hasattr(stage, name)
    }
    return ", ".join(f"{name} {value}" for name, value in told.items())

"""What a recipe will do to a model, told from headers alone, before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.data.calibration import ImageTextSource
from mcsharp_sdk.engine.durations import stage_seconds
from mcsharp_sdk.engine.sizes import ModelSizes, model_sizes, network_bytes, packed_bytes_of
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.architecture import reads_images
from mcsharp_sdk.models.routing import router_settings
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.router_calibration import RouterCalibration
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
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
        *_export_misfits(recipe, source),
        *_calibration_misfits(recipe, source),
    ]
    if misfits:
        raise recipe.error(misfits)


Misfit = tuple[Location, str]


def _stage_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    for position, stage in enumerate(recipe.stages):
        for problem in stage.check_blocks(source.topology.moe):
            setting = (problem.where,) if problem.where else ()
            yield ("stages", position, *setting), problem.message


def _routing_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    try:
        routers = {layer: router_settings(source.config, layer) for layer in source.topology.moe}
    except InputError as error:
        for position, stage in enumerate(recipe.stages):
            if stage.reads_routing:
                yield ("stages", position), str(error)
        for position, exporter in enumerate(recipe.exports):
            if exporter.reads_routing:
                yield ("exports", position), str(error)
        return
    for position, stage in enumerate(recipe.stages):
        if stage.reads_routing:
            for problem in stage.check_routers(routers):
                setting = (problem.where,) if problem.where else ()
                yield ("stages", position, *setting), problem.message


def _export_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    for position, exporter in enumerate(recipe.exports):
        for problem in exporter.check_model(source.config):
            setting = (problem.where,) if problem.where else ()
            yield ("exports", position, *setting), problem.message


def _calibration_misfits(recipe: Recipe, source: SourceModel) -> Iterator[Misfit]:
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for index, settings in enumerate(recipe.sources):
        location = recipe.source_location(index)
        if limit and settings.length > limit:
            message = f"{settings.length} tokens are more than the model's {limit} positions"
            yield (*location, "length"), message
        if isinstance(settings, ImageTextSource) and not reads_images(source.config):
            message = f"{source.config.model_type} reads no images: calibrate it on text"
            yield (*location, "source"), message
    if any(isinstance(settings, ImageTextSource) for settings in recipe.sources):
        for position, stage in enumerate(recipe.stages):
            if isinstance(stage, ExpertStats) and stage.loss_tokens:
                message = "gradients of the loss are measured on text alone: give 'loss_tokens: 0'"
                yield ("stages", position, "loss_tokens"), message


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
    networks = sum(
        network_bytes(sizes, layer, stage.units)
        for stage in recipe.stages
        if isinstance(stage, TopAnyRouter)
        for layer in sizes.layers
    )
    quantiser = _quantiser(recipe)
    if quantiser is None or bits is None:
        return sizes.bytes + networks, None
    group, other = quantiser.group_size, quantiser.other_bits
    quantised = {bits: sizes.expert_weights}
    kept = sizes.bytes - sizes.expert_bytes
    if other is not None:
        quantised[other] = quantised.get(other, 0) + sizes.linear_weights
        kept -= sizes.linear_bytes
    packed = sum(packed_bytes_of(n, width, group) for width, n in quantised.items())
    count = sum(quantised.values())
    mean = sum(width * n for width, n in quantised.items()) / count
    return kept + packed + networks, mean


def _peak_memory(recipe: Recipe, sizes: ModelSizes) -> int:
    """Interpreter, one layer while it loads, the quantiser's working set, and activations."""
    from mcsharp_sdk.modifiers.layer_quantisation import WORKING_SET_BYTES

    # Hidden states before a layer, those in front of its experts, and the experts' outputs;
    # where routers are calibrated, the original's hidden states as well.
    states = 4 if any(isinstance(s, RouterCalibration) for s in recipe.stages) else 3
    activations = states * _most_tokens(recipe) * sizes.hidden_size * sizes.dtype_bytes
    loss_tokens = max(
        (s.loss_tokens for s in recipe.stages if isinstance(s, ExpertStats)), default=0
    )
    # Gradients of the loss need what is in front of every layer.
    kept = min(loss_tokens, _most_tokens(recipe)) * len(sizes.layers)
    activations = max(activations, kept * sizes.hidden_size * sizes.dtype_bytes)
    layer = max(sizes.layers, key=lambda s: s.bytes)
    working = max(WORKING_SET_BYTES, layer.expert_working_set)
    loading = int(layer.bytes * LOADING_OVERHEAD)
    peak = max(loading, layer.bytes + working)
    if any(isinstance(s, TopAnyRouter) and s.scope == "model" for s in recipe.stages):
        # The whole model, in float32 where it is held on a CPU.
        peak = max(peak, sizes.bytes * 4 // sizes.stored_bytes_per_weight)
    return INTERPRETER_BYTES + peak + activations


def _stage_plans(recipe: Recipe, sizes: ModelSizes, bits: float | None) -> list[StagePlan]:
    seconds = stage_seconds(recipe.stages, sizes, _most_tokens(recipe))
    return [
        StagePlan(stage.type, _summary(stage, bits), needed)
        for stage, needed in zip(recipe.stages, seconds, strict=True)
    ]


def _most_tokens(recipe: Recipe) -> int:
    """Calibration tokens of all sources; pairs of image and text may have fewer."""
    return sum(source.sequences * source.length for source in recipe.sources)


def _summary(stage: Any, bits: float | None) -> str:
    """A line about a stage with the settings that matter most."""
    told: Mapping[str, Any] = {
        name: getattr(stage, name) for name in _TOLD if getattr(stage, name, None) is not None
    }
    return ", ".join(f"{name} {value}" for name, value in told.items())


_TOLD = (
    *("mode", "quantizer", "allocator", "target_bits", "group_size", "other_bits"),
    *("metric", "protect_ratio", "scope", "target_activation", "activation_penalty"),
)
"""Settings that a line about a stage tells, where the stage has them."""

"""What a recipe will do to a model, told from headers alone, before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mcsharp_sdk.arguments import given_path
from mcsharp_sdk.engine.budget import must_spill, read_bytes_of
from mcsharp_sdk.engine.default_dtype import float32_by_default
from mcsharp_sdk.engine.durations import stage_seconds
from mcsharp_sdk.engine.memory_plan import MemoryPlan, Workload
from mcsharp_sdk.engine.model_fit import check_model, check_shared
from mcsharp_sdk.engine.sizes import ModelSizes, model_sizes, network_bytes, packed_bytes_of
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
from mcsharp_sdk.recipe.library import RecipeLike, as_recipe
from mcsharp_sdk.recipe.schema import Recipe


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it is, and about what it takes.

    Attributes
    ----------
    stage, summary : its type, and the settings that matter most.
    seconds : on this machine.
    peak_memory : bytes, the interpreter included.
    """

    stage: str
    summary: str
    seconds: float
    peak_memory: int


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
    least_memory : the same with all activations on disk.
    spill : whether activations will lie on disk, as the memory that is allowed asks for.
    run_bytes, output_bytes : on disk, of the run directory and the result.
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
    least_memory: int
    spill: bool
    run_bytes: int
    output_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@float32_by_default()
def plan(
    recipe: Recipe | RecipeLike,
    model: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    max_memory: str | int | None = None,
    processes: int = 1,
) -> Plan:
    """Tell what ``compress`` would do, without reading weights.

    Parameters
    ----------
    recipe, model, overrides : as ``compress`` takes them.
    max_memory : bytes that the run, or each of its processes, may take, or a text such as ``8GB``.
    processes : that share the work, as torchrun would start them on machines like this one.

    Raises
    ------
    InputError
        If the recipe is wrong, or it and the model do not fit; all problems together. Or if the
        run would take more memory; the message says the least that would do.
    """
    allowed = read_bytes_of(max_memory)
    if processes < 1:
        raise InputError(f"{processes} processes cannot do anything: give 1 or more")
    return make_plan(
        as_recipe(recipe, overrides), SourceModel(given_path(model, "model")), allowed, processes
    )


def make_plan(
    recipe: Recipe, source: SourceModel, max_memory: int | None = None, processes: int = 1
) -> Plan:
    """The plan for an opened model.

    Parameters
    ----------
    max_memory : bytes that each process may take.
    processes : that share the work.

    Raises
    ------
    InputProblems
        If recipe and model do not fit, or a stage cannot be shared by several processes.
    InputError
        If the run would take more memory.
    """
    check_model(recipe, source)
    if processes > 1:
        check_shared(recipe)
    sizes = model_sizes(source)
    bits = _intended_bits(recipe, source)
    blocks = list(source.topology.moe.values())
    after, nominal = _after(recipe, sizes, bits)
    length = max((source.length for source in recipe.sources), default=0)
    work = Workload(sizes, _most_tokens(recipe), length, processes, source.overlaps)
    seconds = stage_seconds(recipe.stages, sizes, work.tokens, processes)
    # Behind the measured speeds: what compiled kernels take by themselves is there by then.
    memory = MemoryPlan.of(recipe.stages, work, bits)
    spill = must_spill(max_memory, memory.peak(spill=False), memory.peak(spill=True))
    return Plan(
        model=source.path.name,
        layers=source.topology.num_layers,
        moe_layers=len(blocks),
        experts=blocks[0].num_experts,
        top_k=blocks[0].top_k,
        stages=_stage_plans(recipe, seconds, memory.stages(spill=spill)),
        bytes_before=sizes.bytes,
        bytes_after=after,
        nominal_bits=nominal,
        peak_memory=memory.peak(spill=spill),
        least_memory=memory.peak(spill=True),
        spill=spill,
        run_bytes=_run_bytes(recipe, sizes, after) + (processes * memory.movable if spill else 0),
        output_bytes=after * sum(exporter.writes_weights for exporter in recipe.exports),
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
        return sizes.used_bytes + networks, None
    group, other = quantiser.group_size, quantiser.other_bits
    quantised = {bits: sizes.expert_weights}
    kept = sizes.used_bytes - sizes.expert_bytes
    if other is not None:
        quantised[other] = quantised.get(other, 0) + sizes.linear_weights
        kept -= sizes.linear_bytes
    packed = sum(packed_bytes_of(n, width, group) for width, n in quantised.items())
    count = sum(quantised.values())
    mean = sum(width * n for width, n in quantised.items()) / count
    return kept + packed + networks, mean


def _run_bytes(recipe: Recipe, sizes: ModelSizes, after: int) -> int:
    """Bytes that stages leave in the run directory: what is packed, networks, and gradients."""
    kept = sizes.used_bytes
    quantiser = _quantiser(recipe)
    if quantiser is not None:
        kept -= sizes.expert_bytes + (0 if quantiser.other_bits is None else sizes.linear_bytes)
    tokens = sum(s.loss_tokens for s in recipe.stages if isinstance(s, ExpertStats))
    moe_layers = sum(1 for layer in sizes.layers if layer.experts)
    state = min(tokens, _most_tokens(recipe)) * sizes.hidden_size * sizes.dtype_bytes
    return max(0, after - kept) + moe_layers * state


def _stage_plans(
    recipe: Recipe, seconds: Sequence[float], memory: Sequence[int]
) -> list[StagePlan]:
    return [
        StagePlan(stage.type, _summary(stage), needed, peak)
        for stage, needed, peak in zip(recipe.stages, seconds, memory, strict=True)
    ]


def _most_tokens(recipe: Recipe) -> int:
    """Calibration tokens of all sources; pairs of image and text may have fewer."""
    return sum(source.sequences * source.length for source in recipe.sources)


def _summary(stage: Any) -> str:
    """A line about a stage with the settings that matter most."""
    told: Mapping[str, Any] = {
        name: getattr(stage, name) for name in _TOLD if getattr(stage, name, None) is not None
    }
    return ", ".join(f"{name} {value}" for name, value in told.items())


_TOLD = (
    *("mode", "quantizer", "allocator", "target_bits", "bits", "group_size", "other_bits"),
    *("metric", "protect_ratio", "scope", "target_activation", "activation_penalty"),
)
"""Settings that a line about a stage tells, where the stage has them."""

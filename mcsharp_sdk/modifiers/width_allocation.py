"""The work of a BitAllocation stage: widths from statistics, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcsharp_sdk.allocation.baselines import ALLOCATORS
from mcsharp_sdk.allocation.significance import Exponents, allocation_cost
from mcsharp_sdk.arguments import AnyPath, path_argument
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, LayerStatistics
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.modifiers.layer_factors import factors_of, layer_weights

if TYPE_CHECKING:
    from mcsharp_sdk.modifiers.bit_allocation import BitAllocation

Layers = Sequence[LayerStatistics]
Track = Callable[[Sequence[Layers], str], Iterable[Layers]]


def _no_track(items: Sequence[Layers], description: str) -> Iterable[Layers]:
    return items


def allocate(
    statistics: ExpertStatistics | AnyPath,
    settings: BitAllocation,
    *,
    track: Track = _no_track,
) -> BitMap:
    """Choose the widths: the whole stage, without a model.

    Parameters
    ----------
    statistics : expert statistics, or the file that holds them.
    settings : of the stage; ``settings.factors`` is not looked at.
    track : wraps the list of programs to solve, to show progress.

    Returns
    -------
    The map. Its ``objective`` is always the PMQ cost with the settings' exponents, whichever
    allocator chose, so that allocators compare; None if the statistics have no errors to tell it.

    Raises
    ------
    InputError
        If the settings are no BitAllocation, or the statistics do not hold what the allocator
        needs.
    InfeasibleBudget
        If the budget cannot be met.
    """
    _check_settings(settings)
    if not isinstance(statistics, ExpertStatistics):
        file = path_argument(statistics, "statistics", "the file of them, or ExpertStatistics")
        statistics = ExpertStatistics.load(file)
    layers = statistics.layers
    programs: list[Layers] = [layers] if settings.whole_model else [(layer,) for layer in layers]
    bits: dict[int, tuple[int, ...]] = {}
    for program in track(programs, "allocating bits"):
        bits.update(_solve(program, settings))
    return BitMap(bits, _objective(layers, bits, settings), settings.allocator)


def _check_settings(settings: object) -> None:
    from mcsharp_sdk.modifiers.bit_allocation import BitAllocation  # which uses allocate itself

    if not isinstance(settings, BitAllocation):
        raise InputError(
            f"settings are a BitAllocation, e.g. BitAllocation(target_bits=2.5), not {settings!r}"
        )


def _solve(layers: Layers, settings: BitAllocation) -> dict[int, tuple[int, ...]]:
    """Widths of the layers that share one budget."""
    allocator = ALLOCATORS[settings.allocator]
    costs = []
    for layer, weight in zip(layers, weights_of(layers, settings), strict=True):
        rng = np.random.default_rng([settings.seed, layer.layer])
        factors = factors_of(layer, settings.widths, allocator.needs)
        try:
            costs.append(weight * allocator.cost(factors, _exponents(settings), rng))
        except InputError as error:
            raise InputError(f"layer {layer.layer}: {error}") from None
    experts = [layer.num_experts for layer in layers]
    budget = settings.budget_of(experts)
    widths = allocator.spend(np.concatenate(costs), settings.widths, budget)
    ends = np.cumsum(experts)[:-1]
    return {
        layer.layer: tuple(part.tolist())
        for layer, part in zip(layers, np.split(widths, ends), strict=True)
    }


def _objective(
    layers: Layers, bits: Mapping[int, Sequence[int]], settings: BitAllocation
) -> dict[int, float] | None:
    """Layer -> PMQ cost of the widths, where the statistics can tell it."""
    objective = {}
    for layer in layers:
        given = sorted(set(bits[layer.layer]))
        if not set(given) <= set(layer.errors):
            return None
        try:
            cost = allocation_cost(factors_of(layer, given, "quant_error"), _exponents(settings))
        except InputError:
            return None  # nothing to weigh the experts by: no cost, but the widths stand
        chosen = [row[given.index(w)] for row, w in zip(cost, bits[layer.layer], strict=True)]
        objective[layer.layer] = math.fsum(chosen)
    return objective


def weights_of(layers: Layers, settings: BitAllocation) -> list[float]:
    """What the errors of each layer are multiplied by where layers share a budget.

    Raises
    ------
    InputError
        If the settings ask for weights that were not measured.
    """
    comparable = ALLOCATORS[settings.allocator].needs == "quant_error" and settings.whole_model
    return layer_weights(layers, settings.loss_weighting if comparable else False)


def _exponents(settings: BitAllocation) -> Exponents:
    return Exponents(settings.alpha, settings.beta, settings.gamma)

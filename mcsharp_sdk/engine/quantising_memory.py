"""Memory that quantising matrices takes, told from shapes alone: see ``memory_plan``."""

from __future__ import annotations

from mcsharp_sdk.engine.sizes import LayerSizes
from mcsharp_sdk.models.expert_runs import KEPT_BYTES
from mcsharp_sdk.quantization.hessian import CHUNK_TOKENS

FACTOR_COPIES = 3.0
"""A Hessian, the factor of its inverse, and LAPACK's copy of it, in Hessians."""

FLOAT = 4

ROUNDING = 10
"""Bytes per weight of the one matrix that is rounded: in float32, and what its codes become."""

REFINING = 20
"""Bytes per weight of the one matrix whose codes are chosen once more."""


def experts_together(layer: LayerSizes) -> int:
    """Experts that are quantised together."""
    from mcsharp_sdk.modifiers.expert_chunks import experts_at_once

    shapes = [(matrix.rows, matrix.columns) for matrix in layer.expert]
    return min(experts_at_once(shapes), layer.experts)


def expert_quantising(
    layer: LayerSizes,
    dtype: int,
    tokens: int,
    *,
    propagates: bool = False,
    refines: bool = False,
    overlaps: bool = False,
) -> int:
    """Hessians, factors, and the float32 weights and codes of a chunk of experts.

    Parameters
    ----------
    dtype : bytes of one number in the model's dtype.
    tokens : of an expert.
    propagates, refines : as the settings of GPTQQuantize say.
    overlaps : whether the next experts are read meanwhile.
    """
    if not layer.experts:
        return 0
    count = experts_together(layer)
    weights = layer.weights_of_expert
    peak = 0
    for size in layer.expert:
        columns, matrix = size.columns, size.weights
        square = FLOAT * columns**2
        # What the inputs are short of, and the weights that make up for it.
        cross, made_up = (square, FLOAT * matrix) if propagates else (0, 0)
        collecting = square * (2 if tokens < columns else 1) * count
        collecting += FLOAT * (min(columns, 4096) ** 2 + CHUNK_TOKENS * columns)
        both = (square + cross) * count + 2 * FLOAT * CHUNK_TOKENS * columns
        factorising = (int(FACTOR_COPIES * square) + cross + matrix * dtype) * count
        making_up = 2 * made_up + (2 * square + cross + matrix * dtype + made_up) * count
        walking = (square + made_up + matrix * (FLOAT + 2 + 2 * dtype)) * count
        refining = (
            square + REFINING * matrix + (2 * square + made_up + matrix * (dtype + 1)) * count
        )
        steps = [collecting, factorising, walking]
        steps += [both, making_up] if propagates else []
        peak = max(*steps, refining if refines else 0, peak)
    kept = min(KEPT_BYTES, count * tokens * layer.expert[-1].columns * 2)
    first = layer.expert[0].weights if propagates else 0
    # The next experts, the last of which is there twice while it is read.
    ahead = (count + 1) * weights * dtype if overlaps and count < layer.experts else 0
    return count * (weights + first) * dtype + ahead + kept + peak


def rounding(layer: LayerSizes, dtype: int, *, linears: bool, overlaps: bool = False) -> int:
    """What quantising a layer takes that is known by its weights alone.

    Parameters
    ----------
    linears : whether linear layers outside of the experts are quantised too.
    overlaps : whether the next experts are read meanwhile.
    """
    others = [(2 * dtype + ROUNDING) * linear.weights for linear in layer.linears if linears]
    if not layer.experts:
        return max(others, default=0)
    count = experts_together(layer)
    # A chunk of experts with one of their matrices stacked, its codes, and one in float32.
    held = (count + (2 if overlaps else 1)) * dtype * layer.weights_of_expert
    held += (count * (dtype + 1) + ROUNDING) * max(matrix.weights for matrix in layer.expert)
    return max([held, *others])


def linear_quantising(layer: LayerSizes, dtype: int, *, propagates: bool = False) -> int:
    """Hessians of one part's linears, and the quantising of those that share an input."""
    peak = 0
    for part in {linear.part for linear in layer.linears}:
        groups: dict[int, int] = {}
        for linear in layer.linears:
            if linear.part == part:
                groups[linear.columns] = groups.get(linear.columns, 0) + linear.rows
        collected = 2 if propagates else 1
        squares = sum(collected * FLOAT * columns**2 for columns in groups)
        for columns, rows in groups.items():
            square, matrix = FLOAT * columns**2, rows * columns
            made_up = FLOAT * matrix if propagates else 0
            factorising = int((FACTOR_COPIES - 1) * square) + matrix * dtype
            walking = matrix * (FLOAT + 2 + 2 * dtype) + 2 * made_up
            peak = max(peak, squares + max(factorising, walking))
    return peak

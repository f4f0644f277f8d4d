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

    shapes = list(zip(layer.expert_rows, layer.expert_columns, strict=True))
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
    weights = sum(r * c for r, c in zip(layer.expert_rows, layer.expert_columns, strict=True))
    peak = 0
    for rows, columns in zip(layer.expert_rows, layer.expert_columns, strict=True):
        square, matrix = FLOAT * columns**2, rows * columns
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
    kept = min(KEPT_BYTES, count * tokens * layer.expert_columns[-1] * 2)
    first = layer.expert_rows[0] * layer.expert_columns[0] if propagates else 0
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
    count = experts_together(layer) if layer.experts else 0
    experts = list(zip(layer.expert_rows, layer.expert_columns, strict=True)) * bool(count)
    # A chunk of experts with one of their matrices stacked, its codes, and one in float32.
    held = (count + (2 if overlaps else 1)) * dtype * sum(r * c for r, c in experts)
    held += max((count * r * c * (dtype + 1) + ROUNDING * r * c for r, c in experts), default=0)
    others = zip(layer.linear_rows, layer.linear_columns, strict=True) if linears else ()
    return max(held, *((2 * dtype + ROUNDING) * r * c for r, c in others), 0)


def linear_quantising(layer: LayerSizes, dtype: int, *, propagates: bool = False) -> int:
    """Hessians of one part's linears, and the quantising of those that share an input."""
    peak = 0
    for part in set(layer.linear_parts):
        groups: dict[int, int] = {}
        for name, rows, columns in zip(
            layer.linear_parts, layer.linear_rows, layer.linear_columns, strict=True
        ):
            if name == part:
                groups[columns] = groups.get(columns, 0) + rows
        collected = 2 if propagates else 1
        squares = sum(collected * FLOAT * columns**2 for columns in groups)
        for columns, rows in groups.items():
            square, matrix = FLOAT * columns**2, rows * columns
            made_up = FLOAT * matrix if propagates else 0
            factorising = int((FACTOR_COPIES - 1) * square) + matrix * dtype
            walking = matrix * (FLOAT + 2 + 2 * dtype) + 2 * made_up
            peak = max(peak, squares + max(factorising, walking))
    return peak

"""Quantise matrices by one of several quantisers, and note what that does to their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mcsharp_sdk.models.evenly_spaced import evenly_spaced
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.modifiers.layer_notes import LayerNotes
from mcsharp_sdk.quantization.descent import refine
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.grid import QuantizedBatch, QuantizedWeight, dequantise
from mcsharp_sdk.quantization.hessian import diagonal_importance, squared_output_error
from mcsharp_sdk.quantization.hqq import fit_half_quadratic
from mcsharp_sdk.quantization.inverse_factor import InverseFactor, damped, factorise
from mcsharp_sdk.quantization.lwc import quantise_lwc
from mcsharp_sdk.quantization.propagation import make_up
from mcsharp_sdk.quantization.round_to_nearest import GroupFit, quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings, fit_group

QuantizerName = Literal["gptq", "rtn", "hqq", "lwc"]

ERROR_ROWS = 128
"""Rows of each matrix that its error is noted from: it is told, and decides nothing."""


@dataclass(frozen=True)
class QuantizerSettings:
    """How weights are quantised, whatever their width.

    Attributes
    ----------
    quantizer : ``gptq``, or one without compensation: ``rtn`` (round to nearest), ``hqq``
        (half-quadratic) or ``lwc`` (learned clipping).
    grid : group size and clip search.
    damping : share of the Hessian's mean diagonal that is added to it.
    token_damping : further share, times columns by tokens that the Hessian is of.
    routing_weighted : weigh each token's part of an expert's Hessian by its routing weight squared.
    compensate_within_block : whether GPTQ passes errors on inside a block at 3 bits and fewer.
    propagation : share of the errors of their inputs that matrices make up for.
    refinements : rounds of choosing codes and scales once more; None for none, 0 for scales alone.
    """

    quantizer: QuantizerName
    grid: GridSettings
    damping: float
    token_damping: float
    routing_weighted: bool
    compensate_within_block: bool
    propagation: float = 0.0
    refinements: int | None = None


@dataclass
class Moments:
    """What is known of the inputs of matrices.

    Attributes
    ----------
    hessians : fp32 [n, K, K].
    tokens : how many each is of, length n.
    cross : fp32 [n, K, K], with what they are short of; None where nothing is made up for.
    """

    hessians: Tensor
    tokens: Sequence[float]
    cross: Tensor | None = None


def quantise_matrices(
    settings: QuantizerSettings,
    weights: Tensor,
    moments: Moments | None,
    bits: Sequence[int],
    names: Sequence[str],
    notes: LayerNotes,
    matrix_of_row: Tensor | None = None,
) -> QuantizedBatch:
    """Quantise matrices [n, R, K], and note their errors.

    With propagation they are the errors against the weights that make up for those of the inputs.

    Parameters
    ----------
    moments : of the inputs. None where nothing is known of them: then no error is, and only the
        quantisers in ``FITS`` can do without.
    matrix_of_row : int64 [R], which linear layer each row is of; all of one if left out.
    """
    if moments is None:
        fit = FITS[settings.quantizer]
        return quantise_rtn(weights, bits, settings.grid, matrix_of_row=matrix_of_row, fit=fit)
    hessians = moments.hessians
    weights, batch = _quantised(settings, weights, moments, bits, names, notes, matrix_of_row)
    for position, name in enumerate(names):
        rows = evenly_spaced(weights.shape[1], ERROR_ROWS)
        changed = dequantise(_at_rows(batch.expert(position), rows), torch.float32)
        found = squared_output_error(weights[position, rows], changed, hessians[position])
        of = weights.shape[1] / len(rows)
        notes.add_error(name.split(".")[0], *(of * square for square in found))
    return batch


def _quantised(
    s: QuantizerSettings,
    weights: Tensor,
    moments: Moments,
    bits: Sequence[int],
    names: Sequence[str],
    notes: LayerNotes,
    matrix_of_row: Tensor | None,
) -> tuple[Tensor, QuantizedBatch]:
    """The weights that were quantised, and what they became."""
    hessians = moments.hessians
    if s.quantizer in FITS:
        rounded = quantise_rtn(
            weights,
            bits,
            s.grid,
            importance=diagonal_importance(hessians),
            matrix_of_row=matrix_of_row,
            fit=FITS[s.quantizer],
        )
        return weights, rounded
    if s.quantizer == "lwc":
        return weights, quantise_lwc(weights, hessians, bits, s.grid)
    factor = factorise(hessians, damping=_damping(s, moments))
    release_free_memory()
    notes.raised_damping += [names[e] for e in factor.raised]
    notes.fallbacks += [names[e] for e in factor.failed]
    if moments.cross is not None:
        weights = make_up(weights, moments.cross, factor, s.propagation)
        moments.cross = None
    batch = quantise_gptq(
        weights,
        factor,
        bits,
        s.grid,
        compensate_within_block=s.compensate_within_block,
        matrix_of_row=matrix_of_row,
    )
    if s.refinements is not None:
        _refine(weights, batch, hessians, factor, s.refinements)
    return weights, batch


FITS: Mapping[str, GroupFit] = {"rtn": fit_group, "hqq": fit_half_quadratic}
"""Quantiser that rounds to nearest -> how it chooses scale and zero point of a group."""


def _damping(s: QuantizerSettings, moments: Moments) -> list[float]:
    """Of each matrix, more where fewer tokens speak for its Hessian."""
    columns = moments.hessians.shape[-1]
    return [s.damping + s.token_damping * columns / max(1.0, n) for n in moments.tokens]


def _refine(
    weights: Tensor, batch: QuantizedBatch, hessians: Tensor, factor: InverseFactor, rounds: int
) -> None:
    """Choose codes and scales once more, one matrix at a time, in place."""
    for index, weight in enumerate(weights):
        better = refine(weight, batch.expert(index), damped(hessians, factor, index), rounds)
        batch.codes[index], batch.scales[index] = better.codes, better.scales


def _at_rows(whole: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Some rows of a quantised matrix."""
    codes, scales, zeros = (tensor[rows] for tensor in (whole.codes, whole.scales, whole.zeros))
    return QuantizedWeight(codes, scales, zeros, whole.bits, whole.group_size)

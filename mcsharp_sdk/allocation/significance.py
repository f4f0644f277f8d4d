"""What it costs to give an expert a bit width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcsharp_sdk.errors import InputError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Factors:
    """What is known of the E experts of one layer, for W candidate widths.

    Attributes
    ----------
    widths : (W,) candidate widths, ascending.
    activation_count : (E,) float64, tokens that selected each expert.
    routing_weight_sum : (E,) float64, router probability summed over those tokens.
    quant_error : (E, W) float64, change of the output's Frobenius norm; None where not needed.
    hessian_error : (E, W) float64, HAWQ-V2's Ω; None where not needed.
    block_cosine : cosine between what enters and leaves the layer; None where not needed.
    """

    widths: tuple[int, ...]
    activation_count: FloatArray
    routing_weight_sum: FloatArray
    quant_error: FloatArray | None = None
    hessian_error: FloatArray | None = None
    block_cosine: float | None = None


@dataclass(frozen=True)
class Exponents:
    """Exponents of frequency (alpha), routing weight (beta) and quantisation error (gamma)."""

    alpha: float
    beta: float
    gamma: float


def allocation_cost(factors: Factors, exponents: Exponents) -> FloatArray:
    """Cost of each expert at each width: φ^α · w^β · ε^γ (MC, arXiv 2410.06270, Eq. 4).

    φ and w are the counts and weights divided by their sums over the layer's experts, 0⁰ = 1. An
    expert that no token selected costs nothing at any width unless α = β = 0.

    Returns
    -------
    (E, W) float64, finite, >= 0.

    Raises
    ------
    InputError
        If there are no errors, all counts (or weights) are zero while α (or β) is not, or the
        power leaves the range of float64.
    """
    if factors.quant_error is None:
        raise InputError("the cost needs quantisation errors")
    frequency = _powered_share("activation_count", factors.activation_count, exponents.alpha)
    weight = _powered_share("routing_weight_sum", factors.routing_weight_sum, exponents.beta)
    with np.errstate(over="ignore"):
        cost = (frequency * weight)[:, None] * np.power(factors.quant_error, exponents.gamma)
    if not np.isfinite(cost).all():
        raise InputError(f"errors to the power of gamma = {exponents.gamma:g} are too large")
    return cost


def shares(name: str, values: FloatArray) -> FloatArray:
    """(E,) values divided by their sum; InputError if they are all zero."""
    total = values.sum()
    if total == 0:
        raise InputError(f"{name} is zero for every expert, so it cannot rank them")
    return values / total


def _powered_share(name: str, values: FloatArray, exponent: float) -> FloatArray:
    if exponent == 0:
        return np.ones_like(values)
    return np.power(shares(name, values), exponent)

"""Hessians of the layer-wise error.

For a linear layer with inputs x_t the squared output error of a change ΔW is tr(ΔW H ΔWᵀ)/2 with
H = 2 Σ_t x_t x_tᵀ (GPTQ, arXiv 2210.17323, Eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

CHUNK_TOKENS = 2048
"""Tokens that are added at a time: on a CPU they are converted to fp32, and tensor cores cut off
what long sums lose, 1e-4 of a Hessian of 65536 tokens that are added at once."""

GRAM_COLUMNS = 192
"""Columns of a Hessian that are added at a time."""

EXACT_COLUMNS = 2048
"""The same on tensor cores, which like large products."""


def accumulate(hessian: Tensor, inputs: Tensor, weight: Tensor | None = None) -> None:
    """Add 2 Σ_t σ_t² x_t x_tᵀ to a Hessian, in place.

    Products are exact or fp32, and sums fp32, whatever the dtype of the inputs. Products rounded to
    bf16 would be faster, but where a few columns are hundreds of times larger than the rest, as in
    the residual stream of language models, their rounding can exceed the damping.

    Parameters
    ----------
    hessian : fp32 [K, K]
    inputs : [T, K], any float dtype.
    weight : [T], σ_t, e.g. the routing weights; ones if left out.
    """
    exact = _has_exact_products(inputs, weighed=weight is not None)
    weights: Sequence[Tensor | None] = [None] if weight is None else weight.split(CHUNK_TOKENS)
    for chunk, sigma in zip_longest(inputs.split(CHUNK_TOKENS), weights):
        if exact:
            _add_exact_products(hessian, chunk, sigma)
            continue
        rows = chunk.to(hessian.dtype)
        if sigma is not None:
            rows = rows * sigma.to(hessian.dtype).unsqueeze(-1)
        _add_gram(hessian, rows)


def _has_exact_products(inputs: Tensor, *, weighed: bool) -> bool:
    """Whether this is a GPU that multiplies such 16-bit floats exactly and adds up in fp32.

    Weighed inputs may leave the range of fp16: routing weights are above 1 in some families.
    """
    dtypes = (torch.bfloat16,) if weighed else (torch.bfloat16, torch.float16)
    if not inputs.is_cuda or inputs.dtype not in dtypes:
        return False
    return torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


def _add_exact_products(hessian: Tensor, inputs: Tensor, sigma: Tensor | None) -> None:
    """Add 2 Σ_t σ_t² x_t x_tᵀ of 16-bit x, [T, K], to [K, K] on tensor cores.

    σ² x is the sum of two bf16 numbers, so that rounding takes 2⁻¹⁶ of it.
    """
    factors = [inputs]
    if sigma is not None:
        weighed = inputs.to(hessian.dtype) * sigma.to(hessian.dtype).square().unsqueeze(-1)
        factors = [weighed.to(inputs.dtype)]
        factors.append((weighed - factors[0]).to(inputs.dtype))
    columns = hessian.shape[0]
    for start in range(0, columns, EXACT_COLUMNS):
        stop = min(start + EXACT_COLUMNS, columns)
        product = hessian.new_zeros(stop - start, columns - start)
        for factor in factors:
            left, right = factor[:, start:stop].T, inputs[:, start:]
            product += torch.mm(left, right, out_dtype=hessian.dtype)
        corner = product[:, : stop - start]
        corner.copy_((corner + corner.T) / 2)
        hessian[start:stop, start:].add_(product, alpha=2.0)
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T


def _add_gram(hessian: Tensor, rows: Tensor) -> None:
    """Add 2 Xᵀ X of fp32 X, [T, K], to [K, K].

    Blocks on and above the diagonal are computed, which is little more than half of the product,
    and mirrored. numpy knows such products, but its library's idle threads keep cores busy that
    torch's need.
    """
    columns = hessian.shape[0]
    for start in range(0, columns, GRAM_COLUMNS):
        stop = min(start + GRAM_COLUMNS, columns)
        hessian[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:], alpha=2.0)
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T


def complete_(hessian: Tensor, tokens: float, overall: Tensor, overall_tokens: float) -> Tensor:
    """Complete the Hessian of an expert with few tokens by that of all tokens of the layer.

    With n < K tokens it gets K − n tokens' worth of the mean Hessian of all tokens; without tokens
    only that. Our choice; the papers do not treat the case.

    Parameters
    ----------
    hessian : fp32 [K, K], sum over the expert's tokens; changed in place.
    tokens : in it; an effective number where they are weighed.
    overall : fp32 [K, K], sum over all tokens.
    overall_tokens : number of tokens in it, > 0; where others are weighed, over their mean weight.

    Returns
    -------
    ``hessian``.
    """
    if overall_tokens <= 0:
        raise ValueError("the overall Hessian needs at least one token")
    missing = max(0.0, len(hessian) - tokens)
    return hessian.add_(overall, alpha=missing / overall_tokens)


def diagonal_importance(hessians: Tensor) -> Tensor:
    """Weight of each column in a column-wise error: the diagonal of H, [E, K]."""
    return hessians.diagonal(dim1=-2, dim2=-1).clone()


def squared_output_error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> tuple[float, float]:
    """What GPTQ minimises, tr(Δ H Δᵀ), and the same of the weights themselves, tr(W H Wᵀ).

    The root of their ratio is the relative error of the matrix's outputs, ‖ΔX‖ / ‖WX‖, on the
    inputs X that the Hessian is of.

    Parameters
    ----------
    weight, quantised : [R, K], of any float dtype; Δ is their difference.
    hessian : fp32 [K, K].

    Returns
    -------
    Both, not negative; NaN for a Hessian that is not finite.
    """
    weight = weight.float()
    change = quantised.float() - weight
    squares = (((m @ hessian) * m).sum(dtype=torch.float64) for m in (change, weight))
    error, output = (float(square.clamp(min=0.0)) for square in squares)
    return error, output

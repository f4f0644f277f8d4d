"""Weights that make up for the errors of their inputs.

A matrix of a quantised model gets inputs X̂ that differ from the original's X, since what is in
front of it is quantised too. Quantising W so that Ŵ·X̂ stays near W·X̂ passes that difference on;
what the model needs is W·X. By completing the square,

    ‖W·X − Ŵ·X̂‖² + λ‖W − Ŵ‖²  =  tr((W̃ − Ŵ)·(X̂X̂ᵀ + λI)·(W̃ − Ŵ)ᵀ) + what Ŵ does not change,
    W̃ = W + W·(X − X̂)X̂ᵀ·(X̂X̂ᵀ + λI)⁻¹,

so GPTQ of W̃ with the usual Hessian does it. Only a share α of the correction is applied, which
guards against fitting the calibration text. This is QEP (arXiv 2504.09629); GPTAQ (arXiv
2504.02692) has the same target.
"""

from __future__ import annotations

from torch import Tensor

from mcsharp_sdk.quantization.hessian import CHUNK_TOKENS
from mcsharp_sdk.quantization.inverse_factor import InverseFactor


def accumulate_cross(
    cross: Tensor, original: Tensor, inputs: Tensor, weight: Tensor | None = None
) -> None:
    """Add 2 Σ_t σ_t² (x_t − x̂_t) x̂_tᵀ to a cross-Gram matrix, in place.

    Parameters
    ----------
    cross : fp32 [K, K]
    original, inputs : [T, K], x and x̂ of the same tokens, any float dtype.
    weight : [T], σ_t; ones if left out.
    """
    for start in range(0, len(inputs), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        found = inputs[part].to(cross.dtype)
        missing = original[part].to(cross.dtype) - found
        if weight is not None:
            missing *= weight[part].to(cross.dtype).square().unsqueeze(-1)
        cross.addmm_(missing.T, found, alpha=2.0)


def make_up(weights: Tensor, cross: Tensor, factor: InverseFactor, share: float) -> Tensor:
    """W + α · W · C · (H + λI)⁻¹ of each matrix.

    Parameters
    ----------
    weights : [E, R, K], any float dtype; not changed.
    cross : C, fp32 [E, K, K], sums of 2 (x − x̂) x̂ᵀ.
    factor : of the Hessians of x̂, E of them. Matrices in ``failed`` stay as they are.
    share : α, 0 to 1.

    Returns
    -------
    fp32 [E, R, K].
    """
    found = weights.float() if weights.dtype != cross.dtype else weights.clone()
    for index, weight in enumerate(found):
        if index in factor.failed:
            continue
        upper, change = factor.upper[index], cross[index]
        if len(weight) < weight.shape[1]:
            weight.addmm_((weight @ change) @ upper.T, upper, alpha=share)
        else:
            weight.addmm_(weight.clone(), (change @ upper.T) @ upper, alpha=share)
    return found

"""Fitting a router, against its objective's gradient written out and against exact answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mcsharp_sdk.quantization.router_fit import Scoring, divergence, fit_router


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens: int = 400, experts: int = 6, columns: int = 20) -> dict[str, Tensor]:
    """Inputs with noise and one column far larger than the others, as in language models."""
    clean = random(tokens, columns, seed=0)
    clean[:, 3] *= 30
    weight = random(experts, columns, seed=1) * 0.4
    bias = random(experts, seed=2)
    noisy = clean + 0.3 * random(tokens, columns, seed=3)
    return {
        "weight": weight,
        "bias": bias,
        "inputs": noisy,
        "target": clean @ weight.T + bias,
    }


def gradient(
    fitted: Tensor, given: dict[str, Tensor], scoring: Scoring, ridge: float, bias: Tensor | None
) -> Tensor:
    """float64 [E, K]: (scores − target scores)ᵀ X / T + 2 · ridge · m · (W − W₀)."""
    inputs, start = given["inputs"].double(), given["weight"].double()
    score = torch.sigmoid if scoring == "sigmoid" else lambda z: z.softmax(-1)
    logits = inputs @ fitted.double().T + (0 if bias is None else bias.double())
    residual = score(logits) - score(given["target"].double())
    pull = 2 * ridge * inputs.square().mean() * (fitted.double() - start)
    return residual.T @ inputs / len(inputs) + pull


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_gradient_vanishes_at_the_fitted_weight(scoring: Scoring, biased: bool) -> None:
    given = problem()
    bias = given["bias"] if biased else None
    rest = (given["inputs"], given["target"], scoring)
    fitted = fit_router(given["weight"], bias, *rest, ridge=1e-3, steps=200)
    before = gradient(given["weight"], given, scoring, 1e-3, bias)
    after = gradient(fitted, given, scoring, 1e-3, bias)
    assert after.norm() < 0.02 * before.norm()  # what sums in fp32 leave


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_inputs_that_are_mixed_by_a_matrix_are_unmixed(scoring: Scoring) -> None:
    weight, clean = random(5, 12, seed=4), random(600, 12, seed=5)
    mix = torch.eye(12) + 0.1 * random(12, 12, seed=6)
    target = clean @ weight.T
    fitted = fit_router(weight, None, clean @ mix, target, scoring, ridge=1e-9, steps=500)
    scores = torch.sigmoid if scoring == "sigmoid" else torch.nn.Softmax(-1)
    torch.testing.assert_close(scores(clean @ mix @ fitted.T), scores(target), rtol=0, atol=2e-3)


def test_a_high_price_leaves_the_weight_as_it_is() -> None:
    given = problem()
    fitted = fit_router(**given, scoring="softmax", ridge=1e6, steps=50)
    torch.testing.assert_close(fitted, given["weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_inputs_leave_nothing_to_fit(dtype: torch.dtype) -> None:
    inputs, weight = random(50, 8, seed=7).to(dtype), random(4, 8, seed=8).to(dtype)
    target = inputs.float() @ weight.float().T
    fitted = fit_router(weight, None, inputs, target, "softmax", ridge=1e-3, steps=50)
    torch.testing.assert_close(fitted, weight.float(), rtol=0, atol=1e-5)


def test_divergence_is_that_of_the_distributions() -> None:
    target, logits = random(30, 5, seed=9), random(30, 5, seed=10)
    known = torch.distributions.Categorical(logits=target)
    found = torch.distributions.Categorical(logits=logits)
    expected = torch.distributions.kl_divergence(known, found).mean()
    torch.testing.assert_close(divergence(target, logits, "softmax"), expected)
    alone, also = (torch.distributions.Bernoulli(logits=z) for z in (target, logits))
    expected = torch.distributions.kl_divergence(alone, also).sum(-1).mean()
    torch.testing.assert_close(divergence(target, logits, "sigmoid"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(0, 20), "target": torch.zeros(0, 6)}, "without tokens"),
        ({"inputs": torch.zeros(400, 21)}, r"needs inputs \[T, 20\]"),
        ({"target": torch.zeros(400, 5)}, r"targets \[T, 6\]"),
        ({"ridge": 0.0}, "ridge must be positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {**problem(), "scoring": "softmax", "ridge": 1e-3, "steps": 1}
    with pytest.raises(ValueError, match=message):
        fit_router(**{**given, **change})  # type: ignore[arg-type]

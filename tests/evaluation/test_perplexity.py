"""Perplexity against a plain float64 computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, MixtralConfig, MixtralForCausalLM

import mcsharp_sdk.models.logits as module
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.evaluation.perplexity import perplexity

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.4,
    "experts_implementation": "eager",
}


class WithoutChoiceOfLogits(MixtralForCausalLM):
    """As some third-party models: the forward cannot be told which logits to compute."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {}),
    "scaled logits": (GraniteMoeForCausalLM, GraniteMoeConfig, {"logits_scaling": 3.0}),
    "no logits_to_keep": (WithoutChoiceOfLogits, MixtralConfig, {}),
}


def tiny(kind: str = "mixtral") -> Any:
    torch.manual_seed(0)
    model_class, config_class, extra = MODELS[kind]
    return model_class(config_class(**SHAPE, **extra)).eval()


MODEL = tiny()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(128, (200,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def plain_nll(model: Any, tokens: Tensor, window: int) -> tuple[float, int]:
    """Mean loss and count of predictions, one full forward per window, in float64."""
    losses: list[Tensor] = []
    for start in range(0, len(tokens), window):
        part = tokens[start : start + window]
        logits = model(input_ids=part[None]).logits[0].double()
        chances = logits.softmax(-1)
        losses += [-chances[i, part[i + 1]].log() for i in range(len(part) - 1)]
    return float(torch.stack(losses).mean()), len(losses)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("logits_at_once", [1, 128 * 7, 2**24])
def test_equals_the_plain_computation(
    kind: str, logits_at_once: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits_at_once)
    model = tiny(kind)
    expected, count = plain_nll(model, tokens, 48)
    result = perplexity(model, tokens, 48)
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.predicted, result.tokens, result.windows) == (count, 200, 5)


@pytest.mark.parametrize(
    ("length", "window"), [(2, 2), (3, 2), (5, 8), (8, 8), (9, 8), (10, 8), (24, 8), (25, 8)]
)
def test_any_length_and_window(length: int, window: int) -> None:
    stream = torch.randint(128, (length,), generator=torch.Generator().manual_seed(length))
    expected, count = plain_nll(MODEL, stream, window)
    result = perplexity(MODEL, stream, window)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.predicted == count
    left_over = 1 if length % window == 1 else 0
    assert result.tokens == length - left_over


@torch.no_grad()
def test_agrees_with_the_loss_of_transformers(tokens: Tensor) -> None:
    loss = MODEL(input_ids=tokens[None], labels=tokens[None]).loss
    assert perplexity(MODEL, tokens, 2048).nll == pytest.approx(float(loss), rel=1e-6)


def test_the_model_is_left_as_it_was(tokens: Tensor) -> None:
    before = MODEL(input_ids=tokens[None]).logits
    perplexity(MODEL, tokens, 48)
    assert "forward" not in vars(MODEL.base_model)
    assert torch.equal(MODEL(input_ids=tokens[None]).logits, before)


def test_a_forward_of_the_instance_survives(tokens: Tensor) -> None:
    model = tiny()
    own = model.base_model.forward = model.base_model.forward  # as accelerate does it
    perplexity(model, tokens, 48)
    assert vars(model.base_model)["forward"] is own


def test_forwards_are_tracked(tokens: Tensor) -> None:
    seen: list[range] = []

    def track(windows: range) -> range:
        seen.append(windows)
        return windows

    perplexity(MODEL, tokens, 48, track=track)
    # Four whole windows go through together, the shorter last one by itself.
    assert seen == [range(2)]


def test_a_hopeless_model_is_infinitely_perplexed(tokens: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    result = perplexity(model, tokens, 48)
    assert result.perplexity == math.inf
    assert result.nll > 709


def test_a_broken_model_is_an_error(tokens: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(RunError, match="is not a number"):
        perplexity(model, tokens, 48)


@pytest.mark.parametrize(("count", "window"), [(0, 8), (1, 8), (9, 1), (9, 0)])
def test_too_little_to_predict_is_refused(count: int, window: int) -> None:
    with pytest.raises(InputError, match=r"2 tokens|two tokens"):
        perplexity(MODEL, torch.zeros(count, dtype=torch.int64), window)

"""The model that comes with the package."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from mcsharp_sdk.data.tokenise import load_tokenizer, token_stream
from mcsharp_sdk.embedded import evaluation_text, location, model_directory
from mcsharp_sdk.errors import RunError

PERPLEXITY_BOUND = 35.0
"""Held-out perplexity is well below; wording differs a little between Python versions."""


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return token_stream(evaluation_text(), load_tokenizer(model_directory()), limit=4096)


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32).eval()


def nll(model: MixtralForCausalLM, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        windows = tokens.view(-1, 256)
        return float(model(input_ids=windows, labels=windows, use_cache=False).loss)


def test_it_is_small_complete_and_described() -> None:
    files = {path.name: path.stat().st_size for path in model_directory().iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)


def test_it_is_a_mixtral_that_stock_transformers_knows(model: MixtralForCausalLM) -> None:
    config = json.loads((model_directory() / "config.json").read_text())
    assert type(model) is MixtralForCausalLM
    assert "auto_map" not in config
    assert "quantization_config" not in config
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0


def test_its_tokenizer_gives_the_text_back_and_fits_the_model(model: MixtralForCausalLM) -> None:
    tokenizer = load_tokenizer(model_directory())
    text = evaluation_text()[:20_000] + " ünï €𝄞\t\n  x"
    ids = token_stream(text, tokenizer)
    assert tokenizer.decode(ids) == text
    assert int(ids.max()) < len(tokenizer) == model.config.vocab_size


def test_it_is_really_trained(model: MixtralForCausalLM, tokens: torch.Tensor) -> None:
    assert nll(model, tokens) < math.log(PERPLEXITY_BOUND)


def test_every_expert_is_used(model: MixtralForCausalLM, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        output = model(input_ids=tokens[:2048].view(-1, 256), output_router_logits=True)
    for logits in output.router_logits:
        chosen = logits.topk(2, dim=-1).indices.flatten()
        assert torch.bincount(chosen, minlength=8).min() > 0.01 * chosen.numel()


def test_it_feels_quantisation(model: MixtralForCausalLM, tokens: torch.Tensor) -> None:
    before = nll(model, tokens[:2048])
    kept = {name: p.clone() for name, p in model.named_parameters() if "experts" in name}
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data.copy_(rounded_to_two_bits(parameter.data))
    after = nll(model, tokens[:2048])
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name])
    assert after > before + 0.1


def rounded_to_two_bits(weight: torch.Tensor) -> torch.Tensor:
    """Four equally spaced values between the least and the largest of every 64 columns."""
    groups = weight.unflatten(-1, (-1, 64))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 3
    return (((groups - low) / step).round() * step + low).flatten(-2)


def test_a_package_without_the_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location, "files", lambda package: tmp_path)
    with pytest.raises(RunError, match="embedded model is not there"):
        model_directory()

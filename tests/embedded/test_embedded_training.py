"""The script that makes the embedded model, in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcsharp_sdk.embedded.card import model_card
from mcsharp_sdk.embedded.moe_training import balance_loss, batched_experts
from mcsharp_sdk.embedded.train import (
    SHAPE,
    WINDOW,
    Schedule,
    batches,
    encode,
    held_out_perplexity,
    new_model,
    train,
    train_tokenizer,
    write,
)

TEXT = "\n\n".join(f"The value of item {n} is {n * n}; see also item {n + 1}." for n in range(3000))


def test_batched_experts_equal_the_stock_experts() -> None:
    torch.manual_seed(0)
    model = new_model()
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(700, 192)
    index = torch.stack([torch.randperm(7)[:2] for _ in range(700)])  # expert 7 gets no token
    weights = torch.rand(700, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fast = batched_experts(experts, hidden, index, weights)
    with torch.no_grad():
        stock = experts(hidden, index, weights)
    assert (fast - stock).norm() / stock.norm() < 0.02


def test_balance_loss_is_one_for_even_use_and_the_expert_count_for_one_expert() -> None:
    even = torch.eye(8).repeat(4, 1) * 20
    assert balance_loss((even, even), k=1).item() == pytest.approx(1, abs=1e-3)
    single = torch.zeros(32, 8)
    single[:, 3] = 30
    assert balance_loss((single,), k=1).item() == pytest.approx(8, rel=1e-3)


def test_the_rate_rises_then_falls() -> None:
    schedule = Schedule(steps=1000, warmup=100, peak_rate=1.0)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[99] == pytest.approx(1.0)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_batches_are_windows_of_their_streams_and_repeat_with_the_seed() -> None:
    streams = [(torch.arange(1000), 3), (torch.arange(5000, 6000), 2)]
    first, again = (next(batches(streams, torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (5, WINDOW)
    assert bool((first.diff(dim=1) == 1).all())
    assert (first[:, 0] >= 5000).tolist() == [False] * 3 + [True] * 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], float, float]:
    """A model trained a little: its directory, the steps saved, perplexity before and after."""
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXT, size=600)
    stream = encode(tokenizer, TEXT)
    model = new_model(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=1,
        num_hidden_layers=1,
        vocab_size=600,
    )
    saved: list[int] = []
    before = held_out_perplexity(model, stream[:1024])
    schedule = Schedule(steps=24, batch=4, warmup=4, save_every=10, peak_rate=1e-2)
    train(model, [(stream, 4)], schedule, saved.append)
    after = held_out_perplexity(write(model, tokenizer, out), stream[:1024])
    return out, saved, before, after


def test_training_learns_and_saves_on_the_way(
    written: tuple[Path, list[int], float, float],
) -> None:
    _, saved, before, after = written
    assert saved == [10, 20]
    assert after < before / 4


def test_what_is_written_loads_in_stock_transformers(
    written: tuple[Path, list[int], float, float],
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(written[0])
    tokenizer = AutoTokenizer.from_pretrained(written[0])
    assert model.dtype == torch.bfloat16
    ids = tokenizer("item 5 is", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > ids.shape[1]


def test_the_card_has_every_fact_filled_in() -> None:
    facts = {
        "parameters": 3_745_344, "perplexity": 12.345, "held_out_tokens": 55_717,
        "held_out_modules": "csv, heapq", "training_tokens": 10, "seen_tokens": 20, "minutes": 3.2,
        "threads": 2, "python": "3.11.7", "window": 256, "vocabulary": 1536, "steps": 5, "batch": 6,
        "seed": 0, "prose_share": 0.5,
    }  # fmt: skip
    card = model_card(**facts, **SHAPE)
    assert "{" not in card
    assert "| parameters | 3,745,344, stored in bfloat16 |" in card
    assert "**12.35**" in card or "**12.34**" in card

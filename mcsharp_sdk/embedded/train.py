"""Make the embedded model: ``python -m mcsharp_sdk.embedded.train OUT``.

Trains a byte-level BPE tokenizer and a small Mixtral on the text of the running Python (see
``mcsharp_sdk.embedded.text``) and writes a model directory that stock ``transformers`` loads. The
same Python, libraries, processor, threads and seed give the same model.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ExpertsInterface

from mcsharp_sdk.embedded import text
from mcsharp_sdk.embedded.card import model_card
from mcsharp_sdk.embedded.moe_training import balance_loss, batched_experts
from mcsharp_sdk.folders import CARD_FILE

WINDOW = 256
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1536
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Schedule:
    """How the model is trained; lengths in steps of one batch.

    prose_share : share of windows drawn from docstrings and topics, the rest from source.
    balance : weight of the load-balancing loss.
    """

    steps: int = 2000
    batch: int = 16
    warmup: int = 100
    peak_rate: float = 3e-3
    weight_decay: float = 0.1
    prose_share: float = 0.5
    balance: float = 0.01
    save_every: int = 250
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then half a cosine down to 2 % of the peak."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def train_tokenizer(prose: str, size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``size`` entries; entry 0 is the end-of-text mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose.split(text.SEPARATOR), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def encode(tokenizer: PreTrainedTokenizerFast, content: str) -> Tensor:
    """(tokens,) int64: the whole text as one stream."""
    ids = tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64)


def new_model(**changes: Any) -> MixtralForCausalLM:
    """The untrained model in float32; ``changes`` replace settings of its config."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = MixtralConfig(**(settings | SHAPE | changes))
    return MixtralForCausalLM(config)


def batches(streams: list[tuple[Tensor, int]], generator: torch.Generator) -> Iterator[Tensor]:
    """Endless (windows, WINDOW) int64: from each (stream, count), ``count`` random windows."""
    offsets = torch.arange(WINDOW)
    while True:
        yield torch.cat(
            [
                stream[
                    torch.randint(len(stream) - WINDOW, (count, 1), generator=generator) + offsets
                ]
                for stream, count in streams
            ]
        )


def training_loss(
    model: MixtralForCausalLM, windows: Tensor, balance: float
) -> tuple[Tensor, Tensor]:
    """(loss to minimise, its part that is the mean cross-entropy in nats)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=windows, use_cache=False, output_router_logits=True)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    entropy = F.cross_entropy(logits, windows[:, 1:].flatten())
    return entropy + balance * balance_loss(
        output.router_logits, model.config.num_experts_per_tok
    ), entropy.detach()


@torch.no_grad()
def held_out_perplexity(model: nn.Module, stream: Tensor, batch: int = 16) -> float:
    """Perplexity of a token stream in non-overlapping windows of WINDOW tokens, less the tail."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for part in windows.split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (WINDOW - 1)))


def optimiser(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: MixtralForCausalLM,
    streams: list[tuple[Tensor, int]],
    schedule: Schedule,
    save: Callable[[int], object],
) -> None:
    """Train in place, printing progress; ``save(step)`` is called now and then."""
    ExpertsInterface.register("mcsharp_training", batched_experts)
    model.set_experts_implementation("mcsharp_training")
    adam = optimiser(model, schedule)
    source = batches(streams, torch.Generator().manual_seed(schedule.seed))
    began = time.monotonic()
    average = float("nan")
    for step in range(schedule.steps):
        for group in adam.param_groups:
            group["lr"] = schedule.rate(step)
        loss, entropy = training_loss(model, next(source), schedule.balance)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        average = entropy.item() if step == 0 else 0.95 * average + 0.05 * entropy.item()
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(
                f"step {step + 1}/{schedule.steps}  loss {average:.3f}  {minutes:.1f} min",
                flush=True,
            )
        if (step + 1) % schedule.save_every == 0 and step + 1 < schedule.steps:
            save(step + 1)
    model.set_experts_implementation("eager")


def write(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> nn.Module:
    """Save a bfloat16 copy and the tokenizer; returns the copy, read back and in float32."""
    copy = MixtralForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return MixtralForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def main() -> None:
    """Train, write the model directory and its card, print the held-out perplexity."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--seed", type=int, default=Schedule.seed)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    make(arguments.out, Schedule(steps=arguments.steps, seed=arguments.seed))


def make(out: Path, schedule: Schedule) -> None:
    """Train a model and write it to ``out``, with its card."""
    prose, everything = text.calibration_text(), text.training_text()
    tokenizer = train_tokenizer(prose)
    stream, source = encode(tokenizer, prose), encode(tokenizer, everything[len(prose) :])
    held_out = encode(tokenizer, text.evaluation_text())
    from_prose = round(schedule.batch * schedule.prose_share)
    print(
        f"tokens: {len(stream)} prose, {len(source)} source, {len(held_out)} held out", flush=True
    )

    model = new_model()

    def save(step: int) -> float:
        perplexity = held_out_perplexity(write(model, tokenizer, out), held_out)
        print(f"step {step}: held-out {perplexity:.3f}, windows of {WINDOW}", flush=True)
        return perplexity

    began = time.monotonic()
    train(model, [(stream, from_prose), (source, schedule.batch - from_prose)], schedule, save)
    minutes = (time.monotonic() - began) / 60
    card = model_card(
        parameters=model.num_parameters(),
        perplexity=save(schedule.steps),
        held_out_tokens=len(held_out),
        held_out_modules=", ".join(sorted(text.HELD_OUT)),
        training_tokens=len(stream) + len(source),
        seen_tokens=schedule.steps * schedule.batch * WINDOW,
        minutes=minutes,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        window=WINDOW,
        vocabulary=VOCABULARY,
        steps=schedule.steps,
        batch=schedule.batch,
        seed=schedule.seed,
        prose_share=schedule.prose_share,
        **SHAPE,
    )
    (out / CARD_FILE).write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

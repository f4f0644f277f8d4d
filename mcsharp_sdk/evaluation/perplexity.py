"""Perplexity of a causal language model on a stream of tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.bfloat16 import fast_linears
from mcsharp_sdk.models.logits import positions_at_once

Observer = Callable[[int, Tensor, Tensor], None]
"""Gets the index of a batch of windows, positions (p,) and the logits (b, p, vocabulary) there."""

Reader = Callable[[Tensor], Iterator[tuple[Tensor, Tensor]]]
"""Gives, of windows (b, n), positions (p,) and the logits (b, p, vocabulary) there, a few at a
time; the positions together are all but the last."""

TOKENS_PER_FORWARD = 4096
"""Short windows go through the model together, up to so many tokens: a packed expert is then
dequantised once for all of them."""


@dataclass(frozen=True)
class Perplexity:
    """What a text cost a model.

    Attributes
    ----------
    perplexity : exp of the mean loss; infinite where that overflows.
    nll : mean negative log-likelihood of the predicted tokens, in nats.
    tokens : tokens of the stream that lie in a window.
    predicted : tokens that were predicted: all but the first of each window.
    windows : number of windows.
    """

    perplexity: float
    nll: float
    tokens: int
    predicted: int
    windows: int


@torch.inference_mode()
def perplexity(
    model: Any,
    tokens: Tensor,
    window: int = 2048,
    *,
    track: Callable[[range], Iterable[int]] = iter,
    observe: Observer | None = None,
) -> Perplexity:
    """Measure perplexity over non-overlapping windows, each read with an empty context.

    The loss is taken in float32 from the model's logits and summed in float64. The last window may
    be shorter; a single left-over token is not used, since nothing predicts it.

    Parameters
    ----------
    model : causal language model of transformers, in eval mode.
    tokens : (n,) int64, n >= 2: the stream, on any device.
    window : tokens per window, at least 2.
    track : wraps the range of forwards, e.g. to show progress.
    observe : is given all logits that predict a token, a few positions at a time.

    Raises
    ------
    InputError
        If the stream or the window has fewer than two tokens.
    RunError
        If the loss of a window is not a number.
    """
    device = model.get_input_embeddings().weight.device

    def read(windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return _logits(model, windows.to(device))

    with fast_linears():
        return perplexity_of(
            read, tokens, window, together=windows_together(window), track=track, observe=observe
        )


def perplexity_of(
    read: Reader,
    tokens: Tensor,
    window: int,
    *,
    together: int = 1,
    track: Callable[[range], Iterable[int]] = iter,
    observe: Observer | None = None,
) -> Perplexity:
    """As :func:`perplexity`, of anything that predicts tokens.

    Parameters
    ----------
    read : what predicts.
    together : windows of equal length that it is given at once.
    """
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise InputError(f"perplexity needs two tokens or more, got {list(tokens.shape)}")
    check_window(window)
    batches = window_batches(tokens, window, together)
    total = 0.0
    for index in track(range(len(batches))):
        losses = _window_nlls(read, batches[index], index, observe)
        if losses.isnan().any():
            raise RunError("the loss of a window is not a number: the model is broken")
        total += losses.sum().item()
    used, windows = sum(batch.numel() for batch in batches), sum(map(len, batches))
    mean = total / (used - windows)
    return Perplexity(_exp(mean), mean, used, used - windows, windows)


def check_window(window: int) -> None:
    """InputError if a window has fewer than two tokens."""
    if window < 2:
        raise InputError(f"a window of {window} predicts nothing: use 2 tokens or more")


def windows_together(window: int) -> int:
    """How many windows of so many tokens a model of torch reads at once."""
    return max(1, TOKENS_PER_FORWARD // max(1, window))


def window_batches(tokens: Tensor, window: int, together: int) -> list[Tensor]:
    """Windows of a stream that go through a model together, at most ``together``: [b, n] each.

    They are in order. Windows of equal length are stacked; what is left over and has a single token
    is not in any.
    """
    windows = [part for part in tokens.split(window) if part.numel() >= 2]
    batches: list[Tensor] = []
    for _, equal in groupby(windows, key=len):
        batches += torch.stack(list(equal)).split(together)
    return batches


def _window_nlls(read: Reader, windows: Tensor, index: int, observe: Observer | None) -> Tensor:
    """Summed negative log-likelihood of each window (b, n) behind its first token: (b,) float64."""
    totals = torch.zeros(len(windows), dtype=torch.float64)
    for positions, logits in read(windows):
        if observe is not None:
            observe(index, positions, logits)
        targets = windows[:, positions.to(windows.device) + 1].to(logits.device)
        losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        totals += losses.double().sum(1).cpu()
    return totals


def _logits(model: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions (p,) but the last, and the logits (b, p, vocabulary) there, a few at a time.

    The body runs once. The head is the model's own forward, with whatever scaling the family puts
    behind it, answered with the body's stored output.
    """
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    if not has_separate_head(model):
        yield positions, model(input_ids=ids, use_cache=False).logits[:, :-1]
        return
    output = model.base_model(input_ids=ids, use_cache=False)
    vocabulary = model.config.get_text_config().vocab_size
    for chunk in positions.split(positions_at_once(vocabulary, len(ids))):
        yield chunk, head_logits(model, ids, output, chunk)


def has_separate_head(model: Any) -> bool:
    """Whether the model's body and its head can run one after the other."""
    takes_positions = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    return model.base_model is not model and takes_positions


def head_logits(model: Any, ids: Tensor, output: Any, positions: Tensor) -> Tensor:
    """Logits (b, p, vocabulary) at positions (p,) from what the body returned for ids (b, n)."""
    with _answered_with(model.base_model, output):
        return model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits


@contextmanager
def _answered_with(module: nn.Module, output: Any) -> Iterator[None]:
    """Make ``module`` return ``output`` instead of computing."""
    own = module.__dict__.get("forward")  # accelerate puts its own on the instance
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf

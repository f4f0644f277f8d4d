"""The small network that decides how many of its top-k experts a token needs.

After OTP of MC# (arXiv 2510.10962), whose code and exact network could not be had: the shape below,
its input and its start are our choices. The mask it makes is monotone, that is, a token that keeps
the expert of some rank keeps all of the ranks before it; so the k outputs are logits of "how many".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcsharp_sdk.pruning.rule import in_slot_order, ranked

KEEP_ALL_BIAS = 4.0
"""Logit of "all of them" before training; that of every other count is 0."""

RMS_EPSILON = 1e-6


def network_input(hidden: Tensor, weights: Tensor) -> Tensor:
    """What the network sees of a token.

    Parameters
    ----------
    hidden : floating [T, H], as the experts get it.
    weights : floating [T, k], routing weights in any order.

    Returns
    -------
    float32 [T, H + k]: the hidden state over its root mean square, and the routing weights by
    rank over their sum.
    """
    exact = hidden.float()
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + RMS_EPSILON)
    by_rank = weights.float().sort(dim=-1, descending=True).values
    total = by_rank.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([exact * scale, by_rank / total], dim=-1)


def top_any_layers(hidden_size: int, top_k: int, units: int) -> tuple[nn.Linear, nn.Linear]:
    """The two linear layers in float32, set to keep everything."""
    first = nn.Linear(hidden_size + top_k, units, dtype=torch.float32)
    second = nn.Linear(units, top_k, dtype=torch.float32)
    with torch.no_grad():
        second.weight.zero_()
        second.bias.zero_()
        second.bias[-1] = KEEP_ALL_BIAS
    return first, second


def top_any_logits(first: nn.Module, second: nn.Module, hidden: Tensor, weights: Tensor) -> Tensor:
    """Logits, float32 [T, k], of keeping 1 … k experts, given the two linear layers."""
    logits: Tensor = second(F.silu(first(network_input(hidden, weights))))
    return logits


class TopAnyNetwork(nn.Module):
    """Two linear layers: hidden state and routing weights to "how many experts".

    Parameters
    ----------
    hidden_size : H.
    top_k : k, experts that the router chooses per token.
    units : width between the layers.
    """

    def __init__(self, hidden_size: int, top_k: int, units: int) -> None:
        super().__init__()
        self.first, self.second = top_any_layers(hidden_size, top_k, units)

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], weights [T, k] in any order of slots -> logits float32 [T, k]."""
        return top_any_logits(self.first, self.second, hidden, weights)


def kept_counts(logits: Tensor) -> Tensor:
    """How many experts each token keeps: int64 [T], 1 … k; the smaller where logits tie."""
    return 1 + logits.argmax(-1)


def keep_mask(logits: Tensor, weights: Tensor) -> Tensor:
    """Which slots are kept: as many as :func:`kept_counts`, those of the largest weights.

    Parameters
    ----------
    logits : [T, k].
    weights : [T, k], in any order.

    Returns
    -------
    bool [T, k], by slot; the slot of the largest weight is always kept.
    """
    return in_slot_order(_up_to(kept_counts(logits), logits.shape[-1]), ranked(weights))


def soft_keep(logits: Tensor, temperature: float, *, noise: Tensor) -> Tensor:
    """A sampled mask with a gradient: Gumbel-Softmax over the counts, straight-through.

    Parameters
    ----------
    logits : [T, k].
    temperature : above 0; the smaller, the closer the gradient's mask is to the sampled one.
    noise : [T, k], added to the logits: :func:`gumbel_noise`, or zeros for the hard mask of
        inference.

    Returns
    -------
    float32 [T, k] by *rank*: 1 for the kept ranks and 0 behind them, exactly. The gradient is that
    of keep_i = Σ_{j >= i} p_j, with p = softmax((logits + noise) / temperature) over the counts.
    """
    noisy = logits.float() + noise
    chances = (noisy / temperature).softmax(-1)
    soft = chances.flip(-1).cumsum(-1).flip(-1)
    hard = _up_to(kept_counts(noisy), logits.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def gumbel_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, of the shape and device of ``like``."""
    waiting = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    waiting.exponential_(generator=generator)
    return -waiting.clamp(min=torch.finfo(torch.float32).tiny).log()


def _up_to(counts: Tensor, k: int) -> Tensor:
    """bool [T, k]: true at the first ``counts`` [T] places."""
    return torch.arange(k, device=counts.device) < counts[..., None]

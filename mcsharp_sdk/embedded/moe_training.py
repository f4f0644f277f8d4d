"""What training a Mixture of Experts needs beside the model: fast experts and a balancing loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


def batched_experts(
    experts: MixtralExperts, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The experts as two batched products over tokens sorted by expert; for training.

    Every expert's tokens are padded to one multiple of 256, so that few matrix shapes occur:
    preparing a product for a new shape costs a CPU more than the padding.

    Parameters
    ----------
    hidden : (tokens, hidden) ; index, weights : (tokens, k), chosen experts and their weights.

    Returns
    -------
    (tokens, hidden), the weighted sum of the chosen experts' outputs.
    """
    tokens, k = index.shape
    chosen = index.reshape(-1)
    counts = torch.bincount(chosen, minlength=experts.num_experts)
    room = -(-int(counts.max()) // 256) * 256
    order = chosen.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(tokens * k) - (counts.cumsum(0) - counts)[chosen[order]]
    place = chosen * room + rank
    inputs = hidden.bfloat16().repeat_interleave(k, dim=0)
    padded = inputs.new_zeros(experts.num_experts * room, hidden.shape[1])
    padded = padded.index_copy(0, place, inputs).view(experts.num_experts, room, -1)
    gate, up = torch.bmm(padded, experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    outputs = torch.bmm(F.silu(gate) * up, experts.down_proj.transpose(1, 2)).flatten(0, 1)
    outputs = outputs.index_select(0, place).view(tokens, k, -1)
    return (outputs * weights.to(outputs.dtype).unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def balance_loss(router_logits: tuple[Tensor, ...], k: int) -> Tensor:
    """Load-balancing loss of the Switch Transformer (arXiv 2101.03961, Eq. 4), mean over layers.

    Each entry of ``router_logits`` is (tokens, experts). 1 where all experts are used alike.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(k, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()

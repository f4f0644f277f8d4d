"""Stock transformers models read without mcsharp_sdk: the truth that its results are held against.

What families keep differently is written out here again, from transformers' source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def stock_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, in the stock class, with the plainest implementation of experts."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@dataclass
class StockBlock:
    """One mixture of experts of a stock model, and what it was called with.

    Attributes
    ----------
    layer : index of its decoder layer.
    router, experts : its modules.
    arguments : of the last call of ``experts``.
    hidden, routed : what ``router`` last got, [T, hidden], and what it returned.
    """

    layer: int
    router: nn.Module
    experts: nn.Module
    arguments: tuple[Any, ...] = ()
    hidden: Tensor | None = None
    routed: Any = None

    @property
    def routing(self) -> Tensor:
        """[T, experts]: routing weights, 0 where an expert is not chosen."""
        if type(self.router).__name__ == "Llama4Router":
            return self.routed[0]
        _, index, weights = self.arguments
        routing = torch.zeros(len(index), self.num_experts, dtype=weights.dtype)
        return routing.scatter_(1, index, weights)

    @property
    def logits(self) -> Tensor:
        """[T, experts]."""
        if isinstance(self.routed, Tensor):
            return self.routed
        return self.routed[1 if type(self.router).__name__ == "Llama4Router" else 0]

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    def weights(self, expert: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of an expert's first and second weights, each [outputs, inputs], in rows' order."""
        experts: Any = self.experts
        if hasattr(experts, "mlp"):
            split = (self.num_experts, -1, experts.hidden_size)
            w1, v1, w2 = (getattr(experts.mlp, n).view(split)[expert] for n in ("w1", "v1", "w2"))
            return [w1, v1], [w2.T]
        first = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
        if type(experts).__name__ in TRANSPOSED:
            return [first[expert].T], [experts.down_proj[expert].T]
        return [first[expert]], [experts.down_proj[expert]]


TRANSPOSED = ("AriaExperts", "GptOssExperts", "Llama4TextExperts")
"""Experts whose parameters are [experts, inputs, outputs]."""


def watched_blocks(model: nn.Module) -> list[StockBlock]:
    """All mixtures of experts of a model, which from now on note their calls."""
    blocks = list(_blocks(model))
    for block in blocks:

        def note_call(_: nn.Module, arguments: Any, block: StockBlock = block) -> None:
            block.arguments = arguments

        def note_routing(_: nn.Module, args: Any, out: Any, block: StockBlock = block) -> None:
            block.hidden, block.routed = args[0].reshape(-1, args[0].shape[-1]), out

        block.experts.register_forward_pre_hook(note_call)
        block.router.register_forward_hook(note_routing)
    return blocks


def _blocks(model: nn.Module) -> Iterator[StockBlock]:
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module):
            router = next(getattr(module, n) for n in ("gate", "router") if hasattr(module, n))
            yield StockBlock(next(int(p) for p in name.split(".") if p.isdigit()), router, experts)


@contextmanager
def pruned(
    blocks: list[StockBlock], thresholds: Mapping[int, list[float]]
) -> Iterator[list[float]]:
    """Let experts of low rank go with weight 0 where it is below a share of the token's largest.

    The weights of a token's other experts grow so that their sum stays. Yields a list to which each
    call adds the share of slots that go.
    """
    lost: list[float] = []

    def prune(least: list[float], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, index, weights = arguments
        by_rank, order = weights.sort(dim=-1, descending=True)
        small = by_rank < by_rank[:, :1] * torch.tensor([0.0, *least])
        drop = torch.zeros_like(small).scatter_(1, order, small)
        lost.append(float(drop.float().mean()))
        kept = weights.masked_fill(drop, 0.0)
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
        return hidden, index, kept

    with ExitStack() as stack:
        for block in blocks:

            def hook(_: nn.Module, args: Any, layer: int = block.layer) -> tuple[Tensor, ...]:
                return prune(thresholds[layer], args)

            stack.callback(block.experts.register_forward_pre_hook(hook).remove)
        yield lost


def set_weight(views: list[Tensor], weight: Tensor) -> None:
    """Write [outputs, inputs] into the views that make it up."""
    for view, part in zip(views, weight.split([len(v) for v in views]), strict=True):
        view.copy_(part)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Make constant tensors (biases, norms, correction biases) vary, so that none can be missed."""
    generator = torch.Generator().manual_seed(7)
    skipped = {name for name, _ in model.named_non_persistent_buffers()}  # type: ignore[operator]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        constant = tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all())
        if constant and name not in skipped:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))

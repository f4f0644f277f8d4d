"""Experts of real families packed with random weights, and tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model

from mcsharp_sdk.models.experts import is_experts
from mcsharp_sdk.models.normal_form import normalise
from mcsharp_sdk.runtime.modules import pack_experts_module

BITS = (1, 2, 3, 2)


def routed(tokens: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, two different experts per token or a dropped slot, routing weights."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).half()
    order = torch.rand(tokens, len(BITS) + 1, generator=generator).argsort(1)
    return x, order[:, :2], torch.rand(tokens, 2, generator=generator)


def packed_experts(family: str, *, rotated: bool, removed: bool) -> Any:
    """The experts of a family's first sparse layer, packed at mixed widths with random weights."""
    model = tiny_model(family)
    normalise(model)
    experts: Any = next(module for module in model.modules() if is_experts(module))
    widths = (*BITS[:-1], 0) if removed else BITS
    bits = [widths[expert % len(widths)] for expert in range(experts.num_experts)]
    pack_experts_module(experts, bits, group_size=32, rotated=rotated)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        if parameter.dtype == torch.uint8:
            parameter.random_(0, 256, generator=generator)
        elif name.endswith("scales"):
            parameter.uniform_(-0.1, 0.1, generator=generator)
        else:
            parameter.data.normal_(generator=generator)
    return experts.requires_grad_(False)

"""One view of every family's fused experts module.

transformers keeps the experts of a layer as 3-D parameters and says by flags on the module
(``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``) how they are laid out.
The functions here read these flags, so that nothing else has to. Families that transformers keeps
otherwise are brought to this form by :mod:`mcsharp_sdk.models.normal_form`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Matrix = Literal["gate_up", "down"]
MATRICES: tuple[Matrix, Matrix] = ("gate_up", "down")

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the fused experts of a layer."""
    return all(hasattr(module, flag) for flag in _FLAGS)


def parameter_name(experts: Any, matrix: Matrix) -> str:
    """Name of the fused parameter that holds ``matrix``."""
    if matrix == "down":
        return "down_proj"
    return "gate_up_proj" if experts.has_gate else "up_proj"


def fused_weight(experts: Any, matrix: Matrix) -> Tensor:
    """View of all experts' ``matrix``, (experts, rows, columns), rows being outputs."""
    fused = getattr(experts, parameter_name(experts, matrix))
    return fused.transpose(1, 2) if experts.is_transposed else fused


def projection_of_row(experts: Any, matrix: Matrix) -> Tensor:
    """int64 (rows,), which linear layer each row of a fused matrix is of: 0 is gate, 1 is up."""
    rows = torch.arange(fused_weight(experts, matrix).shape[1])
    if matrix == "down" or not experts.has_gate:
        return torch.zeros_like(rows)
    concatenated = getattr(experts, "is_concatenated", True)
    return rows // (len(rows) // 2) if concatenated else rows % 2


def activate(experts: Any, projected: Tensor, expert: int | Tensor) -> Tensor:
    """What goes into the down projection, (tokens, intermediate), from the first one's output.

    ``expert`` is one for all tokens, or int64 (tokens,): one for each.
    """
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        projected = projected + bias[expert]
    return experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)


def finish(experts: Any, output: Tensor, expert: int | Tensor) -> Tensor:
    """An expert's output, (tokens, hidden), from its down projection's; experts as above."""
    if experts.has_bias:
        output = output + experts.down_proj_bias[expert]
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def weigh(experts: Any, hidden: Tensor, routing: Tensor) -> tuple[Tensor, Tensor]:
    """What an expert gets, [n, hidden], and what its output is multiplied by, [n].

    Parameters
    ----------
    hidden : [n, hidden], the hidden states of its tokens.
    routing : [n], their routing weights. Most families weigh an expert's output by them, but some
        its input, and then the output counts as it is.
    """
    if not getattr(experts, "weighs_input", False):
        return hidden, routing
    return (hidden * routing.unsqueeze(-1)).to(hidden.dtype), torch.ones_like(routing)


ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""Of an experts module, in order, as transformers calls them."""


def call_arguments(
    args: Sequence[Tensor], kwargs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an experts module is called with, by position or by name.

    Returns
    -------
    Hidden states, (..., hidden); the chosen experts, int64 (T, k); their routing weights, (T, k).
    """
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    hidden, top_k_index, top_k_weights = (given[name] for name in ARGUMENTS)
    return hidden, top_k_index, top_k_weights


@contextmanager
def answering(experts: Any, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let an experts module return ``answer(hidden)`` instead of computing."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return answer(hidden)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def tokens_of_expert(top_k_index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens that select ``expert`` and the slot in which they do, both (n,) int64."""
    token, slot = torch.where(top_k_index == expert)
    return token, slot

"""One form for the mixture of experts of families that transformers keeps in a form of their own.

Most families have a fused experts module with flags, and a router that returns its choice; see
:mod:`mcsharp_sdk.models.experts`. The blocks of the others are replaced here by modules of that
form, which compute the same, and their tensors on disk are converted. A family is a row of
:data:`NORMAL_FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from mcsharp_sdk.models.experts import activate, finish, fused_weight, tokens_of_expert, weigh

Choice = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Logits (T, experts) and k -> routing weights and chosen experts, both (T, k)."""


class StandardRouter(nn.Module):
    """A router that returns ``(logits, top_k_weights, top_k_index)``.

    Parameters
    ----------
    num_experts, hidden_size, top_k : (experts, hidden) is the shape of ``weight``.
    like : gives dtype and device.
    choice : how it chooses from the logits.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, top_k: int, like: Tensor, choice: Choice
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(like.new_empty(num_experts, hidden_size))
        self._choice = choice

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H] -> logits [T, experts], weights [T, k], index int64 [T, k]."""
        logits = F.linear(hidden, self.weight)
        return logits, *self._choice(logits, self.top_k)


class StandardExperts(nn.Module):
    """Fused gated experts, without biases.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : shapes of the parameters.
    like : gives dtype and device.
    act_fn : of the gate.
    is_transposed : whether the parameters are [experts, inputs, outputs].
    weighs_input : whether routing weights multiply an expert's input instead of its output.
    """

    has_gate, has_bias, has_post_expert_norm, is_concatenated = True, False, False, True

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        like: Tensor,
        act_fn: nn.Module,
        *,
        is_transposed: bool = False,
        weighs_input: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        self.is_transposed, self.weighs_input = is_transposed, weighs_input
        for name, rows, columns in (
            ("gate_up_proj", 2 * intermediate_size, hidden_size),
            ("down_proj", hidden_size, intermediate_size),
        ):
            shape = (columns, rows) if is_transposed else (rows, columns)
            self.register_parameter(name, nn.Parameter(like.new_empty(num_experts, *shape)))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], index [T, k], weights [T, k] -> [T, H]; index ``num_experts`` is none."""
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, slot = tokens_of_expert(top_k_index, expert)
            inputs, factor = weigh(self, hidden[token], top_k_weights[token, slot])
            inner = F.linear(inputs, fused_weight(self, "gate_up")[expert])
            result = F.linear(activate(self, inner, expert), fused_weight(self, "down")[expert])
            weighted = finish(self, result, expert) * factor.unsqueeze(-1)
            out.index_add_(0, token, weighted.to(out.dtype))
        return out


class DbrxBlock(nn.Module):
    """In place of ``DbrxFFN``."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        glu = stock.experts.mlp
        sizes = (glu.moe_num_experts, glu.hidden_size, glu.ffn_hidden_size)
        order = stock.moe_normalize_expert_weights

        def choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
            weights, index = logits.softmax(dim=1, dtype=logits.dtype).topk(top_k, dim=-1)
            if order is not None:
                weights = weights / weights.norm(p=order, dim=-1, keepdim=True)
            return weights, index

        self.router = StandardRouter(sizes[0], sizes[1], stock.top_k, glu.w1, choice)
        self.experts = StandardExperts(*sizes, glu.w1, glu.activation_fn)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden] -> the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.router(flat)
        return self.experts(flat, index, weights).view_as(hidden)


class Llama4Block(nn.Module):
    """In place of ``Llama4TextMoe``."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        old = stock.experts
        sizes = (old.num_experts, old.hidden_size, old.expert_dim)
        like = old.gate_up_proj

        def choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
            chosen, index = logits.topk(top_k, dim=-1)
            return chosen.float().sigmoid().to(logits.dtype), index

        self.router = StandardRouter(sizes[0], sizes[1], stock.top_k, like, choice)
        self.experts = StandardExperts(
            *sizes, like, old.act_fn, is_transposed=True, weighs_input=True
        )
        self.shared_expert = stock.shared_expert

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length, hidden] -> [tokens, hidden] and the logits [tokens, experts]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits, weights, index = self.router(flat)
        return self.shared_expert(flat) + self.experts(flat, index, weights), logits


class _PerExpert(ConversionOps):  # type: ignore[misc]
    """Cut matrices in which all experts of a layer are stacked, [E·R, K] -> [E, R, K]."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        # Counted by what one expert has, since only some of the experts may be asked for.
        expert = kwargs["model"].get_parameter(kwargs["full_layer_name"])[0].numel()
        single = {
            name: found[0] if isinstance(found, list) else found
            for name, found in input_dict.items()
        }
        columns = sum(tensor.shape[1] for tensor in single.values())
        return {name: t.unflatten(0, (-1, expert // columns)) for name, t in single.items()}


def _dbrx_conversions() -> list[Any]:
    return [
        WeightRenaming("ffn.router.layer.weight", "ffn.router.weight"),
        WeightConverter(
            ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1"],
            "ffn.experts.gate_up_proj",
            [_PerExpert(), Concatenate(dim=1)],
        ),
        WeightConverter(
            ["ffn.experts.mlp.w2"], "ffn.experts.down_proj", [_PerExpert(), Transpose(1, 2)]
        ),
    ]


@dataclass(frozen=True)
class NormalForm:
    """How a family is brought to the normal form.

    Attributes
    ----------
    name : of the family's MoE block within a decoder layer.
    block : makes the block that replaces it, with empty parameters, from the family's own.
    conversions : names and layouts on disk -> those of the new block.
    """

    name: str
    block: Callable[[Any], nn.Module]
    conversions: Callable[[], list[Any]] = list


NORMAL_FORMS: Mapping[str, NormalForm] = {
    "dbrx": NormalForm("ffn", DbrxBlock, _dbrx_conversions),
    "llama4_text": NormalForm("feed_forward", Llama4Block),
}
"""model_type of the (text) config -> its normal form."""


def normalise(model: Any) -> None:
    """Bring a model's MoE blocks to the normal form, in place; new parameters are empty.

    Models that are in that form already are left as they are.
    """
    form = _normal_form(model)
    if form is None:
        return
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == form.name and hasattr(module, "experts"):
            model.set_submodule(name, form.block(module))


def weight_conversions(model: Any) -> list[Any]:
    """How tensors on disk become those of a model that :func:`normalise` has been through."""
    form = _normal_form(model)
    own = [] if form is None else form.conversions()
    return [*get_model_conversion_mapping(model), *own]


def _normal_form(model: Any) -> NormalForm | None:
    return NORMAL_FORMS.get(model.config.get_text_config().model_type)

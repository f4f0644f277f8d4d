"""The module that drops slots of a router's choice, by the modes of :mod:`~.pruned_routing`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.topology import MoeBlock
from mcsharp_sdk.pruning.importance import (
    ATTENTION,
    least_important,
    most_important,
    token_importance,
)
from mcsharp_sdk.pruning.rule import renormalise, weight_rule
from mcsharp_sdk.pruning.top_any import keep_mask, top_any_layers, top_any_logits
from mcsharp_sdk.runtime.kept_dtypes import KeepsDtypes
from mcsharp_sdk.runtime.pruning_layout import DROP_INSIGNIFICANT, PruningLayout, PruningMode
from mcsharp_sdk.runtime.received_attention import AttentionTap, TokenBatch


class PruningState:
    """What the pruners of one model share.

    Attributes
    ----------
    layout : what the model can do.
    decoder : path of the module that owns the decoder layers.
    mode : what it does now.
    ranks_tokens : whether that needs the importance of tokens.
    batch : the tokens of the present forward.
    """

    def __init__(self, layout: PruningLayout, decoder: str) -> None:
        self.layout = layout
        self.decoder = decoder
        self.mode: PruningMode = "off"
        self.ranks_tokens = False
        self.batch = TokenBatch()


class ExpertPruner(KeepsDtypes):
    """Drops slots of the router's choice in one decoder layer.

    Parameters
    ----------
    layer, block : index of the decoder layer, and its mixture of experts.
    hidden_size : width of what the experts get.
    state : shared by the model's pruners.
    """

    def __init__(self, layer: int, block: MoeBlock, hidden_size: int, state: PruningState) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, block.num_experts
        self.state, self.tap = state, AttentionTap(state.batch)
        rule, learned = state.layout.rule, state.layout.learned
        self.thresholds = rule.thresholds.get(layer) if rule else None
        self.learned = learned is not None and layer in learned.layers
        if learned is not None and self.learned:
            self.first, self.second = top_any_layers(hidden_size, block.top_k, learned.units)

    @property
    def active(self) -> bool:
        """Whether the model's present mode prunes this layer."""
        return {
            "off": False,
            "rule": self.thresholds is not None,
            "learned": self.learned,
            "both": self.learned,
        }[self.state.mode]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice without the dropped slots.

        Parameters
        ----------
        hidden : [T, H], what the experts get.
        index : int64 [T, k], the chosen experts.
        weights : [T, k], their routing weights, in any order of slots.

        Returns
        -------
        index, with ``num_experts`` at dropped slots, and weights, 0 there. A token that keeps
        everything keeps its weights bit for bit.
        """
        rule = self.state.layout.rule
        if self.state.mode == "rule" and rule is not None and rule.metric == DROP_INSIGNIFICANT:
            lost = self._chosen(hidden, least_important, rule.drop_ratio)
            if lost is None:
                return index, weights
            return index.masked_fill(lost, self.num_experts), weights.masked_fill(lost, 0.0)
        keep = self._kept(hidden, weights)
        return index.masked_fill(~keep, self.num_experts), renormalise(weights, keep)

    def _kept(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """bool [T, k], by weight rule or network, and everything of protected tokens."""
        if self.state.mode == "rule":
            assert self.thresholds is not None
            keep = weight_rule(weights, self.thresholds)
        else:
            keep = keep_mask(top_any_logits(self.first, self.second, hidden, weights), weights)
        rule = self.state.layout.rule
        if rule is None or self.state.mode == "learned":
            return keep
        protected = self._chosen(hidden, most_important, rule.protect_ratio)
        return keep if protected is None else keep | protected

    def _chosen(
        self, hidden: Tensor, choose: Callable[[Tensor, Tensor, float], Tensor], share: float
    ) -> Tensor | None:
        """Tokens chosen by importance, bool [T, 1]; None if no token is ranked."""
        rule, valid = self.state.layout.rule, self.state.batch.valid
        if rule is None or rule.importance is None:
            return None
        if valid is None or valid.numel() != hidden.shape[0]:
            raise RunError(
                f"decoder layer {self.layer}: cannot tell which of the {hidden.shape[0]} tokens "
                "belong to which sequence; use model.set_expert_pruning('off') for such calls"
            )
        received = self.tap.take()
        if valid.shape[1] == 1:
            return None
        if rule.importance == ATTENTION and received is None:
            raise RunError(
                f"decoder layer {self.layer}: it is not known what attention its tokens receive. "
                "Either the attention implementation was changed after expert pruning was chosen "
                f"(call model.set_expert_pruning({self.state.mode!r}) again), or this layer has "
                "no softmax attention (use another metric)"
            )
        valid = valid.to(hidden.device)
        by_sequence = hidden.unflatten(0, valid.shape)
        importance = token_importance(rule.importance, by_sequence, received, valid)
        alone = valid.sum(-1, keepdim=True) == 1
        return (choose(importance, valid, share) & ~alone).reshape(-1, 1)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, thresholds={self.thresholds}, learned={self.learned}"

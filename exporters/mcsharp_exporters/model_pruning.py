"""How a whole model's graph drops experts: what of the rules of a model it can know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mcsharp_exporters.graph_names import GraphPruning
from mcsharp_exporters.router_pruning import ModelPruning, RouterPruning
from mcsharp_sdk.artifacts import TOP_ANY_ROUTER
from mcsharp_sdk.errors import InputError, Problem
from mcsharp_sdk.runtime.pruning_layout import DROP_INSIGNIFICANT, RulePruning

NOT_IN_A_GRAPH = (
    "the rule protects tokens by the metric {metric!r}, and the graph ranks no tokens against each "
    "other (its attention does not tell how much each receives). The nearest that it can do is "
    "pruning: weights, the rule without protection, which is what the model does in decode steps; "
    "learned, if the model has networks; or off"
)
DROPS_TOKENS = (
    f"the rule {DROP_INSIGNIFICANT!r} drops experts of whole tokens by the attention that they "
    "receive, of which the graph knows nothing: export with pruning: off, or learned if the model "
    "has networks"
)


def choose_pruning(choice: GraphPruning, model: ModelPruning | None) -> RouterPruning:
    """The pruning that was asked for; ``default`` is that in which the model is loaded.

    Raises
    ------
    InputError
        If the model lacks what it needs, or a graph cannot do it.
    """
    rule = None if model is None else model.layout.rule
    mode = choice
    if choice == "default":
        mode = "off" if model is None else model.layout.mode
    if mode in ("weights", "rule") and rule is not None and rule.metric == DROP_INSIGNIFICANT:
        raise InputError(DROPS_TOKENS)
    if mode in ("rule", "both") and rule is not None and rule.importance is not None:
        raise InputError(NOT_IN_A_GRAPH.format(metric=rule.metric))
    chosen = RouterPruning.choose("rule" if mode == "weights" else mode, model)
    return replace(chosen, protects=False)


def rules_of(stages: Sequence[Any]) -> list[RulePruning]:
    """The rules that stages will make, as far as they are known before."""
    return [rule for s in stages if isinstance(rule := getattr(s, "rule", None), RulePruning)]


def pruning_problems(choice: GraphPruning, stages: Sequence[Any]) -> list[Problem]:
    """What a graph cannot do of the rule that these stages will make."""
    rules = rules_of(stages)
    networks = any(s.writes == TOP_ANY_ROUTER for s in stages)
    if not rules or choice in ("off", "learned"):
        return []
    rule = rules[-1]
    if rule.metric == DROP_INSIGNIFICANT:
        by_rule = choice in ("weights", "rule", "both") or not networks
        return [Problem("pruning", DROPS_TOKENS)] if by_rule else []
    if choice == "weights" or rule.importance is None:
        return []
    return [Problem("pruning", NOT_IN_A_GRAPH.format(metric=rule.metric))]

"""How each family's router picks experts, as far as the config alone tells.

A new family is one row of :data:`ROUTER_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mcsharp_sdk.errors import InputError

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]

WEIGHT, BIAS, CORRECTION_BIAS = "weight", "bias", "e_score_correction_bias"


@dataclass(frozen=True)
class RouterSettings:
    """Everything about a router except its weights.

    Attributes
    ----------
    model_type : the family, as in config.json.
    experts : routed experts of the layer.
    top_k : experts that a token uses.
    scoring : turns logits into scores.
    score_chosen_only : choose by the logits, then score only the chosen ones (softmax over
        ``top_k`` values); otherwise all experts are scored first.
    logit_bias : a bias is added to the logits.
    correction_bias : a bias is added to the scores for the choice only, never to the weights
        (DeepSeek-V3, arXiv 2412.19437, Eq. 16).
    groups, kept_groups : experts are cut into ``groups`` equal runs, and only those of the
        ``kept_groups`` best groups may be chosen (DeepSeek-V2, arXiv 2405.04434, 2.2.2).
    group_score : a group's worth: its best expert, or the sum of its best two.
    renormalise : divide the chosen weights by their sum plus ``epsilon``.
    scale : multiplies the weights at the end.
    logits_in_fp32 : the projection is computed in float32; otherwise in the hidden states' dtype.
    weights_in_fp32 : weights leave in float32; otherwise rounded to the hidden states' dtype.
    """

    model_type: str
    experts: int
    top_k: int
    scoring: Scoring = "softmax"
    score_chosen_only: bool = False
    logit_bias: bool = False
    correction_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: GroupScore = "max"
    renormalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    logits_in_fp32: bool = False
    weights_in_fp32: bool = True

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise InputError(f"router of {self.model_type}: {fault}")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names, relative to the router module, of the tensors that such a router has."""
        optional = {BIAS: self.logit_bias, CORRECTION_BIAS: self.correction_bias}
        return (WEIGHT, *(name for name, there in optional.items() if there))


def router_settings(config: Any) -> RouterSettings:
    """Read how a model routes from its transformers config.

    Raises
    ------
    InputError
        If the family's routing is not known, or its settings contradict each other.
    """
    text = config.get_text_config()
    try:
        read = ROUTER_FAMILIES[text.model_type]
    except KeyError:
        known = ", ".join(sorted(ROUTER_FAMILIES))
        raise InputError(
            f"the routing of model type {text.model_type!r} is not known; known are {known}"
        ) from None
    return read(text)


def _fault(settings: RouterSettings) -> str | None:
    """What contradicts itself in the settings, if anything does."""
    experts, top_k = settings.experts, settings.top_k
    groups, kept = settings.groups, settings.kept_groups
    if not isinstance(top_k, int) or not 1 <= top_k <= experts:
        return f"a token cannot use {top_k} of {experts} experts"
    if not 1 <= kept <= groups or experts % groups:
        return f"{experts} experts cannot be cut into {groups} groups of which {kept} are kept"
    if groups > 1 and kept * (experts // groups) < top_k:
        return f"{kept} of {groups} groups hold fewer than {top_k} experts"
    if groups > 1 and settings.group_score == "top2_sum" and experts // groups < 2:
        return f"groups of one expert ({groups} of {experts}) have no best two"
    if settings.score_chosen_only and (settings.correction_bias or groups > 1):
        return "groups and correction biases need scores before the choice"
    return None


def _mixtral(config: Any) -> RouterSettings:
    return RouterSettings(
        config.model_type, config.num_local_experts, config.num_experts_per_tok, renormalise=True
    )


def _softmax_optional_norm(config: Any) -> RouterSettings:
    return RouterSettings(
        config.model_type,
        config.num_experts,
        config.num_experts_per_tok,
        renormalise=bool(config.norm_topk_prob),
        weights_in_fp32=False,
    )


def _deepseek_v2(config: Any) -> RouterSettings:
    # transformers never renormalises here, whatever norm_topk_prob says.
    methods = {"greedy": False, "group_limited_greedy": True}
    if config.topk_method not in methods:
        raise InputError(
            f"router of {config.model_type}: topk_method {config.topk_method!r} is not known; "
            f"known are {', '.join(methods)}"
        )
    grouped = methods[config.topk_method]
    return RouterSettings(
        config.model_type,
        config.n_routed_experts,
        config.num_experts_per_tok,
        groups=config.n_group or 1 if grouped else 1,
        kept_groups=config.topk_group or 1 if grouped else 1,
        scale=config.routed_scaling_factor,
        logits_in_fp32=True,
    )


def _deepseek_v3(config: Any) -> RouterSettings:
    return RouterSettings(
        config.model_type,
        config.n_routed_experts,
        config.num_experts_per_tok,
        scoring="sigmoid",
        correction_bias=True,
        groups=config.n_group or 1,
        kept_groups=config.topk_group or 1,
        group_score="top2_sum",
        renormalise=bool(config.norm_topk_prob),
        epsilon=1e-20,
        scale=config.routed_scaling_factor,
        logits_in_fp32=True,
    )


ROUTER_FAMILIES: Mapping[str, Callable[[Any], RouterSettings]] = {
    "mixtral": _mixtral,
    "olmoe": _softmax_optional_norm,
    "qwen2_moe": _softmax_optional_norm,
    "qwen3_moe": _softmax_optional_norm,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
"""model_type -> reader of its (text) config."""

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

TENSOR_NAMES: Mapping[str, str] = {
    "wg.weight": WEIGHT,
    "moe_statics.e_score_correction_bias": CORRECTION_BIAS,
}
"""Tensor within a router module -> what it is: of hunyuan_v1_moe and ernie4_5_moe."""

BLOCK_TENSORS = (CORRECTION_BIAS,)
"""Tensors of a router that may be kept in its MoE block instead: minimax_m2."""


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
    least_sum : the sum that weights are divided by is at least this.
    sparse_mixing : half the width of the band in which experts compete, if they are chosen one
        after the other by SparseMixer (arXiv 2409.12136); otherwise None.
    logits_in_fp32 : the projection is computed in float32; otherwise in the hidden states' dtype.
    scores_in_fp32 : so is everything from the logits on; otherwise rounded to that dtype each time.
    weights_in_fp32 : weights leave in float32; otherwise rounded to the hidden states' dtype.
    weighs_input : weights multiply the input of an expert, not its output.
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
    least_sum: float = 0.0
    scale: float = 1.0
    sparse_mixing: float | None = None
    logits_in_fp32: bool = False
    scores_in_fp32: bool = True
    weights_in_fp32: bool = True
    weighs_input: bool = False

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise InputError(f"router of {self.model_type}: {fault}")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names, relative to the router module, of the tensors that such a router has."""
        optional = {BIAS: self.logit_bias, CORRECTION_BIAS: self.correction_bias}
        return (WEIGHT, *(name for name, there in optional.items() if there))


def router_settings(config: Any, layer: int) -> RouterSettings:
    """Read how a layer of a model routes from the model's transformers config.

    Parameters
    ----------
    layer : decoder layer index, since families may choose another number of experts in each.

    Raises
    ------
    InputError
        If the family's routing is not known, or its settings contradict each other.
    """
    text = config.get_text_config()
    family = text.model_type
    if family in REFUSED_FAMILIES:
        raise InputError(
            f"the routing of model type {family!r} cannot be described: {REFUSED_FAMILIES[family]}"
        )
    if family not in ROUTER_FAMILIES:
        known = ", ".join(sorted(ROUTER_FAMILIES))
        raise InputError(f"the routing of model type {family!r} is not known; known are {known}")
    return ROUTER_FAMILIES[family](_LayerConfig(text, layer))


class _LayerConfig:
    """A config in which a setting that is a list, one value for each layer, is this layer's."""

    def __init__(self, config: Any, layer: int) -> None:
        self._config, self._layer = config, layer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        return value[self._layer] if isinstance(value, list) else value


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


Reader = Callable[[Any], RouterSettings]
"""Settings from the (text) config of one layer."""


def _fixed(experts: str, top_k: str = "num_experts_per_tok", **settings: Any) -> Reader:
    """A reader of configs of which only the two fields of these names are asked."""

    def read(config: Any) -> RouterSettings:
        return RouterSettings(
            config.model_type, getattr(config, experts), getattr(config, top_k), **settings
        )

    return read


def _optional_norm(config: Any) -> RouterSettings:
    return RouterSettings(
        config.model_type,
        config.num_experts,
        config.num_experts_per_tok,
        renormalise=bool(config.norm_topk_prob),
        weights_in_fp32=False,
    )


def _ernie(config: Any) -> RouterSettings:
    return RouterSettings(
        config.model_type,
        config.moe_num_experts,
        config.moe_k,
        correction_bias=True,
        renormalise=True,
        least_sum=config.moe_norm_min,
        logits_in_fp32=True,
        weights_in_fp32=False,
    )


def _phimoe(config: Any) -> RouterSettings:
    if config.num_experts_per_tok != 2:
        raise InputError(
            f"router of {config.model_type}: SparseMixer chooses 2 experts, "
            f"but num_experts_per_tok is {config.num_experts_per_tok}"
        )
    return RouterSettings(
        config.model_type,
        config.num_local_experts,
        config.num_experts_per_tok,
        sparse_mixing=config.router_jitter_noise,
        scores_in_fp32=False,
        weights_in_fp32=False,
    )


def _dbrx(config: Any) -> RouterSettings:
    settings = config.ffn_config
    order = settings.moe_normalize_expert_weights
    if order not in (None, 1):
        raise InputError(
            f"router of {config.model_type}: weights divided by their norm of order {order} "
            "are not supported; moe_normalize_expert_weights must be 1 or null"
        )
    return RouterSettings(
        config.model_type,
        settings.moe_num_experts,
        settings.moe_top_k,
        renormalise=order is not None,
        scores_in_fp32=False,
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


_MIXTRAL = _fixed("num_local_experts", renormalise=True)

ROUTER_FAMILIES: Mapping[str, Reader] = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": _fixed(
        "num_local_experts", scoring="sigmoid", correction_bias=True, renormalise=True
    ),
    "olmoe": _optional_norm,
    "qwen2_moe": _optional_norm,
    "qwen3_moe": _optional_norm,
    "qwen3_next": _optional_norm,
    "qwen3_vl_moe_text": _fixed("num_experts", renormalise=True, weights_in_fp32=False),
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _deepseek_v3,
    "glm4v_moe_text": _deepseek_v3,
    "dots1": _deepseek_v3,
    "nemotron_h": _deepseek_v3,
    "gpt_oss": _fixed(
        "num_local_experts", score_chosen_only=True, logit_bias=True, weights_in_fp32=False
    ),
    "phimoe": _phimoe,
    "granitemoe": _fixed("num_local_experts", score_chosen_only=True, weights_in_fp32=False),
    "ernie4_5_moe": _ernie,
    "ernie4_5_vl_moe_text": _ernie,
    "hunyuan_v1_moe": _fixed("num_experts", "moe_topk", renormalise=True, weights_in_fp32=False),
    "jamba": _fixed("num_experts", weights_in_fp32=False),
    "dbrx": _dbrx,
    "llama4_text": _fixed(
        "num_local_experts",
        scoring="sigmoid",
        score_chosen_only=True,
        weights_in_fp32=False,
        weighs_input=True,
    ),
    "aria_text": _fixed(
        "moe_num_experts", "moe_topk", score_chosen_only=True, weights_in_fp32=False
    ),
}
"""model_type -> reader of its (text) config."""

REFUSED_FAMILIES: Mapping[str, str] = {
    "deepseek_v4": "its first layers choose experts by the token's number, not by a score",
    "switch_transformers": "it drops tokens when an expert has got its share",
    "nllb_moe": "it drops tokens when an expert has got its share",
}
"""model_type -> why its routing is none of the kinds described here."""

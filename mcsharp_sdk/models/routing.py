"""A layer's router and what it decides, exactly as the model's own module does.

:class:`Router` is a layer's weights with the family's settings; :func:`route` computes it in the
families' own operations and dtypes, so that its choices and weights equal those of the
transformers modules bit for bit. Two things may differ: the order of the slots, where a family
leaves it open, and with it the last bit of a renormalised weight, since a sum depends on its order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.router_settings import (
    BIAS,
    BLOCK_TENSORS,
    CORRECTION_BIAS,
    TENSOR_NAMES,
    WEIGHT,
    GroupScore,
    RouterSettings,
    Scoring,
    router_settings,
)


@dataclass(frozen=True, eq=False)
class Router:
    """The routing of one MoE layer.

    Attributes
    ----------
    layer : decoder layer index.
    settings : how it routes.
    weight : (experts, hidden), any floating dtype.
    bias : (experts,), added to the logits, or None.
    correction_bias : (experts,), added to the scores for the choice only, or None.
    """

    layer: int
    settings: RouterSettings
    weight: Tensor
    bias: Tensor | None = None
    correction_bias: Tensor | None = None

    def __post_init__(self) -> None:
        experts = self.settings.experts
        if self.weight.ndim != 2 or self.weight.shape[0] != experts:
            raise InputError(
                f"router of layer {self.layer}: weight has shape {list(self.weight.shape)}, "
                f"expected [{experts}, hidden]"
            )
        for name, bias in ((BIAS, self.bias), (CORRECTION_BIAS, self.correction_bias)):
            if bias is not None and bias.shape != (experts,):
                raise InputError(
                    f"router of layer {self.layer}: {name} has shape {list(bias.shape)}, "
                    f"expected [{experts}]"
                )

    @property
    def experts(self) -> int:
        """Number of routed experts."""
        return self.settings.experts

    @property
    def top_k(self) -> int:
        """Experts that a token uses."""
        return self.settings.top_k

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.weight.shape[1]


class Routing(NamedTuple):
    """What a router decides for T tokens; slots stand in falling order of the choice's score.

    ``indices`` (T, top_k) int64, ``weights`` (T, top_k) float32, ``keep`` (T, top_k) bool: False
    where a slot's expert need not be computed.
    """

    indices: Tensor
    weights: Tensor
    keep: Tensor


def read_router(
    module: nn.Module, config: Any, layer: int, block: nn.Module | None = None
) -> Router:
    """The router that a transformers router module (``gate`` or ``router``) computes.

    The tensors are the module's own, detached, not copied.

    Parameters
    ----------
    module : the router.
    block : the MoE block that it is in, where some families keep a tensor of it.

    Raises
    ------
    InputError
        As :func:`router_settings` and :func:`router_from_tensors`.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    beside = {name: getattr(block, name) for name in BLOCK_TENSORS if hasattr(block, name)}
    return router_from_tensors({**beside, **tensors}, config, layer)


def router_from_tensors(tensors: Mapping[str, Tensor], config: Any, layer: int) -> Router:
    """The router made of tensors read from anywhere, named relative to the router module.

    Raises
    ------
    InputError
        If a tensor is missing or left over, a shape is wrong, or the routing is not known.
    """
    settings = router_settings(config, layer)
    found = {TENSOR_NAMES.get(name, name): t.detach() for name, t in tensors.items()}
    if set(found) != set(settings.tensors):
        raise InputError(
            f"router of layer {layer} has tensors {sorted(found)}; "
            f"one of {settings.model_type} has {sorted(settings.tensors)}"
        )
    correction = found.get(CORRECTION_BIAS)
    if correction is not None and correction.ndim == 2:  # of one group of experts: ernie4_5
        correction = correction.squeeze(0)
    return Router(layer, settings, found[WEIGHT], found.get(BIAS), correction)


def router_tensor_names(names: Collection[str], path: str) -> dict[str, str]:
    """Name within the router -> full name, of the tensors that belong to the router at ``path``."""
    owner = path.rpartition(".")[0]
    inside = {n.removeprefix(f"{path}."): n for n in names if n.startswith(f"{path}.")}
    beside = {name: f"{owner}.{name}" for name in BLOCK_TENSORS if f"{owner}.{name}" in names}
    return beside | inside


def router_logits(router: Router, hidden: Tensor) -> Tensor:
    """Logits (T, experts) float32 of hidden states (T, hidden); dtype as the settings say."""
    dtype = torch.float32 if router.settings.logits_in_fp32 else hidden.dtype
    weight = router.weight.to(hidden.device, dtype)
    bias = None if router.bias is None else router.bias.to(hidden.device, dtype)
    return F.linear(hidden.to(dtype), weight, bias).float()


def router_scores(router: Router, hidden: Tensor) -> Tensor:
    """Scores (T, experts) float32 of all experts, before choice and renormalisation."""
    return _SCORES[router.settings.scoring](router_logits(router, hidden))


def route(router: Router, hidden: Tensor) -> Routing:
    """Choose experts and weights for each token.

    Parameters
    ----------
    router : any layer's.
    hidden : (T, hidden) floating, on any device; T may be 0. Its dtype takes the place of the
        model's dtype.

    Returns
    -------
    Routing
        On the device of ``hidden``. Among equal scores the choice is that of ``torch.topk``.

    Raises
    ------
    InputError
        If ``hidden`` has another shape or is not floating.
    """
    if hidden.ndim != 2 or hidden.shape[1] != router.hidden_size or not hidden.is_floating_point():
        raise InputError(
            f"router of layer {router.layer} takes floating hidden states of shape "
            f"[tokens, {router.hidden_size}], got {hidden.dtype} {list(hidden.shape)}"
        )
    settings = router.settings
    logits = router_logits(router, hidden)
    indices, weights = _choose(
        router, logits if settings.scores_in_fp32 else logits.to(hidden.dtype)
    )
    if settings.renormalise:
        total = weights.sum(dim=-1, keepdim=True) + settings.epsilon
        weights = weights / total.clamp(min=settings.least_sum)
    weights = weights * settings.scale
    if not settings.weights_in_fp32:
        weights = weights.to(hidden.dtype)
    return Routing(indices, weights.float(), torch.ones_like(indices, dtype=torch.bool))


def _choose(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and raw weights, both (T, top_k), from logits (T, experts)."""
    settings = router.settings
    score = _SCORES[settings.scoring]
    if settings.sparse_mixing is not None:
        return sparse_mixer(logits, settings.top_k, settings.sparse_mixing)
    if settings.score_chosen_only:
        chosen, indices = logits.topk(settings.top_k, dim=-1)
        return indices, score(chosen)
    scores = score(logits)
    preference = scores
    if router.correction_bias is not None:
        preference = scores + router.correction_bias.to(scores.device, torch.float32)
    indices = _without_lost_groups(settings, preference).topk(settings.top_k, dim=-1).indices
    return indices, scores.gather(1, indices)


def sparse_mixer(logits: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Choose experts one after the other, each weighed against those that come close to it.

    SparseMixer (arXiv 2409.12136) as it is at inference: the best expert that is left is chosen;
    its weight is its softmax among the experts left whose logit is within a relative distance of
    2 ``jitter`` of its own.

    Parameters
    ----------
    logits : (T, experts) floating.

    Returns
    -------
    Indices and weights, both (T, top_k).
    """
    left = logits
    indices, weights = [], []
    for _ in range(top_k):
        best, index = left.max(dim=-1, keepdim=True)
        distance = (best - logits) / logits.abs().clamp(min=best)
        rivals = left.masked_fill(distance > 2 * jitter, float("-inf"))
        indices.append(index)
        weights.append(rivals.softmax(dim=-1).gather(-1, index))
        left = left.scatter(-1, index, float("-inf"))
    return torch.cat(indices, -1), torch.cat(weights, -1)


def _without_lost_groups(settings: RouterSettings, preference: Tensor) -> Tensor:
    """``preference`` (T, experts) with -inf at the experts of groups that are not kept."""
    if settings.groups == 1:
        return preference
    grouped = preference.unflatten(1, (settings.groups, -1))
    worth = _GROUP_SCORES[settings.group_score](grouped)
    kept = worth.topk(settings.kept_groups, dim=-1).indices
    lost = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(lost.unsqueeze(-1), float("-inf")).flatten(1)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _best(grouped: Tensor) -> Tensor:
    return grouped.amax(dim=-1)


def _best_two(grouped: Tensor) -> Tensor:
    return grouped.topk(2, dim=-1).values.sum(dim=-1)


_SCORES: Mapping[Scoring, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
}
_GROUP_SCORES: Mapping[GroupScore, Callable[[Tensor], Tensor]] = {
    "max": _best,
    "top2_sum": _best_two,
}

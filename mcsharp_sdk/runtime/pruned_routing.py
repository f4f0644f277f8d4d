"""Fewer experts per token, decided while the model runs.

Each pruned layer's experts module has a child ``pruner``, which a forward pre-hook asks before the
experts compute. A dropped slot becomes expert ``num_experts`` with weight 0, which costs nothing,
and the weights of the token's other slots grow so that their sum stays.

Modes
-----
- ``off``: nothing happens.
- ``rule``: a slot is dropped if its weight is small beside the token's largest. The share
  ``protect_ratio`` of the most important tokens keeps all. With the metric ``drop_insignificant``
  the least important tokens lose all routed experts instead; their weights become 0.
- ``learned``: a small network says how many experts the token keeps.
- ``both``: as ``learned``, but tokens that the rule's metric protects keep all.

Decode rule
-----------
Tokens are ranked within their own sequence and among the tokens of the present forward only; keys
in a cache are not ranked again, and padding is never ranked. A sequence that brings a single token,
as in each decode step, has nothing to rank: the token is neither protected nor insignificant. It is
pruned by its weights, or by the network, alone. So with ``learned``, and with the metric ``none``,
generation step by step agrees with one forward over the whole sequence. With the other metrics a
decode step prunes every token as the whole forward would if it did not single that token out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.experts import ARGUMENTS, call_arguments, fused_weight
from mcsharp_sdk.models.topology import Topology, why_not_prunable
from mcsharp_sdk.pruning.importance import ATTENTION
from mcsharp_sdk.runtime.expert_pruner import ExpertPruner, PruningState
from mcsharp_sdk.runtime.pruning_layout import PRUNER, PruningLayout, PruningMode
from mcsharp_sdk.runtime.received_attention import (
    attach_tap,
    attended,
    first_own_key,
    use_received_attention,
)

_STATE = "expert_pruning_state"


def install_pruning(model: Any, topology: Topology, layout: PruningLayout) -> None:
    """Give a model the pruners that ``layout`` describes, switched off; networks are empty.

    To be called while the experts are still fused.

    Raises
    ------
    InputError
        If the layout does not fit the model's layers or experts per token.
    """
    _check(topology, layout)
    decoder = topology.decoder_path
    state = PruningState(layout, decoder)
    setattr(model, _STATE, state)
    owner = model.get_submodule(decoder)
    setattr(owner, _STATE, state)
    owner.register_forward_pre_hook(_note_batch, with_kwargs=True)
    layers = model.get_submodule(topology.layers_path)
    for index in sorted(_layers(layout)):
        block = topology.moe[index]
        experts = layers[index].get_submodule(block.experts)
        hidden_size = fused_weight(experts, "gate_up").shape[2]
        pruner = ExpertPruner(index, block, hidden_size, state)
        attach_tap(layers[index], pruner.tap)
        experts.add_module(PRUNER, pruner)
        experts.register_forward_pre_hook(_prune, with_kwargs=True)


def set_expert_pruning(model: Any, mode: str) -> None:
    """Choose how a model prunes its experts from now on; see :mod:`~.pruned_routing`.

    Raises
    ------
    InputError
        If the model has no data for this mode, or runs an attention implementation that cannot
        tell what the mode needs.
    """
    state: PruningState | None = getattr(model, _STATE, None)
    if state is None:
        if mode == "off":
            return
        raise InputError(f"expert pruning {mode!r} is not possible: this model has none")
    state.layout.check_mode(mode)
    rule = state.layout.rule
    importance = rule.importance if rule and mode in ("rule", "both") else None
    use_received_attention(model.get_submodule(state.decoder), importance == ATTENTION)
    state.mode = mode  # type: ignore[assignment]  # checked above
    state.ranks_tokens = importance is not None
    for module in model.modules():
        pruner = getattr(module, PRUNER, None)
        if isinstance(pruner, ExpertPruner):
            pruner.tap.wanted = pruner.active and importance == ATTENTION
            # Implementations of transformers look for dropped slots only with this flag.
            module._is_expert_parallel = pruner.active


def expert_pruning(model: Any) -> PruningMode:
    """How a model prunes its experts now."""
    state: PruningState | None = getattr(model, _STATE, None)
    return "off" if state is None else state.mode


def _layers(layout: PruningLayout) -> set[int]:
    """Decoder layers that some mode prunes."""
    ruled = set(layout.rule.thresholds) if layout.rule else set()
    return ruled | set(layout.learned.layers if layout.learned else ())


def _check(topology: Topology, layout: PruningLayout) -> None:
    if unknown := sorted(_layers(layout) - set(topology.moe)):
        raise InputError(
            f"quantization_config.pruning is for decoder layers {unknown}, but the model has "
            f"experts in {sorted(topology.moe)}"
        )
    if (obstacle := why_not_prunable(topology.moe.values())) is not None:
        raise InputError(f"experts cannot be pruned: {obstacle}")
    for layer, thresholds in (layout.rule.thresholds if layout.rule else {}).items():
        top_k = topology.moe[layer].top_k
        if len(thresholds) != top_k - 1:
            raise InputError(
                f"quantization_config.pruning gives decoder layer {layer} {len(thresholds)} "
                f"thresholds; {top_k} experts per token need {top_k - 1}"
            )


def _prune(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of an experts module: hand it the pruned choice."""
    pruner: ExpertPruner = experts.pruner
    if not pruner.active:
        return None
    hidden, index, weights = call_arguments(args, kwargs)
    others = {name: value for name, value in kwargs.items() if name not in ARGUMENTS}
    return (hidden, *pruner(hidden, index, weights)), others


def _note_batch(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of the decoder: remember the shape of the batch and where its padding is."""
    state: PruningState = getattr(decoder, _STATE)
    if not state.ranks_tokens:
        return
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = given.get("input_ids")
    inputs = given["inputs_embeds"] if inputs is None else inputs
    batch, length = inputs.shape[:2]
    state.batch.valid = _valid(given.get("attention_mask"), batch, length, inputs.device)


def _valid(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """bool [B, L]: which tokens of this forward are no padding.

    Parameters
    ----------
    mask : as models take it: None; [B, >= L] with a cache's tokens first; [B, 1, L, keys]; or a
        dict of such, by kind of layer.
    """
    if isinstance(mask, dict):
        mask = next((found for found in mask.values() if found is not None), None)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    start = first_own_key(mask, mask.shape[3])
    own = attended(mask)[..., start : start + length].diagonal(dim1=-2, dim2=-1)
    return own.any(1).expand(batch, length)

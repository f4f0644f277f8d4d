"""The tensors that a run leaves behind: what its stages made, and the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from mcsharp_sdk.artifacts import TOP_ANY_ROUTER

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.safetensors_file import StoredTensor
    from mcsharp_sdk.models.source import SourceModel
    from mcsharp_sdk.runtime.layout import PackedLayout

GROUP_SIZE = 128
"""Written where nothing is packed, so that it means nothing."""

AnyTensor: TypeAlias = "Tensor | StoredTensor"


def outer_tensors(model: SourceModel) -> Iterator[tuple[str, AnyTensor]]:
    """What is outside the decoder layers (embeddings, head, vision tower), as it was.

    One module's own tensors are held at a time.
    """
    of_owner: dict[str, list[str]] = {}
    for name in dict.fromkeys(model.names.memory.values()):
        if model.topology.in_layers(name):
            continue
        if name in model.names.verbatim:
            yield name, model.checkpoint.slice(model.names.verbatim[name])
        else:
            of_owner.setdefault(name.rpartition(".")[0], []).append(name)
    for names in of_owner.values():
        yield from model.stored_tensors(*names)


def model_layout(context: RunContext) -> PackedLayout:
    """How the stages left the model: what is packed, and how it is pruned."""
    from mcsharp_sdk.runtime.layout import PackedLayout

    quantised = context.quantised_layout() or PackedLayout(GROUP_SIZE, {}, {})
    return replace(quantised, pruning=context.pruning_layout())


def named_layer_tensors(
    context: RunContext, layout: PackedLayout, index: int
) -> Iterator[tuple[str, AnyTensor]]:
    """A decoder layer: what stages made from the run directory, the rest from the model."""
    model = context.model
    packed = context.quantised_tensors(index)
    yield from packed.items()
    prefix = f"{model.layer_path(index)}."
    linears = [n for n in model.topology.linears[index] if n in layout.linears]
    replaced = [f"{prefix}{name}.weight" for name in linears]
    if index in layout.experts:
        replaced += model.fused_weights(index)
    copied = {n: t for n, t in _as_stored(model, prefix) if n not in replaced}
    yield from ((name, tensor) for name, tensor in copied.items() if name not in packed)
    for name, tensor in model.stored_tensors(prefix, but_not=[*replaced, *copied]):
        if name not in packed:
            yield name, tensor
    yield from _pruner_tensors(context, layout, index)


def _as_stored(model: SourceModel, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors that can be copied from the original model as they are, in its stored dtype."""
    tree = model.model.state_dict()
    for name, disk in model.names.verbatim.items():
        if not name.startswith(prefix):
            continue
        stored = model.checkpoint.slice(disk)
        if stored.dtype == model.stored_dtype and tree[name].dtype == model.dtype:
            yield name, stored


def _pruner_tensors(
    context: RunContext, layout: PackedLayout, index: int
) -> Iterator[tuple[str, Tensor]]:
    """The top-any network of a decoder layer, if it has one."""
    from mcsharp_sdk.runtime.pruning_layout import PRUNER

    learned = layout.pruning.learned if layout.pruning is not None else None
    if learned is None or index not in learned.layers:
        return
    model = context.model
    path = f"{model.layer_path(index)}.{model.topology.moe[index].experts}.{PRUNER}"
    for name, tensor in context.layers(TOP_ANY_ROUTER).tensors(index).items():
        yield f"{path}.{name}", tensor

"""Linear layers outside of the experts: their inputs, and those that share them stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.models.capture import linear_inputs, paired_linear_inputs
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.modifiers.matrix_quantisation import Moments
from mcsharp_sdk.modifiers.original_model import OriginalLayer
from mcsharp_sdk.quantization.grid import QuantizedBatch, QuantizedWeight
from mcsharp_sdk.quantization.hessian import accumulate
from mcsharp_sdk.quantization.propagation import accumulate_cross


def linear_moments(
    layer: StreamedLayer, names: Sequence[str], original: OriginalLayer | None
) -> dict[tuple[str, ...], Moments | None]:
    """Linears that share their input -> its moments over the tokens of all processes.

    Each by itself, without moments, if there is nothing to measure with.
    """
    if not layer.inputs.hidden:
        return dict.fromkeys((name,) for name in names)
    found: dict[tuple[str, ...], Moments] = {}
    ranks = layer.inputs.ranks
    tokens = ranks.total(sum(hidden.shape[:2].numel() for hidden in layer.inputs.hidden))

    def collect(group: tuple[str, ...], inputs: Tensor) -> None:
        if group not in found:
            columns = inputs.shape[-1]
            hessians = torch.zeros(1, columns, columns, device=inputs.device)
            found[group] = Moments(hessians, [tokens])
        accumulate(found[group].hessians[0], inputs)

    def collect_both(group: tuple[str, ...], inputs: Tensor, wanted: Tensor) -> None:
        collect(group, inputs)
        moments = found[group]
        if moments.cross is None:
            moments.cross = torch.zeros_like(moments.hessians)
        accumulate_cross(moments.cross[0], wanted, inputs)

    if original is None:
        linear_inputs(layer, names, collect)
    else:
        paired_linear_inputs(layer, original.in_place, names, collect_both)
    for moments in found.values():
        ranks.sum_(moments.hessians)
    return dict(found)


def linears_of(layer: StreamedLayer, names: Sequence[str]) -> list[Any]:
    """Modules by their paths in the layer."""
    return [layer.module.get_submodule(name) for name in names]


def stacked(layer: StreamedLayer, names: Sequence[str]) -> Tensor:
    """The weights of linears that share their input, as one tall matrix [R, K]."""
    return torch.cat([linear.weight for linear in linears_of(layer, names)])


def linear_of_row(layer: StreamedLayer, names: Sequence[str]) -> Tensor:
    """int64 [R], which of the linears that ``stacked`` puts together each row is of."""
    rows = torch.tensor([linear.out_features for linear in linears_of(layer, names)])
    return torch.arange(len(rows)).repeat_interleave(rows)


def split_rows(batch: QuantizedBatch, rows: Sequence[int]) -> Iterator[QuantizedWeight]:
    """Cut a batch of one tall matrix into the matrices that were stacked in it."""
    whole = batch.expert(0)
    parts = (tensor.split(list(rows)) for tensor in (whole.codes, whole.scales, whole.zeros))
    for codes, scales, zeros in zip(*parts, strict=True):
        yield QuantizedWeight(codes, scales, zeros, whole.bits, whole.group_size)


def components(names: Sequence[str]) -> list[list[str]]:
    """Linears by the child of the layer that they are in (attention, MLP), in order of the tree."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split(".")[0], []).append(name)
    return list(found.values())

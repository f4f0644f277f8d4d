"""Quantise one decoder layer in place: its linears first, then its routed experts.

The order is that of the forward pass, so that everything is calibrated on inputs that come from
what is already quantised: attention, then the dense or shared MLP, then the experts' gate and up
projections, then their down projections on the quantised gate and up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES, Matrix, projection_of_row
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.models.ranks import divide
from mcsharp_sdk.models.streamed_layer import StreamedLayer
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.modifiers.expert_buckets import ExpertBuckets
from mcsharp_sdk.modifiers.expert_chunks import expert_chunks
from mcsharp_sdk.modifiers.expert_hessians import expert_hessians
from mcsharp_sdk.modifiers.layer_linears import (
    components,
    linear_moments,
    linear_of_row,
    linears_of,
    split_rows,
    stacked,
)
from mcsharp_sdk.modifiers.layer_notes import LayerNotes
from mcsharp_sdk.modifiers.matrix_quantisation import Moments, QuantizerSettings, quantise_matrices
from mcsharp_sdk.modifiers.original_model import OriginalExperts, OriginalLayer
from mcsharp_sdk.quantization.grid import (
    REMOVED,
    PackedWeight,
    QuantizedBatch,
    QuantizedWeight,
    dequantise,
    group_count,
    pack_weight,
)
from mcsharp_sdk.quantization.rotation import expert_signs, rotate_, rotate_both_, turned_back
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.runtime.layout import linear_tensors


@dataclass(frozen=True)
class LayerQuantiser:
    """Quantises decoder layers with one set of settings.

    Attributes
    ----------
    settings : of the quantiser.
    linear_bits : width of linears outside the experts, or None to leave them.
    router_bits : width that router weights are rounded to, or None to leave them. They keep their
        dtype in storage: what they weigh is not worth packing.
    rotated : whether the experts are quantised with their inputs turned.
    """

    settings: QuantizerSettings
    linear_bits: int | None
    router_bits: int | None
    rotated: bool = False

    @torch.no_grad()
    def quantise(
        self,
        layer: StreamedLayer,
        expert_bits: Sequence[int] | None,
        original: OriginalLayer | None = None,
    ) -> tuple[dict[str, Tensor], LayerNotes]:
        """Quantise a loaded layer in place.

        Parameters
        ----------
        original : the layer as it is, with the original model's activations, which it moves on;
            None where nothing is made up for.
        expert_bits : width of each routed expert, or None for a dense layer. What the experts then
            give on the calibration tokens is left in ``layer.expert_outputs``.

        Returns
        -------
        Packed tensors by their full names, and notes.
        """
        notes = LayerNotes()
        packed: dict[str, Tensor] = {}
        prefix = layer.source.layer_path(layer.index)
        if self.linear_bits is not None:
            for names in components(layer.source.topology.linears[layer.index]):
                for name, weight in self._linears(layer, names, self.linear_bits, notes, original):
                    packed |= linear_tensors(f"{prefix}.{name}", weight)
        if original is not None:
            original.advance()
        if expert_bits is not None:
            if self.router_bits is not None:
                packed |= self._router(layer, self.router_bits)
            path = f"{prefix}.{layer.moe.experts}"
            tensors = self._experts(layer, expert_bits, notes, original)
            packed |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        return packed, notes.merge(layer.inputs.ranks)

    def _linears(
        self,
        layer: StreamedLayer,
        names: Sequence[str],
        bits: int,
        notes: LayerNotes,
        original: OriginalLayer | None,
    ) -> Iterator[tuple[str, PackedWeight]]:
        """Linears of one part of the layer, quantised on inputs as they are now, and put back."""
        moments, ranks = linear_moments(layer, names, original), layer.inputs.ranks
        groups = list(moments)
        columns = [linears_of(layer, group)[0].in_features for group in groups]
        owned = divide([float(count) ** 3 for count in columns], ranks.count)
        batches = {}
        for position in owned[ranks.rank]:
            group = groups[position]
            weights = stacked(layer, group).unsqueeze(0)
            batches[position] = quantise_matrices(
                self.settings,
                weights,
                moments.pop(group),
                [bits],
                group[:1],
                notes,
                linear_of_row(layer, group),
            )
        for position, group in enumerate(groups):
            linears = linears_of(layer, group)
            rows = [linear.out_features for linear in linears]
            owner = next(rank for rank, own in enumerate(owned) if position in own)
            shape = (sum(rows), linears[0].in_features)
            batch = self._spread(batches.pop(position, None), shape, bits, owner, layer)
            for name, linear, part in zip(group, linears, split_rows(batch, rows), strict=True):
                linear.weight.copy_(dequantise(part, linear.weight.dtype))
                yield name, pack_weight(part)

    def _spread(
        self,
        batch: QuantizedBatch | None,
        shape: tuple[int, int],
        bits: int,
        owner: int,
        layer: StreamedLayer,
    ) -> QuantizedBatch:
        """A matrix [1, R, K] that one process quantised, for all of them."""
        if batch is None:
            size = self.settings.grid.group_size
            groups = group_count(shape[1], size)
            like = torch.empty(0, dtype=torch.uint8, device=layer.source.device)
            batch = QuantizedBatch(
                like.new_empty(1, *shape),
                like.new_empty(1, shape[0], groups, dtype=torch.float16),
                like.new_empty(1, shape[0], groups),
                (bits,),
                size,
            )
        for tensor in (batch.codes, batch.scales, batch.zeros):
            layer.inputs.ranks.spread(tensor, owner)
        return batch

    def _router(self, layer: StreamedLayer, bits: int) -> dict[str, Tensor]:
        router = layer.module.get_submodule(layer.moe.router)
        path = f"{layer.moe.router}.{router_weight(router)}"
        weight = layer.module.get_parameter(path)
        batch = quantise_rtn(weight.float().unsqueeze(0), [bits], self.settings.grid)
        weight.copy_(dequantise(batch.expert(0), weight.dtype))
        stored = weight.to(layer.source.stored_dtype, copy=True)
        return {f"{layer.source.layer_path(layer.index)}.{path}": stored}

    def _experts(
        self,
        layer: StreamedLayer,
        bits: Sequence[int],
        notes: LayerNotes,
        original: OriginalLayer | None,
    ) -> dict[str, Tensor]:
        """Packed tensors of the experts, by their names within the experts' module."""
        runs = ExpertRuns.of_layer(layer, last=True)
        buckets = ExpertBuckets(bits, layer.inputs.scratch)
        beside = None if original is None else original.experts(runs)
        for chunk in expert_chunks(runs):
            stored = [expert for expert in chunk if bits[expert] != REMOVED]
            _remove(runs, set(chunk) - set(stored))
            if beside is not None:
                beside.keep(stored)
            for matrix in MATRICES if stored else ():
                batch = self._quantised_chunk(runs, matrix, stored, bits, notes, beside)
                for position, expert in enumerate(stored):
                    quantised = batch.expert(position)
                    if runs.calibrated:  # otherwise nothing is run with it
                        weight = self._restored(quantised, expert, runs)
                        runs.weights.replace(matrix, expert, weight)
                    buckets.put(matrix, expert, pack_weight(quantised))
                del batch, quantised
                release_free_memory()
            runs.run(chunk)
        layer.expert_outputs = runs.finish()
        if not layer.inputs.ranks.alone:
            buckets.gather(runs.tokens.owned, self.settings.grid.group_size, runs)
        return buckets.tensors

    def _restored(self, quantised: QuantizedWeight, expert: int, runs: ExpertRuns) -> Tensor:
        """What an expert's matrix has become, for inputs as they are."""
        dtype = runs.routed.hidden.dtype
        if not self.rotated:
            return dequantise(quantised, dtype)
        codes = quantised.codes
        signs = expert_signs(runs.weights.num_experts, codes.shape[1], codes.device)
        return turned_back(quantised, dtype, signs[expert])

    def _quantised_chunk(
        self,
        runs: ExpertRuns,
        matrix: Matrix,
        chunk: Sequence[int],
        bits: Sequence[int],
        notes: LayerNotes,
        beside: OriginalExperts | None,
    ) -> QuantizedBatch:
        """One matrix of some experts, quantised."""
        moments = self._expert_moments(runs, matrix, chunk, notes, beside)
        weights = torch.stack([runs.weights.read(matrix, expert) for expert in chunk])
        if self.rotated:
            weights = weights.float()
            signs = expert_signs(runs.weights.num_experts, weights.shape[2], weights.device)
            for position, expert in enumerate(chunk):
                rotate_(weights[position], signs[expert])
                for squares in () if moments is None else (moments.hessians, moments.cross):
                    if squares is not None:
                        rotate_both_(squares[position], signs[expert])
        names = [f"experts.{expert}.{matrix}" for expert in chunk]
        return quantise_matrices(
            self.settings,
            weights,
            moments,
            [bits[e] for e in chunk],
            names,
            notes,
            projection_of_row(runs.weights.module, matrix),
        )

    def _expert_moments(
        self,
        runs: ExpertRuns,
        matrix: Matrix,
        chunk: Sequence[int],
        notes: LayerNotes,
        beside: OriginalExperts | None,
    ) -> Moments | None:
        """Of the inputs of one matrix of some experts; None if there is nothing to measure with."""
        if not runs.calibrated:
            return None
        weighted = self.settings.routing_weighted
        moments = Moments(*expert_hessians(runs, matrix, chunk, notes, routing_weighted=weighted))
        if beside is not None:
            moments.cross = beside.cross_grams(matrix, chunk, routing_weighted=weighted)
        return moments


def _remove(runs: ExpertRuns, experts: Iterable[int]) -> None:
    """Give experts zeros for weights."""
    for expert in experts:
        for matrix in MATRICES:
            zeros = runs.routed.hidden.new_zeros(runs.weights.shape(matrix))
            runs.weights.replace(matrix, expert, zeros)

"""Quantise one decoder layer in place: its linears first, then its routed experts.

The order is that of the forward pass, so that everything is calibrated on inputs that come from
what is already quantised: attention, then the dense or shared MLP, then the experts' gate and up
projections, then their down projections on the quantised gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mcsharp_sdk.models.capture import linear_inputs
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES, Matrix
from mcsharp_sdk.models.memory import release_free_memory
from mcsharp_sdk.models.ranks import divide
from mcsharp_sdk.models.stream import StreamedLayer
from mcsharp_sdk.models.topology import router_weight
from mcsharp_sdk.modifiers.expert_buckets import ExpertBuckets
from mcsharp_sdk.modifiers.expert_chunks import expert_chunks
from mcsharp_sdk.modifiers.layer_notes import LayerNotes
from mcsharp_sdk.quantization.gptq import quantise_gptq
from mcsharp_sdk.quantization.grid import (
    PackedWeight,
    QuantizedBatch,
    QuantizedWeight,
    dequantise,
    group_count,
    pack_weight,
)
from mcsharp_sdk.quantization.hessian import (
    accumulate,
    diagonal_importance,
    factorise,
    shrink,
    squared_output_error,
)
from mcsharp_sdk.quantization.hqq import quantise_hqq
from mcsharp_sdk.quantization.lwc import quantise_lwc
from mcsharp_sdk.quantization.round_to_nearest import quantise_rtn
from mcsharp_sdk.quantization.search import GridSettings
from mcsharp_sdk.runtime.layout import linear_tensors

QuantizerName = Literal["gptq", "rtn", "hqq", "lwc"]

ERROR_ROWS = 256
"""Rows of each matrix that its error is noted from: it is told, and decides nothing."""


@dataclass(frozen=True)
class QuantizerSettings:
    """How weights are quantised, whatever their width.

    Attributes
    ----------
    quantizer : ``gptq``, or one without compensation: ``rtn`` (round to nearest), ``hqq``
        (half-quadratic) or ``lwc`` (learned clipping).
    grid : group size and clip search.
    damping : share of the Hessian's mean diagonal that is added to it.
    routing_weighted : weigh each token's part of an expert's Hessian by its routing weight squared.
    compensate_within_block : whether GPTQ passes errors on inside a block at 3 bits and fewer.
    """

    quantizer: QuantizerName
    grid: GridSettings
    damping: float
    routing_weighted: bool
    compensate_within_block: bool


@dataclass(frozen=True)
class LayerQuantiser:
    """Quantises decoder layers with one set of settings.

    Attributes
    ----------
    settings : of the quantiser.
    linear_bits : width of linears outside the experts, or None to leave them.
    router_bits : width that router weights are rounded to, or None to leave them. They keep their
        dtype in storage: what they weigh is not worth packing.
    """

    settings: QuantizerSettings
    linear_bits: int | None
    router_bits: int | None

    @torch.no_grad()
    def quantise(
        self, layer: StreamedLayer, expert_bits: Sequence[int] | None
    ) -> tuple[dict[str, Tensor], LayerNotes]:
        """Quantise a loaded layer in place.

        Parameters
        ----------
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
                for name, weight in self._linears(layer, names, self.linear_bits, notes):
                    packed |= linear_tensors(f"{prefix}.{name}", weight)
        if expert_bits is not None:
            if self.router_bits is not None:
                packed |= self._router(layer, self.router_bits)
            path = f"{prefix}.{layer.moe.experts}"
            tensors = self._experts(layer, expert_bits, notes)
            packed |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        return packed, notes.merge(layer.inputs.ranks)

    def _linears(
        self, layer: StreamedLayer, names: Sequence[str], bits: int, notes: LayerNotes
    ) -> Iterator[tuple[str, PackedWeight]]:
        hessians: dict[tuple[str, ...], Tensor] = {}

        def collect(group: tuple[str, ...], inputs: Tensor) -> None:
            columns = inputs.shape[-1]
            if group not in hessians:
                hessians[group] = torch.zeros(columns, columns, device=inputs.device)
            accumulate(hessians[group], inputs)

        linear_inputs(layer, names, collect)
        ranks = layer.inputs.ranks
        costs = [float(ranks.sum_(hessian).shape[-1]) ** 3 for hessian in hessians.values()]
        owned = divide(costs, ranks.count)
        groups, batches = list(hessians), {}
        for position in owned[ranks.rank]:
            group = groups[position]
            waiting = [hessians.pop(group).unsqueeze(0)]
            weights = _stacked(layer, group).unsqueeze(0)
            batches[position] = self._quantise(weights, waiting, [bits], group[:1], notes)
        for position, group in enumerate(groups):
            linears: list[Any] = [layer.module.get_submodule(name) for name in group]
            rows = [linear.out_features for linear in linears]
            owner = next(rank for rank, own in enumerate(owned) if position in own)
            shape = (sum(rows), linears[0].in_features)
            batch = self._spread(batches.pop(position, None), shape, bits, owner, layer)
            for name, linear, part in zip(group, linears, _split_rows(batch, rows), strict=True):
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
        self, layer: StreamedLayer, bits: Sequence[int], notes: LayerNotes
    ) -> dict[str, Tensor]:
        """Packed tensors of the experts, by their names within the experts' module."""
        runs = ExpertRuns.of_layer(layer)
        buckets = ExpertBuckets(bits, layer.inputs.scratch)
        for chunk in expert_chunks(runs):
            for matrix in MATRICES:
                batch = self._quantised_chunk(runs, matrix, chunk, bits, notes)
                for position, expert in enumerate(chunk):
                    quantised = batch.expert(position)
                    dtype = runs.routed.hidden.dtype
                    runs.weights.replace(matrix, expert, dequantise(quantised, dtype))
                    buckets.put(matrix, expert, pack_weight(quantised))
                del batch, quantised
                release_free_memory()
            runs.run(chunk)
        layer.expert_outputs = runs.finish()
        if not layer.inputs.ranks.alone:
            buckets.gather(runs.tokens.owned, self.settings.grid.group_size, runs)
        return buckets.tensors

    def _quantised_chunk(
        self,
        runs: ExpertRuns,
        matrix: Matrix,
        chunk: Sequence[int],
        bits: Sequence[int],
        notes: LayerNotes,
    ) -> QuantizedBatch:
        """One matrix of some experts, quantised."""
        waiting = [self.expert_hessians(runs, matrix, chunk, notes)]
        weights = torch.stack([runs.weights.read(matrix, expert) for expert in chunk])
        names = [f"experts.{expert}.{matrix}" for expert in chunk]
        return self._quantise(weights, waiting, [bits[e] for e in chunk], names, notes)

    def expert_hessians(
        self,
        runs: ExpertRuns,
        matrix: Matrix,
        chunk: Sequence[int],
        notes: LayerNotes,
        most: int | None = None,
    ) -> Tensor:
        """Hessians of one matrix of some experts, [n, K, K], from the tokens routed to each.

        Experts with few tokens are completed by tokens of the whole layer, and noted. Tokens that
        are weighed by their routing weight squared, v, count as (Σ v)²/Σ v² (Kish's effective
        sample size), and those that complete them get the expert's mean v. Of more than ``most``
        tokens, so many are taken.
        """
        _, columns = runs.weights.shape(matrix)
        hessians = torch.zeros(len(chunk), columns, columns, device=runs.routed.hidden.device)
        shared: Tensor | None = None
        for hessian, expert in zip(hessians, chunk, strict=True):
            tokens, weights, squares = 0, 0.0, 0.0
            for piece in runs.pieces(expert, matrix, most):
                routing = piece.routing if self.settings.routing_weighted else None
                accumulate(hessian, piece.inputs, routing)
                tokens += len(piece.token)
                if routing is not None:
                    weights += float(routing.double().square().sum())
                    squares += float(routing.double().pow(4).sum())
            weighed = squares > 0
            counted = weights**2 / squares if weighed else tokens
            if counted < columns:
                notes.starved[str(expert)] = tokens
                if shared is None or matrix == "down":
                    shared = None  # the old one goes before the new one is made
                    shared = _mean_hessian(runs, matrix, expert)
                # What completes it gets the expert's mean weight.
                shrink(hessian[None], [counted], shared, tokens / weights if weighed else 1)
        return hessians

    def _quantise(
        self,
        weights: Tensor,
        waiting: list[Tensor],
        bits: Sequence[int],
        names: Sequence[str],
        notes: LayerNotes,
    ) -> QuantizedBatch:
        """Quantise matrices [n, R, K] with their Hessians [n, K, K], and note their errors.

        Hessians are taken out of ``waiting``, so that nobody else holds them.
        """
        hessians = waiting.pop()
        batch = self._quantised(weights, hessians, bits, names, notes)
        for position, name in enumerate(names):
            rows = _some_rows(weights.shape[1])
            changed = dequantise(_at_rows(batch.expert(position), rows), torch.float32)
            found = squared_output_error(weights[position, rows], changed, hessians[position])
            of = weights.shape[1] / len(rows)
            notes.add_error(name.split(".")[0], *(of * square for square in found))
        return batch

    def _quantised(
        self,
        weights: Tensor,
        hessians: Tensor,
        bits: Sequence[int],
        names: Sequence[str],
        notes: LayerNotes,
    ) -> QuantizedBatch:
        s = self.settings
        if s.quantizer == "rtn":
            importance = diagonal_importance(hessians)
            return quantise_rtn(weights, bits, s.grid, importance=importance)
        if s.quantizer == "hqq":
            return quantise_hqq(weights, bits, s.grid)
        if s.quantizer == "lwc":
            return quantise_lwc(weights, hessians, bits, s.grid)
        factor = factorise(hessians, damping=s.damping)
        release_free_memory()
        notes.raised_damping += [names[e] for e in factor.raised]
        notes.fallbacks += [names[e] for e in factor.failed]
        return quantise_gptq(
            weights,
            factor,
            bits,
            s.grid,
            compensate_within_block=s.compensate_within_block or min(bits) > 3,
        )


def _stacked(layer: StreamedLayer, names: Sequence[str]) -> Tensor:
    """The weights of linears that share their input, as one tall matrix [R, K]."""
    linears: list[Any] = [layer.module.get_submodule(name) for name in names]
    return torch.cat([linear.weight for linear in linears])


def _some_rows(rows: int) -> Tensor:
    """At most ``ERROR_ROWS`` numbers of rows, evenly spaced."""
    return torch.linspace(0, rows - 1, min(rows, ERROR_ROWS)).long()


def _at_rows(whole: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Some rows of a quantised matrix."""
    codes, scales, zeros = (tensor[rows] for tensor in (whole.codes, whole.scales, whole.zeros))
    return QuantizedWeight(codes, scales, zeros, whole.bits, whole.group_size)


def _split_rows(batch: QuantizedBatch, rows: Sequence[int]) -> Iterator[QuantizedWeight]:
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


def _mean_hessian(runs: ExpertRuns, matrix: Matrix, expert: int) -> Tensor:
    """Hessian of one matrix of an expert per token, [K, K], over tokens of the whole layer.

    For gate and up it is the same for all experts.
    """
    inputs = runs.inputs_from_all_tokens(expert, matrix)
    columns = inputs.shape[-1]
    hessian = torch.zeros(columns, columns, device=inputs.device)
    accumulate(hessian, inputs)
    return hessian.div_(len(inputs))

"""How much memory a run takes at its peak, told from shapes alone.

What is counted is what the code holds at the same time, written down here stage by stage next to
the names of what it is. ``benchmarks/plan_accuracy.py`` compares it with reality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcsharp_sdk.engine.quantising_memory import (
    FLOAT,
    ROUNDING,
    expert_quantising,
    experts_together,
    linear_quantising,
    rounding,
)
from mcsharp_sdk.engine.sizes import LayerSizes, ModelSizes, packed_bytes_of
from mcsharp_sdk.models.embedding import TOKENS_PER_BATCH
from mcsharp_sdk.models.expert_runs import KEPT_BYTES, PIECE_TOKENS
from mcsharp_sdk.models.logits import LOGITS_AT_ONCE
from mcsharp_sdk.models.memory import resident_bytes
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.router_calibration import RouterCalibration
from mcsharp_sdk.modifiers.token_protection import TokenProtection
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
from mcsharp_sdk.quantization.router_fit import HISTORY

SOLVER_BYTES = 120 * 10**6
"""What the solver of the allocation adds once it is imported; it stays."""

LOADING_OVERHEAD = 1.3
"""Peak memory of loading a layer whole, in layers: fused tensors are stacked from single ones."""

SHARD_BYTES = 5 * 10**9
"""Size of the shards of a result, unless the exporter is told otherwise."""


@dataclass(frozen=True)
class Need:
    """Bytes that something takes.

    Attributes
    ----------
    fixed : in memory, whatever is allowed.
    movable : activations, which may lie in files instead.
    """

    fixed: int
    movable: int

    def peak(self, *, spill: bool) -> int:
        """Bytes in memory."""
        return self.fixed + (0 if spill else self.movable)


@dataclass(frozen=True)
class Workload:
    """What a stage works on.

    ``tokens`` of calibration, sequences of at most ``length``, divided among ``processes``;
    ``overlaps`` if experts are read, and layers written, beside the computing.
    """

    sizes: ModelSizes
    tokens: int
    length: int
    processes: int = 1
    overlaps: bool = False

    @property
    def own_tokens(self) -> int:
        """Tokens of one process."""
        return -(-self.tokens // self.processes)

    @property
    def activations(self) -> int:
        """Bytes of a hidden state of every token that a process has."""
        return self.own_tokens * self.sizes.hidden_size * self.sizes.dtype_bytes

    @property
    def batch_tokens(self) -> int:
        """Tokens of a forward."""
        return min(self.own_tokens, max(TOKENS_PER_BATCH, self.length))

    def tokens_per_expert(self, layer: LayerSizes) -> int:
        """On average."""
        return self.tokens * layer.top_k // max(1, layer.experts)


def base_bytes() -> int:
    """What this process takes before the work begins: torch, transformers, the module tree."""
    return resident_bytes()


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes.

    Attributes
    ----------
    needs : of each stage, and of writing the result.
    base : what each of them comes on top of.
    """

    needs: tuple[Need, ...]
    base: int

    @classmethod
    def of(cls, stages: Sequence[Modifier], work: Workload, bits: float | None) -> MemoryPlan:
        """Of a recipe's stages; ``bits`` is the mean width of the experts, if it is known."""
        needs = [_stage_need(stage, work, bits) for stage in stages]
        solves = any(isinstance(s, BitAllocation) and s.solves for s in stages)
        solver = SOLVER_BYTES if solves else 0
        packed = any(isinstance(s, GPTQQuantize) for s in stages)
        return cls((*needs, _export_need(work, packed=packed)), base_bytes() + solver)

    def stages(self, *, spill: bool) -> list[int]:
        """Bytes of each stage."""
        return [self.base + need.peak(spill=spill) for need in self.needs[:-1]]

    def peak(self, *, spill: bool) -> int:
        """Bytes of the whole run."""
        return self.base + max(need.peak(spill=spill) for need in self.needs)

    @property
    def movable(self) -> int:
        """Bytes that lie in files where activations do."""
        return max(need.movable for need in self.needs)


def _export_need(work: Workload, *, packed: bool) -> Need:
    """What writing the result takes: one tensor at a time where experts are packed.

    Others are stacked as transformers has them, and held until their shard is written.
    """
    if packed:
        return Need(work.sizes.largest_tensor, 0)
    layer = max(layer.bytes for layer in work.sizes.layers)
    waiting = min(SHARD_BYTES, work.sizes.used_bytes)
    return Need(max(work.sizes.largest_tensor, int(LOADING_OVERHEAD * layer) + waiting), 0)


def _stage_need(stage: Modifier, work: Workload, bits: float | None) -> Need:
    if not (stage.needs_calibration() or isinstance(stage, _BUILT_IN)):
        return Need(0, 0)
    embedded = work.sizes.embedding_bytes + _forward_bytes(work) if work.tokens else 0
    embedding = Need(embedded, work.activations)
    layers = [_layer_need(stage, layer, work, bits) for layer in work.sizes.layers]
    if _holds_model(stage):
        layers.append(_whole_model(work))
    if isinstance(stage, ExpertStats) and stage.loss_tokens:
        layers += _gradient_needs(stage.loss_tokens, work)
    needs = [embedding, *layers]
    return Need(max(n.fixed for n in needs), max(n.movable for n in needs))


def _holds_model(stage: Modifier) -> bool:
    return isinstance(stage, (ExpertStats, TopAnyRouter)) and stage.scope == "model"


def _whole_model(work: Workload) -> Need:
    """The whole model and the three activations of a layer's tokens, in float32."""
    sizes = work.sizes
    activations = 3 * work.own_tokens * sizes.hidden_size * FLOAT
    return Need(sizes.used_bytes * FLOAT // sizes.stored_bytes_per_weight, activations)


def _gradient_needs(loss_tokens: int, work: Workload) -> list[Need]:
    """What gradients of the loss take: behind the head, and on the way back through each layer.

    Hidden states in front of every layer are held, of few tokens and always in memory; layers are
    loaded whole, and a batch's intermediate results and their gradients are kept for each.
    """
    sizes = work.sizes
    tokens = min(work.tokens, max(loss_tokens, work.length))
    state = tokens * sizes.hidden_size * sizes.dtype_bytes
    # Behind the layers: gradients of all tokens. Logits, their probabilities, and gradients.
    head = 2 * sizes.embedding_bytes + 4 * LOGITS_AT_ONCE * FLOAT
    needs = [Need((len(sizes.layers) + 2) * state + head, 0)]
    for layer in sizes.layers:
        columns = sum(linear.rows + linear.columns for linear in layer.linears)
        columns += 8 * sizes.hidden_size
        columns += 2 * layer.top_k * sum(matrix.rows + matrix.columns for matrix in layer.expert)
        passing = 2 * min(tokens, work.batch_tokens) * columns * sizes.dtype_bytes
        loading = int(layer.bytes * LOADING_OVERHEAD)
        kept = (len(sizes.layers) + 2) * state
        needs.append(Need(kept + max(loading, layer.bytes + passing), 0))
    return needs


def _fitting(stage: RouterCalibration, layer: LayerSizes, work: Workload) -> int:
    """Bytes for fitting a router: what it gets and gives on all tokens, and the fit's own."""
    width, seen = work.sizes.hidden_size, min(work.tokens, stage.tokens)
    everything = work.own_tokens * (width + 3 * layer.experts) * FLOAT
    # The second moments and their root in float64, and the tokens that are fitted on.
    fit = 4 * 2 * FLOAT * width**2 + seen * (width + 4 * layer.experts) * FLOAT
    history = 2 * HISTORY * layer.experts * width * FLOAT
    return max(everything, work.own_tokens * layer.experts * FLOAT + fit + history)


def _layer_need(stage: Modifier, layer: LayerSizes, work: Workload, bits: float | None) -> Need:
    """A layer that is worked on, with the activations of all tokens."""
    by_expert = layer.by_expert and isinstance(stage, _BUILT_IN)
    resident = layer.other_bytes if by_expert or not layer.experts else layer.bytes
    working, more = 0, 0
    if isinstance(stage, GPTQQuantize):
        working, more = _quantising(stage, layer, work, bits)
    elif isinstance(stage, ExpertStats):
        working = _measuring(stage, layer, work)
    elif isinstance(stage, TokenProtection):
        working, more = _running(layer, work), work.activations
    elif isinstance(stage, RouterCalibration) and layer.experts:
        # The original's hidden states are carried along.
        working = max(_running(layer, work), _fitting(stage, layer, work))
        more = work.activations
    elif isinstance(stage, TopAnyRouter):
        working = _running(layer, work) + work.own_tokens * layer.top_k**2 * FLOAT
        more = min(work.activations * layer.top_k, 2**30)
    # Hidden states before the layer, in front of its experts, and the experts' outputs.
    movable = (3 if layer.experts else 1) * work.activations + more
    if work.processes > 1:
        # Tokens of the experts of a process, what they give, and what comes back to their owners.
        movable += 3 * layer.top_k * work.activations
    loading = int(resident * (LOADING_OVERHEAD - 1)) if resident == layer.bytes else 0
    fixed = resident + max(loading, working, _forward_bytes(work, layer))
    return Need(fixed + work.own_tokens * layer.top_k * 16, movable)


_BUILT_IN = (ExpertStats, GPTQQuantize, RouterCalibration, TokenProtection, TopAnyRouter)


def _forward_bytes(work: Workload, layer: LayerSizes | None = None) -> int:
    """Temporaries of one batch on its way through a layer without its routed experts."""
    linears = () if layer is None else layer.linears
    widest = max((linear.rows for linear in linears), default=0)
    columns = 8 * work.sizes.hidden_size + 3 * widest
    return work.batch_tokens * columns * work.sizes.dtype_bytes


def _running(layer: LayerSizes, work: Workload) -> int:
    """One expert with its inputs."""
    if not layer.experts:
        return 0
    tokens = min(work.tokens_per_expert(layer), PIECE_TOKENS)
    columns = max(max(matrix.rows, matrix.columns) for matrix in layer.expert)
    kept = min(KEPT_BYTES, work.tokens_per_expert(layer) * layer.expert[-1].columns * 2)
    # Reading an expert stacks its parts, so that it is there twice for a moment.
    there = 3 if work.overlaps else 2
    weights = there * layer.weights_of_expert * work.sizes.dtype_bytes
    return weights + kept + 2 * tokens * columns * FLOAT


def _measuring(stage: ExpertStats, layer: LayerSizes, work: Workload) -> int:
    if not layer.experts:
        return 0
    if stage.quantizer == "gptq":
        return expert_quantising(
            layer,
            work.sizes.dtype_bytes,
            work.tokens_per_expert(layer),
            overlaps=work.overlaps,
        )
    largest = max(matrix.weights for matrix in layer.expert)
    return _running(layer, work) + experts_together(layer) * ROUNDING * largest


def _quantising(
    stage: GPTQQuantize, layer: LayerSizes, work: Workload, bits: float | None
) -> tuple[int, int]:
    """Working set, and what may lie in files: packed experts, and the original's activations."""
    width = bits if bits is not None else 3.0
    packed = packed_bytes_of(layer.expert_weights, width, stage.group_size)
    # The layer before may still be on its way to the disk.
    packed *= 2 if work.overlaps else 1
    dtype, count = work.sizes.dtype_bytes, work.tokens_per_expert(layer)
    if not work.tokens:
        others = stage.other_bits is not None
        return rounding(layer, dtype, linears=others, overlaps=work.overlaps), packed
    experts = expert_quantising(
        layer,
        dtype,
        count,
        propagates=stage.propagates,
        refines=stage.refinements is not None,
        overlaps=work.overlaps,
    )
    linears = 0
    if stage.other_bits is not None:
        linears = linear_quantising(layer, dtype, propagates=stage.propagates)
    if not stage.propagates:
        return max(experts, linears), packed
    # The original's linears; its hidden states before the layer, and in front of its experts.
    kept = layer.linear_weights * dtype
    return kept + max(experts, linears), packed + (2 if layer.experts else 1) * work.activations

"""Train all top-any networks together on the model's predictions (scope ``model``).

The loss is KL(p ‖ q) of the next-token distributions of the unpruned model, p, and the pruned one,
q. Both are the same model, held in memory as quantised so far; only the networks have gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mcsharp_sdk.artifacts import TrainingCurve
from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.bfloat16 import fast_linears
from mcsharp_sdk.models.device import is_cpu
from mcsharp_sdk.models.embedding import model_inputs
from mcsharp_sdk.models.experts import call_arguments
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.top_any_target import TOLERANCE, apply_shift, keep_ratio, shift_for
from mcsharp_sdk.modifiers.top_any_training import (
    StepLosses,
    Training,
    new_network,
    renormalised,
)
from mcsharp_sdk.pruning.rule import ranked
from mcsharp_sdk.pruning.top_any import TopAnyNetwork, gumbel_noise, soft_keep

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter

SHIFTS = 4
"""Most corrections of the shift: each changes the hidden states that the next one is found on."""

KeepOf = Callable[[int, Tensor], Tensor]
"""Decoder layer and logits (T, k) of its network -> (T, k) by rank, 1 where a slot is kept."""


@dataclass
class PrunedExperts:
    """Hooks that prune the experts' calls of a model as its networks say.

    Attributes
    ----------
    networks : decoder layer -> network.
    keep_of : which slots are kept; None prunes nothing.
    kept, logits : decoder layer -> mean of the last mask, and what it was made from.
    """

    networks: Mapping[int, TopAnyNetwork]
    keep_of: KeepOf | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def attached(self, source: SourceModel) -> Iterator[None]:
        """Prune the model's experts while this lasts."""
        with ExitStack() as stack:
            for layer, block in source.topology.moe.items():
                experts = source.layer(layer).get_submodule(block.experts)
                hook = partial(self._prune, layer)
                handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _prune(
        self, layer: int, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]] | None:
        if self.keep_of is None:
            return None
        hidden, index, weights = call_arguments(args, kwargs)
        order = ranked(weights)
        index, weights = index.gather(1, order), weights.gather(1, order)
        logits = self.networks[layer](hidden.reshape(-1, hidden.shape[-1]), weights)
        keep = self.keep_of(layer, logits)
        self.kept[layer], self.logits[layer] = keep.mean(), logits.detach()
        pruned = renormalised(weights.float(), keep).to(weights.dtype)
        return (hidden, index, pruned), {}


@dataclass
class ModelTask:
    """What the networks are trained on.

    Attributes
    ----------
    model : the whole model, loaded.
    calibration : what it runs on.
    batch_tokens : most tokens of a forward, of at least one sequence.
    pruning : attached to the model.
    device : of the model.
    ranks : the processes that train together; each has the whole model.
    """

    model: Any
    calibration: CalibrationSet
    batch_tokens: int
    pruning: PrunedExperts
    device: str
    ranks: Ranks = ALONE

    def divergence(self, group: SampleGroup, keep_of: KeepOf) -> Tensor:
        """Mean KL(unpruned ‖ pruned) over the tokens of some sequences, scalar."""
        with torch.no_grad():
            expected = self._predict(group, None)
        predicted = self._predict(group, keep_of)
        terms = F.kl_div(predicted, expected, log_target=True, reduction="none")
        return terms.sum(-1).mean()

    def step_losses(self, temperature: float, generator: torch.Generator) -> StepLosses:
        """This process's part of the losses of one training step, on sequences drawn at random.

        All processes draw the same sequences, and each works on some of them.
        """
        group = self._drawn(generator)
        top_k = {layer: n.second.out_features for layer, n in self.pruning.networks.items()}
        count, length = group.tokens.numel(), group.tokens.shape[1]
        # Drawn beforehand, so that layers that are computed again for gradients draw the same.
        noise = {k: gumbel_noise(torch.empty(count, n), generator) for k, n in top_k.items()}
        sequences = len(group.tokens)
        first = sequences * self.ranks.rank // self.ranks.count
        last = sequences * (self.ranks.rank + 1) // self.ranks.count
        if first == last:
            return self._nothing()
        if last - first < sequences:
            group = SampleGroup({"input_ids": group.tokens[first:last]}, group.source)
        share = (last - first) / sequences

        def sampled(layer: int, logits: Tensor) -> Tensor:
            own = noise[layer][first * length :][: len(logits)]
            return soft_keep(logits, temperature, noise=own.to(logits.device))

        error = self.divergence(group, sampled)
        kept = [self.pruning.kept[layer].to(error.device) for layer in self.pruning.networks]
        return StepLosses(error * share, torch.stack(kept).mean() * share)

    def _nothing(self) -> StepLosses:
        """The part of a process that has no sequence: zero, with gradients of zero."""
        parameters = [p for n in self.pruning.networks.values() for p in n.parameters()]
        zero = sum((p.sum() * 0.0 for p in parameters), torch.zeros((), device=self.device))
        return StepLosses(zero, zero)

    @torch.no_grad()
    def worst_error(self) -> float:
        """Divergence of some sequences if every token kept its first expert alone."""

        def first_alone(_: int, logits: Tensor) -> Tensor:
            keep = torch.zeros_like(logits)
            keep[:, 0] = 1.0
            return keep

        return float(
            self.divergence(next(self.calibration.batches(self.batch_tokens)), first_alone)
        )

    @torch.no_grad()
    def all_logits(self) -> dict[int, Tensor]:
        """Decoder layer -> (T, k), what the networks say in the model that they prune."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in self.pruning.networks}
        own = self.calibration.share(self.ranks.rank, self.ranks.count)
        for group in own.batches(self.batch_tokens):
            self._predict(group, _hard)
            for layer, logits in self.pruning.logits.items():
                found[layer].append(logits.cpu())
        return {layer: self.ranks.gather(torch.cat(parts)) for layer, parts in found.items()}

    def _drawn(self, generator: torch.Generator) -> SampleGroup:
        """Sequences of one group; the longer a group, the more often it is drawn."""
        groups = self.calibration.groups
        group = groups[0]
        if len(groups) > 1:
            sizes = torch.tensor([float(group.tokens.numel()) for group in groups])
            group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
        if group.has_images:
            return group
        sequences = max(1, self.batch_tokens // group.tokens.shape[1])
        rows = torch.randint(len(group.tokens), (sequences,), generator=generator)
        return SampleGroup({"input_ids": group.tokens[rows]}, group.source)

    def _predict(self, group: SampleGroup, keep_of: KeepOf | None) -> Tensor:
        """(sequences, length, vocabulary) float32 log-probabilities."""
        self.pruning.keep_of = keep_of
        inputs = model_inputs(group.inputs, self.device, self.model.dtype)
        with fast_linears():
            logits = self.model(**inputs, use_cache=False).logits
        return F.log_softmax(logits.float(), dim=-1)


def train_on_model(
    context: RunContext, settings: TopAnyRouter, state: Path
) -> tuple[dict[int, TopAnyNetwork], dict[int, float], TrainingCurve]:
    """Train the networks of all layers.

    Parameters
    ----------
    state : file in which a training that is under way is kept.

    Returns
    -------
    Networks by decoder layer, their biases shifted to the target; the share of experts that each
    keeps on the calibration tokens; the curve.
    """
    source = whole_model(context)
    hidden_size = source.config.get_text_config().hidden_size
    networks = {
        layer: new_network(layer, hidden_size, block.top_k, settings, source.device)
        for layer, block in source.topology.moe.items()
    }
    pruning = PrunedExperts(networks)
    ranks = context.ranks
    task = ModelTask(
        source.model, context.calibration, settings.batch_tokens, pruning, source.device, ranks
    )
    layers = source.model.get_submodule(source.topology.layers_path)
    with task.pruning.attached(source), checkpointed(layers):
        training = Training(
            settings, "model", networks, ranks.share(task.worst_error()), state, ranks
        )
        curve = training.run(task.step_losses)
        logits = task.all_logits()
        for _ in range(SHIFTS):
            target = settings.target_activation
            if target is None or abs(keep_ratio(list(logits.values())) - target) < TOLERANCE / 2:
                break
            apply_shift(networks, shift_for(list(logits.values()), target))
            logits = task.all_logits()
    return networks, {layer: keep_ratio([found]) for layer, found in logits.items()}, curve


def whole_model(context: RunContext) -> SourceModel:
    """A copy of the run's model with all weights loaded, as quantised so far, without gradients.

    On a CPU it is in float32, in which gradients are computed several times faster.
    """
    source = SourceModel(context.model.path, context.model.device)
    owners = {name.rpartition(".")[0] for name in source.names.memory.values()}
    outside = sorted(f"{name}." for name in owners if not source.topology.in_layers(name))
    source.load(f"{source.topology.layers_path}.", *outside)
    for index in context.track(range(source.topology.num_layers), "loading the model"):
        context.restore_quantised(source, index)
    source.model.tie_weights()
    empty = [name for name, tensor in source.model.named_parameters() if tensor.is_meta]
    if empty:
        raise RunError(f"{source.path}: the checkpoint lacks {', '.join(empty[:5])}")
    source.model.requires_grad_(False)
    if is_cpu(source.device):
        source.model.float()
    return source


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers keep their inputs alone for gradients, and compute the rest again."""
    changed: list[Any] = list(layers)
    for layer in changed:
        layer.forward = partial(_checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _hard(_: int, logits: Tensor) -> Tensor:
    """The mask of inference, by rank."""
    return soft_keep(logits, 1.0, noise=torch.zeros_like(logits))

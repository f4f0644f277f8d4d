"""How the loss changes with the output of each MoE block, a layer in memory at a time.

A forward pass keeps the hidden states in front of each layer; behind the head a token is drawn from
the model's own prediction at each position, so that products of gradients are the Fisher matrix and
with it the Hessian of the divergence from the model as it is. Then the layers are loaded once more,
last to first, and the gradient goes back through them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.embedding import TOKENS_PER_BATCH, embed, layers_answered, model_inputs
from mcsharp_sdk.models.logits import positions_at_once
from mcsharp_sdk.models.streamed_layer import LayerInputs

if TYPE_CHECKING:
    from mcsharp_sdk.data.calibration_set import CalibrationSet
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.source import SourceModel

LOSS_GRADIENTS = "loss_gradients"
GRADIENT = "gradient"
SEED = 0
"""Of the tokens that are drawn."""


def measure_loss_gradients(context: RunContext, tokens: int) -> None:
    """Keep the gradient of the summed loss by each block's output in the run directory.

    It is taken on the first whole sequences of at most so many calibration tokens, at least one:
    (T, hidden) per MoE layer in the model's dtype, tokens in the order of the calibration.

    Raises
    ------
    InputError
        If the calibration has images.
    """
    store = context.layers(LOSS_GRADIENTS)
    if store.is_complete():
        return
    if context.calibration.has_images:
        raise InputError(
            "ExpertStats: gradients of the loss are measured on text alone; give 'loss_tokens: 0', "
            "or calibrate on text"
        )
    source = context.model
    few = context.calibration.first(tokens)
    inputs = embed(source, few)
    kept = _forward(context, inputs)
    gradients = _behind_layers(source, inputs, few)
    last_to_first = list(reversed(range(source.topology.num_layers)))
    for index in context.track(last_to_first, "measuring gradients of the loss"):
        inputs.hidden = kept.pop()
        path = f"{source.layer_path(index)}."
        source.load(path)
        source.model.requires_grad_(False)
        found = [_backward(source, inputs, index, batch, g) for batch, g in enumerate(gradients)]
        source.free(path)
        gradients = [in_front for in_front, _ in found]
        of_block = [gradient for _, gradient in found if gradient is not None]
        if of_block:
            store.write(index, {GRADIENT: torch.cat(of_block)}, {})
    store.write_summary({"tokens": few.num_tokens})


@torch.no_grad()
def _forward(context: RunContext, inputs: LayerInputs) -> list[list[Tensor]]:
    """Hidden states in front of each layer, per batch; those behind the last are left in inputs."""
    source = context.model
    kept = []
    for index in context.track(range(source.topology.num_layers), "keeping hidden states"):
        path = f"{source.layer_path(index)}."
        source.load(path)
        kept.append([hidden.clone() for hidden in inputs.hidden])
        inputs.advance(source.layer(index), index)
        source.free(path)
    return kept


def _behind_layers(
    source: SourceModel, inputs: LayerInputs, calibration: CalibrationSet
) -> list[Tensor]:
    """Per batch, the gradient of the summed loss by the hidden states behind the last layer."""
    outside = source.outer_names()
    source.load(*outside)
    source.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    gradients = []
    for batch, group in enumerate(calibration.batches(TOKENS_PER_BATCH)):
        hidden = inputs.hidden[batch].clone().requires_grad_()
        given = model_inputs(group.inputs, source.device, source.dtype)
        with layers_answered(source, partial(_same, hidden)), torch.enable_grad():
            for logits in _logits(source.model, given):
                _drawn_loss(logits, generator).backward()
        gradients.append(_gradient(hidden))
    source.free(*outside)
    return gradients


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _logits(model: Any, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """Logits [n, vocabulary], fp32, some positions at a time where the model allows it."""
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        yield model(**given, use_cache=False).logits.float().flatten(0, 1)
        return
    sequences, length = given["input_ids"].shape
    at_once = positions_at_once(model.config.get_text_config().vocab_size, sequences)
    for positions in torch.arange(length, device=given["input_ids"].device).split(at_once):
        answer = model(**given, use_cache=False, logits_to_keep=positions)
        yield answer.logits.float().flatten(0, 1)


def _drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss of tokens drawn from the prediction itself."""
    chances = logits.detach().softmax(-1).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def _backward(
    source: SourceModel, inputs: LayerInputs, index: int, batch: int, behind: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients in front of a loaded layer, and at the output of its block if it has one.

    Parameters
    ----------
    inputs : its hidden states are those in front of the layer.
    behind : gradient behind the layer.
    """
    layer, block = source.layer(index), source.topology.moe.get(index)
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    with ExitStack() as stack, torch.enable_grad():
        if block is not None:
            experts = layer.get_submodule(block.experts)
            stack.callback(experts.register_forward_hook(note).remove)
        hidden = inputs.hidden[batch].requires_grad_()
        inputs.call(layer, index, batch).backward(behind)
    of_block = _gradient(outputs[0]).reshape(-1, outputs[0].shape[-1]) if outputs else None
    return _gradient(hidden), of_block


def _gradient(tensor: Tensor) -> Tensor:
    """The gradient of a tensor that the loss depends on; zeros if it turned out not to."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

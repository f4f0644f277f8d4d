"""Run a model on calibration tokens one decoder layer at a time.

The arguments of each layer (masks, rotary tables, cache flags) are not rebuilt here: a stub pass
of the model's own forward, with recorders in place of the layers, captures them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.models.bfloat16 import fast_linears
from mcsharp_sdk.models.experts import answering
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.topology import MoeBlock

TOKENS_PER_BATCH = 2048


class _Recorder(nn.Module):
    """Stands in for a decoder layer, keeps the arguments and passes hidden states on."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, tuple[Any, ...], Any]]) -> None:
        super().__init__()
        self._layer = [layer]
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append((hidden_states, args, kwargs))
        return hidden_states


class _LayersDone(Exception):
    """Raised behind the last recorder: the head is not wanted."""


@dataclass
class LayerInputs:
    """Hidden states before a decoder layer and the other arguments it takes.

    Attributes
    ----------
    hidden : (sequences, length, hidden), the model's dtype; replaced by ``advance``.
    arguments : batch size -> per layer, positional and keyword arguments.
    batch : sequences per forward.
    """

    hidden: Tensor
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]
    batch: int

    def batches(self) -> Iterator[slice]:
        """Slices of sequences, one forward each."""
        for start in range(0, self.hidden.shape[0], self.batch):
            yield slice(start, min(start + self.batch, self.hidden.shape[0]))

    def call(self, layer: nn.Module, index: int, rows: slice) -> Tensor:
        """Output of ``layer`` (decoder layer ``index``) for some sequences."""
        hidden = self.hidden[rows]
        args, kwargs = self.arguments[hidden.shape[0]][index]
        with fast_linears():
            output = layer(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by what ``layer`` makes of them."""
        for rows in self.batches():
            self.hidden[rows] = self.call(layer, index, rows)

    def advance_with(self, layer: nn.Module, index: int, block: MoeBlock, outputs: Tensor) -> None:
        """As ``advance``, with the routed experts' outputs, [T, hidden], known already."""
        rest = iter(outputs.split(self.batch * self.hidden.shape[1]))
        experts = layer.get_submodule(block.experts)
        with answering(experts, lambda hidden: next(rest).view_as(hidden)):
            self.advance(layer, index)


@torch.no_grad()
def embed(source: SourceModel, tokens: Tensor) -> LayerInputs:
    """Embed ``tokens`` and capture what each decoder layer is called with.

    Parameters
    ----------
    tokens : (sequences, length) int64, no padding.
    """
    batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    embedding = next(
        name
        for name, module in source.model.named_modules()
        if module is source.model.get_input_embeddings()
    )
    source.load(f"{embedding}.")
    hidden: list[Tensor] = []
    arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    with _recorders(source) as calls:
        for part in tokens.split(batch):
            calls.clear()
            try:
                source.model(input_ids=part.to(source.device), use_cache=False)
            except _LayersDone:
                hidden.append(calls[0][0])
            arguments.setdefault(part.shape[0], [(args, kwargs) for _, args, kwargs in calls])
    source.free(f"{embedding}.")
    return LayerInputs(torch.cat(hidden), arguments, batch)


@contextmanager
def _recorders(source: SourceModel) -> Iterator[list[tuple[Tensor, tuple[Any, ...], Any]]]:
    """Put recorders in place of the decoder layers, and stop the forward behind the last one."""
    path = source.topology.layers_path
    owner = source.model.get_submodule(path.rpartition(".")[0])
    layers = owner.layers
    calls: list[tuple[Tensor, tuple[Any, ...], Any]] = []
    stubs = [_Recorder(layer, calls) for layer in layers]

    def stop(*_: Any) -> None:
        raise _LayersDone

    owner.layers = nn.ModuleList(stubs)
    handle = stubs[-1].register_forward_hook(stop)
    try:
        yield calls
    finally:
        handle.remove()
        owner.layers = layers


@dataclass
class StreamedLayer:
    """One loaded decoder layer with the calibration activations in front of it.

    Attributes
    ----------
    source, index, module : the model, and which of its layers this is.
    inputs : in front of it.
    expert_outputs : [T, hidden], the sum of the routed experts' outputs on all tokens if the
        consumer has computed it; they are not run again then.
    """

    source: SourceModel
    index: int
    module: nn.Module
    inputs: LayerInputs
    expert_outputs: Tensor | None = None

    @property
    def moe(self) -> Any:
        """The layer's mixture of experts, or None if it is dense."""
        return self.source.topology.moe.get(self.index)

    def advance(self) -> None:
        """Move the activations on through the layer as it is now."""
        if self.expert_outputs is None:
            self.inputs.advance(self.module, self.index)
        else:
            self.inputs.advance_with(self.module, self.index, self.moe, self.expert_outputs)
            self.expert_outputs = None


@torch.no_grad()
def stream_layers(
    source: SourceModel,
    tokens: Tensor,
    track: Callable[[range], Iterator[int]] = iter,  # type: ignore[assignment]
) -> Iterator[StreamedLayer]:
    """Yield each decoder layer, loaded, with the activations that reach it.

    The consumer may change the layer's weights: the hidden states move on through the layer as the
    consumer leaves it, and the layer is freed. Peak memory is one layer and the activations.
    """
    inputs = embed(source, tokens)
    for index in track(range(source.topology.num_layers)):
        path = f"{source.layer_path(index)}."
        source.load(path)
        layer = StreamedLayer(source, index, source.layer(index), inputs)
        yield layer
        layer.advance()
        source.free(path)

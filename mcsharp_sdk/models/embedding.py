"""What a model's decoder layers are called with: its own forward, with recorders in their place.

So masks, rotary tables, cache flags and what vision towers contribute are not rebuilt here but
captured exactly. What a model adds to the hidden states between two layers (Qwen3-VL puts features
of its vision tower there) shows when the recorders return zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.streamed_layer import Addition, Arguments, LayerInputs

TOKENS_PER_BATCH = 2048


@torch.no_grad()
def embed(
    source: SourceModel, calibration: CalibrationSet, scratch: Scratch | None = None
) -> LayerInputs:
    """Embed a calibration set and capture what each decoder layer is called with.

    Of an empty set there is nothing, and the model is not run. Parts outside of the decoder layers
    are loaded for this and freed: the embedding, and all but the head where there are images.

    Raises
    ------
    InputError
        If the model does more between its layers than adding.
    """
    scratch = scratch or Scratch(device=source.device)
    inputs, pool = LayerInputs([], [], [], scratch=scratch), _Pool()
    if not calibration.groups:
        return inputs
    needed = _outer_names(source) if calibration.has_images else [_embedding_path(source)]
    source.load(*needed)
    room = scratch.empty(calibration.num_tokens, _hidden_size(source), dtype=source.dtype)
    taken = 0
    checked: set[frozenset[str]] = set()
    with _Recorders.in_place_of_layers(source) as recorders:
        for batch, group in enumerate(calibration.batches(TOKENS_PER_BATCH)):
            calls = recorders.run(source, group, zeros=True)
            for layer, call in enumerate(calls[1:], start=1):
                if call.added is not None:
                    inputs.additions[batch, layer] = call.added
            hidden = calls[0].hidden
            tokens = hidden.shape[:2].numel()
            inputs.hidden.append(room[taken : taken + tokens].view_as(hidden).copy_(hidden))
            taken += tokens
            scratch.release()
            inputs.arguments.append([pool.shared(call.arguments) for call in calls])
            inputs.sources.append(group.source)
            kind = frozenset(group.inputs)
            if kind not in checked:
                _check_additive(source, calls, recorders.run(source, group, zeros=False))
                checked.add(kind)
    source.free(*needed)
    return inputs


def _hidden_size(source: SourceModel) -> int:
    return int(source.config.get_text_config().hidden_size)


def _embedding_path(source: SourceModel) -> str:
    embedding = source.model.get_input_embeddings()
    return next(f"{name}." for name, m in source.model.named_modules() if m is embedding)


def _outer_names(source: SourceModel) -> list[str]:
    """Names of all tensors outside of the decoder layers and the head."""
    head = source.model.get_output_embeddings()
    of_head = tuple(f"{name}." for name, m in source.model.named_modules() if m is head)
    names = (name for name in source.outer_names() if not name.startswith(of_head))
    return [_embedding_path(source), *names]


@dataclass(frozen=True)
class _Call:
    """What one decoder layer was called with.

    ``hidden`` is kept of the first layer, and where recorders pass hidden states on; ``added``
    what there was besides the zeros that the recorder before returned.
    """

    hidden: Tensor
    added: Addition | None
    arguments: Arguments


class _LayersDone(Exception):
    """Raised behind the last recorder: the head is not wanted."""


@dataclass
class _Recorders:
    """Stand-ins for the decoder layers.

    ``zeros``: they return zeros, else the hidden states that they get.
    """

    calls: list[_Call] = field(default_factory=list)
    zeros: bool = False

    @classmethod
    @contextmanager
    def in_place_of_layers(cls, source: SourceModel) -> Iterator[_Recorders]:
        """Put recorders in place of the layers, and stop the forward behind the last one."""
        path = source.topology.layers_path
        layers = source.model.get_submodule(path)
        recorders = cls()
        stubs = [_Recorder(layer, recorders) for layer in layers]

        def stop(*_: Any) -> None:
            raise _LayersDone

        source.model.set_submodule(path, nn.ModuleList(stubs))
        handle = stubs[-1].register_forward_hook(stop)
        try:
            yield recorders
        finally:
            handle.remove()
            source.model.set_submodule(path, layers)

    def run(self, source: SourceModel, group: SampleGroup, *, zeros: bool) -> list[_Call]:
        """What the layers are called with for a group."""
        self.calls, self.zeros = [], zeros
        with suppress(_LayersDone):
            source.model(**model_inputs(group.inputs, source.device, source.dtype), use_cache=False)
        return self.calls


class _StandIn(nn.Module):
    """In place of a decoder layer, with its attributes; not one of its submodules."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


class _Answering(_StandIn):
    """Returns what it is told to, whatever it is called with."""

    def __init__(self, layer: nn.Module, answer: Callable[[], Tensor]) -> None:
        super().__init__(layer)
        self._answer = answer

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._answer()


@contextmanager
def layers_answered(source: SourceModel, answer: Callable[[], Tensor]) -> Iterator[None]:
    """Let the decoder layers return ``answer()``, as if it were the hidden states behind them."""
    path = source.topology.layers_path
    layers = source.model.get_submodule(path)
    stubs = nn.ModuleList([_Answering(layer, answer) for layer in layers])
    source.model.set_submodule(path, stubs)
    try:
        yield
    finally:
        source.model.set_submodule(path, layers)


class _Recorder(_StandIn):
    """Stands in for one decoder layer and keeps what it is called with."""

    def __init__(self, layer: nn.Module, recorders: _Recorders) -> None:
        super().__init__(layer)
        self._recorders = recorders

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls, zeros = self._recorders.calls, self._recorders.zeros
        if calls and zeros:
            # Sparse at once: hidden states of all layers would be too many to hold.
            added = _nonzero(hidden_states)
            calls.append(_Call(hidden_states.new_empty(0), added, (args, kwargs)))
        else:
            calls.append(_Call(hidden_states, None, (args, kwargs)))
        return torch.zeros_like(hidden_states) if zeros else hidden_states


def _nonzero(hidden: Tensor) -> Addition | None:
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = flat.any(dim=1).nonzero().squeeze(1)
    return Addition(rows, flat[rows]) if rows.numel() else None


def model_inputs(
    inputs: Mapping[str, Tensor], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs on a model's device; images in its dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def _check_additive(source: SourceModel, zero: Sequence[_Call], passed_on: Sequence[_Call]) -> None:
    """Whether what happens between layers is the same addition, whatever the hidden states are."""
    hidden = zero[0].hidden.clone()
    for layer, (with_zeros, found) in enumerate(zip(zero[1:], passed_on[1:], strict=True), start=1):
        if with_zeros.added is not None:
            with_zeros.added.add_to(hidden)
        if not torch.equal(hidden, found.hidden):
            raise InputError(
                f"{source.config.model_type} changes hidden states in front of decoder layer "
                f"{layer} other than by adding to them: its layers cannot be run one at a time"
            )


@dataclass
class _Pool:
    """Arguments in which tensors that are equal to earlier ones are these."""

    known: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)

    def shared(self, value: Any) -> Any:
        """The same value, its tensors shared."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self.shared(part) for part in value)
        if type(value) is dict:
            return {name: self.shared(part) for name, part in value.items()}
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        alike = self.known.setdefault((tensor.dtype, tensor.device, *tensor.shape), [])
        for known in reversed(alike):
            if known is tensor or torch.equal(known, tensor):
                return known
        alike.append(tensor)
        return tensor

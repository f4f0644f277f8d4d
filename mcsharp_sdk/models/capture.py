"""What reaches the linear layers and the experts of a decoder layer on calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.models.experts import answering, call_arguments
from mcsharp_sdk.models.routed_inputs import RoutedInputs
from mcsharp_sdk.models.streamed_layer import StreamedLayer


class _Enough(Exception):
    """Raised once everything wanted has been seen: the rest of the layer need not run."""


def routed_inputs(layer: StreamedLayer, *, last: bool = False) -> RoutedInputs:
    """Run an MoE layer up to its experts and keep what they are called with.

    Parameters
    ----------
    last : the caller runs the layer no more. Then ``layer.inputs`` moves on to what the layer makes
        of it but for the experts' outputs, where these are added last, so that only these
        are left to add.
    """
    if not layer.inputs.hidden:
        return RoutedInputs.none(layer)
    router = layer.module.get_submodule(layer.moe.router)
    gathered = _Gathered(layer)
    seen: list[Tensor] = []
    running = [0]
    passing = last and _adds_experts_last(layer)

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index, weights = call_arguments(args, kwargs)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        gathered.add(running[0], hidden, seen.pop(), index, weights)
        if not passing or hidden.numel() != layer.inputs.hidden[running[0]].numel():
            raise _Enough

    with ExitStack() as stack:
        stack.callback(router.register_forward_pre_hook(note).remove)
        stack.callback(
            layer.experts_module.register_forward_pre_hook(record, with_kwargs=True).remove
        )
        stack.enter_context(without_routed_experts(layer))
        for batch in layer.inputs.batches():
            running[0] = batch
            seen.clear()
            behind = _run_batch(layer, batch)
            if behind is not None:
                layer.inputs.hidden[batch].copy_(behind)
                layer.passed.add(batch)
    return gathered.finish()


@torch.no_grad()
def _adds_experts_last(layer: StreamedLayer) -> bool:
    """Whether a layer gives what it gives without its routed experts, plus their outputs.

    To the last bit, and tried on the first batch, once for every type of layer: where shared
    experts or norms come between, it does not.
    """
    kind, inputs = type(layer.module), layer.inputs
    if kind not in inputs.adding:
        outputs: list[Tensor] = []

        def answer(hidden: Tensor) -> Tensor:
            generator = torch.Generator(hidden.device).manual_seed(0)
            outputs.append(torch.empty_like(hidden).normal_(generator=generator))
            return outputs[-1]

        first = inputs.batches()[0]
        with without_routed_experts(layer):
            without = inputs.call(layer.module, layer.index, first)
        with answering(layer.experts_module, answer):
            whole = inputs.call(layer.module, layer.index, first)
        inputs.adding[kind] = outputs[0].numel() == without.numel() and torch.equal(
            whole, without + outputs[0].view_as(without)
        )
    return inputs.adding[kind]


class _Gathered:
    """Collects what reaches a layer's experts, batch by batch, without holding it twice."""

    def __init__(self, layer: StreamedLayer) -> None:
        self._scratch, self._ranks = layer.inputs.scratch, layer.inputs.ranks
        self._experts = layer.moe.num_experts
        self._most = sum(hidden.shape[:2].numel() for hidden in layer.inputs.hidden)
        self._counts = [0] * len(layer.inputs.hidden)
        self._rooms: dict[str, Tensor] = {}
        self._routing: list[tuple[Tensor, Tensor]] = []

    def add(
        self, batch: int, hidden: Tensor, router_hidden: Tensor, index: Tensor, weights: Tensor
    ) -> None:
        start = sum(self._counts)
        self._counts[batch] = len(hidden)
        self._fill("hidden", hidden, start)
        if router_hidden.data_ptr() != hidden.data_ptr():
            self._fill("router_hidden", router_hidden, start)
        self._routing.append((index, weights))

    def finish(self) -> RoutedInputs:
        total = sum(self._counts)
        hidden = self._rooms["hidden"][:total]
        router_hidden = self._rooms.get("router_hidden", hidden)[:total]
        index, weights = (torch.cat(parts) for parts in zip(*self._routing, strict=True))
        counts = tuple(self._counts)
        return RoutedInputs(
            hidden, router_hidden, index, weights, counts, self._experts, self._ranks
        )

    def _fill(self, name: str, rows: Tensor, start: int) -> None:
        if name not in self._rooms:
            columns = rows.shape[1]
            self._rooms[name] = self._scratch.empty(self._most, columns, dtype=rows.dtype)
        self._rooms[name][start : start + len(rows)] = rows


def linear_inputs(
    layer: StreamedLayer,
    names: Sequence[str],
    consume: Callable[[tuple[str, ...], Tensor], None],
) -> None:
    """Run a layer until its linears ``names`` have been called, and hand over their inputs.

    Parameters
    ----------
    names : paths relative to the layer, all below one child of it (e.g. ``self_attn``).
    consume : called with the names of the linears that share an input, and that input [T, K]; once
        per batch and group of linears.
    """
    groups = _sharing_groups(layer, names)
    with _handing_over(layer, names, groups, consume):
        _run(layer)


def paired_linear_inputs(
    layer: StreamedLayer,
    original: Callable[[], AbstractContextManager[StreamedLayer]],
    names: Sequence[str],
    consume: Callable[[tuple[str, ...], Tensor, Tensor], None],
) -> None:
    """As :func:`linear_inputs`, with the inputs that the same linears get in the original model.

    Parameters
    ----------
    original : makes the layer the original's while its context lasts.
    consume : called with the names, the inputs [T, K], and those of the original [T, K].
    """
    groups = _sharing_groups(layer, names)
    seen: list[tuple[tuple[str, ...], Tensor]] = []
    with _handing_over(layer, names, groups, lambda group, inputs: seen.append((group, inputs))):
        for batch in layer.inputs.batches():
            seen.clear()
            _run_batch(layer, batch)
            found = list(seen)
            seen.clear()
            with original() as beside:
                _run_batch(beside, batch)
            for (group, inputs), (_, wanted) in zip(found, seen, strict=True):
                consume(group, inputs, wanted)


@contextmanager
def _handing_over(
    layer: StreamedLayer,
    names: Sequence[str],
    groups: Sequence[tuple[str, ...]],
    consume: Callable[[tuple[str, ...], Tensor], None],
) -> Iterator[None]:
    """While it lasts, linears hand their inputs over, and the layer stops behind the last."""
    component = layer.module.get_submodule(names[0].split(".")[0])
    with ExitStack() as stack:
        for group in groups:

            def hand_over(
                _: nn.Module, args: tuple[Tensor, ...], group: tuple[str, ...] = group
            ) -> None:
                consume(group, args[0].reshape(-1, args[0].shape[-1]))

            linear = layer.module.get_submodule(group[0])
            stack.callback(linear.register_forward_pre_hook(hand_over).remove)
        stack.callback(component.register_forward_hook(_stop).remove)
        stack.enter_context(without_routed_experts(layer))
        yield


@contextmanager
def without_routed_experts(layer: StreamedLayer) -> Iterator[None]:
    """Let the routed experts of a layer return zeros: nothing that is measured depends on them."""
    if layer.moe is None:
        yield
        return
    with answering(layer.experts_module, torch.zeros_like):
        yield


def _stop(*_: Any) -> None:
    raise _Enough


def _run(layer: StreamedLayer) -> None:
    for batch in layer.inputs.batches():
        _run_batch(layer, batch)


@torch.no_grad()
def _run_batch(layer: StreamedLayer, batch: int) -> Tensor | None:
    """What the layer makes of a batch; None if it was left early."""
    with suppress(_Enough):
        return layer.inputs.call(layer.module, layer.index, batch)
    return None


@torch.no_grad()
def _sharing_groups(layer: StreamedLayer, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Linears that are called with one and the same tensor, found by calling the layer once.

    Linears that the layer never calls are left out.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    with ExitStack() as stack:
        for name in names:

            def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                for tensor, group in seen:
                    if tensor is args[0]:
                        group.append(name)
                        return
                seen.append((args[0], [name]))

            linear = layer.module.get_submodule(name)
            stack.callback(linear.register_forward_pre_hook(note).remove)
        stack.enter_context(without_routed_experts(layer))
        layer.inputs.call(layer.module, layer.index, layer.inputs.batches()[0])
    return [tuple(group) for _, group in seen]

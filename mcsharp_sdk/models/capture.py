"""What reaches the linear layers and the experts of a decoder layer on calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcsharp_sdk.models.experts import answering, tokens_of_expert
from mcsharp_sdk.models.stream import StreamedLayer


@dataclass(frozen=True)
class RoutedInputs:
    """What reaches a layer's routed experts, over all calibration tokens.

    Attributes
    ----------
    hidden : [T, hidden], the model's dtype.
    router_hidden : [T, hidden], what the router decides on. It is ``hidden``, unless the experts
        get a projection of it.
    top_k_index : int64 [T, k]
    top_k_weights : [T, k], as the experts apply them.
    batch_tokens : per forward batch, how many of the tokens are its own. Of sequences with images
        some models route the text alone here.
    """

    hidden: Tensor
    router_hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    batch_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.hidden.shape[0])

    def of_expert(self, expert: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens routed to an expert, [n, hidden], and their routing weights, [n].

        Parameters
        ----------
        most : if more tokens than this select the expert, take this many, evenly spaced.
        """
        token, slot = tokens_of_expert(self.top_k_index, expert)
        if most is not None and token.numel() > most:
            chosen = torch.linspace(0, token.numel() - 1, most).long()
            token, slot = token[chosen], slot[chosen]
        return self.hidden[token], self.top_k_weights[token, slot]

    def first(self, tokens: int) -> RoutedInputs:
        """What reaches them of the first so many tokens, in one batch."""
        parts = (self.hidden, self.router_hidden, self.top_k_index, self.top_k_weights)
        hidden, router_hidden, index, weights = (part[:tokens] for part in parts)
        return RoutedInputs(hidden, router_hidden, index, weights, (len(hidden),))

    def counts(self, num_experts: int) -> list[int]:
        """Tokens per expert."""
        return torch.bincount(self.top_k_index.reshape(-1), minlength=num_experts).tolist()


class _Enough(Exception):
    """Raised once everything wanted has been seen: the rest of the layer need not run."""


def routed_inputs(layer: StreamedLayer) -> RoutedInputs:
    """Run an MoE layer up to its experts and keep what they are called with."""
    experts: Any = layer.module.get_submodule(layer.moe.experts)
    router = layer.module.get_submodule(layer.moe.router)
    routed: list[Tensor] = []
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    running = [0]
    counts = [0] * len(layer.inputs.hidden)

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        routed.append(args[0].reshape(-1, args[0].shape[-1]))

    def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, index, weights = (*args, *kwargs.values())
        calls.append((hidden.reshape(-1, hidden.shape[-1]), index, weights))
        counts[running[0]] = calls[-1][0].shape[0]
        raise _Enough

    with ExitStack() as stack:
        stack.callback(router.register_forward_pre_hook(note).remove)
        stack.callback(experts.register_forward_pre_hook(record, with_kwargs=True).remove)
        for running[0] in layer.inputs.batches():
            _run_batch(layer, running[0])
    hidden, index, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
    same = routed[0].data_ptr() == calls[0][0].data_ptr()
    router_hidden = hidden if same else torch.cat(routed)
    return RoutedInputs(hidden, router_hidden, index, weights, tuple(counts))


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
    leaders = {group[0]: group for group in groups}
    component = layer.module.get_submodule(names[0].split(".")[0])
    with ExitStack() as stack:
        for leader, group in leaders.items():

            def hand_over(
                _: nn.Module, args: tuple[Tensor, ...], group: tuple[str, ...] = group
            ) -> None:
                consume(group, args[0].reshape(-1, args[0].shape[-1]))

            linear = layer.module.get_submodule(leader)
            stack.callback(linear.register_forward_pre_hook(hand_over).remove)
        stack.callback(component.register_forward_hook(_stop).remove)
        stack.enter_context(without_routed_experts(layer))
        _run(layer)


@contextmanager
def without_routed_experts(layer: StreamedLayer) -> Iterator[None]:
    """Let the routed experts of a layer return zeros: nothing that is measured depends on them."""
    if layer.moe is None:
        yield
        return
    with answering(layer.module.get_submodule(layer.moe.experts), torch.zeros_like):
        yield


def _stop(*_: Any) -> None:
    raise _Enough


def _run(layer: StreamedLayer) -> None:
    for batch in layer.inputs.batches():
        _run_batch(layer, batch)


@torch.no_grad()
def _run_batch(layer: StreamedLayer, batch: int) -> None:
    with suppress(_Enough):
        layer.inputs.call(layer.module, layer.index, batch)


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

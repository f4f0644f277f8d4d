"""The parts of a training step that several processes work on add up to the step of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import save_tiny_model

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.models.ranks import Ranks
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.modifiers.top_any_block import BlockTask
from mcsharp_sdk.modifiers.top_any_distillation import ModelTask, PrunedExperts, checkpointed
from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter
from mcsharp_sdk.modifiers.top_any_training import StepLosses, new_network
from mcsharp_sdk.pruning.top_any import TopAnyNetwork


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    # Large weights: what pruning changes is then far above the rounding of predictions.
    folder = tmp_path_factory.mktemp("model")
    return SourceModel(save_tiny_model(folder, "mixtral", initializer_range=0.2))


def _calibration() -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet.of_tokens(torch.randint(1, 128, (6, 16), generator=generator))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _gradients(networks: dict[int, TopAnyNetwork], losses: StepLosses) -> torch.Tensor:
    for network in networks.values():
        network.zero_grad()
    (losses.error + 0.3 * losses.keep_ratio).backward()
    parameters = [p for network in networks.values() for p in network.parameters()]
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    )


def _assert_parts_add_up(
    networks: dict[int, TopAnyNetwork], alone: StepLosses, parts: list[StepLosses]
) -> None:
    assert float(alone.error.detach()) > 0
    whole = _gradients(networks, alone)
    assert whole.any()
    torch.testing.assert_close(sum(part.error for part in parts), alone.error)
    torch.testing.assert_close(sum(part.keep_ratio for part in parts), alone.keep_ratio)
    summed = torch.stack([_gradients(networks, part) for part in parts]).sum(0)
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_a_step_on_one_block(count: int, source: SourceModel) -> None:
    layer = next(stream_layers(source, _calibration()))
    task = BlockTask.of_layer(layer)
    network = new_network(0, 64, 2, TopAnyRouter(units=4), "cpu")
    edges = [task.whole * part // count for part in range(count + 1)]
    parts = []
    for rank in range(count):
        own = slice(edges[rank], edges[rank + 1])
        tensors = (task.hidden[own], task.weights[own], task.gram[own], task.norms[own])
        shared = BlockTask(*tensors, Ranks(rank, count), edges[rank], task.whole)
        parts.append(shared.step_losses(network, 40, 1.0, _generator()))
    alone = task.step_losses(network, 40, 1.0, _generator())
    _assert_parts_add_up({0: network}, alone, parts)


@pytest.mark.parametrize("count", [2, 5])
def test_parts_of_a_step_on_the_whole_model(count: int, source: SourceModel) -> None:
    """Three sequences a step, so that of five processes two have nothing to do."""
    source.load("")
    for parameter in source.model.parameters():
        parameter.requires_grad_(False)
    networks = {
        layer: new_network(layer, 64, 2, TopAnyRouter(units=4), "cpu")
        for layer in source.topology.moe
    }
    pruning = PrunedExperts(networks)
    task = ModelTask(source.model, _calibration(), 48, pruning, "cpu")
    layers = source.model.get_submodule(source.topology.layers_path)
    with pruning.attached(source), checkpointed(layers):
        whole = task.step_losses(1.0, _generator())
        gradients = _gradients(networks, whole)
        summed = torch.zeros_like(gradients)
        error = keep = 0.0
        for rank in range(count):
            part = replace(task, ranks=Ranks(rank, count)).step_losses(1.0, _generator())
            error, keep = error + float(part.error.detach()), keep + float(part.keep_ratio.detach())
            summed += _gradients(networks, part)
    assert error == pytest.approx(float(whole.error.detach()), rel=1e-4)
    assert keep == pytest.approx(float(whole.keep_ratio.detach()), rel=1e-6)
    assert gradients.any()
    torch.testing.assert_close(summed, gradients, rtol=1e-3, atol=1e-6)
    source.free("")

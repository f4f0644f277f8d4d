"""Hessians of experts from the tokens routed to them, weighed and completed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES, Matrix
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.modifiers.expert_hessians import expert_hessians
from mcsharp_sdk.modifiers.layer_notes import LayerNotes


@pytest.mark.parametrize("most", [10, 70, 150, None])
@pytest.mark.parametrize("matrix", MATRICES)
@torch.no_grad()
def test_an_expert_that_enough_tokens_reach_is_not_completed_however_few_are_asked_for(
    most: int | None, matrix: Matrix, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral", initializer_range=0.2))
    tokens = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    layer = next(iter(stream_layers(source, CalibrationSet.of_tokens(tokens))))
    runs, notes = ExpertRuns.of_layer(layer), LayerNotes()
    columns = runs.weights.shape(matrix)[1]
    found, _ = expert_hessians(runs, matrix, range(4), notes, most=most)
    steps = set()
    for expert in range(4):
        token, _ = torch.where(runs.routed.top_k_index == expert)
        assert len(token) >= columns
        every = 1 if most is None else max(1, len(token) // max(most, columns))
        steps.add(every)
        rows = runs.routed.hidden[token]
        rows = runs.inputs(expert, matrix, rows)[::every].double()
        assert len(rows) >= columns
        torch.testing.assert_close(found[expert].double(), 2 * rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert not notes.starved
    assert most is None or max(steps) > 1


@pytest.mark.parametrize("weighted", [False, True])
def test_few_tokens_are_completed_by_all_tokens_in_the_same_measure(
    weighted: bool, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral", initializer_range=0.2))
    tokens = torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(0))
    layer = next(iter(stream_layers(source, CalibrationSet.of_tokens(tokens))))
    runs, notes = ExpertRuns.of_layer(layer), LayerNotes()
    found, tokens_of = expert_hessians(runs, "gate_up", range(4), notes, routing_weighted=weighted)
    routed, columns = runs.routed, runs.routed.hidden.shape[1]
    everything = 2 * routed.hidden.double().T @ routed.hidden.double() / routed.num_tokens
    completed = 0
    for expert in range(4):
        token, slot = torch.where(routed.top_k_index == expert)
        rows = routed.hidden[token].double()
        weight = routed.top_k_weights[token, slot].double().square()
        weight = weight if weighted else torch.ones_like(weight)
        expected = 2 * rows.T @ (rows * weight[:, None])
        counted = float(weight.sum() ** 2 / weight.square().sum())
        if counted < columns:
            completed += 1
            expected += (columns - counted) * weight.mean() * everything
        torch.testing.assert_close(found[expert].double(), expected, rtol=1e-4, atol=1e-4)
        assert (str(expert) in notes.starved) == (counted < columns)
        assert tokens_of[expert] == pytest.approx(max(counted, columns))
    assert completed

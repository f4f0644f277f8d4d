"""The streamed model against the full one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny_models import PLAIN_FAMILIES, save_tiny_model
from transformers import AutoModelForCausalLM

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.models import expert_runs
from mcsharp_sdk.models.capture import linear_inputs, routed_inputs
from mcsharp_sdk.models.expert_runs import run_experts
from mcsharp_sdk.models.experts import MATRICES, is_experts
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.models.streamed_layer import StreamedLayer


def _tokens(sequences: int = 5, length: int = 19) -> torch.Tensor:
    return torch.randint(1, 128, (sequences, length), generator=torch.Generator().manual_seed(1))


def _streamed(source: SourceModel, tokens: torch.Tensor) -> Iterator[StreamedLayer]:
    return stream_layers(source, CalibrationSet.of_tokens(tokens))


def _full(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_hidden_states_equal_those_of_the_full_model(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path, family, dtype=dtype)
    tokens = _tokens()
    with torch.no_grad():
        reference = _full(folder, dtype)(tokens, output_hidden_states=True, use_cache=False)
    # Not bit for bit: sums of products come in another order, which can turn a rounding to bf16.
    near = 1e-5 if dtype == torch.float32 else 2**-8
    for layer in _streamed(SourceModel(folder), tokens):
        expected = reference.hidden_states[layer.index]
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            torch.cat(layer.inputs.hidden), expected, rtol=0, atol=near * scale
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_advanced_with_known_expert_outputs_gives_the_same(
    family: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path, family)
    plain = [torch.cat(layer.inputs.hidden) for layer in _streamed(SourceModel(folder), _tokens())]
    for layer in _streamed(SourceModel(folder), _tokens()):
        torch.testing.assert_close(
            torch.cat(layer.inputs.hidden), plain[layer.index], rtol=0, atol=1e-5
        )
        if layer.moe is not None:
            layer.expert_outputs = run_experts(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_the_experts_behind_the_layer_gives_the_same_bits_as_running_it_again(
    family: str, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, family, dtype=torch.bfloat16))

    def states(last: bool) -> list[torch.Tensor]:
        found = []
        for layer in _streamed(source, _tokens()):
            found.append(torch.cat(layer.inputs.hidden))
            if layer.moe is not None:
                layer.expert_outputs = run_experts(layer, last=last)
        return found

    assert all(map(torch.equal, states(last=True), states(last=False)))


@pytest.mark.parametrize("by_expert", [False, True])
def test_only_layers_with_others_behind_them_are_run(by_expert: bool, tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    run: set[int] = set()
    for index in range(source.topology.num_layers):
        source.layer(index).register_forward_hook(lambda *_, index=index: run.add(index))
    calibration = CalibrationSet.of_tokens(_tokens())
    for layer in stream_layers(source, calibration, by_expert=by_expert):
        before = torch.cat(layer.inputs.hidden)
    assert run == set(range(source.topology.num_layers - 1))
    assert torch.equal(torch.cat(layer.inputs.hidden), before)


@pytest.mark.parametrize(("family", "adds"), [("mixtral", True), ("qwen2_moe", False)])
def test_a_layer_passes_its_batches_on_only_if_it_adds_its_experts_last(
    family: str, adds: bool, tmp_path: Path
) -> None:
    source = SourceModel(save_tiny_model(tmp_path, family, dtype=torch.bfloat16))
    layer = next(_streamed(source, _tokens()))
    run_experts(layer, last=True)
    assert layer.passed == (set(layer.inputs.batches()) if adds else set())


@pytest.mark.parametrize("kept_bytes", [0, 10**6])
def test_an_experts_pieces_are_its_tokens_and_what_its_matrices_see(
    kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_runs, "PIECE_TOKENS", 7)
    monkeypatch.setattr(expert_runs, "KEPT_BYTES", kept_bytes)
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    layer = next(_streamed(source, _tokens()))
    runs = expert_runs.ExpertRuns.of_layer(layer)
    tokens, routing, _ = runs.sample_of(1, most=10**6)
    projected = tokens @ runs.weights.module.gate_up_proj[1].T
    gate, up = projected.chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    for _ in range(2):
        for matrix, expected in zip(MATRICES, (tokens, inner), strict=True):
            pieces = list(runs.pieces(1, matrix))
            assert max(len(piece.token) for piece in pieces) <= 7
            torch.testing.assert_close(torch.cat([p.inputs for p in pieces]), expected)
            torch.testing.assert_close(torch.cat([p.routing for p in pieces]), routing)
    few = sum(len(piece.token) for piece in runs.pieces(1, "down", most=10))
    assert min(10, len(tokens)) <= few < 20


def test_only_one_layer_is_loaded_at_a_time(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    for layer in _streamed(source, _tokens()):
        loaded = {
            name.split(".")[2]
            for name, tensor in source.model.named_parameters()
            if not tensor.is_meta
        }
        assert loaded == {str(layer.index)}
    assert all(tensor.is_meta for tensor in source.model.parameters())


def test_a_changed_layer_changes_what_the_layers_behind_it_see(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    for layer in _streamed(source, _tokens()):
        if layer.index == 0:
            with torch.no_grad():
                for parameter in layer.module.parameters():
                    parameter.zero_()
            before = torch.cat(layer.inputs.hidden)
        if layer.index == 1:
            # A layer of zeros adds nothing to the residual stream.
            assert torch.equal(torch.cat(layer.inputs.hidden), before)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_captured_expert_inputs_equal_those_of_the_full_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family)
    tokens = _tokens()
    full = _full(folder, torch.float32)
    calls: dict[int, tuple[torch.Tensor, ...]] = {}
    for index, layer in enumerate(full.model.layers):
        for module in layer.modules():
            if is_experts(module):
                module.register_forward_pre_hook(
                    lambda _, args, index=index: calls.__setitem__(index, args)
                )
    with torch.no_grad():
        full(tokens, use_cache=False)
    for layer in _streamed(SourceModel(folder), tokens):
        if layer.moe is None:
            assert layer.index not in calls
            continue
        captured = routed_inputs(layer)
        hidden, chosen, weights = calls[layer.index]
        torch.testing.assert_close(captured.hidden, hidden, rtol=1e-5, atol=1e-5)
        assert torch.equal(captured.top_k_index, chosen)
        torch.testing.assert_close(captured.top_k_weights, weights, rtol=1e-5, atol=1e-5)
        experts = range(layer.moe.num_experts)
        assert captured.counts() == [int((chosen == expert).sum()) for expert in experts]


def test_linears_that_share_an_input_are_handed_over_together(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    seen: dict[tuple[str, ...], int] = {}

    def consume(names: tuple[str, ...], inputs: torch.Tensor) -> None:
        seen[names] = seen.get(names, 0) + inputs.shape[0]

    layer = next(iter(_streamed(source, _tokens())))
    linear_inputs(layer, source.topology.linears[0], consume)
    qkv = tuple(f"self_attn.{p}_proj" for p in "qkv")
    assert seen == {qkv: 5 * 19, ("self_attn.o_proj",): 5 * 19}


def test_an_expert_gets_its_own_tokens_and_weights(tmp_path: Path) -> None:
    source = SourceModel(save_tiny_model(tmp_path, "mixtral"))
    layer = next(iter(_streamed(source, _tokens())))
    runs = expert_runs.ExpertRuns.of_layer(layer)
    routed = runs.routed
    for expert in range(4):
        chosen = (routed.top_k_index == expert).any(1)
        tokens, weights, count = runs.sample_of(expert, most=10**6)
        assert torch.equal(tokens, routed.hidden[chosen])
        assert weights.shape == (int(chosen.sum()),)
        assert count == len(tokens)
        fewer, _, count = runs.sample_of(expert, most=3)
        assert count == len(tokens)
        assert fewer.shape[0] == min(3, tokens.shape[0])


def test_linears_and_experts_are_found_but_no_steering(tmp_path: Path) -> None:
    topology = SourceModel(save_tiny_model(tmp_path, "qwen2_moe")).topology
    names = topology.linears[0]
    assert "mlp.shared_expert.gate_proj" in names
    assert "mlp.shared_expert_gate" not in names
    assert not any("experts" in name for name in names)
    assert topology.experts_per_layer() == {0: 4, 1: 4, 2: 4}

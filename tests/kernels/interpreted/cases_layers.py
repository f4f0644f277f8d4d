"""Whole layers in Triton's interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_stacks import random_layer, relative_error, silu_layer
from packed_layers import BITS, packed_experts, routed

from mcsharp_sdk.kernels import (
    crossovers,
    gpu_experts,
    gpu_support,
    measuring,
    triton_launch,
)
from mcsharp_sdk.kernels.case import LayerCase
from mcsharp_sdk.kernels.gpu_experts import case_of, run_experts
from mcsharp_sdk.kernels.tilings import MATRIX_TILINGS, TILINGS
from mcsharp_sdk.kernels.timed_cases import time_layer
from mcsharp_sdk.runtime.modules import ExpertBucket
from mcsharp_sdk.runtime.whole_layers import gates_by_silu


@pytest.mark.parametrize(("tokens", "dp4a"), [(0, False), (2, False), (2, True), (9, False)])
def test_a_layer_agrees_with_float64(tokens: int, dp4a: bool) -> None:
    layer, gate_up, down = random_layer(BITS, 128, 32, 128)
    hidden, chosen, routing = routed(tokens, 128)
    out = run_experts(layer, hidden, chosen, routing, dp4a=dp4a)
    assert out.shape == hidden.shape
    assert out.dtype == hidden.dtype
    expected = silu_layer(hidden, chosen, routing, gate_up, down)
    assert not tokens or relative_error(out, expected) < (0.03 if dp4a else 2e-3)


@pytest.mark.parametrize("tiling", MATRIX_TILINGS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_runs_in_every_way_that_matrices_have_too(
    tiling: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_experts, "GEMV_AT_ONCE", 4)
    layer, gate_up, down = random_layer(BITS, 128, 32, 32)
    hidden, chosen, routing = routed(tokens, 128)
    out = run_experts(layer, hidden, chosen, routing, tiling=TILINGS[tiling])
    expected = silu_layer(hidden, chosen, routing, gate_up, down)
    assert relative_error(out, expected) < 2e-3


def test_a_layer_runs_as_was_measured_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _, _ = random_layer(BITS, 128, 32, 32)
    hidden, chosen, routing = routed(3, 128)
    case = case_of(layer, 2, hidden)
    assert case == LayerCase(128, 32, 64, 4, 2, (1, 2, 3), 32, torch.float16, "cpu")
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    steps = time_layer(replace(case, hidden=32, rows=32, intermediate=16), (1, 3))
    assert steps[0][0] == 1
    assert {name for _, name in steps} <= set(MATRIX_TILINGS)

    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(tmp_path / "crossovers.json"))
    crossovers.save("cpu", {case.key(): ((1, "gemv_32"), (3, "gemm_32"))})
    heights: list[int | None] = []
    sort_slots = triton_launch.sort_slots

    def noted(chosen: torch.Tensor, experts: int, height: int | None = None) -> Any:
        heights.append(height)
        return sort_slots(chosen, experts, height)

    monkeypatch.setattr(triton_launch, "sort_slots", noted)
    run_experts(layer, hidden, chosen, routing)
    run_experts(layer, hidden[:2], chosen[:2], routing[:2])
    assert heights == [32]


@pytest.mark.parametrize(("family", "rotated"), [("mixtral", True), ("llama4", False)])
def test_a_row_per_slot_runs_as_was_measured_with_whole_tokens(
    family: str, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = packed_experts(family, rotated=rotated, removed=False).half()
    buckets = [m for m in experts.children() if isinstance(m, ExpertBucket)]
    monkeypatch.setattr(gpu_support, "serves", lambda x: True)
    asked: list[tuple[int, int]] = []

    def fastest(case: LayerCase, tokens: int) -> str:
        asked.append((tokens, case.slots))
        return ""

    monkeypatch.setattr(crossovers, "fastest", fastest)
    sorted_slots: list[int] = []
    sort_slots = triton_launch.sort_slots

    def noted(chosen: torch.Tensor, experts: int, height: int | None = None) -> Any:
        sorted_slots.append(len(chosen))
        return sort_slots(chosen, experts, height)

    monkeypatch.setattr(triton_launch, "sort_slots", noted)
    for tokens in (3, 5):
        hidden, chosen, routing = routed(tokens, buckets[0].columns["gate_up"])
        chosen = chosen.where(chosen < len(BITS), experts.num_experts)
        experts(hidden, chosen, routing.half())
    assert asked == [(3, 2), (5, 2)]
    assert sorted_slots == [10]  # 3 tokens are few, also with a row per slot


@pytest.mark.parametrize(
    ("family", "silu", "rotated", "removed"),
    [
        ("mixtral", True, False, False),
        ("mixtral", True, True, False),
        ("mixtral", True, False, True),
        ("mixtral", True, True, True),
        ("gpt_oss", False, False, False),
        ("gpt_oss", False, True, False),
        ("gpt_oss", False, False, True),
        ("llama4", True, False, False),
        ("llama4", True, True, True),
        ("nemotron_h", False, False, True),
    ],
)
def test_families_run_in_kernels_as_without_them(
    family: str, silu: bool, rotated: bool, removed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = packed_experts(family, rotated=rotated, removed=removed)
    buckets = [m for m in experts.children() if isinstance(m, ExpertBucket)]
    hidden_size = buckets[0].columns["gate_up"]
    intermediate = buckets[0].columns["down"]
    assert gates_by_silu(experts, intermediate) == silu
    for tokens in (1, 5):
        hidden, chosen, routing = routed(tokens, hidden_size)
        chosen = chosen.where(chosen < len(BITS), experts.num_experts)
        expected = experts.float()(hidden.float(), chosen, routing)
        monkeypatch.setattr(gpu_support, "serves", lambda x: True)
        given = experts.half()(hidden, chosen, routing.half())
        monkeypatch.undo()
        assert relative_error(given, expected.double()) < 4e-3

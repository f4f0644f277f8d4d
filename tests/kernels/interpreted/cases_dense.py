"""Dequantised weights in Triton's interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_stacks import random_layer, random_stack, relative_error, silu_layer
from packed_layers import BITS, routed
from torch import Tensor

from mcsharp_sdk.kernels import gpu_dense, gpu_experts
from mcsharp_sdk.kernels.expert_layer import expert_table
from mcsharp_sdk.kernels.gpu_experts import run_experts
from mcsharp_sdk.kernels.tilings import TILINGS
from mcsharp_sdk.kernels.triton_launch import dequantised

DENSE = TILINGS["dense"]


@pytest.mark.parametrize("group", [32, 100, 128, 256])
@pytest.mark.parametrize("bits", [(1,), (2,), (3,), (4,), (8,), (3, 8, 1, 2, 4)], ids=str)
def test_rows_are_dequantised_as_without_the_kernel(bits: tuple[int, ...], group: int) -> None:
    stack, exact = random_stack(bits, 48, 256, group)
    found = dequantised(stack, expert_table(bits), 8, 24, torch.float16)
    torch.testing.assert_close(found.double(), exact[:, 8:32], rtol=1e-3, atol=1e-6)


def test_rows_of_both_halves_and_more_than_a_program_has() -> None:
    stack, exact = random_stack(BITS, 192, 128, 128)
    table = expert_table(BITS)
    found = dequantised(stack, table, 16, 40, torch.float16, gated=True)
    expected = torch.cat([exact[:, 16:56], exact[:, 112:152]], dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    found = dequantised(stack, table, 64, 128, torch.float16)
    torch.testing.assert_close(found.double(), exact[:, 64:], rtol=1e-3, atol=1e-6)


def test_weights_of_a_removed_expert_are_nothing() -> None:
    stack, exact = random_stack((2, 3), 16, 128, 32)
    found = dequantised(stack, expert_table((2, 0, 3)), 0, 16, torch.float16)
    torch.testing.assert_close(found[[0, 2]].double(), exact, rtol=1e-3, atol=1e-6)
    assert not found[1].any()


def test_a_layer_agrees_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, gate_up, down = random_layer(BITS, 256, 128, 128)
    hidden, chosen, routing = routed(9, 256)
    expected = silu_layer(hidden, chosen, routing, gate_up, down)
    whole = run_experts(layer, hidden, chosen, routing, tiling=DENSE)
    assert relative_error(whole, expected) < 3e-3
    # 128 rows at a time, of gate_up half of them gates, and 4 tokens
    monkeypatch.setattr(gpu_dense, "DENSE_BYTES", 0)
    room = 4 * gpu_dense.workspace_bytes(layer, 2, hidden.dtype)
    monkeypatch.setattr(gpu_experts, "LONG_WORKSPACE_BYTES", room)
    assert gpu_dense.rows_at_once(layer.gate_up, len(BITS), hidden.dtype) == 128
    parts = run_experts(layer, hidden, chosen, routing, tiling=DENSE)
    assert relative_error(parts, expected) < 3e-3


def test_the_rest_of_the_rows_may_be_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, exact = random_stack(BITS, 200, 128, 32)
    x = torch.randn(7, 128).half()
    monkeypatch.setattr(gpu_dense, "DENSE_BYTES", 0)
    ends = torch.tensor([2, 2, 3, 7], dtype=torch.int32)
    found = gpu_dense.products(stack, expert_table(BITS), x, ends)
    of = torch.tensor([0, 0, 2, 3, 3, 3, 3])
    expected = torch.einsum("nk,nrk->nr", x.double(), exact[of])
    assert relative_error(found, expected) < 2e-3


def test_a_family_s_own_code_gets_each_row_with_its_expert() -> None:
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0]).half()

    def between(rows: Tensor, expert: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=1)
        return factors[expert, None] * torch.nn.functional.silu(gate) * up

    def behind(rows: Tensor, expert: Tensor) -> Tensor:
        return rows * expert[:, None]

    layer, gate_up, down = random_layer(BITS, 128, 128, 32, between, behind)
    hidden, chosen, routing = routed(9, 128)
    assert (chosen == len(BITS)).any()
    found = run_experts(layer, hidden, chosen, routing, tiling=DENSE)
    weighed = down * (factors.double() * torch.arange(4))[:, None, None]
    assert relative_error(found, silu_layer(hidden, chosen, routing, gate_up, weighed)) < 4e-3


def test_undefined_rows_of_dropped_slots_reach_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch._grouped_mm

    def spoilt(x: Tensor, weights: Tensor, *, offs: Tensor) -> Any:
        out = product(x, weights, offs=offs)
        out[int(offs[-1]) :] = torch.nan
        return out

    layer, _, _ = random_layer(BITS, 128, 128, 32)
    given = routed(9, 128)
    expected = run_experts(layer, *given, tiling=DENSE)
    monkeypatch.setattr(torch, "_grouped_mm", spoilt)
    assert torch.equal(run_experts(layer, *given, tiling=DENSE), expected)
    chosen = torch.full_like(given[1], len(BITS))
    assert not run_experts(layer, given[0], chosen, given[2], tiling=DENSE).any()

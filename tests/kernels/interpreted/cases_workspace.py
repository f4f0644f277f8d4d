"""The workspace of layers in Triton's interpreter; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_stacks import random_layer, relative_error
from packed_layers import BITS, packed_experts, routed

from mcsharp_sdk.kernels import gpu_experts, gpu_support
from mcsharp_sdk.kernels.gpu_experts import run_experts, workspace_bytes
from mcsharp_sdk.runtime import whole_layers
from mcsharp_sdk.runtime.modules import ExpertBucket


def test_tokens_beyond_the_workspace_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = random_layer((2, 3, 1, 2), 32, 16, 32)
    hidden, chosen, routing = routed(8, 32)
    at_once = run_experts(layer, hidden, chosen, routing)
    room = 5 * workspace_bytes(layer, 2, hidden.dtype)
    monkeypatch.setattr(gpu_experts, "WORKSPACE_BYTES", room)
    torch.testing.assert_close(run_experts(layer, hidden, chosen, routing), at_once)


@pytest.mark.parametrize(
    ("family", "rotated"), [("mixtral", True), ("llama4", False), ("gpt_oss", True)]
)
def test_rows_of_slots_stay_within_the_workspace(
    family: str, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = packed_experts(family, rotated=rotated, removed=False).half()
    columns = next(m for m in experts.children() if isinstance(m, ExpertBucket)).columns
    monkeypatch.setattr(gpu_support, "serves", lambda x: True)
    hidden, chosen, routing = routed(12, columns["gate_up"])
    given = (hidden, chosen.where(chosen < len(BITS), experts.num_experts), routing.half())
    at_once = experts(*given)

    rows, turned = [], []
    run, rotate = whole_layers.run_experts, whole_layers.rotate

    def noted_run(layer: Any, hidden: torch.Tensor, *others: Any, **how: Any) -> torch.Tensor:
        room = workspace_bytes(layer, 2, hidden.dtype, own_rows=True)
        rows.append(len(hidden) // 2 * room)
        return run(layer, hidden, *others, **how)

    def noted_rotate(inputs: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        turned.append(inputs.numel() * whole_layers.TURNING_BYTES_PER_COLUMN)
        return rotate(inputs, signs)

    monkeypatch.setattr(whole_layers, "run_experts", noted_run)
    monkeypatch.setattr(whole_layers, "rotate", noted_rotate)
    monkeypatch.setattr(gpu_experts, "WORKSPACE_BYTES", 10_000)
    monkeypatch.setitem(whole_layers.TURNING_BYTES, "cpu", 3_000)
    assert relative_error(experts(*given), at_once.double()) < 4e-3
    assert len(rows) > 1
    assert max(rows) <= 10_000
    assert len(turned) > 2 * len(rows) if rotated else not turned
    assert max(turned, default=0) <= 3_000

"""Memory that a layer of packed experts takes while it runs on a GPU, against docs/gpu.md.

Triton kernels allocate nothing, so what is counted is what is around them: it runs on the CPU, in
the sizes of real models, with launches left out.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from torch import Tensor

from mcsharp_sdk.kernels import gpu_dense, gpu_experts
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack, PerSlot, expert_table
from mcsharp_sdk.kernels.gpu_experts import run_experts
from mcsharp_sdk.kernels.tilings import TILINGS, Tiling
from mcsharp_sdk.quantization.grid import PackedWeight, group_count
from mcsharp_sdk.quantization.packing import packed_bytes

triton_launch = pytest.importorskip(
    "mcsharp_sdk.kernels.triton_launch", reason="triton is not installed: it is for Linux only"
)
triton_launch_few = pytest.importorskip("mcsharp_sdk.kernels.triton_launch_few")


def swiglu(rows: Tensor, expert: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


KERNELS = {
    triton_launch: ("combine_slots", "dequantise_rows", "grouped_gemm", "prepare_rows"),
    triton_launch_few: ("grouped_gemv", "round_activations"),
}
WIDTHS = (1, 2, 3)
GROUP = 128
SHAPES = {"mixtral-8x7b": (4096, 14336, 8, 2), "deepseek-v2-lite": (2048, 1408, 64, 6)}
"""Hidden size, intermediate size, experts, and experts of a token."""

SMALL = 64 * 2**10
"""Bytes for what docs/gpu.md does not name: scales and sums of blocks, the order of slots."""


@pytest.fixture(autouse=True)
def _no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of each kernel something that takes a grid and arguments, and launches nothing."""

    def nothing(*arguments: Any, **constants: Any) -> None: ...

    def any_order(chosen: Tensor, order: Tensor, *others: Any, **constants: Any) -> None:
        order.zero_()

    def product(x: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        return x.new_empty(len(x), weights.shape[-1])

    for launches, kernels in KERNELS.items():
        for kernel in kernels:
            monkeypatch.setattr(launches, kernel, defaultdict(lambda: nothing))
    monkeypatch.setattr(triton_launch, "sort_by_expert", defaultdict(lambda: any_order))
    monkeypatch.setattr(torch, "_grouped_mm", product)


def unset_stack(experts: int, rows: int, columns: int) -> MatrixStack:
    """One matrix of experts of all widths, with whatever was in memory."""

    def weight(count: int, bits: int) -> PackedWeight:
        groups = group_count(columns, GROUP)
        return PackedWeight(
            torch.empty(count, rows, packed_bytes(columns, bits), dtype=torch.uint8),
            torch.empty(count, rows, groups, dtype=torch.float16),
            torch.empty(count, groups, packed_bytes(rows, bits), dtype=torch.uint8),
        )

    counts = [len(range(place, experts, len(WIDTHS))) for place in range(len(WIDTHS))]
    stacks = {bits: weight(count, bits) for bits, count in zip(WIDTHS, counts, strict=True)}
    return MatrixStack(stacks, GROUP, columns)


def unset_layer(shape: str, between: PerSlot | None = None) -> ExpertLayer:
    hidden, inner, experts, _ = SHAPES[shape]
    table = expert_table([WIDTHS[expert % len(WIDTHS)] for expert in range(experts)])
    gate_up, down = ((2 * inner, hidden), (hidden, inner))
    return ExpertLayer(unset_stack(experts, *gate_up), unset_stack(experts, *down), table, between)


def taken(layer: ExpertLayer, shape: str, tokens: int, tiling: Tiling) -> int:
    hidden, _, experts, slots = SHAPES[shape]
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    chosen = torch.arange(tokens * slots).reshape(tokens, slots) % experts
    routing = torch.empty(tokens, slots)
    return peak_bytes(lambda: run_experts(layer, x, chosen, routing, tiling=tiling))


def result_bytes(shape: str, tokens: int, at_once: int) -> int:
    """Of the result, and of a part of it where there are several."""
    part = at_once if tokens > at_once else 0
    return (tokens + part) * SHAPES[shape][0] * 2


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_take_a_row_of_each_slot_and_integers(shape: str, tokens: int) -> None:
    hidden, inner, _, slots = SHAPES[shape]
    rows = tokens * slots * (inner + hidden) * 2
    integers = 2 * (tokens * hidden + tokens * slots * inner)
    found = taken(unset_layer(shape), shape, tokens, Tiling("gemv"))
    assert rows < found <= rows + integers + result_bytes(shape, tokens, tokens) + SMALL
    assert found <= 2**20


@pytest.mark.parametrize("between", [None, swiglu], ids=["silu", "own code"])
def test_the_second_product_alone_is_chained_to_another(
    between: PerSlot | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chained: list[bool] = []

    def noted(*arguments: Any, CHAINED: bool, **constants: Any) -> None:
        chained.append(CHAINED)

    monkeypatch.setattr(triton_launch_few, "round_activations", defaultdict(lambda: noted))
    shape = "deepseek-v2-lite"
    taken(unset_layer(shape, between), shape, 2, Tiling("gemv"))
    assert chained == [False, True]


@pytest.mark.parametrize("between", [None, swiglu], ids=["silu", "own code"])
@pytest.mark.parametrize("tiling", ["gemm_16", "gemm_128", "dense"])
@pytest.mark.parametrize("tokens", [1000, 20000])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tokens_stay_within_the_workspace(
    shape: str, tokens: int, tiling: str, between: PerSlot | None
) -> None:
    layer, slots = unset_layer(shape, between), SHAPES[shape][3]
    if tiling == "dense":
        one = gpu_dense.workspace_bytes(layer, slots, torch.bfloat16)
        weights, most = gpu_dense.DENSE_BYTES, gpu_experts.LONG_WORKSPACE_BYTES
    else:
        one = gpu_experts.workspace_bytes(layer, slots, torch.bfloat16)
        weights, most = 0, gpu_experts.WORKSPACE_BYTES
    room = weights + min(tokens * one, most)
    found = taken(layer, shape, tokens, TILINGS[tiling])
    assert room / 2 < found <= room + result_bytes(shape, tokens, most // one) + SMALL

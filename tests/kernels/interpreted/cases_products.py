"""Triton products in the interpreter against float64; run by ``tests/kernels/test_triton.py``."""

from __future__ import annotations

import pytest
import torch
from expert_stacks import random_stack, relative_error

from mcsharp_sdk.kernels import KERNELS, gpu_linear
from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.kernels.expert_layer import expert_table
from mcsharp_sdk.kernels.gpu_experts import takes_gemv
from mcsharp_sdk.kernels.matrix import PackedStack
from mcsharp_sdk.kernels.tilings import MATRIX_TILINGS
from mcsharp_sdk.kernels.triton_launch import EMULATE, gemm, sort_slots
from mcsharp_sdk.kernels.triton_launch_few import gemv
from mcsharp_sdk.quantization.grid import WIDTHS

HALF = 1e-3
"""Relative error of sums in fp32 that are rounded to fp16 once."""


def activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).half()


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x as ``dp4a`` sees it: 128 at a time, the largest at 127."""
    blocks = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 128)).unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)[:, : x.shape[1]]


def test_these_tests_run_in_the_interpreter() -> None:
    assert EMULATE


@pytest.mark.parametrize("dp4a", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(72, 160, 128), (24, 128, 32)])
def test_one_launch_serves_every_width_and_skips_dropped_slots(
    rows: int, columns: int, group: int, dp4a: bool
) -> None:
    stack, exact = random_stack(WIDTHS, rows, columns, group)
    x = activations(2, columns)
    chosen = torch.tensor([4, 1, len(WIDTHS), 3, 0, 2])
    out = gemv(stack, expert_table(WIDTHS), x, chosen, gated=False, dp4a=dp4a)
    seen = in_8_bits(x) if dp4a else x.double()
    for slot, expert in enumerate(chosen.tolist()):
        if expert < len(WIDTHS):
            expected = exact[expert] @ seen[slot // 3]
            assert relative_error(out[slot], expected) < HALF, WIDTHS[expert]


@pytest.mark.parametrize(("columns", "group"), [(160, 128), (200, 100)])
def test_ragged_experts_of_every_width_share_a_launch(columns: int, group: int) -> None:
    stack, exact = random_stack(WIDTHS, 40, columns, group)
    counts = [1, 0, 19, 3, 16]
    chosen = torch.repeat_interleave(torch.tensor([*range(5), 5]), torch.tensor([*counts, 2]))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(5))]
    x = activations(len(chosen), columns)
    tiles = sort_slots(chosen, len(WIDTHS))
    by_position = gemm(stack, expert_table(WIDTHS), x, tiles, gated=False, to_slots=False)
    by_slot = gemm(stack, expert_table(WIDTHS), x[tiles.order], tiles, gated=False, to_slots=True)
    kept = chosen < len(WIDTHS)
    assert torch.equal(by_slot[tiles.order][kept[tiles.order]], by_position[kept[tiles.order]])
    for expert, width in enumerate(WIDTHS):
        mine = chosen == expert
        expected = x[mine].double() @ exact[expert].T
        assert not counts[expert] or relative_error(by_slot[mine], expected) < HALF, width


@pytest.mark.parametrize(("tokens", "bits", "columns"), [(1, 4, 128), (5, 4, 128), (1, 3, 72)])
def test_a_linear_layer_agrees_with_float64(tokens: int, bits: int, columns: int) -> None:
    stack, exact = random_stack([bits], 40, columns, 64)
    weight = stack.weights[bits]
    x = activations(tokens, columns)
    out = gpu_linear.run(x, PackedStack(weight, bits, 64, columns), [0], [tokens])
    assert relative_error(out, x.double() @ exact[0].T) < HALF


@pytest.mark.parametrize("tiling", MATRIX_TILINGS)
@pytest.mark.parametrize("counts", [[3], [1, 5, 2]], ids=str)
def test_a_matrix_is_multiplied_in_every_way_that_can_be_measured(
    tiling: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_linear, "GEMV_AT_ONCE", 4)
    stack, exact = random_stack([3] * len(counts), 72, 160, 32)
    packed = PackedStack(stack.weights[3], 3, 32, 160)
    x = activations(sum(counts), 160)
    out = KERNELS[f"triton_{tiling}"].run(x, packed, range(len(counts)), counts)
    parts = x.double().split(counts)
    expected = torch.cat([part @ own.T for part, own in zip(parts, exact, strict=True)])
    assert relative_error(out, expected) < HALF


def test_the_matrices_of_a_bucket_get_their_own_rows() -> None:
    stack, exact = random_stack([2, 2, 2], 24, 64, 64)
    x = activations(5, 64)
    out = gpu_linear.run(x, PackedStack(stack.weights[2], 2, 64, 64), [0, 2], [4, 1])
    expected = torch.cat([x[:4].double() @ exact[0].T, x[4:].double() @ exact[2].T])
    assert relative_error(out, expected) < HALF


@pytest.mark.parametrize(
    ("device", "dtype", "columns", "words"),
    [
        ("cpu", torch.float16, 128, "not on cpu"),
        ("cuda", torch.float32, 128, "16-bit floats"),
        ("cuda", torch.float16, 72, "32-bit words"),
        ("cuda", torch.float16, 128, ""),
    ],
)
def test_a_case_is_refused_with_its_reason(
    device: str, dtype: torch.dtype, columns: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        monkeypatch.setattr(gpu_linear, "missing_support", lambda device: "")
    case = Case(64, columns, 1, 64, 1, dtype, device)
    reason = gpu_linear.refuses_dp4a(case)
    assert words in reason
    assert bool(words) == bool(reason)


def test_rows_that_are_not_whole_words_are_left_to_the_grouped_product() -> None:
    assert takes_gemv(96, [1, 3], 32)
    assert not takes_gemv(72, [4, 1], 24)
    assert not takes_gemv(128, [4], 50)

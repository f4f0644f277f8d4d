"""What Triton compiles of the kernels for few tokens, run on the CPU, against float64.

The interpreter knows neither inline assembly, nor what lies where in threads, nor what a kernel
reads that begins before the one before it has ended; this does.
"""

from __future__ import annotations

import math

import pytest
import torch
from expert_stacks import random_layer, random_stack, relative_error, silu_layer
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import MatrixStack, expert_table
from mcsharp_sdk.kernels.gpu_experts import run_experts
from mcsharp_sdk.kernels.tilings import TILINGS
from mcsharp_sdk.quantization.grid import WIDTHS, PackedWeight

pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

from emulated_gpu import addresses, emulate_gpu

from mcsharp_sdk.kernels import triton_launch_few
from mcsharp_sdk.kernels.triton_launch import combine
from mcsharp_sdk.kernels.triton_launch_few import GemvTile, gemv, tile_of

CAPABILITIES = (80, 90, 100)
BFLOAT16 = 2**-8
"""Relative error of what is rounded to bf16 once."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def activations(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dp4a", [False, True])
@pytest.mark.parametrize(
    ("widths", "rows", "columns", "group", "step"),
    [
        (WIDTHS, 80, 640, 128, None),
        (WIDTHS, 40, 160, 128, None),
        ((2, 3), 48, 512, 256, 32),
        ((3,), 32, 256, 32, None),
    ],
)
def test_products_agree_with_float64(
    widths: tuple[int, ...],
    rows: int,
    columns: int,
    group: int,
    step: int | None,
    dp4a: bool,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulate_gpu(monkeypatch, capability)
    stack, exact = random_stack(widths, rows, columns, group)
    x, chosen = activations(1, columns), torch.arange(len(widths) + 1)
    out = gemv(stack, expert_table(widths), x, chosen, gated=False, dp4a=dp4a, step=step)
    for expert, width in enumerate(widths):
        expected = exact[expert] @ x[0].double()
        assert relative_error(out[expert], expected) < (2e-2 if dp4a else BFLOAT16), width


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dp4a", [False, True])
def test_a_layer_agrees_with_float64(
    dp4a: bool, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = emulate_gpu(monkeypatch, capability)
    layer, gate_up, down = random_layer((1, 2, 3, 4), 256, 128, 128)
    x, chosen = activations(2, 256), torch.tensor([[2, 0], [3, 4]])
    routing = torch.rand(2, 2, generator=torch.Generator().manual_seed(4))
    memory.late = list(map(addresses, (x, chosen, routing)))  # from the kernels before
    out = run_experts(layer, x, chosen, routing, dp4a=dp4a, tiling=TILINGS["gemv"])
    expected = silu_layer(x, chosen, routing, gate_up, down)
    assert relative_error(out, expected) < (3e-2 if dp4a else 3 * BFLOAT16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", triton_launch_few.TILES.values())
def test_every_tile_agrees_with_float64(
    tile: GemvTile, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_gpu(monkeypatch, 90)
    monkeypatch.setattr(triton_launch_few, "TILES", {0: tile})
    columns = 128 * (tile.quads + 1)  # more than one step of each width
    stack, exact = random_stack((1, 2, 3), 32, columns, 128)
    x, chosen = activations(1, columns), torch.arange(3)
    out = gemv(stack, expert_table((1, 2, 3)), x, chosen, gated=gated, dp4a=False)
    for expert, weight in enumerate(exact):
        expected = weight @ x[0].double()
        if gated:
            expected = torch.nn.functional.silu(expected[:16]) * expected[16:]
        assert relative_error(out[expert], expected) < 2 * BFLOAT16, expert


@pytest.mark.parametrize(
    ("widths", "columns", "group"), [((2, 3), 1312, 128), ((8,), 608, 100), ((3,), 1408, 32)]
)
def test_several_steps_agree_with_float64(
    widths: tuple[int, ...], columns: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_gpu(monkeypatch, 90)
    stack, exact = random_stack(widths, 24, columns, group)
    x, chosen = activations(1, columns), torch.arange(len(widths))
    out = gemv(stack, expert_table(widths), x, chosen, gated=False, dp4a=False)
    for expert, width in enumerate(widths):
        assert relative_error(out[expert], exact[expert] @ x[0].double()) < BFLOAT16, width


def test_tiles_go_by_columns_unless_groups_are_no_whole_blocks() -> None:
    sizes = (128, 4095, 4096, 8191, 8192, 20000)
    small, middle, large = sorted(triton_launch_few.TILES)
    expected = [small, small, middle, middle, large, large]
    assert [tile_of(columns, 128) for columns in sizes] == [
        triton_launch_few.TILES[fewest] for fewest in expected
    ]
    assert tile_of(8192, 32) == tile_of(128, 32) == triton_launch_few.SCALED_TILE
    assert tile_of(4096, 128, rows=64).quads * 64 == math.prod(tile_of(4096, 128)[:2])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_weighed_sums_agree_with_float64(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_gpu(monkeypatch, capability)
    y, chosen = activations(6, 600), torch.tensor([[4, 1, 5], [3, 0, 2]])
    routing = torch.rand(2, 3, generator=torch.Generator().manual_seed(4))
    out = combine(y, chosen, routing, experts=5)
    kept = (routing.double() * (chosen < 5)).unsqueeze(-1)
    assert relative_error(out, (kept * y.double().view(2, 3, 600)).sum(1)) < BFLOAT16


@pytest.mark.parametrize("planes", [1, 2])
def test_activations_of_any_size_are_rounded_or_become_nan(
    planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_gpu(monkeypatch, 80)
    sizes = torch.tensor([1e-30, 1.0, 6e35, 1e36, 3e38, 0.0, torch.inf, torch.nan])
    x = (sizes.unsqueeze(1) * torch.linspace(-1, 1, 128)).bfloat16()
    integers = torch.empty(len(x), planes, 128, dtype=torch.int8)
    scales, sums = torch.empty(len(x), 1), torch.empty(len(x), 1)
    triton_launch_few.round_activations[(1, len(x))](
        x, integers, scales, sums, 128, PLANES=planes, CHAINED=False, OVERLAP=False
    )
    bytes_ = integers.double()
    found = scales * (bytes_[:, 0] if planes == 1 else 256 * bytes_[:, 0] + bytes_[:, 1])
    allowed = x.double().abs().amax(1) * (1 / 250 if planes == 1 else 2**-14)
    assert ((found - x.double()).abs().amax(1) <= allowed)[:6].all()
    assert ((sums[:6, 0] - found[:6].sum(1)).abs() <= 1e-4 * x[:6].double().abs().amax(1)).all()
    assert found[6:].isnan().all()


def small_product(
    x: Tensor, chosen: Tensor, *, chained: bool, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """A product and what it should be, from weights that begin ``shift`` bytes behind a multiple of
    16."""
    stack, exact = random_stack((2,), 16, 256, 128)
    weight = stack.weights[2]
    moved = torch.empty(weight.qweight.numel() + shift, dtype=torch.uint8)[shift:]
    moved.copy_(weight.qweight.view(-1))
    weights = PackedWeight(moved.view(weight.qweight.shape), weight.scales, weight.zeros)
    stack = MatrixStack({2: weights}, 128, 256)
    out = gemv(stack, expert_table((2,)), x, chosen, gated=False, dp4a=False, chained=chained)
    return out, (exact[0] @ x[0].double()).unsqueeze(0)


def test_weights_may_begin_at_any_word(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_gpu(monkeypatch, 90)
    chosen = torch.tensor([0])
    out, expected = small_product(activations(1, 256), chosen, chained=False, shift=4)
    assert relative_error(out, expected) < BFLOAT16


def test_a_kernel_that_reads_what_is_not_there_yet_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = emulate_gpu(monkeypatch, 90)
    x, chosen = activations(1, 256), torch.tensor([0])
    memory.late = [addresses(x), addresses(chosen)]
    small_product(x, chosen, chained=False)
    memory.late = [addresses(x), addresses(chosen)]
    with pytest.raises(AssertionError, match="read before it is written"):
        small_product(x, chosen, chained=True)


def test_weights_are_loaded_before_the_kernel_before_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = emulate_gpu(monkeypatch, 90)
    stack, _ = random_stack((2,), 16, 256, 128)
    for late in (stack.weights[2].qweight, stack.weights[2].scales):
        memory.late = [addresses(late)]
        with pytest.raises(AssertionError, match="read before it is written"):
            gemv(
                stack, expert_table((2,)), activations(1, 256), torch.tensor([0]),
                gated=False, dp4a=False, chained=True,
            )  # fmt: skip

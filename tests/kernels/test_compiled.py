"""What Triton compiles of the kernels for few tokens, run on the CPU, against float64.

The interpreter knows neither inline assembly nor what lies where in threads; this does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from expert_stacks import random_stack, relative_error
from numpy.typing import NDArray
from ptx_machine import Memory, launch
from torch import Tensor

from mcsharp_sdk.kernels.expert_layer import expert_table
from mcsharp_sdk.quantization.grid import WIDTHS

pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

import compile_kernels

from mcsharp_sdk.kernels.triton_launch import OVERLAPPING
from mcsharp_sdk.kernels.triton_launch_few import SMALL_TILE, TILE, GemvTile

CAPABILITIES = (80, 90, 100)
BFLOAT16 = 2**-8
"""Relative error of what is rounded to bf16 once."""

TOKENS = 2
SLOTS = 3
"""Of a token, each with another expert."""


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def as_bits(x: Tensor) -> NDArray[np.uint16]:
    return x.bfloat16().view(torch.int16).numpy().view(np.uint16)


def as_numbers(bits: NDArray[np.uint16]) -> Tensor:
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32))


def empty(memory: Memory, array: NDArray[np.generic]) -> int:
    """Where a kernel writes, and the next one reads."""
    return memory.put(np.zeros_like(array), late=True)


@dataclass(frozen=True)
class Rounded:
    """Where activations are after rounding, what they stand for, float64 [T, K], and whether the
    next kernel could begin before this one had waited."""

    addresses: tuple[int, int, int]
    values: Tensor
    next_began: bool = False


class Experts:
    """One matrix of an expert of each width, as stored and in float64, and the experts that slots
    chose: all of them, and none, marked by their number."""

    def __init__(self, widths: tuple[int, ...], rows: int, columns: int, group: int) -> None:
        self.stack, self.exact = random_stack(widths, rows, columns, group)
        self.chosen = (torch.arange(TOKENS * SLOTS) + len(widths) - 1) % (len(widths) + 1)


def rounded(
    memory: Memory, x: Tensor, planes: int, capability: int, *, chained: bool = False
) -> Rounded:
    """bf16 [T, K] through the compiled kernel."""
    tokens, columns = x.shape
    blocks = -(-columns // 128)
    integers = np.zeros((tokens, planes, 128 * blocks), np.int8)
    of_blocks = np.zeros((tokens, blocks), np.float32)
    where = empty(memory, integers), empty(memory, of_blocks), empty(memory, of_blocks)
    kernel = compile_kernels.rounding(planes, chained)
    next_began = launch(
        compile_kernels.compiled(*kernel[1:], capability).asm["ptx"],
        memory,
        [memory.put(as_bits(x), late=True), *where, columns],
        (blocks, tokens, 1),
        compile_kernels.WARPS,
        early=overlaps(capability),
    )
    found = memory.get(where[0], integers).astype(np.float64)
    value = found[:, 0] if planes == 1 else 256 * found[:, 0] + found[:, 1]
    value = value.reshape(tokens, blocks, 128) * memory.get(where[1], of_blocks)[..., None]
    sums = memory.get(where[2], of_blocks)
    np.testing.assert_allclose(sums, value.sum(-1), rtol=1e-5, atol=1e-4 * np.abs(value).max())
    return Rounded(where, torch.from_numpy(value.reshape(tokens, -1)[:, :columns]), next_began)


def overlaps(capability: int) -> bool:
    return capability // 10 >= OVERLAPPING[0]


def multiplied(
    memory: Memory,
    experts: Experts,
    x: Rounded,
    capability: int,
    *,
    gated: bool,
    planes: int,
    tile: GemvTile,
) -> Tensor:
    """Products of the chosen experts' matrix, [slots, R or R/2], through the compiled kernel."""
    stack, widths = experts.stack, experts.stack.widths
    rows = stack.rows // 2 if gated else stack.rows
    tail = stack.columns % 128 != 0
    kernel = compile_kernels.gemv(widths, planes == 1, gated, stack.group_size, tail, tile)
    out = np.zeros((TOKENS * SLOTS, rows), np.uint16)
    where = empty(memory, out)
    weights = (stack.weights[width] for width in widths)
    stored = [tensor.numpy() for w in weights for tensor in (w.qweight, w.scales, w.zeros)]
    step = tile.rows // 2 if gated else tile.rows
    launch(
        compile_kernels.compiled(*kernel[1:], capability).asm["ptx"],
        memory,
        [
            *x.addresses,
            where,
            memory.put(experts.chosen.numpy()),
            memory.put(expert_table(widths).numpy()),
            *map(memory.put, stored),
            stack.rows,
            stack.columns,
        ],
        (-(-rows // step), SLOTS, TOKENS),
        tile.warps,
        early=overlaps(capability),
    )
    return as_numbers(memory.get(where, out))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(
    ("widths", "rows", "columns", "group", "gated", "tile"),
    [
        (WIDTHS, 144, 640, 128, True, TILE),
        (WIDTHS, 48, 160, 128, False, SMALL_TILE),
        ((2, 3), 48, 512, 256, False, SMALL_TILE),
        ((3,), 32, 256, 32, True, SMALL_TILE),
    ],
)
def test_products_agree_with_float64(
    widths: tuple[int, ...],
    rows: int,
    columns: int,
    group: int,
    gated: bool,
    tile: GemvTile,
    planes: int,
    capability: int,
) -> None:
    experts, memory = Experts(widths, rows, columns, group), Memory()
    x = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    seen = rounded(memory, x, planes, capability)
    assert relative_error(seen.values, x.double()) < (1e-2 if planes == 1 else 3e-5)
    out = multiplied(memory, experts, seen, capability, gated=gated, planes=planes, tile=tile)
    for slot, expert in enumerate(experts.chosen.tolist()):
        if expert == len(widths):
            assert not out[slot].any()
            continue
        expected = experts.exact[expert] @ seen.values[slot // SLOTS]
        if gated:
            gate, up = expected.chunk(2)
            expected = torch.nn.functional.silu(gate) * up
        assert relative_error(out[slot], expected) < BFLOAT16, widths[expert]


@pytest.mark.parametrize("planes", [1, 2])
def test_activations_of_any_size_are_rounded_or_become_nan(planes: int) -> None:
    block = torch.linspace(-1, 1, 128).bfloat16()
    sizes = [1e-30, 1.0, 6e35, 1e36, 3e38, 0.0]
    x = torch.stack([block * size for size in sizes])
    found = rounded(Memory(), x, planes, 90).values
    for row, expected in zip(found, x.double(), strict=True):
        assert (row - expected).abs().max() <= expected.abs().max() / (
            250 if planes == 1 else 2**14
        )
    for odd in (torch.inf, torch.nan):
        x[:, 5] = odd
        with np.errstate(invalid="ignore"):
            assert rounded(Memory(), x, planes, 90).values.isnan().all()


def test_a_product_begins_early_only_behind_another_of_the_same_experts() -> None:
    x = torch.ones(1, 128).bfloat16()
    began = [rounded(Memory(), x, 2, 90, chained=chained).next_began for chained in (False, True)]
    assert began == [False, True]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_weighed_sums_agree_with_float64(capability: int) -> None:
    width, experts = 600, 5
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(6, width, generator=generator).bfloat16()
    chosen = torch.tensor([[4, 1, experts], [3, 0, 2]])
    routing = torch.rand(2, 3, generator=generator)
    memory = Memory()
    out = np.zeros((2, width), np.uint16)
    where = empty(memory, out)
    launch(
        compile_kernels.compiled(*compile_kernels.combining()[1:], capability).asm["ptx"],
        memory,
        [
            memory.put(as_bits(y), late=True),
            memory.put(chosen.numpy()),
            memory.put(routing.numpy()),
            where,
            width,
            experts,
            3,
        ],
        (2, 2, 1),
        compile_kernels.WARPS,
        early=overlaps(capability),
    )
    kept = routing.double() * (chosen < experts)
    expected = (kept.unsqueeze(-1) * y.double().view(2, 3, width)).sum(1)
    assert relative_error(as_numbers(memory.get(where, out)), expected) < BFLOAT16


def run_products(capability: int, *, late: bool, shift: int = 0) -> None:
    """A small product, from activations that come late or not, at an address that is shifted."""
    memory = Memory()
    blocks = np.zeros((TOKENS, 2), np.float32)
    planes = memory.put(np.zeros(TOKENS * 512 + shift, np.uint8), late=late) + shift
    x = Rounded((planes, memory.put(blocks), memory.put(blocks)), torch.empty(0))
    experts = Experts((2,), 32, 256, 128)
    multiplied(memory, experts, x, capability, gated=False, planes=2, tile=TILE)


def test_a_kernel_that_began_early_and_did_not_wait_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_products(90, late=True)
    monkeypatch.setattr("test_compiled.overlaps", lambda capability: True)
    with pytest.raises(AssertionError, match="read before it is written"):
        run_products(80, late=True)


def test_an_address_that_is_no_multiple_is_found() -> None:
    with pytest.raises(AssertionError, match="no multiple of 16 bytes"):
        run_products(90, late=False, shift=4)

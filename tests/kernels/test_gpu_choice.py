"""How a layer of experts is run on a GPU where nothing was measured, without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mcsharp_sdk.kernels import gpu_dense
from mcsharp_sdk.kernels.case import BUILT_IN, LayerCase
from mcsharp_sdk.kernels.gpu_experts import explain_tiling, tilings_of
from mcsharp_sdk.kernels.linear import KERNELS
from mcsharp_sdk.kernels.tilings import TILINGS

MIXTRAL = LayerCase(4096, 14336, 28672, 8, 2, (2, 3), 128, torch.bfloat16, "cuda")
MANY_SMALL = replace(MIXTRAL, experts=128, slots=8, intermediate=768, rows=1536)


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCSHARP_CROSSOVERS", "off")
    monkeypatch.setattr(gpu_dense, "_has_product", lambda device: device == "cuda")


@pytest.mark.parametrize(
    ("case", "tokens", "kind"),
    [
        (MIXTRAL, 4, "gemv"),
        (MIXTRAL, 5, "gemm"),
        (MIXTRAL, 2047, "gemm"),
        (MIXTRAL, 2048, "dense"),
        (MANY_SMALL, 8191, "gemm"),
        (MANY_SMALL, 8192, "dense"),
        (replace(MIXTRAL, dtype=torch.float16), 4096, "gemm"),
        (replace(MIXTRAL, hidden=2880), 4096, "gemm"),
        (replace(MIXTRAL, intermediate=14400), 4096, "gemm"),
        (replace(MIXTRAL, rows=14340), 4096, "gemm"),
        (replace(MIXTRAL, device="cpu"), 4096, "gemm"),
        (replace(MIXTRAL, group_size=50), 4, "gemm"),
    ],
)
def test_the_kind_follows_tokens_and_slots_of_an_expert(
    case: LayerCase, tokens: int, kind: str
) -> None:
    assert explain_tiling(case, tokens) == (kind, BUILT_IN)


def test_dense_is_measured_where_it_fits_and_for_layers_alone() -> None:
    assert tilings_of(MIXTRAL) == TILINGS
    assert "dense" not in tilings_of(replace(MIXTRAL, dtype=torch.float16))
    assert "triton_gemm_64" in KERNELS
    assert "triton_dense" not in KERNELS


def test_a_gpu_of_another_kind_has_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: found[number])
    has_product = gpu_dense._has_product.__wrapped__
    assert not has_product("cuda")
    found.append((9, 0))
    assert has_product("cuda")
    assert not has_product("cpu")
    found.append((8, 0))
    assert not has_product("cuda")

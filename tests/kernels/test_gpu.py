"""The Triton kernels on a GPU, where there is one, against float64 on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_stacks import random_layer, relative_error, silu_layer
from grid_errors import share_as_good, share_of_equal_grids
from sorted_slots import check_sorted
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.kernels import gpu_dense, gpu_experts, gpu_support
from mcsharp_sdk.kernels.expert_layer import ExpertLayer, MatrixStack
from mcsharp_sdk.kernels.gpu_experts import run_experts
from mcsharp_sdk.kernels.tilings import MATRIX_TILINGS, TILINGS, Tiling
from mcsharp_sdk.quantization import GridSettings, factorise, gptq, quantise_gptq
from mcsharp_sdk.quantization.grid import PackedWeight
from mcsharp_sdk.quantization.hessian import accumulate
from mcsharp_sdk.quantization.search import fit_group, search_by_torch
from mcsharp_sdk.recipe.schema import Recipe

if not gpu_support.missing_support("cuda"):
    from mcsharp_sdk.kernels import triton_launch

pytestmark = pytest.mark.skipif(
    bool(gpu_support.missing_support("cuda")), reason="needs an NVIDIA GPU and triton"
)

ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error that activations between the matrices, rounded, may cause."""

MIXED = (1, 2, 3, 2, 4, 8)

DENSE = TILINGS["dense"]
needs_product = pytest.mark.skipif(
    not gpu_dense._has_product("cuda"), reason="needs torch's grouped product on a Hopper GPU"
)


def on_gpu(layer: ExpertLayer) -> ExpertLayer:
    def moved(stack: MatrixStack) -> MatrixStack:
        weights = {
            width: PackedWeight(weight.qweight.cuda(), weight.scales.cuda(), weight.zeros.cuda())
            for width, weight in stack.weights.items()
        }
        return dataclasses.replace(stack, weights=weights)

    return dataclasses.replace(
        layer, gate_up=moved(layer.gate_up), down=moved(layer.down), table=layer.table.cuda()
    )


def routed(tokens: int, hidden: int, experts: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token, some slots dropped, and routing weights."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    order = torch.rand(tokens, experts + 1, generator=generator).argsort(1)
    return x, order[:, :slots], torch.rand(tokens, slots, generator=generator)


def error_of(
    bits: Sequence[int],
    sizes: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    **how: Any,
) -> float:
    """Relative error of a layer of (hidden, intermediate, group) sizes on the GPU."""
    layer, gate_up, down = random_layer(bits, *sizes)
    hidden, chosen, routing = routed(tokens, sizes[0], len(bits), 2)
    hidden = hidden.to(dtype)
    out = run_experts(on_gpu(layer), hidden.cuda(), chosen.cuda(), routing.cuda(), **how)
    return relative_error(out.cpu(), silu_layer(hidden, chosen, routing, gate_up, down))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("sizes", [(256, 384, 128), (320, 96, 32), (200, 72, 40)], ids=str)
def test_layers_of_mixed_widths_agree_with_float64(
    sizes: tuple[int, int, int], tokens: int, dtype: torch.dtype
) -> None:
    assert error_of(MIXED, sizes, tokens, dtype) < ROUNDING[dtype]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tiling", MATRIX_TILINGS)
def test_every_width_in_every_way(bits: int, tiling: str) -> None:
    error = error_of([bits] * 4, (512, 256, 128), 7, tiling=TILINGS[tiling])
    assert error < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("bits", [(1,), (2,), (3,), MIXED], ids=str)
def test_8_bit_activations_are_as_far_off_as_in_the_interpreter(bits: tuple[int, ...]) -> None:
    assert error_of(bits * 4, (512, 256, 128), 2, dp4a=True) < 0.03


@pytest.mark.parametrize("experts", [1, 8, 256])
def test_slots_are_sorted_by_expert_and_cut_into_tiles(experts: int) -> None:
    chosen = torch.randint(0, experts + 1, (5000,), generator=torch.Generator().manual_seed(0))
    found = triton_launch.sort_slots(chosen.cuda(), experts)
    check_sorted(found, chosen.tolist(), experts)


@needs_product
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [(1,) * 4, (2,) * 4, (3,) * 4, (4,) * 4, (8,) * 4, MIXED], ids=str)
def test_long_prompts_with_dequantised_weights_agree_with_float64(
    bits: tuple[int, ...], group: int
) -> None:
    error = error_of(bits, (512, 256, group), 300, tiling=DENSE)
    assert error < ROUNDING[torch.bfloat16]


@needs_product
def test_a_long_prompt_is_done_in_parts_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, gate_up, down = random_layer(MIXED, 1024, 512, 128)
    gpu = on_gpu(layer)
    given = routed(700, 1024, len(MIXED), 2)
    hidden, chosen, routing = given[0].bfloat16().cuda(), given[1].cuda(), given[2].cuda()
    run_experts(gpu, hidden, chosen, routing, tiling=DENSE)
    weights = 2**22
    monkeypatch.setattr(gpu_dense, "DENSE_BYTES", weights)
    room = gpu_dense.workspace_bytes(gpu, 2, hidden.dtype)
    monkeypatch.setattr(gpu_experts, "LONG_WORKSPACE_BYTES", 300 * room)
    assert gpu_dense.rows_at_once(gpu.gate_up, len(MIXED), hidden.dtype) < gpu.gate_up.rows
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run_experts(gpu, hidden, chosen, routing, tiling=DENSE)
    taken = torch.cuda.max_memory_allocated() - before
    sorting = 2**20
    assert taken <= weights + 300 * room + 2 * out.nbytes + sorting
    expected = silu_layer(hidden.cpu(), given[1], given[2], gate_up, down)
    assert relative_error(out.cpu(), expected) < ROUNDING[torch.bfloat16]


@needs_product
def test_a_family_s_own_code_runs_between_dequantised_matrices() -> None:
    factors = torch.rand(len(MIXED)) + 0.5
    on_device = factors.bfloat16().cuda()

    def between(rows: Tensor, expert: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=1)
        return on_device[expert, None] * torch.nn.functional.silu(gate) * up

    def behind(rows: Tensor, expert: Tensor) -> Tensor:
        return rows * expert[:, None]

    layer, gate_up, down = random_layer(MIXED, 256, 128, 32, between, behind)
    hidden, chosen, routing = routed(200, 256, len(MIXED), 2)
    hidden = hidden.bfloat16()
    given = (hidden.cuda(), chosen.cuda(), routing.cuda())
    out = run_experts(on_gpu(layer), *given, tiling=DENSE)
    weighed = down * (on_device.cpu().double() * torch.arange(len(MIXED)))[:, None, None]
    expected = silu_layer(hidden, chosen, routing, gate_up, weighed)
    assert relative_error(out.cpu(), expected) < 1.5 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("tiling", [None, pytest.param(DENSE, marks=needs_product)], ids=str)
def test_a_recorded_layer_follows_the_routing(tiling: Tiling | None) -> None:
    layer, gate_up, down = random_layer(MIXED, 256, 128, 128)
    gpu = on_gpu(layer)
    hidden, chosen, routing = (part.cuda() for part in routed(1, 256, len(MIXED), 2))
    hidden = hidden.bfloat16()
    run_experts(gpu, hidden, chosen, routing, tiling=tiling)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_experts(gpu, hidden, chosen, routing, tiling=tiling)
    for experts in ([2, 0], [5, len(MIXED)], [1, 4]):
        chosen.copy_(torch.tensor([experts]))
        graph.replay()
        expected = silu_layer(hidden.cpu(), chosen.cpu(), routing.cpu(), gate_up, down)
        assert relative_error(out.cpu(), expected) < ROUNDING[torch.bfloat16]


def test_columns_are_quantised_as_by_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 96, 320, generator=generator).cuda()
    inputs = torch.randn(3, 2000, 320, generator=generator)
    factor = factorise((2 * inputs.transpose(1, 2) @ inputs).cuda())
    kernel = quantise_gptq(weights, factor, (2, 1, 3), GridSettings())
    monkeypatch.setattr(gptq, "_column_loop", lambda exact: gptq._quantise_columns)
    loop = quantise_gptq(weights, factor, (2, 1, 3), GridSettings())
    assert (kernel.codes != loop.codes).float().mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [32, 100, 128, 256])
def test_grids_are_those_that_torch_finds(columns: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(columns + bits)
    weights = (torch.randn(2, columns + 9, 1003, generator=generator) * 0.02).cuda()[:, 4:-5]
    importance = torch.rand(1, columns, generator=generator).cuda()
    settings = GridSettings(group_size=columns)
    kernel = fit_group(weights, bits, importance, settings)
    expected = search_by_torch(weights, bits, importance, settings)
    assert share_as_good(weights, bits, importance, kernel, expected) > 0.99
    assert share_of_equal_grids(kernel, expected) > 0.97


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("most", [0, 1, 16], ids=["not weighed", "weighed", "weighed by up to 16"])
def test_hessians_of_16_bit_inputs_are_those_of_float64(dtype: torch.dtype, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3000, 200, generator=generator)
    inputs[:, :3] *= 300  # as in residual streams
    inputs = inputs.to(dtype)
    weight = most * torch.rand(3000, generator=generator) if most else None
    hessian = torch.zeros(200, 200, device="cuda")
    accumulate(hessian, inputs.cuda(), None if weight is None else weight.cuda())
    rows = inputs.double() if weight is None else inputs.double() * weight.double()[:, None]
    expected = 2 * rows.T @ rows
    size = expected.diagonal().sqrt()
    difference = (hessian.cpu().double() - expected).abs() / torch.outer(size, size)
    assert float(difference.max()) < 3e-5
    assert torch.equal(hessian, hessian.T)


def recipe_for(folder: Path) -> Recipe:
    text = folder / "text.txt"
    text.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    return Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"source": "text", "path": str(text), "sequences": 8, "length": 32},
            "stages": [{"type": "GPTQQuantize", "bits": 3, "group_size": 32}],
        }
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_model_is_compressed_and_runs_on_the_gpu_as_on_the_cpu(
    family: str, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", family, dtype=torch.bfloat16)
    save_tiny_tokenizer(model)
    tokens = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    truth = logits(model, tokens, "cpu", torch.float32)
    errors = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        mcsharp_sdk.compress(recipe_for(tmp_path), model, out, progress=False, device=device)
        errors[device] = relative_error(logits(out, tokens, "cpu", torch.float32), truth.double())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.25)
    given = logits(tmp_path / "cuda", tokens, "cuda", torch.bfloat16)
    expected = logits(tmp_path / "cuda", tokens, "cpu", torch.float32)
    assert relative_error(given, expected.double()) < 0.05


def test_generation_with_a_static_cache_is_compiled_into_a_cuda_graph(tmp_path: Path) -> None:
    stored = save_tiny_model(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    save_tiny_tokenizer(stored)
    out = tmp_path / "out"
    mcsharp_sdk.compress(recipe_for(tmp_path), stored, out, progress=False)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map="cuda")
    tokens = torch.randint(0, 90, (1, 17), generator=torch.Generator().manual_seed(0)).cuda()

    def steps(**how: Any) -> Tensor:
        settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, **how}
        found = model.generate(tokens, return_dict_in_generate=True, **settings)
        return torch.stack(found.logits).float().cpu()

    expected = steps()
    torch._dynamo.utils.counters.clear()
    found = steps(cache_implementation="static")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert not torch._dynamo.utils.counters["graph_break"]
    # The first step is not compiled, so both have the same token in front of the second one.
    assert relative_error(found[:2], expected[:2].double()) < 0.02


@torch.inference_mode()
def logits(folder: Path, tokens: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    return model(tokens.to(device)).logits.float().cpu()

"""What the benchmarks for GPUs compute around their measurements, which a CPU can check."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import gpu_decode
import gpu_gptq
import gpu_peers
import gpu_prefill
import pytest
import torch
from expert_stacks import relative_error, silu_layer
from gpu_timing import Shape, dense_weights, expert_bytes, graphed_if_possible, random_layer
from torch import Tensor

SMALL = Shape(hidden=256, inner=128, experts=2, slots=1, layers=3)
"""Groups have 128 columns: ``gate_up`` [256, 256] has two in a row, ``down`` [256, 128] one."""

AT_2_BITS = (256 * 64 + 256 * 2 * 2 + 2 * 64) + (256 * 32 + 256 * 1 * 2 + 1 * 64)
AT_3_BITS = (256 * 96 + 256 * 2 * 2 + 2 * 96) + (256 * 48 + 256 * 1 * 2 + 1 * 96)
"""Bytes of an expert of that shape: codes, fp16 scales and zero points of both matrices."""

with_gptqmodel = pytest.mark.skipif(
    find_spec("gptqmodel") is None, reason=f"GPTQModel is not installed ({gpu_peers.TESTED})"
)


# Limits


def test_bytes_of_experts_are_codes_scales_and_zero_points_of_their_widths() -> None:
    layer = random_layer(SMALL, [2, 3], "cpu")
    assert expert_bytes(layer, [0]) == AT_2_BITS
    assert expert_bytes(layer, [1, 0, 1]) == AT_2_BITS + 2 * AT_3_BITS


@pytest.mark.parametrize(
    ("chosen", "weights"), [([0, 0, 0], AT_2_BITS), ([1, 0, 1], AT_2_BITS + AT_3_BITS)]
)
def test_prefill_limits_are_those_counted_by_hand(chosen: list[int], weights: int) -> None:
    layer = random_layer(SMALL, [2, 3], "cpu")
    operations = 3 * 2 * (256 * 256 + 256 * 128)
    moved = weights + 3 * 256 * 2 + 3 * 256 * 2
    found = gpu_prefill.limits(layer, torch.tensor(chosen).unsqueeze(1), 1e9, 1e6)
    assert list(found.values()) == pytest.approx([operations / 1e6, moved / 1e3])


def test_prefill_rows_have_their_share_of_the_higher_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_prefill.report(7, {"ours": 2.0, "dense bf16": 8.0}, {"products": 0.5, "bytes": 1.0})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["ours", "2.000", "4.00", "50%"]
    assert rows[2] == ["dense", "bf16", "8.000", "1.00", "12%"]
    assert rows[3:] == [["products", "0.500", "16.00"], ["bytes", "1.000", "8.00"]]


# The estimate for a model


def test_model_estimate_is_the_parts_of_both_matrices_times_experts_and_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = {"Hessians, fp32": 1e6, "columns, one launch per operation": 1e6}
    gate_up = dict(zip(gpu_gptq.PARTS, (1000.0, 200.0, 30.0), strict=True)) | others
    down = dict(zip(gpu_gptq.PARTS, (4000.0, 500.0, 60.0), strict=True)) | others
    # Measured were 4 experts of a layer; the model has 3 layers of 2: one and a half times as many.
    seconds = gpu_gptq.model_seconds([gate_up, down], 4, SMALL)
    assert list(seconds.values()) == pytest.approx([7.5, 1.05, 0.135])
    gpu_gptq.report_model(seconds, SMALL, 64, goal=17.37)
    text = capsys.readouterr().out
    assert text.startswith("estimate from one layer's parts: 3 layers x 2 experts")
    assert text.splitlines()[-2].split() == ["sum", "/", "goal", "of", "17", "s", "0.50"]
    assert "not in it: reading, attention" in text.splitlines()[-1]


def test_every_part_of_the_estimate_is_one_that_is_measured() -> None:
    precisions = (gpu_gptq.EXACT, *gpu_gptq.PRECISIONS)
    measured = {f"Hessians, {name}" for name in precisions} | {"factors"}
    measured |= {f"columns, {loop}" for loop in gpu_gptq.LOOPS}
    assert measured.issuperset(gpu_gptq.PARTS)


# Peers


def test_both_ways_through_the_experts_give_the_sum_of_the_chosen_ones() -> None:
    torch.manual_seed(0)
    shape = Shape(hidden=256, inner=128, experts=4, slots=2, layers=1)
    layer = random_layer(shape, [2, 3], "cpu")
    products = gpu_peers.dense_products(dense_weights(layer))
    gate_up, down = (weight.double() for weight in dense_weights(layer))
    tokens = gpu_decode.random_tokens(shape, "cpu")
    x, chosen, routing = (
        torch.cat([getattr(token, name) for token in tokens]) for name in ("x", "chosen", "routing")
    )
    truth = silu_layer(x.double(), chosen, routing.double(), gate_up, down)
    one_by_one = torch.cat([gpu_decode.one_after_the_other(products, token) for token in tokens])
    by_expert = gpu_prefill.expert_by_expert(products, x, chosen, routing)
    assert relative_error(one_by_one, truth) < 0.01
    assert relative_error(by_expert, truth) < 0.01


def test_gptq_files_hold_eight_codes_a_word_along_columns_around_eight() -> None:
    checkpoint = gpu_peers.gptq_checkpoint(8, 256)
    words, scales = checkpoint["qweight"].tolist(), checkpoint["scales"].tolist()
    expected = [
        [((words[k // 8][r] >> 4 * (k % 8) & 15) - 8) * scales[k // 128][r] for k in range(256)]
        for r in range(8)
    ]
    found = gpu_peers.gptq_weights(checkpoint, torch.float16)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_zero_point_that_is_read_one_too_low_is_noticed() -> None:
    torch.manual_seed(0)
    checkpoint = gpu_peers.gptq_checkpoint(64, 256)
    right = gpu_peers.gptq_weights(checkpoint, torch.float16)
    wrong = right + checkpoint["scales"].float().repeat_interleave(128, 0).T
    errors = [
        gpu_peers.relative_error(
            partial(torch.nn.functional.linear, weight=weight.half()),
            checkpoint,
            "cpu",
            torch.float16,
        )
        for weight in (right, wrong)
    ]
    assert errors[0] < gpu_peers.LARGEST_ERROR / 5
    assert errors[1] > gpu_peers.LARGEST_ERROR * 5


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="GPTQModel is installed")
def test_without_gptqmodel_there_is_no_row_of_it_and_a_line_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu_peers.gptqmodel_peer(SMALL, "cpu") == {}
    assert f"pip install {gpu_peers.TESTED}" in capsys.readouterr().out


@pytest.mark.slow
@with_gptqmodel
@pytest.mark.parametrize("size", SMALL.matrices.values(), ids=list(SMALL.matrices))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_gptqmodels_layer_multiplies_with_the_weights_that_it_says_it_has(
    size: tuple[int, int], dtype: torch.dtype, rounding: float
) -> None:
    torch.manual_seed(0)
    checkpoint = gpu_peers.gptq_checkpoint(*size)
    layer: Any = gpu_peers.gptqmodel_layers([checkpoint], "cpu", dtype)[0]
    said = layer.dequantize_weight().T.double()  # before a first call, which lays codes out anew
    ours = gpu_peers.gptq_weights(checkpoint, dtype).double()
    torch.testing.assert_close(said, ours, rtol=rounding, atol=0)
    x = torch.randn(5, size[1]).to(dtype)
    with torch.inference_mode():
        out = layer(x)
    truth = x.double() @ said.T
    assert out.shape == (5, size[0])
    assert relative_error(out, truth) < 2 * rounding
    assert gpu_peers.relative_error(layer, checkpoint, "cpu", dtype) < gpu_peers.LARGEST_ERROR


@pytest.mark.slow
@with_gptqmodel
def test_the_row_of_gptqmodel_is_named_after_the_kernel_that_it_chose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ((name, products),) = gpu_peers.gptqmodel_peer(SMALL, "cpu").items()
    kernel = type(products.down[1]).__name__
    assert name == f"GPTQModel {kernel}"
    assert f"chose its kernel {kernel}" in capsys.readouterr().out
    assert products.expert(1, torch.ones(3, 256, dtype=torch.bfloat16)).shape == (3, 256)


# Running them


def test_a_peer_that_no_graph_can_record_is_timed_without_and_its_name_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run() -> Tensor:
        return torch.zeros(1)

    def refuse(run: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert graphed_if_possible("peer", run, lambda recorded: recorded) == ("peer", run)
    assert graphed_if_possible("peer", run, refuse) == ("peer, no graph", run)
    assert capsys.readouterr().out.endswith("operation not permitted when stream is capturing\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu_decode", "gpu_prefill", "gpu_gptq"])
def test_without_a_gpu_a_benchmark_says_so_and_ends_with_status_1(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 1
    assert "needs a CUDA GPU" in capsys.readouterr().out

"""Planned work of stages, against multiplications that are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mcsharp_sdk.engine import durations
from mcsharp_sdk.engine.durations import Speeds, stage_seconds
from mcsharp_sdk.engine.sizes import LayerSizes, MatrixSize, ModelSizes
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.expert_measurement import HESSIAN_TOKENS
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.quantization.hessian import GRAM_COLUMNS
from mcsharp_sdk.quantization.lwc import quantise_lwc
from mcsharp_sdk.quantization.search import GridSettings

EXPERTS, ROWS, COLUMNS = 2, (48, 32), (2 * GRAM_COLUMNS, 3 * GRAM_COLUMNS)
ENOUGH = COLUMNS[1]
"""Tokens of the calibration from which on no Hessian is completed: each expert gets all."""


def sizes(*linears: MatrixSize) -> ModelSizes:
    """One layer, with every token at both experts."""
    expert = tuple(MatrixSize(r, c, "experts") for r, c in zip(ROWS, COLUMNS, strict=True))
    layer = LayerSizes(0, 0, True, EXPERTS, EXPERTS, expert, linears)
    return ModelSizes(0, 0, 0, torch.float32, 64, (layer,), 2)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Planned multiplications in float32 of a stage."""
    weights = dict.fromkeys(("gptq", "rtn", "hqq", "lwc"), math.inf)
    speeds = Speeds(math.inf, 1.0, weights, math.inf, math.inf)
    monkeypatch.setattr(durations.Speeds, "measure", lambda *_: speeds)

    def of(stage: Modifier, tokens: int = ENOUGH, *linears: MatrixSize) -> float:
        return stage_seconds([stage], sizes(*linears), tokens)[0]

    return of


def quantise(quantizer: str, **settings: Any) -> GPTQQuantize:
    given = {"bits": 2, "quantizer": quantizer, "other_bits": None, **settings}
    return GPTQQuantize.model_validate(given)


def counted(tokens: int, columns: int) -> float:
    """Multiplications of a Hessian: the products of its blocks on and above the diagonal."""
    starts = range(0, columns, GRAM_COLUMNS)
    return sum(tokens * GRAM_COLUMNS * (columns - start) for start in starts)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn", "hqq", "lwc"])
def test_every_quantiser_is_planned_with_the_hessians_that_it_gets(
    quantizer: str, work: Callable[..., float]
) -> None:
    stage = quantise(quantizer)
    more = work(stage, 2 * ENOUGH) - work(stage)
    expected = EXPERTS * sum(counted(ENOUGH, columns) for columns in COLUMNS)
    assert expected / 1.6 < more <= expected


@pytest.mark.parametrize("linear", [False, True])
def test_learned_clipping_is_planned_with_all_its_steps(
    linear: bool, work: Callable[..., float]
) -> None:
    linears = [MatrixSize(24, 96, "self_attn")] * linear
    settings = {"other_bits": 4 if linear else None}
    shapes = [*zip(ROWS, COLUMNS, strict=True)] * EXPERTS + [(24, 96)] * linear
    with FlopCounterMode(display=False) as counter:
        for r, c in shapes:
            quantise_lwc(torch.randn(1, r, c), torch.eye(c)[None], [2], GridSettings(group_size=32))
    learned, rounded = (
        work(quantise(name, **settings), ENOUGH, *linears) for name in ("lwc", "rtn")
    )
    assert learned - rounded == pytest.approx(counter.get_total_flops() / 2)


@pytest.mark.parametrize("tokens", [600, 2047, 2048, 4095, 4096, 10000])
def test_statistics_are_planned_with_the_tokens_that_their_hessians_take(
    tokens: int, work: Callable[..., float]
) -> None:
    each = (work(ExpertStats()) - work(ExpertStats(), 0)) / ENOUGH  # all of ENOUGH are taken
    taken = (work(ExpertStats(), tokens) - work(ExpertStats(), 0)) / each
    assert min(tokens, HESSIAN_TOKENS) <= taken < 2 * HESSIAN_TOKENS
    assert taken <= tokens


@pytest.mark.parametrize(("tokens", "turns"), [(0, 1), (ENOUGH, 2)])
def test_experts_are_planned_to_be_turned_and_back_where_they_are_run(
    tokens: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = Speeds(math.inf, math.inf, {"rtn": math.inf}, math.inf, turned=1.0)
    monkeypatch.setattr(durations.Speeds, "measure", lambda *_: speeds)
    linear = MatrixSize(24, 96, "self_attn")
    turned, plain = (
        stage_seconds([quantise("rtn", **settings)], sizes(linear), tokens)[0]
        for settings in ({"rotation": "hadamard"}, {})
    )
    experts = EXPERTS * sum(r * c for r, c in zip(ROWS, COLUMNS, strict=True))
    assert turned - plain == pytest.approx(turns * experts)


def test_weights_are_planned_to_be_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = Speeds(math.inf, math.inf, {"rtn": math.inf}, math.inf, math.inf)
    monkeypatch.setattr(durations.Speeds, "measure", lambda *_: speeds)
    weights = EXPERTS * sum(r * c for r, c in zip(ROWS, COLUMNS, strict=True))
    for other_bits, handled in ((None, weights), (4, weights + 24 * 96)):
        stage = quantise("rtn", other_bits=other_bits)
        seconds = stage_seconds([stage], sizes(MatrixSize(24, 96, "self_attn")), 0)[0]
        assert seconds == pytest.approx(handled / durations.HANDLED)

"""Expert statistics against a plain computation on the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import PLAIN_FAMILIES, save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.artifacts import ExpertStatistics
from mcsharp_sdk.models.experts import MATRICES, fused_weight, is_experts
from mcsharp_sdk.modifiers.expert_measurement import QUICK_SEARCH
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.quantization import GridSettings, quantise_rtn
from mcsharp_sdk.recipe.schema import Recipe

GROUP = 16
GRID = GridSettings(group_size=GROUP, **QUICK_SEARCH)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    return file


def measure(model: Path, text: Path, work: Path, **settings: Any) -> ExpertStatistics:
    calibration = {"source": "text", "path": str(text), "sequences": 6, "length": 32}
    stage = {"type": "ExpertStats", "group_size": GROUP, **settings}
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {**calibration, "sampling": "first"},
            "stages": [stage],
            "exports": [],
        }
    )
    mcsharp_sdk.compress(recipe, model, work / "out", run_dir=work / "run", progress=False)
    return ExpertStatistics.load(work / "run" / ExpertStatistics.FILE)


def tokens_of(text: Path) -> torch.Tensor:
    """The tokens that the calibration takes: the tiny tokenizer's are ASCII codes."""
    return torch.tensor([ord(c) for c in text.read_text()[: 6 * 32]]).view(6, 32)


def full_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def block_error(experts: Any, expert: int, width: int, arguments: tuple[Any, ...]) -> float:
    """Change of a block's output when one expert is rounded to nearest, by running the block."""
    before = experts(*arguments)
    own = {m: fused_weight(experts, m)[expert].clone() for m in MATRICES}
    for matrix in MATRICES:
        rounded = quantise_rtn(own[matrix][None], [width], GRID)
        fused_weight(experts, matrix)[expert] = rounded.dequantise()[0]
    after = experts(*arguments)
    for matrix in MATRICES:
        fused_weight(experts, matrix)[expert] = own[matrix]
    return float((after - before).norm())


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_statistics_equal_a_plain_computation_on_the_full_model(
    family: str, text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", family)
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released")

    model = full_model(folder)
    calls: dict[int, tuple[Any, ...]] = {}
    for index, layer in enumerate(model.model.layers):
        for module in filter(is_experts, layer.modules()):
            module.register_forward_pre_hook(
                lambda _, arguments, index=index: calls.setdefault(index, arguments)
            )
    with torch.no_grad():
        model(tokens_of(text), use_cache=False)

    assert [s.layer for s in measured.layers] == sorted(calls)
    for statistics in measured.layers:
        arguments = calls[statistics.layer]
        experts = next(filter(is_experts, model.model.layers[statistics.layer].modules()))
        chosen = arguments[1]
        counts = [int((chosen == e).sum()) for e in range(experts.num_experts)]
        np.testing.assert_array_equal(statistics.activation_count, counts)
        for width in (1, 2, 3):
            expected = [block_error(experts, e, width, arguments) for e in range(len(counts))]
            np.testing.assert_allclose(statistics.quant_error[width], expected, rtol=1e-3)


def test_routing_weights_are_those_before_renormalisation(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="released")
    model = full_model(folder)
    logits: list[torch.Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *a: logits.append(a[2][0]))
    with torch.no_grad():
        model(tokens_of(text), use_cache=False)
    probabilities = logits[0].double().softmax(-1)
    top = probabilities.topk(2)
    expected = torch.zeros(4, dtype=torch.float64)
    expected.index_add_(0, top.indices.flatten(), top.values.flatten())
    np.testing.assert_allclose(measured.layers[0].routing_weight_sum, expected, rtol=1e-5)


def test_gptq_errors_are_below_those_of_rounding(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    gptq = measure(folder, text, tmp_path / "gptq")
    rounded = measure(folder, text, tmp_path / "rtn", quantizer="rtn")
    for a, b in zip(gptq.layers, rounded.layers, strict=True):
        np.testing.assert_array_equal(a.activation_count, b.activation_count)
        for width in (2, 3):
            assert a.quant_error[width].sum() < b.quant_error[width].sum()
        assert (a.quant_error[3] < a.quant_error[1]).all()
        assert a.drop_error is not None
        assert (a.drop_error > a.quant_error[3]).all()


def test_model_errors_equal_a_plain_computation_on_the_full_model(
    text: Path, tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", "mixtral")
    save_tiny_tokenizer(folder)
    measured = measure(folder, text, tmp_path, mode="paper", bits=[2], error_tokens=64)
    assert ExpertStats(mode="paper").scope == "model"
    model = full_model(folder)
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))

    @torch.no_grad()
    def run() -> torch.Tensor:
        model(tokens_of(text)[:2], use_cache=False)
        return last.pop()

    reference = run()
    for layer in range(3):
        experts = model.model.layers[layer].mlp.experts
        for expert in range(4):
            own = {m: fused_weight(experts, m)[expert].clone() for m in MATRICES}
            with torch.no_grad():
                for matrix in MATRICES:
                    rounded = quantise_rtn(own[matrix][None], [2], GRID)
                    fused_weight(experts, matrix)[expert] = rounded.dequantise()[0]
                change = float((run() - reference).norm())
                for matrix in MATRICES:
                    fused_weight(experts, matrix)[expert] = own[matrix]
            error = measured.layers[layer].quant_error[2][expert]
            assert error == pytest.approx(change, rel=1e-3)

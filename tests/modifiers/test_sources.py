"""Calibration of several sources: totals are sums, and each source is counted by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.artifacts import ExpertStatistics, TokenProtectionRule, TopAnyTraining
from mcsharp_sdk.models.experts import is_experts
from mcsharp_sdk.recipe.schema import Recipe

SIZES = {"a.txt": (4, 32), "b.txt": (3, 20)}
"""File -> sequences and length taken from it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and texts; the texts have no character in common."""
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral"))
    for name, start in (("a.txt", 33), ("b.txt", 80)):
        text = "".join(chr(start + (i * i + i // 7) % 45) for i in range(400))
        (folder / name).write_text(text)
    return folder


def run(folder: Path, names: Sequence[str], work: Path, *stages: dict[str, Any]) -> Path:
    """The run directory of these stages on these texts."""
    calibration = [
        {"source": "text", "path": str(folder / name), "sampling": "first"}
        | dict(zip(("sequences", "length"), SIZES[name], strict=True))
        for name in names
    ]
    recipe = Recipe.from_dict(
        {"version": 1, "calibration": calibration, "stages": list(stages), "exports": []}
    )
    directory = work / "-".join(["run", *names])
    mcsharp_sdk.compress(
        recipe, folder / "model", work / "out", run_dir=directory, overwrite=True, progress=False
    )
    return directory


STATS = {"type": "ExpertStats", "quantizer": "rtn", "group_size": 16, "error_tokens": 10**6}


def statistics(folder: Path, names: Sequence[str], work: Path, **settings: Any) -> ExpertStatistics:
    directory = run(folder, names, work, {**STATS, **settings})
    return ExpertStatistics.load(directory / ExpertStatistics.FILE)


def tokens_of(folder: Path, name: str) -> torch.Tensor:
    count, length = SIZES[name]
    codes = [ord(c) for c in (folder / name).read_text()[: count * length]]
    return torch.tensor(codes).view(count, length)


def full_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, experts_implementation="eager"
    ).eval()


def test_totals_equal_the_sums_of_separate_runs(folder: Path, tmp_path: Path) -> None:
    both = statistics(folder, ["a.txt", "b.txt"], tmp_path)
    alone = [statistics(folder, [name], tmp_path) for name in SIZES]
    for total, *parts in zip(both.layers, *(one.layers for one in alone), strict=True):
        assert total.tokens == sum(part.tokens or 0 for part in parts) == 4 * 32 + 3 * 20
        for name in ("activation_count", "routing_weight_sum"):
            expected = sum(getattr(part, name) for part in parts)
            np.testing.assert_allclose(getattr(total, name), expected, rtol=1e-5)
            for source, part in zip(total.sources, parts, strict=True):
                np.testing.assert_allclose(getattr(source, name), getattr(part, name), rtol=1e-5)
        for width, errors in total.quant_error.items():
            squares = sum(part.quant_error[width] ** 2 for part in parts)
            np.testing.assert_allclose(errors**2, squares, rtol=1e-4)
        assert all(part.sources == () for part in parts)


@torch.no_grad()
def test_each_source_is_counted_as_the_full_model_routes_it(folder: Path, tmp_path: Path) -> None:
    measured = statistics(folder, ["a.txt", "b.txt"], tmp_path)
    model = full_model(folder)
    for position, name in enumerate(SIZES):
        counts = [np.zeros(4) for _ in measured.layers]
        sums = [np.zeros(4) for _ in measured.layers]
        for sequence in tokens_of(folder, name):
            output = model(sequence[None], output_router_logits=True, use_cache=False)
            for layer, logits in enumerate(output.router_logits):
                scores = logits.double().softmax(-1).numpy()
                for token in scores:
                    for expert in np.argsort(-token)[:2]:
                        counts[layer][expert] += 1
                        sums[layer][expert] += token[expert]
        for layer, found in enumerate(measured.layers):
            source = found.sources[position]
            assert (source.source, source.tokens) == (name, tokens_of(folder, name).numel())
            np.testing.assert_array_equal(source.activation_count, counts[layer])
            np.testing.assert_allclose(source.routing_weight_sum, sums[layer], rtol=1e-5)


def test_errors_of_the_whole_model_add_up_over_lengths(folder: Path, tmp_path: Path) -> None:
    settings = {"scope": "model", "bits": [1], "error_tokens": 10**6}
    both = statistics(folder, ["a.txt", "b.txt"], tmp_path, **settings)
    alone = [statistics(folder, [name], tmp_path, **settings) for name in SIZES]
    for total, *parts in zip(both.layers, *(one.layers for one in alone), strict=True):
        squares = sum(part.quant_error[1] ** 2 for part in parts)
        np.testing.assert_allclose(total.quant_error[1] ** 2, squares, rtol=1e-3)


def test_a_shift_of_domain_shows_in_the_file_the_report_and_python(
    folder: Path, tmp_path: Path
) -> None:
    directory = run(folder, ["a.txt", "b.txt"], tmp_path, STATS)
    found = ExpertStatistics.load(directory / ExpertStatistics.FILE)
    shifts = found.domain_shift()
    assert [(s.layer, s.first, s.second) for s in shifts] == [
        (layer.layer, "a.txt", "b.txt") for layer in found.layers
    ]
    for shift, layer in zip(shifts, found.layers, strict=True):
        one, other = (s.activation_count for s in layer.sources)
        # Spearman: with distinct values, 1 - 6 Σ d² / (n (n² - 1)).
        if len(set(one)) == len(set(other)) == 4:
            distance = one.argsort().argsort() - other.argsort().argsort()
            expected = 1 - 6 * (distance**2).sum() / (4 * 15)
            assert shift.rank_correlation == pytest.approx(expected)
        most = np.abs(one / one.sum() - other / other.sum()).argmax()
        assert next(iter(shift.changed)) == most
        ranks = [sorted(range(4), key=lambda e: -count[e]) for count in (one, other)]
        places = [{expert: order.index(expert) for expert in range(4)} for order in ranks]
        moved = {e: (places[0][e], places[1][e]) for e in range(4)}
        assert dict(shift.moved) == {e: p for e, p in moved.items() if p[0] != p[1]}
        distances = [abs(first - second) for first, second in shift.moved.values()]
        assert distances == sorted(distances, reverse=True)


def test_protection_is_found_sequence_by_sequence(folder: Path, tmp_path: Path) -> None:
    """Half of each sequence is protected, whatever the lengths: thresholds of 1 drop the rest."""
    stage = {"type": "TokenProtection", "threshold": 1.0, "protect_ratio": 0.5}
    directory = run(folder, ["a.txt", "b.txt"], tmp_path, stage)
    rule = TokenProtectionRule.load(directory / TokenProtectionRule.FILE)
    for layer in rule.layers:
        assert layer.keep_ratio == pytest.approx((1 + 0.5) / 2)


@torch.no_grad()
def test_received_attention_is_that_of_each_sequence(folder: Path, tmp_path: Path) -> None:
    """What protects tokens in the mixed run protects them when each sequence runs alone."""
    stage = {"type": "TokenProtection", "threshold": 0.6, "protect_ratio": 0.3}
    both = run(folder, ["a.txt", "b.txt"], tmp_path, stage)
    kept = [
        [
            layer.keep_ratio
            for layer in TokenProtectionRule.load(d / TokenProtectionRule.FILE).layers
        ]
        for d in (both, *(run(folder, [name], tmp_path, stage) for name in SIZES))
    ]
    sizes = np.array([np.prod(size) for size in SIZES.values()])
    expected = np.array(kept[1:]).T @ sizes / sizes.sum()
    np.testing.assert_allclose(kept[0], expected, rtol=1e-6)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_top_any_routers_train_on_several_lengths(scope: str, folder: Path, tmp_path: Path) -> None:
    stage = {"type": "TopAnyRouter", "scope": scope, "steps": 6, "target_activation": 0.75}
    directory = run(folder, ["a.txt", "b.txt"], tmp_path, stage)
    training = TopAnyTraining.load(directory / TopAnyTraining.FILE)
    kept = np.mean(list(training.keep_ratio.values()))
    assert kept == pytest.approx(0.75, abs=0.02)


def test_gptq_sees_all_sources(folder: Path, tmp_path: Path) -> None:
    """Weights differ from those of either source alone: its Hessians hold both."""
    stage = {"type": "GPTQQuantize", "bits": 2, "group_size": 16}
    runs = [["a.txt", "b.txt"], ["a.txt"], ["b.txt"]]
    files = [
        next(run(folder, names, tmp_path, stage).rglob("*00000.safetensors")) for names in runs
    ]
    assert len({file.read_bytes() for file in files}) == 3


def test_statistics_without_sources_load_as_before(tmp_path: Path) -> None:
    layer = {"layer": 0, "activation_count": [1, 2], "routing_weight_sum": [0.5, 1.0]}
    file = tmp_path / "factors.json"
    file.write_text(json.dumps({"layers": [layer]}))
    found = ExpertStatistics.load(file)
    assert found.layers[0].sources == ()
    assert found.domain_shift() == ()
    assert "sources" not in found.to_json()["layers"][0]


def test_mixtral_has_the_experts_that_the_tests_count(folder: Path) -> None:
    assert {m.num_experts for m in full_model(folder).modules() if is_experts(m)} == {4}

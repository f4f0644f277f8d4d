"""The BitAllocation stage."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mcsharp_sdk.allocation.baselines import ALLOCATORS, AllocatorName
from mcsharp_sdk.allocation.solver import InfeasibleBudget
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, LayerStatistics
from mcsharp_sdk.engine.context import RunContext
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.run_directory import RunDirectory
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.width_allocation import allocate
from mcsharp_sdk.recipe.schema import Recipe


def measured(*experts: int, widths: tuple[int, ...] = (1, 2, 3)) -> ExpertStatistics:
    rng = np.random.default_rng(sum(experts))

    def layer(index: int, count: int) -> LayerStatistics:
        scale = rng.lognormal(size=count) * 10.0**index
        errors = {w: scale * 2.0**-w * rng.uniform(0.8, 1.2, count) for w in widths}
        return LayerStatistics(index, rng.uniform(1, 9, count), rng.random(count), errors)

    layers = tuple(layer(index, count) for index, count in enumerate(experts))
    return ExpertStatistics("m", "made up", None, None, layers)


@pytest.mark.parametrize("mode", [{"mode": "released"}, {"alpha": 1.0, "beta": 1.5, "gamma": 1.0}])
def test_published_maps_are_reproduced_in_all_layers(
    mode: dict[str, Any], shared_path: Callable[[str], Path]
) -> None:
    factors = shared_path("reference/mixtral_8x7b_factors.json")
    published = BitMap.load(shared_path("reference/mixtral_8x7b_allocation_16bit.json"))
    found = allocate(factors, BitAllocation(target_bits=2.0, **mode))
    assert found.bits == published.bits
    assert found.nominal_bits == 2.0


def test_the_papers_exponent_gives_other_maps(shared_path: Callable[[str], Path]) -> None:
    factors = shared_path("reference/mixtral_8x7b_factors.json")
    released, paper = (
        allocate(factors, BitAllocation(target_bits=2.0, mode=mode)).bits
        for mode in ("released", "paper")
    )
    assert released != paper


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"settings are a BitAllocation, e.g. .*, not \{'target"):
        allocate(measured(4), {"target_bits": 2.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("best", (0.0, 0.0, 2.0, "at_most")),
        ("paper", (1.0, 1.0, 2.0, "exact")),
        ("released", (1.0, 1.5, 1.0, "at_most")),
    ],
)
def test_a_mode_sets_defaults_and_what_is_given_wins(mode: str, expected: tuple[Any, ...]) -> None:
    settings = BitAllocation.model_validate({"target_bits": 2, "mode": mode})
    assert (settings.alpha, settings.beta, settings.gamma, settings.budget) == expected
    assert BitAllocation.model_validate({"target_bits": 2, "mode": mode, "alpha": 3}).alpha == 3
    assert BitAllocation(target_bits=2) == BitAllocation(target_bits=2, mode="best")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_bits": 3.5}, "target_bits = 3.5 cannot be met with widths of 1 to 3 bits"),
        ({"target_bits": 1.5, "widths": [2, 3]}, "cannot be met with widths of 2 to 3"),
        ({"target_bits": 2, "at_least": {4: 1}}, "at_least names width 4"),
        ({"target_bits": 2, "budget_scope": "global", "mode": "released"}, "gamma must be 2"),
        ({"target_bits": 2, "loss_weighting": True}, "goes with budget_scope: global"),
        (
            {"target_bits": 2, "mode": "paper", "allocator": "block_score_predictor"},
            "block_score_predictor widens whole layers, .*: give 'budget: at_most'",
        ),
        ({"target_bits": 2, "widths": []}, "widths"),
        ({"target_bits": 2, "alpha": -1}, "alpha"),
        ({"target_bits": float("nan")}, "target_bits"),
        ({"target_bits": 2, "targetbits": 2}, "targetbits"),
        ({}, "target_bits"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BitAllocation.model_validate(given)


@pytest.mark.parametrize("allocator", [n for n, a in ALLOCATORS.items() if n != "pmq"])
def test_loss_weighting_is_refused_where_no_quantisation_errors_are_used(
    allocator: AllocatorName,
) -> None:
    given: dict[str, Any] = {"target_bits": 2, "allocator": allocator, "budget_scope": "global"}
    if allocator == "f_norm":
        assert BitAllocation(**given, loss_weighting=True).loss_weighting
        return
    with pytest.raises(ValidationError, match=f"quantisation errors, which {allocator} does not"):
        BitAllocation(**given, loss_weighting=True)
    assert BitAllocation(**given, loss_weighting=False).loss_weighting is False


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("allocator", "rule"),
    [
        *[("pmq", "exact"), ("random", "exact"), ("uniform", "exact"), ("uniform", "at_most")],
        ("block_score_oracle", "at_most"),
    ],
)
def test_a_budget_is_refused_before_work_just_where_it_cannot_be_met(
    allocator: str, rule: str, scope: str
) -> None:
    """The check, which knows how many experts there are, against the allocation itself."""
    told = measured(5, 5, widths=(1, 3, 4))
    layers = tuple(replace(layer, block_cosine=0.1 * layer.layer) for layer in told.layers)
    given = {"widths": (1, 3, 4), "budget": rule, "allocator": allocator, "budget_scope": scope}
    for bits in range(5, 17):
        target = {"target_bits": bits / 5, "at_least": {}}
        settings = BitAllocation.model_validate({**given, **target})
        problems = settings.check_experts({0: 5, 1: 5})
        with pytest.raises(InfeasibleBudget) if problems else nullcontext():
            allocate(replace(told, layers=layers), settings)


def test_uniform_refuses_an_exact_budget_between_its_two_widths() -> None:
    given: dict[str, Any] = {"target_bits": 17 / 8, "allocator": "uniform", "widths": (1, 3, 4)}
    (problem,) = BitAllocation(**given, budget="exact").check_experts({0: 8})
    assert problem.where == "target_bits"
    assert "8 experts of 1 or 3 bits cannot use exactly 17 bits" in problem.message
    assert BitAllocation(**given).check_experts({0: 8}) == []


def test_the_default_required_widths_are_those_that_are_candidates() -> None:
    assert BitAllocation(target_bits=3, widths=(2, 4)).required_widths() == {2: 1}
    assert BitAllocation(target_bits=2, at_least={3: 0}).required_widths() == {}
    assert BitAllocation(target_bits=2, allocator="uniform").required_widths() == {}


def test_a_budget_that_is_no_whole_number_of_bits_is_rounded_down() -> None:
    settings = BitAllocation(target_bits=2.3, budget="exact")
    assert [settings.budget_bits(n) for n in (8, 10, 60)] == [18, 23, 138]
    assert allocate(measured(8), settings).nominal_bits == 18 / 8


def test_layers_may_differ_in_their_number_of_experts() -> None:
    found = allocate(measured(4, 6), BitAllocation(target_bits=2, budget="exact"))
    assert {layer: (len(b), sum(b)) for layer, b in found.bits.items()} == {0: (4, 8), 1: (6, 12)}


def test_a_global_budget_costs_no_more_than_one_per_layer() -> None:
    statistics = measured(6, 6, 6)
    free: dict[str, Any] = {"target_bits": 2, "at_least": {}}
    per_layer = allocate(statistics, BitAllocation(**free))
    overall = allocate(statistics, BitAllocation(**free, budget_scope="global"))
    assert overall.nominal_bits == per_layer.nominal_bits == 2.0
    assert per_layer.objective is not None
    assert overall.objective is not None
    assert sum(overall.objective.values()) < sum(per_layer.objective.values())
    assert sum(overall.bits[0]) < 12 < sum(overall.bits[2])


def test_uniform_and_random_need_no_errors() -> None:
    statistics = measured(4, widths=())
    uniform = allocate(statistics, BitAllocation(target_bits=2.5, allocator="uniform"))
    assert (uniform.bits, uniform.objective) == ({0: (3, 2, 3, 2)}, None)
    maps = {
        allocate(statistics, BitAllocation(target_bits=2, allocator="random", seed=seed)).bits[0]
        for seed in (0, 0, 1, 2, 3)
    }
    assert 1 < len(maps) <= 4
    assert {sum(widths) for widths in maps} == {8}
    with pytest.raises(InputError, match="layer 0: no quantisation error at 1, 2, 3 bits"):
        allocate(statistics, BitAllocation(target_bits=2))


def test_the_objective_is_the_pmq_cost_of_the_map_for_every_allocator() -> None:
    statistics = measured(8)
    errors = statistics.layers[0].quant_error
    for name in ("pmq", "uniform", "frequency"):
        found = allocate(statistics, BitAllocation(target_bits=2, allocator=name))
        assert found.objective is not None
        squares = [errors[w][e] ** 2 for e, w in enumerate(found.bits[0])]
        assert found.objective[0] == pytest.approx(sum(squares), rel=1e-12)


def test_experts_are_checked_against_the_budget() -> None:
    experts = {1: 8, 2: 8, 3: 4}
    assert BitAllocation(target_bits=2).check_experts(experts) == []
    tight = BitAllocation(target_bits=1.25).check_experts(experts)
    assert [problem.where for problem in tight] == ["target_bits"] * 2
    assert "8 experts" in tight[1].message
    assert "11 to 23 bits are possible" in tight[1].message
    assert "'at_least: {}'" in tight[1].message
    assert BitAllocation(target_bits=1.25, allocator="uniform").check_experts(experts) == []
    assert BitAllocation(target_bits=1.25, budget_scope="global").check_experts(experts) == []
    assert BitAllocation(target_bits=1.25, at_least={}).check_experts(experts) == []


def test_a_factor_file_replaces_the_statistics_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    measured(4, 4, widths=(1, 2)).save(path)
    settings = BitAllocation(target_bits=1.5, factors=path, widths=(1, 2))
    assert (settings.needs(), settings.files()) == ((), {"factors": path})
    assert BitAllocation(target_bits=2).needs() == ("expert_statistics",)
    assert settings.check_experts({0: 4, 1: 4}) == []
    (other,) = settings.check_experts({0: 4, 7: 4})
    assert other.where == "factors"
    assert "has nothing for layer 7 and names layer 1" in other.message
    (widths,) = BitAllocation(target_bits=2, factors=path).check_experts({0: 4, 1: 4})
    assert "no quantisation error at 3 bits" in widths.message
    path.write_text("{}")
    (broken,) = settings.check_experts({0: 4, 1: 4})
    assert "'layers' must be a list" in broken.message


def test_the_stage_writes_the_map_of_what_it_reads(tmp_path: Path) -> None:
    statistics = measured(4)
    settings = BitAllocation(target_bits=2)
    path = tmp_path / "factors.json"
    statistics.save(path)
    with RunDirectory(tmp_path / "run", {}) as directory, ProgressBars(visible=False) as progress:
        nothing: Any = None  # the stage touches neither recipe nor tokens, and no weights
        model: Any = SimpleNamespace(topology=SimpleNamespace(experts_per_layer=statistics.experts))
        context = RunContext(model, nothing, nothing, directory, progress)
        settings.model_copy(update={"factors": path}).run(context)
        from_file = directory.read(BitMap)
        directory.write(statistics)
        settings.run(context)
        from_stage = directory.read(BitMap)
    assert from_file == from_stage == allocate(statistics, settings)


def test_settings_are_described_in_the_schema() -> None:
    schema = BitAllocation.model_json_schema()
    described = [name for name, field in schema["properties"].items() if "description" in field]
    assert set(described) == set(schema["properties"]) - {"type"}
    assert json.dumps(schema)


def test_layers_are_weighed_by_how_much_the_loss_feels_them() -> None:
    plain = measured(6, 6)
    sensitivity = (2.0, 0.003)
    told = replace(
        plain,
        layers=tuple(
            replace(layer, loss_sensitivity=value)
            for layer, value in zip(plain.layers, sensitivity, strict=True)
        ),
    )
    settings = BitAllocation(target_bits=2, budget_scope="global", at_least={})
    weighed = allocate(told, settings)
    costs = np.concatenate(
        [
            value * layer.errors_at((1, 2, 3)) ** 2
            for layer, value in zip(plain.layers, sensitivity, strict=True)
        ]
    )
    best = min(
        (sum(costs[e, w - 1] for e, w in enumerate(widths)), widths)
        for widths in itertools.product((1, 2, 3), repeat=12)
        if sum(widths) <= 24
    )
    assert weighed.bits[0] + weighed.bits[1] == best[1]
    assert weighed.bits != allocate(plain, settings).bits
    without = settings.model_copy(update={"loss_weighting": False})
    assert allocate(told, without).bits == allocate(plain, settings).bits
    with pytest.raises(InputError, match=r"layer 0: how much the loss feels.*'loss_tokens'"):
        allocate(plain, settings.model_copy(update={"loss_weighting": True}))


@pytest.mark.parametrize("allocator", ["block_score_predictor", "block_score_oracle"])
def test_block_scores_have_one_budget_for_all_layers(allocator: str) -> None:
    plain = measured(4, 4, 4)
    true, predicted = (0.9, 0.4, 0.8), (0.4, 0.9, 0.8)
    told = replace(
        plain,
        layers=tuple(
            replace(layer, block_cosine=one, predicted_block_cosine=other)
            for layer, one, other in zip(plain.layers, true, predicted, strict=True)
        ),
    )
    wide = 1 if allocator.endswith("oracle") else 0
    settings = BitAllocation.model_validate({"target_bits": 2.34, "allocator": allocator})
    given = {layer: (3 if layer == wide else 2,) * 4 for layer in range(3)}
    assert allocate(told, settings).bits == given
    with pytest.raises(InputError, match="layer 0: no .*block cosine was measured: give ExpertSt"):
        allocate(plain, settings)


def test_an_expert_is_removed_where_that_costs_less() -> None:
    told = measured(4, 4)
    layers = [replace(s, drop_error=s.quant_error[1] * [1.01, 5, 5, 1.01]) for s in told.layers]
    statistics = replace(told, layers=tuple(layers))
    given: dict[str, Any] = {"target_bits": 1.5, "widths": [0, 1, 2, 3], "at_least": {}}
    found = allocate(statistics, BitAllocation.model_validate(given))
    for layer in layers:
        assert layer.drop_error is not None
        errors = [dict(enumerate(row)) for row in layer.errors_at([0, 1, 2, 3])]
        best = min(
            (w for w in itertools.product(range(4), repeat=4) if sum(w) <= 6),
            key=lambda widths: sum(e[w] ** 2 for e, w in zip(errors, widths, strict=True)),
        )
        assert found.bits[layer.layer] == best
        assert 0 in best
    assert found.objective is not None
    with pytest.raises(InputError, match="no quantisation error at 0 bits"):
        allocate(told, BitAllocation.model_validate(given))


def test_the_hessian_allocator_says_what_statistics_lack() -> None:
    with pytest.raises(InputError, match="layer 0: no Hessian error at 1, 2, 3 bits"):
        allocate(measured(4), BitAllocation(target_bits=2, allocator="hessian"))


@pytest.mark.parametrize(
    ("allocation", "statistics", "message"),
    [
        ({"allocator": "block_score_oracle"}, {}, r"allocator: .* needs 'block_scores: true'"),
        (
            {"budget_scope": "global", "loss_weighting": True},
            {},
            r"loss_weighting: needs gradients .*'loss_tokens: 4096'",
        ),
        ({}, {"bits": [2, 3]}, r"widths: ExpertStats measures no error at 1 bits: add 1"),
        ({"widths": [0, 1, 2, 3]}, {}, None),
        ({"widths": [0, 1, 2, 3], "allocator": "hessian"}, {}, r"widths: hessian knows no cost"),
        ({"allocator": "block_score_oracle"}, {"block_scores": True, "bits": [2]}, None),
        ({"allocator": "frequency"}, {"bits": [2]}, None),
        ({"factors": "factors.json"}, {"bits": [2]}, None),
    ],
)
def test_statistics_that_will_lack_something_are_refused_before_they_are_measured(
    allocation: dict[str, Any], statistics: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    measured(4).save(tmp_path / "factors.json")
    stages = [
        {"type": "ExpertStats", **statistics},
        {"type": "BitAllocation", "target_bits": 2, **allocation},
    ]
    recipe = {"version": 1, "calibration": {"source": "embedded"}, "stages": stages, "exports": []}
    if message is None:
        Recipe.from_dict(recipe, base=tmp_path)
        return
    with pytest.raises(InputProblems, match=message):
        Recipe.from_dict(recipe, base=tmp_path)

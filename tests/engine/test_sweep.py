"""Sweeps on a tiny model: what is shared, resumed, refused, and that it changes no result."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.engine import disk_space
from mcsharp_sdk.engine.fingerprint import stage_keys
from mcsharp_sdk.engine.run_directory import LayerStore
from mcsharp_sdk.engine.sweep import Sweep
from mcsharp_sdk.engine.work import Work
from mcsharp_sdk.errors import InputError, InputProblems, RunError
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.recipe.schema import Recipe

BITS = "stages.BitAllocation.target_bits"
OTHER = "stages.GPTQQuantize.other_bits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "mixtral", num_hidden_layers=2, hidden_size=32, head_dim=8)
    save_tiny_tokenizer(folder)
    text = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(2000))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def recipe(model: Path) -> dict[str, Any]:
    return recipe_data(model)


def recipe_data(model: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "calibration": {
            "source": "text",
            "path": str(model / "text.txt"),
            "sequences": 4,
            "length": 32,
        },
        "stages": [
            {"type": "ExpertStats", "group_size": 16, "coverage": 0},
            {"type": "BitAllocation", "target_bits": 2.0},
            {"type": "GPTQQuantize", "group_size": 16},
        ],
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each stage has run."""
    counts: Counter[str] = Counter()
    for kind in (ExpertStats, BitAllocation, GPTQQuantize):

        def counted(self: Any, context: Any, run: Any = kind.run) -> None:
            counts[self.type] += 1
            run(self, context)

        monkeypatch.setattr(kind, "run", counted)
    return counts


def sweep(recipe: Any, model: Path, output: Path, vary: Any, **settings: Any) -> Sweep:
    evaluation = {"text": model / "text.txt", "window": 64, "max_tokens": 128}
    return mcsharp_sdk.sweep(
        recipe, model, output, vary, **{"progress": False, **evaluation, **settings}
    )


def outcomes(done: Sweep) -> list[tuple[dict[str, Any], float, int]]:
    """What must not depend on how a sweep came about."""
    found = [(dict(r.settings), r.evaluation) for r in done.results]
    return [(settings, e["perplexity"], e["bytes"]) for settings, e in found]


def weights(folder: Path) -> dict[str, bytes]:
    names = ("*.safetensors*", "mcsharp_report.json", "expert_statistics.json", "config.json")
    return {f.name: f.read_bytes() for name in names for f in sorted(folder.glob(name))}


# Sharing


@pytest.mark.parametrize("name", ["window", "max_tokens"])
def test_a_number_of_tokens_with_a_point_is_refused_before_work(
    recipe: dict[str, Any], model: Path, tmp_path: Path, name: str
) -> None:
    vary = {"stages.BitAllocation.target_bits": [2.0]}
    with pytest.raises(InputError, match=f"{name} is a whole number, not 64.0"):
        sweep(recipe, model, tmp_path / "out", vary, **{name: 64.0})


def test_each_stage_runs_once_per_distinct_input_and_results_are_those_of_separate_runs(
    model: Path, recipe: dict[str, Any], tmp_path: Path, ran: Counter[str]
) -> None:
    vary = {BITS: [2, 2.5], OTHER: [4, None]}
    done = sweep(recipe, model, tmp_path / "out", vary, keep_models=True)
    assert ran == {"ExpertStats": 1, "BitAllocation": 2, "GPTQQuantize": 4}
    assert [dict(r.settings) for r in done.results] == [
        {BITS: bits, OTHER: other} for bits in (2, 2.5) for other in (4, None)
    ]
    assert list(done.results[1].seconds) == ["GPTQQuantize", "safetensors"]

    for result in done.results[1:3]:
        overrides = [f"{target}={json.dumps(v)}" for target, v in result.settings.items()]
        alone = mcsharp_sdk.compress(
            Recipe.from_dict(recipe, overrides=overrides),
            model,
            tmp_path / result.name,
            progress=False,
        )
        assert result.model is not None
        assert weights(done.output / result.model) == weights(alone.output)
        measured = mcsharp_sdk.evaluate(
            alone.output, model / "text.txt", window=64, max_tokens=128, device="cpu"
        )
        assert result.evaluation["perplexity"] == measured.perplexity
        assert list(result.warnings) == list(alone.warnings)


def test_a_sweep_leaves_a_table_a_plot_and_no_model(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    done = sweep(recipe, model, tmp_path / "out", [f"{BITS}=2.0,2.5"])
    assert {f.name for f in done.output.iterdir()} == {
        *("sweep.json", "sweep.csv", "sweep.svg", "variants")
    }
    assert [f.name for f in sorted(done.output.glob("variants/*"))] == [
        *("target_bits=2.0", "target_bits=2.5")
    ]
    assert not list(done.output.rglob("*.safetensors"))
    lines = (done.output / "sweep.csv").read_text().splitlines()
    assert lines[0].startswith(f"{BITS},perplexity,")
    assert [line.split(",")[0] for line in lines[1:]] == ["2.0", "2.5"]
    kept = json.loads((done.output / "sweep.json").read_text())
    assert kept["varied"] == [BITS]
    assert kept["variants"] == done.to_json()["variants"]
    assert "weights on disk" in (done.output / "sweep.svg").read_text()


def test_only_what_a_later_variant_shares_is_kept_meanwhile(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    kept = []

    def look(name: str, number: int, count: int) -> None:
        stages = (tmp_path / "out" / ".work" / "stages").glob("*/finished_stage.json")
        kept.append(sum(1 for _ in stages))

    vary = {BITS: [2, 2.5], OTHER: [4, None]}
    sweep(recipe, model, tmp_path / "out", vary, on_variant=look)
    statistics, allocation = 1, 1
    assert kept == [0, statistics + allocation, statistics, statistics + allocation]


def test_two_sweeps_share_stages_through_a_run_directory(
    model: Path, recipe: dict[str, Any], tmp_path: Path, ran: Counter[str]
) -> None:
    run_dir = tmp_path / "run"
    first = sweep(recipe, model, tmp_path / "a", {BITS: [2, 2.5]}, run_dir=run_dir)
    before = dict(ran)
    second = sweep(recipe, model, tmp_path / "b", {OTHER: [4, 3]}, run_dir=run_dir)
    assert ran["ExpertStats"] == before["ExpertStats"] == 1
    assert ran["GPTQQuantize"] == before["GPTQQuantize"] + 1, "target_bits 2 is there already"
    assert second.results[0].evaluation["nll"] == first.results[0].evaluation["nll"]


class Pruning(Modifier):
    """A stage that reads nothing and uses the quantised weights if there are any."""

    type: Literal["Pruning"] = "Pruning"
    threshold: float = 0.5

    uses: ClassVar[tuple[str, ...]] = ("quantized_weights",)
    writes: ClassVar[str] = "pruning"

    def run(self, context: Any) -> None:
        raise NotImplementedError


def keys(*stages: Modifier, **parts: str) -> list[str]:
    recipe = Recipe.model_construct(version=1, stages=stages)
    return stage_keys(recipe, {"model weights": "a", "calibration": "c", **parts})


def same(first: list[str], second: list[str]) -> list[bool]:
    return [a == b for a, b in zip(first, second, strict=True)]


def test_a_key_changes_with_what_the_stage_depends_on_and_with_nothing_else() -> None:
    statistics, allocation = ExpertStats(), BitAllocation(target_bits=2)
    quantise, pruning = GPTQQuantize(), Pruning()
    chain = keys(statistics, allocation, quantise, pruning)
    assert len(set(chain)) == 4

    wider = BitAllocation(target_bits=2.5)
    assert same(chain, keys(statistics, wider, quantise, pruning)) == [True, False, False, False]
    stronger = Pruning(threshold=0.7)
    assert same(chain, keys(statistics, allocation, quantise, stronger))[:3] == [True] * 3
    assert same(chain, keys(statistics, allocation, quantise, stronger))[3] is False
    fixed = GPTQQuantize(bits=2)
    assert keys(statistics, fixed)[1] == keys(ExpertStats(bits=(2,)), fixed)[1], "not read"
    assert keys(quantise, pruning)[1] != keys(pruning)[0], "used if it is there"
    assert keys(pruning, quantise)[0] == keys(pruning)[0], "not if it comes later"
    assert keys(statistics, statistics)[0] != keys(statistics, statistics)[1], "written twice"


def test_a_key_changes_with_the_calibration_only_where_it_is_measured_with() -> None:
    stages = (ExpertStats(), GPTQQuantize(bits=2), Pruning())
    assert same(keys(*stages), keys(*stages, calibration="other")) == [False, False, False]
    assert same(keys(Pruning()), keys(Pruning(), calibration="other")) == [True]
    assert same(keys(*stages), keys(*stages, **{"model weights": "b"})) == [False] * 3


# Resuming


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Any], float, int]]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    return outcomes(sweep(recipe_data(model), model, output, {BITS: [2, 2.5]}))


class _CutOff(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("writes_until_the_cut", [1, 5])
def test_a_sweep_that_was_cut_off_continues_and_ends_with_the_same_results(
    writes_until_the_cut: int,
    model: Path,
    recipe: dict[str, Any],
    undisturbed: list[tuple[dict[str, Any], float, int]],
    tmp_path: Path,
    ran: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vary = {BITS: [2, 2.5]}
    write = LayerStore.write
    done: list[int] = []

    def cut_off(self: LayerStore, *arguments: Any) -> None:
        if len(done) == writes_until_the_cut:
            raise _CutOff
        done.append(arguments[0])
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "write", cut_off)
        with pytest.raises(_CutOff):
            sweep(recipe, model, tmp_path / "out", vary)
    cut = dict(ran)
    resumed = sweep(recipe, model, tmp_path / "out", vary)
    assert outcomes(resumed) == undisturbed
    # ExpertStats writes 2 layers, then GPTQQuantize 2 for each variant.
    assert ran["ExpertStats"] == (2 if writes_until_the_cut < 2 else 1)
    assert ran["GPTQQuantize"] == cut.get("GPTQQuantize", 0) + (
        2 if writes_until_the_cut < 4 else 1
    )
    assert not (tmp_path / "out" / ".work").exists()


def test_a_finished_sweep_is_not_done_again_and_can_be_extended(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sweep(recipe, model, tmp_path / "out", {BITS: [2, 2.5]})
    begun: list[str] = []
    again = sweep(
        recipe,
        model,
        tmp_path / "out",
        {BITS: [2.25, 2, 2.5]},
        on_variant=lambda name, number, count: begun.append(f"{number}/{count} {name}"),
    )
    assert begun == ["1/3 target_bits=2.25"]
    assert again.results[1:] == first.results
    monkeypatch.setattr(Work, "run", None)
    assert sweep(recipe, model, tmp_path / "out", {BITS: [2, 2.5]}).results == first.results


def test_a_cut_in_the_evaluation_does_not_compress_again(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any, **__: Any) -> None:
        raise _CutOff

    with monkeypatch.context() as patch:
        patch.setattr("mcsharp_sdk.engine.sweep.evaluate", cut_off)
        with pytest.raises(_CutOff):
            sweep(recipe, model, tmp_path / "out", {BITS: [2]})
    monkeypatch.setattr(Work, "run", None)
    done = sweep(recipe, model, tmp_path / "out", {BITS: [2]})
    assert done.results[0].evaluation["perplexity"] > 1
    assert "GPTQQuantize" in done.results[0].seconds


def test_models_asked_for_later_are_made_again(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    sweep(recipe, model, tmp_path / "out", {BITS: [2]})
    done = sweep(recipe, model, tmp_path / "out", {BITS: [2]}, keep_models=True)
    assert done.results[0].model == "variants/target_bits=2/model"
    assert (done.output / done.results[0].model / "config.json").is_file()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError("no solution"), "no solution"),
        (torch.OutOfMemoryError("out of memory"), "out of memory: too little memory"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
    ids=["of ours", "memory", "of others"],
)
def test_a_variant_that_fails_does_not_stop_the_others_and_is_tried_again(
    model: Path,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
) -> None:
    run = BitAllocation.run

    def fail(self: BitAllocation, context: Any) -> None:
        if self.target_bits == 2:
            raise error
        run(self, context)

    with monkeypatch.context() as patch:
        patch.setattr(BitAllocation, "run", fail)
        broken = sweep(recipe, model, tmp_path / "out", {BITS: [2, 2.5]})
    assert broken.results[0].error.startswith(told)
    assert broken.results[1].error == ""
    assert [r.name for r in broken.failures] == ["target_bits=2"]
    assert told in (tmp_path / "out" / "sweep.csv").read_text()
    mended = sweep(recipe, model, tmp_path / "out", {BITS: [2, 2.5]})
    assert not mended.failures
    assert "ExpertStats" not in mended.results[0].seconds, "was finished before the failure"
    assert not (tmp_path / "out" / ".work").exists()


# Refusals


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_written(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputProblems) as caught:
        sweep(
            recipe,
            model,
            tmp_path / "out",
            [f"{BITS}=2,9", "calibration.sequences=4,4000", "stages.GPTQQuantize.damping=0.01,2"],
            text=tmp_path / "absent.txt",
            window=4096,
            max_tokens=1,
        )
    told = [(problem.where, problem.message) for problem in caught.value.problems]
    assert [where for where, _ in told] == [
        "--vary stages.GPTQQuantize.damping=2",
        f"--vary {BITS}=9",
        "calibration",
        *["evaluation"] * 3,
    ]
    assert told[0][1] == "stages[2].damping: should be less than 1.0, not 2"
    assert "(with target_bits=2,sequences=4000,damping=0.01)" in told[2][1]
    assert [message.partition(":")[0] for _, message in told[3:5]] == [
        "a window of 4096 is longer than the model's 128 positions",
        "max_tokens is 1",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_is_named(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a")
    with pytest.raises(
        InputProblems, match=f"evaluation: {text} has fewer than 2 tokens: give a longer"
    ):
        sweep(recipe, model, tmp_path / "out", {BITS: [2]}, text=text)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({}, "nothing to vary"),
        ({BITS: []}, "has no values"),
        ({BITS: [2, 2]}, "stands there twice"),
        ({BITS: [2, 2.0]}, "is the same as target_bits=2"),
        ({BITS: "2,3"}, "give a list of values"),
        ({BITS: [float("nan")]}, "no plain data"),
        ([BITS], "write it as target=value"),
        ([f"{BITS}=2,,3"], "value 2 is empty"),
        ([f"{BITS}=2", f"{BITS}=3"], "given twice"),
        (["stages.BitAllocation=[1"], "cannot be read"),
        (["stages.Nothing.x=1"], "no 'Nothing'"),
        (["exports=[]"], "add {type: safetensors}"),
        (["exports=[{type: onnx_routers}]"], "add {type: safetensors}"),
    ],
)
def test_a_variation_that_makes_no_sense_is_refused(
    vary: Any, message: str, model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        sweep(recipe, model, tmp_path / "out", vary)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_model_is_told_together_with_a_wrong_recipe(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputProblems) as caught:
        mcsharp_sdk.sweep(recipe, tmp_path / "none", tmp_path / "out", {BITS: [9]})
    assert [p.where for p in caught.value.problems] == [f"--vary {BITS}=9", "model"]
    with pytest.raises(InputError, match="plain data"):
        sweep(Recipe.from_dict(recipe), model, tmp_path / "out", {BITS: [2]})


def test_another_sweep_in_the_folder_is_refused_unless_overwritten(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sweep(recipe, model, output, {BITS: [2]})
    with pytest.raises(InputError, match=f"holds a sweep over {BITS}"):
        sweep(recipe, model, output, {OTHER: [4]})
    with pytest.raises(InputProblems, match="target_bits=2: evaluation changed"):
        sweep(recipe, model, output, {BITS: [2]}, window=32)
    recipe["calibration"]["sequences"] = 5
    with pytest.raises(InputProblems, match="target_bits=2: calibration changed"):
        sweep(recipe, model, output, {BITS: [2]})
    done = sweep(recipe, model, output, {OTHER: [4]}, overwrite=True)
    assert [f.name for f in done.output.glob("variants/*")] == ["other_bits=4"]


@pytest.mark.parametrize("name", ["sweep.json", "variants/target_bits=2/result.json"])
def test_a_damaged_file_of_a_sweep_is_named_with_what_to_do(
    model: Path, recipe: dict[str, Any], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "out"
    sweep(recipe, model, output, {BITS: [2]})
    damaged = output / name
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{damaged}: is not JSON: .*; give another --output, or"):
        sweep(recipe, model, output, {BITS: [2]})
    damaged.write_text("{}")
    with pytest.raises(InputError, match="give another --output, or"):
        sweep(recipe, model, output, {BITS: [2]})
    assert not sweep(recipe, model, output, {BITS: [2]}, overwrite=True).failures


@pytest.mark.parametrize("table", ["{}", '{"varied": []}', '{"varied": null}'])
def test_a_table_of_something_else_is_no_reason_to_go_on(
    model: Path, recipe: dict[str, Any], tmp_path: Path, table: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(table)
    with pytest.raises(InputError, match="a sweep over what cannot be told; give another --output"):
        sweep(recipe, model, tmp_path / "out", {BITS: [2]})


def test_a_folder_of_something_else_is_never_touched(
    model: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.tex").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        sweep(recipe, model, tmp_path / "thesis", {BITS: [2]}, overwrite=True)
    with pytest.raises(InputError, match="is a file"):
        sweep(recipe, model, tmp_path / "thesis" / "chapter_1.tex", {BITS: [2]})
    assert [f.name for f in tmp_path.rglob("*")] == ["thesis", "chapter_1.tex"]


def test_too_little_disk_space_is_found_before_any_variant(
    model: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vary = {BITS: [2, 2.5]}
    sweep(recipe, model, tmp_path / "out", vary)

    class Usage:
        free = 10_000

    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(InputError, match="too little disk space: the run needs .* kB"):
        sweep(recipe, model, tmp_path / "other", vary)
    assert not (tmp_path / "other").exists()
    again = sweep(recipe, model, tmp_path / "out", vary)
    assert not again.failures

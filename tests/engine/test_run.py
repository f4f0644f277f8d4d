"""Runs on tiny models: results, resuming, refusals, and that nothing half-done is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics
from mcsharp_sdk.engine.run_directory import LayerStore
from mcsharp_sdk.errors import InputError, InputProblems, RunError
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.evaluation.evaluate import evaluate
from mcsharp_sdk.recipe.schema import Recipe

STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), "mixtral")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    return file


def recipe(text: Path, stages: list[dict[str, Any]] = STAGES, **changes: Any) -> Recipe:
    calibration = {"source": "text", "path": str(text), "sequences": 8, "length": 32}
    return Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages, **changes})


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors*"))}


def compress(recipe: Recipe, model: Path, output: Path, **settings: Any) -> Any:
    return mcsharp_sdk.compress(recipe, model, output, progress=False, **settings)


def test_a_whole_run_leaves_everything_that_a_compressed_model_has(
    model: Path, text: Path, tmp_path: Path
) -> None:
    exports = [{"type": "safetensors", "max_shard_size": 4e-5}, {"type": "onnx_routers"}]
    done = compress(recipe(text, exports=exports), model, tmp_path / "out")
    assert list(done.seconds) == [
        *("ExpertStats", "BitAllocation", "GPTQQuantize"),
        *("safetensors", "onnx_routers"),
    ]
    names = {file.name for file in done.output.iterdir()}
    assert names > {
        *("config.json", "tokenizer.json", "recipe.yaml", "README.md", "mcsharp_report.json"),
        *("expert_statistics.json", "bit_allocation.json", "mcsharp.safetensors.index.json"),
        "onnx_routers",
    }
    shards = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"mcsharp-00001-of-{len(shards):05d}.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    bits = BitMap.load(done.output / BitMap.FILE)
    assert bits.nominal_bits == 2.25
    config = json.loads((done.output / "config.json").read_text())["quantization_config"]
    assert config["experts"] == {str(layer): list(b) for layer, b in bits.bits.items()}
    assert Recipe.from_file(done.output / "recipe.yaml").stages == recipe(text).stages


def test_stored_bits_are_what_the_arithmetic_says(model: Path, text: Path, tmp_path: Path) -> None:
    group = 32  # divides the hidden and intermediate sizes, so that no group is short
    stage = {"type": "GPTQQuantize", "bits": 3, "group_size": group, "other_bits": None}
    cost = model_cost(compress(recipe(text, [stage]), model, tmp_path / "out").output)
    assert cost.bits.nominal == 3
    assert cost.bits.stored == pytest.approx(3 + 16 / group + 3 / group, rel=0.01)


class _CutOff(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("writes_until_the_cut", "quantise"),
    [
        *((writes, {}) for writes in range(6)),
        (4, {"rotation": "hadamard"}),
        (4, {"bits": "widths.json"}),
    ],
)
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    writes_until_the_cut: int,
    quantise: dict[str, Any],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "bits" in quantise:  # with experts that are removed
        file = tmp_path / quantise["bits"]
        BitMap(dict.fromkeys(range(3), (2, 0, 3, 0))).save(file)
        quantise = {"bits": str(file)}
    stages = [*STAGES[:2], {**STAGES[2], **quantise}]
    undisturbed = compress(recipe(text, stages), model, tmp_path / "undisturbed").output
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
            compress(recipe(text, stages), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    resumed = compress(recipe(text, stages), model, tmp_path / "out").output
    assert weights(resumed) == weights(undisturbed)
    for file in (ExpertStatistics.FILE, BitMap.FILE, "mcsharp_report.json"):
        assert (resumed / file).read_bytes() == (undisturbed / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"stages": [*STAGES[:1], {**STAGES[1], "target_bits": 2.0}, STAGES[2]]}, "recipe"),
        ({"calibration": {"source": "embedded", "sequences": 8, "length": 32}}, "calibration"),
    ],
)
def test_a_changed_run_does_not_resume_and_says_what_changed(
    model: Path, text: Path, tmp_path: Path, change: dict[str, Any], part: str
) -> None:
    run = tmp_path / "run"
    compress(recipe(text), model, tmp_path / "out", run_dir=run)
    with pytest.raises(InputError, match=f"another run: {part} changed"):
        compress(recipe(text, **change), model, tmp_path / "other", run_dir=run)


def test_a_kept_run_directory_makes_a_second_run_instant(
    model: Path, text: Path, tmp_path: Path
) -> None:
    first = compress(recipe(text), model, tmp_path / "a", run_dir=tmp_path / "run")
    second = compress(recipe(text), model, tmp_path / "b", run_dir=tmp_path / "run")
    assert list(second.seconds) == ["safetensors"]
    assert weights(second.output) == weights(first.output)


def test_a_run_directory_in_use_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    from mcsharp_sdk.engine.run_directory import RunDirectory

    with (
        RunDirectory(tmp_path / "run", {}),
        pytest.raises(InputError, match="in use by another run"),
    ):
        compress(recipe(text), model, tmp_path / "out", run_dir=tmp_path / "run")


def test_an_existing_output_is_refused_and_left_alone(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = compress(recipe(text), model, tmp_path / "out").output
    (output / "README.md").write_text("edited")
    with pytest.raises(InputError, match="--overwrite"):
        compress(recipe(text), model, output)
    assert (output / "README.md").read_text() == "edited"
    (output / "mine").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="also holds mine"):
            compress(recipe(text), model, output, overwrite=overwrite)
    assert (output / "mine").read_text() == "precious"
    (output / "mine").unlink()
    compress(recipe(text), model, output, overwrite=True)
    assert (output / "README.md").read_text() != "edited"


def test_a_folder_of_something_else_is_never_overwritten(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.tex").write_text("precious")
    with pytest.raises(InputError, match="something else"):
        compress(recipe(text), model, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter_1.tex").read_text() == "precious"


@pytest.mark.parametrize("within", [".", "models/mixtral"])
def test_an_output_that_holds_the_model_is_refused(
    model: Path, text: Path, tmp_path: Path, within: str
) -> None:
    output = tmp_path / "out"
    original = output / within
    shutil.copytree(model, original)
    (output / "mcsharp_report.json").write_text("{}")  # as if it were a result
    before = weights(original)
    with pytest.raises(InputError, match="which would be replaced"):
        compress(recipe(text), original, output, overwrite=True)
    assert weights(original) == before
    with pytest.raises(InputError, match="cannot be replaced: give a folder"):
        compress(recipe(text), model, Path("/"), overwrite=True)


def test_what_is_wrong_with_output_text_and_recipe_is_told_together(
    model: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    wrong = {"source": "text", "path": str(text), "sequences": 4000, "length": 4096}
    with pytest.raises(InputProblems) as caught:
        compress(recipe(text, calibration=wrong), model, tmp_path / "out")
    told = [problem.message for problem in caught.value.problems]
    assert [("exists already" in m, "positions" in m, "4000" in m) for m in told] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_without_exporters_the_run_directory_is_the_result(
    model: Path, text: Path, tmp_path: Path
) -> None:
    measuring = recipe(text, STAGES[:1], exports=[])
    done = compress(measuring, model, tmp_path / "out")
    assert done.output == tmp_path / "out"
    assert ExpertStatistics.load(done.output / ExpertStatistics.FILE).layers
    assert done.plan.output_bytes == 0
    kept = compress(measuring, model, tmp_path / "no", run_dir=tmp_path / "run")
    assert kept.output == tmp_path / "run"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "run"]
    (tmp_path / "out" / ".gitignore").write_text("mine")
    (tmp_path / "out" / ".left.1.2.tmp").write_text("begun by a run that was killed")
    assert not compress(measuring, model, tmp_path / "out").seconds  # it is there already
    hidden = [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]
    assert hidden == [".gitignore"]


def test_a_run_directory_within_the_output_is_refused(
    model: Path, text: Path, tmp_path: Path
) -> None:
    for run in ("out", "out/run"):
        with pytest.raises(InputError, match="must not lie in the output"):
            compress(recipe(text), model, tmp_path / "out", run_dir=tmp_path / run)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"calibration": {"source": "text", "sequences": 4000, "length": 64}}, {}, "sequences"),
        ({}, {"device": "cuda:7"}, "cuda:7"),
    ],
)
def test_what_can_be_known_before_work_leaves_nothing_behind(
    model: Path,
    text: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    if "calibration" in changes:
        changes["calibration"]["path"] = str(text)
    with pytest.raises(InputError, match=message):
        compress(recipe(text, **changes), model, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_output_in_place(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mcsharp_exporters.safetensors_model import SafetensorsExporter

    before = weights(compress(recipe(text), model, tmp_path / "out").output)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsExporter, "run", fail)
    with pytest.raises(RunError, match=r"no space is left .* is kept in .*\.out\.run"):
        compress(recipe(text), model, tmp_path / "out", overwrite=True)
    assert weights(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out.partial"))


def test_what_an_exporter_refuses_does_not_cost_what_the_stages_made(
    model: Path, text: Path, tmp_path: Path
) -> None:
    widths = tmp_path / "bits.json"
    removed = {"0": [2, 2, 2, 2], "1": [0, 0, 0, 0], "2": [2, 2, 2, 2]}
    widths.write_text(json.dumps({"version": 1, "bits": removed}))
    stages = [{"type": "GPTQQuantize", "bits": str(widths), "group_size": 16}]
    exports = [{"type": "safetensors"}, {"type": "onnx_model"}]
    message = r"all experts of decoder layer 1 .* kept in .*\.out\.run: take onnx_model out of 'exp"
    with pytest.raises(RunError, match=message):
        compress(recipe(text, stages, exports=exports), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = compress(recipe(text, stages, exports=exports[:1]), model, tmp_path / "out")
    assert list(done.seconds) == ["safetensors"]  # no stage ran again
    mcsharp_sdk.verify(done.output)
    assert not (tmp_path / ".out.run").exists()


def test_everything_that_does_not_fit_the_model_is_told_at_once(
    model: Path, text: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "bits.json"
    wrong.write_text(json.dumps({"version": 1, "bits": {"0": [2, 2]}}))
    unfit = recipe(
        text,
        [{"type": "GPTQQuantize", "bits": str(wrong)}],
        calibration={"source": "text", "path": str(text), "sequences": 1, "length": 512},
    )
    with pytest.raises(InputProblems) as caught:
        compress(unfit, model, tmp_path / "out")
    messages = [problem.message for problem in caught.value.problems]
    assert messages[0].startswith("stages[0].bits: ")
    assert messages[1].startswith("calibration.length: 512 tokens are more than")
    assert [p.name for p in tmp_path.iterdir()] == ["bits.json"]


def test_a_published_factor_file_replaces_measuring(
    model: Path, text: Path, tmp_path: Path
) -> None:
    measured = compress(recipe(text), model, tmp_path / "a").output
    factors = {**STAGES[1], "factors": str(measured / ExpertStatistics.FILE)}
    from_file = compress(recipe(text, [factors, STAGES[2]]), model, tmp_path / "b").output
    assert weights(from_file) == weights(measured)


def test_round_to_nearest_and_a_rounded_router_are_written(
    model: Path, text: Path, tmp_path: Path
) -> None:
    from mcsharp_sdk.models.directory import routers_of_directory

    stage = {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 2, "group_size": 16}
    rounded = recipe(
        text,
        [{**stage, "router_bits": 4}],
        exports=[{"type": "safetensors"}, {"type": "onnx_routers"}],
    )
    output = compress(rounded, model, tmp_path / "out").output
    for before, after in zip(
        routers_of_directory(model), routers_of_directory(output), strict=True
    ):
        error = (before.weight - after.weight).norm() / before.weight.norm()
        assert 0.01 < error < 0.2
        graph = onnx.load(output / "onnx_routers" / f"router_layer_{after.layer:05d}.onnx").graph
        exported = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 2]
        assert any(
            np.array_equal(w.T, after.weight) or np.array_equal(w, after.weight) for w in exported
        )


def test_a_config_that_names_no_dtype_changes_nothing(text: Path, tmp_path: Path) -> None:
    stages = [{"type": "GPTQQuantize", "bits": 2, "group_size": 16}]
    named = save_tiny_model(tmp_path / "named", "deepseek_v3", dtype=torch.bfloat16)
    save_tiny_tokenizer(named)
    silent = tmp_path / "silent"
    shutil.copytree(named, silent)
    config = json.loads((silent / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (silent / "config.json").write_text(json.dumps(config))
    first, second = (
        compress(recipe(text, stages), model, tmp_path / f"{model.name}-out").output
        for model in (named, silent)
    )
    assert weights(first) == weights(second)
    written = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert written[0] == written[1]
    for folder in (named, silent, first, second):
        assert evaluate(folder, text, max_tokens=8, device="cpu").dtype == "bfloat16"


def test_the_plan_foretells_the_size(model: Path, text: Path, tmp_path: Path) -> None:
    plan = mcsharp_sdk.plan(recipe(text), model)
    cost = model_cost(compress(recipe(text), model, tmp_path / "out").output)
    assert plan.bytes_after == pytest.approx(cost.weight_bytes, rel=0.05)
    assert plan.nominal_bits == pytest.approx(cost.bits.nominal, rel=0.01)
    assert [stage.stage for stage in plan.stages] == [s["type"] for s in STAGES]

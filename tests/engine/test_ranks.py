"""Several processes on one model: the same result as one, and nothing lost when one dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning_runs import write_text
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, TokenProtectionRule, TopAnyTraining
from mcsharp_sdk.data.calibration_set import CalibrationSet, SampleGroup
from mcsharp_sdk.engine.ranks import joined, own_device
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.models.ranks import divide
from mcsharp_sdk.recipe.schema import Recipe

RECIPE = """version: 1
calibration: {{source: text, path: {text}, sampling: first, sequences: 5, length: 32}}
stages:
  - {{type: ExpertStats, group_size: 16}}
  - {{type: BitAllocation, target_bits: 2.25, widths: [0, 1, 2, 3], at_least: {{0: 1}}}}
  - {{type: GPTQQuantize, group_size: 16}}
  - {{type: TokenProtection}}
  - {{type: TopAnyRouter, steps: 8, units: 4, batch_tokens: 40, checkpoint_steps: 3}}
"""

DIES = """
import os, signal
from mcsharp_sdk.models.expert_exchange import ExchangedTokens
from mcsharp_sdk.cli.main import run

exchange, calls = ExchangedTokens.of_layer, []

def dies(*arguments):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return exchange(*arguments)

ExchangedTokens.of_layer = dies
run()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral"))
    (folder / "recipe.yaml").write_text(RECIPE.format(text=write_text(folder)))
    return folder


def together(
    work: Path, output: str, *program: str, recipe: str = "recipe.yaml"
) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["compress", recipe, "--model", "model", "--output", output]
    return subprocess.run(
        [
            *launcher,
            *(program or ("-m", "mcsharp_sdk.cli")),
            *arguments,
            "--run-dir",
            f"{output}.run",
        ],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def packed(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


@pytest.mark.timeout(900)
def test_two_processes_give_what_one_gives_up_to_the_order_of_sums(work: Path) -> None:
    done = together(work, "two")
    assert done.returncode == 0, done.stderr
    mcsharp_sdk.compress(
        work / "recipe.yaml", work / "model", work / "one", run_dir=work / "one.run", progress=False
    )
    one, two = (
        ExpertStatistics.load(work / name / ExpertStatistics.FILE) for name in ("one", "two")
    )
    for alone, shared in zip(one.layers, two.layers, strict=True):
        assert np.array_equal(alone.activation_count, shared.activation_count)
        assert alone.tokens == shared.tokens
        for name in ("routing_weight_sum", "drop_error"):
            np.testing.assert_allclose(getattr(shared, name), getattr(alone, name), rtol=1e-6)
        for width, error in alone.quant_error.items():
            np.testing.assert_allclose(shared.quant_error[width], error, rtol=1e-5)
        for width, error in alone.hessian_error.items():
            np.testing.assert_allclose(shared.hessian_error[width], error, rtol=1e-5)
    assert BitMap.load(work / "one" / BitMap.FILE) == BitMap.load(work / "two" / BitMap.FILE)
    same, count = 0, 0
    for name, tensor in packed(work / "one").items():
        if name.endswith("qweight"):
            same += int((packed(work / "two")[name] == tensor).sum())
            count += tensor.numel()
    # A sum in another order turns a code here and there, and what follows from it.
    assert same / count > 0.98
    rules = [TokenProtectionRule.load(work / n / TokenProtectionRule.FILE) for n in ("one", "two")]
    for first, second in zip(rules[0].layers, rules[1].layers, strict=True):
        np.testing.assert_allclose(second.thresholds, first.thresholds, rtol=0.02)
        assert second.cost == pytest.approx(first.cost, rel=0.05)
    curves = [TopAnyTraining.load(work / n / TopAnyTraining.FILE).curves for n in ("one", "two")]
    for name, curve in curves[0].items():
        np.testing.assert_allclose(curves[1][name].error, curve.error, rtol=0.1)
        np.testing.assert_allclose(curves[1][name].keep_ratio, curve.keep_ratio, atol=0.05)


@pytest.mark.timeout(900)
def test_two_processes_that_measure_nothing_give_the_same_bytes(work: Path) -> None:
    recipe = work / "weights.yaml"
    recipe.write_text(
        "version: 1\nstages: [{type: GPTQQuantize, quantizer: rtn, bits: 2, group_size: 16}]\n"
    )
    done = together(work, "both", recipe=recipe.name)
    assert done.returncode == 0, done.stderr
    mcsharp_sdk.compress(recipe, work / "model", work / "alone", progress=False)
    both, alone = packed(work / "both"), packed(work / "alone")
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], tensor) for name, tensor in alone.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_process_that_dies_stops_the_other_and_the_run_resumes_with_the_same_bytes(
    work: Path,
) -> None:
    (work / "dies.py").write_text(DIES)
    undisturbed = together(work, "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = together(work, "out", "dies.py")
    assert killed.returncode != 0
    assert "continues from the last finished layer" in killed.stderr
    assert not (work / "out").exists()
    finished = list((work / "out.run").glob("*/layer_*.json"))
    assert finished
    resumed = together(work, "out")
    assert resumed.returncode == 0, resumed.stderr
    for file in (work / "undisturbed").glob("*.safetensors"):
        assert (work / "out" / file.name).read_bytes() == file.read_bytes()


def test_work_is_divided_so_that_nobody_has_much_more_than_others() -> None:
    assert divide([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert divide([1, 1], 3) == [[0], [1], []]
    costs = [float((7 * i) % 11 + 1) for i in range(40)]
    parts = divide(costs, 4)
    assert sorted(i for part in parts for i in part) == list(range(40))
    loads = [sum(costs[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_the_parts_of_a_calibration_set_are_the_whole_in_order(parts: int) -> None:
    groups = [torch.arange(6 * 4).view(6, 4), torch.arange(100, 107).view(1, 7)]
    whole = CalibrationSet(tuple(SampleGroup({"input_ids": t}) for t in groups), ("text",))
    shares = [whole.share(part, parts) for part in range(parts)]
    tokens = [g.tokens.flatten() for share in shares for g in share.groups]
    assert torch.equal(torch.cat(tokens), torch.cat([t.flatten() for t in groups]))
    sizes = [share.num_sequences for share in shares]
    assert max(sizes) - min(sizes) <= 1
    with pytest.raises(InputError, match="7 sequences cannot be divided among 8"):
        whole.share(0, 8)


@pytest.mark.parametrize(
    ("settings", "more", "refused"),
    [
        ({"scope": "model"}, [], r"stages\[0\]: .*scope: block"),
        ({"loss_tokens": 64}, [], r"stages\[0\]: gradients .*loss_tokens: 0"),
        ({"block_scores": True}, [], r"stages\[0\]: .*block_scores: false"),
        ({}, [{"type": "RouterCalibration"}], r"stages\[3\]: .* one process"),
    ],
)
def test_what_several_processes_cannot_share_is_refused_before_work(
    settings: dict[str, Any], more: list[dict[str, Any]], refused: str, work: Path
) -> None:
    stages: list[dict[str, Any]] = [
        {"type": "ExpertStats", **settings},
        {"type": "BitAllocation", "target_bits": 2},
        {"type": "GPTQQuantize"},
        *more,
    ]
    calibration = {"source": "embedded", "sequences": 4, "length": 8}
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages})
    with pytest.raises(InputProblems, match=refused):
        mcsharp_sdk.plan(recipe, work / "model", processes=2)
    assert mcsharp_sdk.plan(recipe, work / "model").stages


def test_more_processes_than_sequences_are_refused_before_work(work: Path) -> None:
    calibration = {"source": "embedded", "sequences": 4, "length": 8}
    stages = [{"type": "GPTQQuantize", "bits": 2}]
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages})
    assert mcsharp_sdk.plan(recipe, work / "model", processes=4).stages
    with pytest.raises(InputProblems, match="calibration: 4 sequences cannot be divided among 5"):
        mcsharp_sdk.plan(recipe, work / "model", processes=5)


def test_without_a_launcher_there_is_one_process() -> None:
    with joined() as ranks:
        assert ranks.alone
        assert ranks.gather(torch.arange(3)).tolist() == [0, 1, 2]
        assert ranks.share({"a": 1}) == {"a": 1}
        assert ranks.collect(5) == [5]
        assert ranks.total(2.5) == 2.5


def test_a_sweep_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        mcsharp_sdk.sweep({}, "model", "out", {"stages.BitAllocation.target_bits": [2]})


@pytest.mark.parametrize(
    ("device", "local", "own"),
    [("cpu", "3", "cpu"), ("cuda", "3", "cuda:3"), ("cuda:1", "3", "cuda:1")],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    device: str, local: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_device(device) == device
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, value)
    assert own_device(device) == own

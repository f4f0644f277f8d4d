"""Tasks of lm-eval on compressed models, against choices scored by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pruning_runs import QUANTISE, load, pruning_recipe, run, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk import evaluate_tasks
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation.harness import _unknown
from mcsharp_sdk.evaluation.tasks import SUITES

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "examples/tasks"
ITEMS = [json.loads(line) for line in (TASKS / "python_words.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    original = save_tiny_model(folder / "original", "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(original, eos_token=chr(0))
    run(original, pruning_recipe(write_text(folder), QUANTISE, {"type": "TokenProtection"}), folder)
    return folder / "out"


@pytest.fixture
def _harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval, the folder that the example's paths start from, and a cache of data of its own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: it is the extra 'eval'")
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@torch.no_grad()
def chosen_by_hand(model: Any, item: dict[str, Any]) -> int:
    """The choice with the largest sum of log-probabilities behind the sentence."""
    scores = []
    for choice in item["choices"]:
        codes = torch.tensor([[ord(c) for c in f"{item['sentence']} {choice}"]])
        chances = model(input_ids=codes).logits[0].double().log_softmax(-1)
        start = len(item["sentence"])
        scores.append(sum(chances[i - 1, codes[0, i]] for i in range(start, codes.shape[1])))
    return int(torch.stack(scores).argmax())


@pytest.mark.usefixtures("_harness")
def test_the_example_task_on_a_compressed_model_is_scored_as_by_hand(model: Path) -> None:
    found = evaluate_tasks(model, ["python_words"], include=TASKS, device="cpu", pruning="off")
    loaded = load(model)
    loaded.set_expert_pruning("off")
    right = sum(chosen_by_hand(loaded, item) == item["answer"] for item in ITEMS)
    accuracy = next(result for result in found.results if result.metric == "acc")
    assert 0 < right < len(ITEMS), "a score that could be had by chance alone tells nothing"
    assert accuracy.value == pytest.approx(right / len(ITEMS))
    assert (accuracy.task, accuracy.samples) == ("python_words", len(ITEMS))
    assert accuracy.higher_is_better is True
    assert accuracy.stderr is not None
    assert found.means("acc") == {0: accuracy.value}
    assert found.pruning == "off"
    assert json.loads(json.dumps(found.to_json()))["results"][0]["value"] == accuracy.value


@pytest.mark.usefixtures("_harness")
def test_tasks_before_one_that_fails_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    task = yaml.safe_load((TASKS / "python_words.yaml").read_text())
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name}))
    evaluate_one = lm_eval.simple_evaluate

    def fail(**settings: Any) -> Any:
        if "second" in settings["tasks"]:
            raise RuntimeError("no memory left")
        return evaluate_one(**settings)

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    told: list[tuple[str, str]] = []
    with pytest.raises(RuntimeError, match="no memory left"):
        evaluate_tasks(
            model,
            ["first", "second"],
            include=tmp_path,
            device="cpu",
            limit=4,
            on_task=lambda results: told.extend((r.task, r.metric) for r in results),
        )
    assert ("first", "acc") in told
    assert {name for name, _ in told} == {"first"}


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"hellaswag"}, "lm-eval knows no such task. Give a folder"),
        ({"python_word"}, "lm-eval knows no such task; did you mean 'python_word'? Give a folder"),
    ],
)
def test_an_unknown_task_is_told_in_sentences(known: set[str], message: str) -> None:
    assert _unknown("python_words", known).startswith(message)


@pytest.mark.slow
@pytest.mark.usefixtures("_harness")
def test_unknown_tasks_and_absent_data_are_told_together_before_the_model_is_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = yaml.safe_load((TASKS / "python_words.yaml").read_text())
    task |= {"task": "absent_data", "dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}}
    (tmp_path / "absent.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr("mcsharp_sdk.evaluation.tasks.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputProblems) as caught:
        evaluate_tasks(model, ["absent_dat", "absent_data"], include=tmp_path, device="cpu")
    unknown, absent = caught.value.problems
    assert (unknown.where, absent.where) == ("absent_dat", "absent_data")
    assert "did you mean 'absent_data'?" in unknown.message
    assert "its data cannot be read" in absent.message


@pytest.mark.slow
@pytest.mark.usefixtures("_harness")
def test_every_task_of_the_suites_is_one_of_lm_eval() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    assert {task for runs in SUITES.values() for run in runs for task in run.tasks} <= known
    zero_shot, five_shot = SUITES["papers"]
    assert (len(zero_shot.tasks), zero_shot.num_fewshot) == (8, 0)
    assert (five_shot.tasks, five_shot.num_fewshot) == (("mmlu",), 5)


def test_without_lm_eval_the_error_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'mcsharp_sdk\[eval\]'"):
        evaluate_tasks(model, ["piqa"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no task is named"),
        ({"suite": "paper"}, "suite 'paper' is not known; there is papers"),
        ({"tasks": ["piqa"], "limit": 0}, "limit is 0"),
        ({"tasks": ["piqa"], "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_tasks(model, **settings)

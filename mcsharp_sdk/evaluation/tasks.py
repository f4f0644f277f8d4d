"""Tasks of EleutherAI's lm-evaluation-harness on a model folder, compressed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.arguments import given_path
from mcsharp_sdk.data.tokenise import load_tokenizer
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.harness import import_harness, load_tasks, network
from mcsharp_sdk.evaluation.loading import check_pruning, choose_device, choose_dtype, load_model
from mcsharp_sdk.models.source import read_config
from mcsharp_sdk.runtime.pruned_routing import expert_pruning

BOOTSTRAPS = 1000
"""Samples for the errors of metrics that are no means; those of means need none."""


@dataclass(frozen=True)
class TaskRun:
    """Tasks with as many examples in the prompt; ``num_fewshot`` None leaves it to each task."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None


SUITES: Mapping[str, tuple[TaskRun, ...]] = {
    "papers": (
        TaskRun(
            (
                "piqa",
                "arc_easy",
                "arc_challenge",
                "boolq",
                "hellaswag",
                "winogrande",
                "mathqa",
                "mmlu",
            ),
            num_fewshot=0,
        ),
        TaskRun(("mmlu",), num_fewshot=5),
    ),
}
"""Name -> runs. ``papers`` are the eight zero-shot tasks of MC (arXiv 2410.06270), and MMLU with
five examples."""


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes
    ----------
    task : name of the task or group.
    num_fewshot : examples in the prompt; None where the harness does not say.
    metric : e.g. ``acc``; with the name of its filter behind a comma unless that is ``none``.
    value, stderr : of the metric; the error is None where the harness gives none.
    higher_is_better : None where the harness does not say.
    samples : how many samples were asked; None of a group.
    """

    task: str
    num_fewshot: int | None
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None


@dataclass(frozen=True)
class TaskEvaluation:
    """Tasks on one model.

    Attributes
    ----------
    model : its folder.
    pruning : how experts were pruned.
    results : metrics in the order of the tasks.
    harness : version of lm-eval.
    limit : most samples per task; None for all.
    """

    model: str
    pruning: str
    results: Sequence[TaskResult]
    harness: str
    limit: int | None = None

    def means(self, metric: str = "acc") -> dict[int | None, float]:
        """Examples in the prompt -> mean of a metric over the tasks with so many that have it."""
        values: dict[int | None, list[float]] = {}
        for result in self.results:
            if result.metric == metric:
                values.setdefault(result.num_fewshot, []).append(result.value)
        return {shots: sum(found) / len(found) for shots, found in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate_tasks(
    model_dir: str | Path,
    tasks: Sequence[str] = (),
    *,
    suite: str | None = None,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    pruning: str | None = None,
    download: bool = False,
    on_task: Callable[[Sequence[TaskResult]], None] = lambda results: None,
) -> TaskEvaluation:
    """Run tasks with lm-eval's ``HFLM`` on a model that is loaded as :func:`evaluate` does.

    Parameters
    ----------
    model_dir : folder with config, safetensors and tokenizer.
    tasks : names of tasks, groups or tags that lm-eval knows or ``include`` has.
    suite : a name in ``SUITES``, besides or in place of tasks.
    include : folder with task files of your own. lm-eval runs Python code that they name.
    num_fewshot : examples in the prompt of ``tasks``; None leaves it to each task.
    limit : most samples per task, for a first look; None for all.
    batch_size : requests that go through the model together.
    device, dtype, pruning : as in :func:`evaluate`.
    download : let lm-eval fetch data of tasks. Otherwise it takes what lies in its cache, or in
        files that tasks name.
    on_task : called with the results of each task as soon as it is done: what a later one fails at
        does not cost them.

    Raises
    ------
    InputError
        If lm-eval is not installed, a task is not known or its data is not at hand, or the model
        cannot be used; before the model is loaded.
    """
    runs = _runs(tasks, suite, num_fewshot)
    _check_numbers(limit=limit, batch_size=batch_size)
    harness = import_harness()
    directory = given_path(model_dir, "model_dir")
    config = read_config(directory)
    check_pruning(pruning, directory)
    place = choose_device(device)
    computed_in = choose_dtype(dtype, config, directory, place)
    tokenizer = load_tokenizer(directory)
    wanted = [(name, run.num_fewshot) for run in runs for name in run.tasks]
    with network(download):
        manager = load_tasks(harness, include, (name for name, _ in wanted))
        model = load_model(directory, place, computed_in, pruning)
        language_model = harness.models.huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size
        )
        results: list[TaskResult] = []
        for name, shots in wanted:
            found = _run(harness, language_model, manager, name, shots, limit, batch_size)
            on_task(found)
            results += found
    return TaskEvaluation(
        str(directory), expert_pruning(model), results, harness.__version__, limit
    )


def _runs(tasks: Sequence[str], suite: str | None, num_fewshot: int | None) -> list[TaskRun]:
    if suite is not None and suite not in SUITES:
        raise InputError(f"suite {suite!r} is not known; there is {', '.join(SUITES)}")
    own = [TaskRun(tuple(dict.fromkeys(tasks)), num_fewshot)] if tasks else []
    runs = [*own, *(SUITES[suite] if suite else ())]
    if not runs:
        raise InputError("no task is named: give --tasks NAME,NAME or --suite papers")
    return runs


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or more")


def _run(
    harness: Any,
    model: Any,
    manager: Any,
    task: str,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
) -> list[TaskResult]:
    found = harness.simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=BOOTSTRAPS,
    )
    every = {**found["results"], **found.get("groups", {})}
    results: list[TaskResult] = []
    # A tag has no row of its own: then the rows of all its tasks are told.
    for name in [task] if task in every else every:
        shots = found.get("n-shot", {}).get(name) if num_fewshot is None else num_fewshot
        results += _metrics(name, shots, every[name], found)
    return results


def _metrics(
    name: str, shots: int | None, row: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[TaskResult]:
    better = found.get("higher_is_better", {}).get(name, {})
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{kind}")
        yield TaskResult(
            task=name,
            num_fewshot=shots,
            metric=metric if kind == "none" else key,
            value=float(value),
            stderr=float(error) if isinstance(error, int | float) else None,
            higher_is_better=better.get(metric),
            samples=samples,
        )

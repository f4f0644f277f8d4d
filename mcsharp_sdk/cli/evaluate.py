"""mcsharp evaluate: perplexity and cost of model folders, their distance to the original, tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from mcsharp_sdk.cli.evaluation_tables import (
    note_results,
    show_comparison,
    show_evaluation,
    show_tasks,
)
from mcsharp_sdk.cli.options import JsonOption, MaxTokensOption, TextOption, WindowOption, path
from mcsharp_sdk.cli.output import console, print_json, print_note
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.folders import MANIFEST_FILE, PAGE_FILE, check_model_folder


def evaluate(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…", parser=path, help="Folder of the model; several to compare."
        ),
    ],
    text: TextOption = None,
    window: WindowOption = None,
    max_tokens: MaxTokensOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    pruning: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="How to prune experts: off, rule, learned or both. Default: as it was made.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One table of all folders, on the same text.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=path,
            help="The original: also measure KL divergence from it and top-1 agreement with it.",
        ),
    ] = None,
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep the figures in each folder, for `mcsharp report`."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Run tasks of lm-eval in place of a text."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run a set of tasks: papers.")
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", parser=path, help="Folder with task files of your own."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt of --tasks. Default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most samples per task.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Requests of tasks that run together. Default: 4.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Let lm-eval fetch the data of tasks.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure perplexity, bits, bytes and activated experts of models, or run tasks on them.

    An exported ONNX model runs with onnxruntime.
    """
    of_text: dict[str, Any] = {"text": text, "window": window, "max_tokens": max_tokens}
    of_tasks: dict[str, Any] = {
        "include": include,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": batch_size,
        "download": download or None,
    }
    shared: dict[str, Any] = {"device": device, "dtype": dtype, "pruning": pruning}
    if len(directories) > 1 and not compare:
        raise InputError("several folders go into one table with --compare")
    if tasks is not None or suite is not None:
        _refuse(
            {**of_text, "reference": reference, "save": save or None},
            "does not go with tasks: leave it out",
        )
        _check_folders(directories)
        _tasks(directories, tasks, suite, {**_given(of_tasks), **shared}, json)
        return
    _refuse(of_tasks, "goes with --tasks or --suite")
    _check_folders([*directories, *([reference] if reference else [])])
    if compare or reference is not None or save:
        _compare(directories, reference, save, {**of_text, **shared}, json)
    else:
        _evaluate(directories[0], {**of_text, **shared}, json)


def _check_folders(directories: Iterable[Path]) -> None:
    """Refuse what is no model, before anything heavy is imported."""
    for directory in directories:
        if not (directory / MANIFEST_FILE).is_file():  # an ONNX model has no config.json
            check_model_folder(directory)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], why: str) -> None:
    for name in _given(options):
        raise InputError(f"--{name.replace('_', '-')} {why}")


def _evaluate(directory: Path, settings: dict[str, Any], json: bool) -> None:
    from mcsharp_sdk.evaluation.evaluate import evaluate as measure

    result = measure(directory, track=_progress, **settings)
    if json:
        print_json(result.to_json())
    else:
        show_evaluation(result)


def _compare(
    directories: list[Path],
    reference: Path | None,
    save: bool,
    settings: dict[str, Any],
    json: bool,
) -> None:
    from mcsharp_sdk.evaluation.comparison import Comparison, compare

    finished: list[Comparison] = []

    def keep(found: Comparison) -> None:
        finished.append(found)
        for file in found.save() if save else ():
            _renew_page(file.parent)
            print_note(f"kept in {file}")

    told: dict[str, Any] = {"track": _progress, "on_model": print_note, "on_result": keep}
    try:
        result = compare(directories, reference=reference, **told, **settings)
    except BaseException:
        if finished and not json:  # what is done should not be lost with what failed
            models = [compared for found in finished for compared in found.models]
            show_comparison(Comparison(models, finished[0].reference))
        raise
    if json:
        print_json(result.to_json())
    else:
        show_comparison(result)


def _renew_page(folder: Path) -> None:
    """Write the report of a folder again, if it has one, so that it shows what was measured."""
    from mcsharp_sdk.report.page import write_report
    from mcsharp_sdk.report.run_folder import RunFolder

    if (folder / PAGE_FILE).is_file() and RunFolder.read(folder).is_result:
        write_report(folder)


def _tasks(
    directories: list[Path],
    tasks: str | None,
    suite: str | None,
    settings: dict[str, Any],
    json: bool,
) -> None:
    from mcsharp_sdk.evaluation.tasks import evaluate_tasks

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    results = []
    for directory in directories:
        print_note(str(directory))
        results.append(
            evaluate_tasks(directory, names, suite=suite, on_task=note_results, **settings)
        )
    if json:
        documents = [result.to_json() for result in results]
        print_json(documents if len(documents) > 1 else documents[0])
    else:
        show_tasks(results)


def _progress(windows: range) -> Iterable[int]:
    """A bar on standard error, if that is a terminal."""
    status = console(stderr=True)
    return track(windows, "windows", console=status, disable=not status.is_terminal, transient=True)

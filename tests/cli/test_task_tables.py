"""Tables of tasks: a column for each model, and means of tasks with equally many examples."""

from __future__ import annotations

import pytest

from mcsharp_sdk.cli.evaluation_tables import note_results, show_tasks
from mcsharp_sdk.evaluation.tasks import TaskEvaluation, TaskResult


def evaluation(model: str, **values: float) -> TaskEvaluation:
    rows = {
        "piqa": (values["piqa"], 0),
        "arc_easy": (values["arc"], 0),
        "mmlu": (values["mmlu"], 5),
    }
    results = [TaskResult(n, shots, "acc", v, 0.01, True, 100) for n, (v, shots) in rows.items()]
    return TaskEvaluation(model, "off", results, "0.4.13")


def test_what_is_done_is_told_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    note_results(evaluation("one", piqa=0.5, arc=0.7, mmlu=0.25).results[:1])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "piqa, 0 shots: acc 0.5000 ± 0.0100\n")


def test_models_stand_side_by_side_and_shots_are_not_mixed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [
        evaluation("one", piqa=0.5, arc=0.7, mmlu=0.25),
        evaluation("two", piqa=0.25, arc=0.75, mmlu=0.5),
    ]
    assert models[0].means() == {0: pytest.approx(0.6), 5: 0.25}
    show_tasks(models)
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["piqa", "0", "acc", "0.5000 ± 0.0100", "0.2500 ± 0.0100"] in cells
    assert ["mean", "0", "acc", "0.6000", "0.5000"] in cells
    assert [row[1] for row in cells if row[0] == "mean"] == ["0"], "one task needs no mean"

"""The folder that a sweep writes: a table, a plot, and a result per variant."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcsharp_sdk.artifact_file import read_json_file, write_json, write_text_atomically
from mcsharp_sdk.engine.sweep_plan import PlannedVariant, SweepPlan
from mcsharp_sdk.errors import InputError, Problem, raise_problems
from mcsharp_sdk.file_lock import lock
from mcsharp_sdk.folders import SWEEP_FILE, check_folder_to_make
from mcsharp_sdk.report.sweep import Row, csv_table, sweep_plot

TABLE_FILE = "sweep.csv"
PLOT_FILE = "sweep.svg"
VARIANTS_FOLDER = "variants"
RESULT_FILE = "result.json"
MODEL_FOLDER = "model"
WORK_FOLDER = ".work"
LOCK_FILE = "sweep.lock"

_ADVICE = "give another --output, or --overwrite to delete the sweep that is there"


@dataclass(frozen=True)
class Result:
    """What became of one variant.

    Attributes
    ----------
    name : of the variant.
    settings : varied setting -> its value.
    evaluation : as ``Evaluation.to_json``; empty if the variant failed.
    seconds : per stage and exporter that was run for it; shared stages are absent.
    warnings : what was noticed on the way.
    model : folder of the model within the output, if models are kept.
    error : why it failed; empty if it did not.
    cause : what was raised then. It is in no file.
    """

    name: str
    settings: Mapping[str, Any]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    model: str | None = None
    error: str = ""
    cause: Exception | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "evaluation": dict(self.evaluation),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
            "model": self.model,
            "error": self.error,
        }


@dataclass(frozen=True)
class SweepFolder:
    """The output of a sweep.

    Attributes
    ----------
    path : the folder.
    plan : of the sweep that it is for.
    keep_models : a variant is finished only if its model is there too.
    """

    path: Path
    plan: SweepPlan
    keep_models: bool

    def check(self, overwrite: bool) -> None:
        """Refuse a folder of something else, or of another sweep than the planned one.

        Raises
        ------
        InputError
            With all variants that were evaluated under other conditions.
        """
        check_folder_to_make(self.path)
        names = {f.name for f in self.path.iterdir()} if self.path.exists() else set()
        if not names - {LOCK_FILE, WORK_FOLDER}:
            return
        if not (self.path / SWEEP_FILE).is_file():
            raise InputError(
                f"{self.path} holds something else than a sweep; give another --output, or empty "
                "the folder yourself"
            )
        if not overwrite:
            self._check_sweep()

    def _check_sweep(self) -> None:
        before = _read(self.path / SWEEP_FILE).get("varied")
        if before != list(self.plan.varied):
            known = isinstance(before, list) and before
            over = ", ".join(map(str, known or ["what cannot be told"]))
            raise InputError(
                f"{self.path} holds a sweep over {over}; give another --output, or "
                "--overwrite to delete it"
            )
        problems = []
        for variant in self.plan.variants:
            kept = self._kept(variant)
            old = kept["fingerprint"] if kept else variant.fingerprint
            parts = sorted(old.keys() | variant.fingerprint.keys())
            changed = [p for p in parts if old.get(p) != variant.fingerprint.get(p)]
            if changed:
                message = f"{', '.join(changed)} changed since it was evaluated; {_ADVICE}"
                problems.append(Problem(variant.name, message))
        raise_problems(str(self.path), problems)

    @contextmanager
    def opened(self, overwrite: bool) -> Iterator[None]:
        """Make the folder and hold it against a second sweep."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path / LOCK_FILE):
            if overwrite:
                for name in (VARIANTS_FOLDER, WORK_FOLDER):
                    shutil.rmtree(self.path / name, ignore_errors=True)
            try:
                yield
            finally:
                (self.path / LOCK_FILE).unlink(missing_ok=True)

    def model(self, variant: PlannedVariant) -> Path:
        """Where the variant's model is kept."""
        return self._variant(variant) / MODEL_FOLDER

    def _variant(self, variant: PlannedVariant) -> Path:
        return self.path / VARIANTS_FOLDER / variant.name

    def _kept(self, variant: PlannedVariant) -> dict[str, Any] | None:
        file = self._variant(variant) / RESULT_FILE
        if not file.is_file():
            return None
        kept = _read(file)
        if not {"fingerprint", "result"} <= kept.keys():
            raise InputError(f"{file} is no result of a variant; {_ADVICE}")
        return kept

    def finished(self, variant: PlannedVariant) -> Result | None:
        """The variant's result, if an earlier call got it; and its model, if models are kept."""
        kept = self._kept(variant)
        if kept is None:
            return None
        result = Result(**kept["result"])
        if self.keep_models and not self.model(variant).is_dir():
            return None
        return result

    def keep(self, variant: PlannedVariant, result: Result) -> Result:
        """Write down a finished variant's result, and give it as later calls will read it."""
        content = {"fingerprint": dict(variant.fingerprint), "result": result.to_json()}
        file = self._variant(variant) / RESULT_FILE
        write_json(file, content)
        return Result(**read_json_file(file)["result"])

    def write_comparison(self, results: Sequence[Result]) -> None:
        """Write the table and the plot of the results so far."""
        shown = {variant.name: variant.shown for variant in self.plan.variants}
        rows = [Row(r.settings, shown[r.name], r.evaluation, r.error) for r in results]
        content = {"varied": list(self.plan.varied), "variants": [r.to_json() for r in results]}
        write_json(self.path / SWEEP_FILE, content)
        write_text_atomically(self.path / TABLE_FILE, csv_table(rows))
        write_text_atomically(self.path / PLOT_FILE, sweep_plot(rows, self.plan.title))


def _read(file: Path) -> dict[str, Any]:
    """A JSON file that an earlier call wrote."""
    try:
        return read_json_file(file)
    except InputError as error:
        raise InputError(f"{error}; {_ADVICE}") from None

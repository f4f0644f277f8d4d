"""Run the stages and exporters of a recipe, of which everything has been checked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.engine.context import RunContext
from mcsharp_sdk.engine.fingerprint import stage_keys
from mcsharp_sdk.engine.obstacles import explained
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.publication import is_published, publish
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.engine.run_directory import FinishedStage, RunDirectory
from mcsharp_sdk.engine.stage_store import StageStore
from mcsharp_sdk.errors import InputError, RunError, some_of
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.partial_folder import partial_folder
from mcsharp_sdk.recipe.schema import Recipe

logger = logging.getLogger("mcsharp_sdk")


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """A run in which everything that can be known before has been checked.

    Attributes
    ----------
    source, recipe, calibration : as in :class:`RunContext`.
    directory : the run directory, not open yet.
    output, overwrite : folder to make, and whether it may replace one that is there.
    store : where finished stages are looked for and kept; None to run every stage.
    spill : keep activations in files of the run directory.
    ranks : the processes that share the work.
    """

    source: SourceModel
    recipe: Recipe
    calibration: CalibrationSet
    directory: RunDirectory
    output: Path
    overwrite: bool = False
    store: StageStore | None = None
    spill: bool = False
    ranks: Ranks = ALONE

    def run(self, progress: bool | None = None) -> tuple[Mapping[str, float], Sequence[str]]:
        """Run stages and exporters; seconds of each that was not finished before, and warnings."""
        watch = _Stopwatch()
        with (
            explained(self.directory.path),
            self.directory as opened,
            ProgressBars(progress) as bars,
        ):
            if not self.overwrite and self._is_published(opened.path):
                logger.info("%s was finished by an earlier run", self.output)
                return {}, _whole_report(opened, self.source).warnings
            context = RunContext(
                self.source,
                self.recipe,
                self.calibration,
                opened,
                bars,
                spill=self.spill,
                ranks=self.ranks,
            )
            _run_stages(context, watch, self.store)
            if self.ranks.first and self.recipe.exports:
                own = replace(context, directory=opened.own)
                _export(own, self.output, self.overwrite, watch)
            self.ranks.wait()
        return watch.seconds, context.report.warnings

    def _is_published(self, run_directory: Path) -> bool:
        """As the first process sees it."""
        return self.ranks.share(is_published(run_directory, self.output, self.recipe))


def _run_stages(context: RunContext, watch: _Stopwatch, store: StageStore | None) -> None:
    directory = context.directory
    keys = stage_keys(context.recipe, directory.fingerprint)
    for position, (stage, key) in enumerate(zip(context.recipe.stages, keys, strict=True)):
        name = f"{position} {stage.type}"
        if name in directory.finished():
            logger.info("%s was finished by an earlier run", stage.type)
        elif store is not None and store.give(key, directory, name):
            logger.info("%s is shared with another run", stage.type)
        else:
            _run_stage(context, stage, name, watch)
        if store is not None:
            store.keep(key, directory, directory.finished()[name])
    context.report = _whole_report(directory, context.model)


def _whole_report(directory: RunDirectory, source: SourceModel) -> RunReport:
    """What the finished stages left to be reported, and what of the model is in no result."""
    report = directory.report()
    if source.names.left_out:
        report.warn(
            "these tensors are left out of the result, since transformers has no place for them in "
            f"a model of type {source.config.model_type}: {some_of(source.names.left_out)}"
        )
    return report


def _run_stage(context: RunContext, stage: Modifier, name: str, watch: _Stopwatch) -> None:
    logger.info("%s begins", stage.type)
    context.report = RunReport()
    with watch.measure(stage.type):
        if context.ranks.alone or stage.measures(calibrated=context.calibrated):
            stage.run(context)
        elif context.ranks.first:
            stage.run(replace(context, directory=context.directory.own, ranks=ALONE))
        context.ranks.wait()
    files = context.directory.files_written(stage.writes)
    if not any(Path(name).parts[0] in (stage.writes, f"{stage.writes}.json") for name in files):
        raise RunError(
            f"{stage.type} did not write its result: 'run' must end with '{stage.writes}' written "
            "by context.write or into context.layers"
        )
    finished = FinishedStage(files, context.report, context.directory.checksums(files))
    context.directory.mark_finished(name, finished)
    logger.info("%s took %.1f s", stage.type, watch.seconds[stage.type])


def _export(context: RunContext, output: Path, overwrite: bool, watch: _Stopwatch) -> None:
    """Run all exporters into a hidden folder and rename it when everything is in it."""
    with partial_folder(output) as partial:
        for exporter in context.recipe.exports:
            with watch.measure(exporter.type):
                try:
                    exporter.run(context, partial)
                except InputError as error:
                    raise RunError(
                        f"{exporter.type}: {error}. What the stages made is kept in "
                        f"{context.directory.path}: take {exporter.type} out of 'exports' and run "
                        "the same command"
                    ) from error
        publish(partial, output, context.recipe, context.directory, overwrite=overwrite)

"""Run a recipe on a model: check everything, run the stages, export, and only then show."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.data.gathering import gather
from mcsharp_sdk.engine.budget import read_bytes_of
from mcsharp_sdk.engine.context import RunContext
from mcsharp_sdk.engine.disk_space import check_disk_space
from mcsharp_sdk.engine.fingerprint import fingerprint, stage_keys
from mcsharp_sdk.engine.obstacles import explained
from mcsharp_sdk.engine.output_folder import check_output
from mcsharp_sdk.engine.plan import Plan, make_plan
from mcsharp_sdk.engine.progress import ProgressBars
from mcsharp_sdk.engine.publication import is_published, partial_output, publish
from mcsharp_sdk.engine.ranks import SharedRunDirectory, joined, own_device
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.engine.run_directory import FinishedStage, RunDirectory
from mcsharp_sdk.engine.stage_store import StageStore
from mcsharp_sdk.errors import Checks, InputError, RunError
from mcsharp_sdk.models.device import is_cpu
from mcsharp_sdk.models.memory import peak_resident_bytes
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.weight_checks import check_outer_weights
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.recipe.library import as_recipe
from mcsharp_sdk.recipe.schema import Recipe

logger = logging.getLogger("mcsharp_sdk")

MOST_NAMED = 3
"""Most tensors that a warning names."""


@dataclass(frozen=True)
class Compression:
    """What ``compress`` did.

    Attributes
    ----------
    output : the finished folder; without exporters that is the run directory.
    seconds : per stage and exporter; a stage finished by an earlier run is absent.
    warnings : what was noticed on the way.
    plan : what was intended.
    peak_memory : the most bytes of memory that this process has had so far.
    """

    output: Path
    seconds: Mapping[str, float]
    warnings: Sequence[str]
    plan: Plan
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "output": str(self.output),
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
            "plan": self.plan.to_json(),
            "peak_memory": self.peak_memory,
        }


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def compress(
    recipe: Recipe | str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    run_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    max_memory: str | int | None = None,
    progress: bool | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Compression:
    """Compress a model as a recipe says.

    The output folder appears when everything in it is finished. A run that was cut off continues
    from the last finished layer if it is started again with the same arguments. The result of a
    recipe without exporters is its run directory, which lies at ``output`` if no other is given.

    Parameters
    ----------
    recipe : a recipe, a recipe file, or the name of a recipe that comes with the package.
    model : folder of a Hugging Face MoE model in safetensors.
    output : folder to make.
    run_dir : where intermediate results are kept. By default beside the output, and removed when
        the run is finished.
    overrides : e.g. ``stages.BitAllocation.target_bits=2.0``; only with a recipe file or name.
    overwrite : replace an output folder that is there.
    device : where to compute, e.g. ``cpu`` or ``cuda:0``.
    max_memory : bytes of memory that the run keeps to, or a text such as ``8GB``; for device
        ``cpu``. Activations lie in the run directory where they must. The result is the same.
    progress : show progress bars; by default where standard error is a terminal.
    on_plan : called with the plan before work begins.

    Raises
    ------
    InputError
        If something given is wrong, or ``max_memory`` is too little; nothing was written then.
    """
    recipe = as_recipe(recipe, overrides)
    with joined() as ranks:
        return _compress(
            recipe,
            Path(model),
            Path(output),
            Path(run_dir) if run_dir is not None else None,
            overwrite=overwrite,
            device=own_device(device),
            max_memory=max_memory,
            progress=progress if ranks.first else False,
            on_plan=on_plan if ranks.first else None,
            ranks=ranks,
        )


def _compress(
    recipe: Recipe,
    model: Path,
    output: Path,
    run_dir: Path | None,
    *,
    overwrite: bool,
    device: str,
    max_memory: str | int | None,
    progress: bool | None,
    on_plan: Callable[[Plan], None] | None,
    ranks: Ranks,
) -> Compression:
    """``compress`` with its arguments read, as one of several processes or alone."""
    allowed = _allowed(max_memory, device)
    output = Path(os.path.abspath(output))
    directory = run_dir if run_dir is not None else _default_directory(output, recipe)
    published = not overwrite and is_published(directory, output, recipe)
    source = SourceModel(model, device)
    checks = Checks()
    if recipe.exports:
        checks.result(lambda: check_output(output, model, directory, overwrite or published))
    plan = checks.result(lambda: make_plan(recipe, source, allowed, ranks.count))
    if plan is not None and not published:
        checks.result(lambda: check_disk_space(plan, source, directory, output))
    checks.result(lambda: check_outer_weights(source))
    calibration = checks.result(lambda: _shared_calibration(recipe, source, ranks))
    checks.raise_together("the run")
    assert plan is not None
    assert calibration is not None
    if on_plan is not None:
        on_plan(plan)
    ranks.wait()  # all have checked, so that none finds what another one has begun
    keep = run_dir is not None or not recipe.exports
    opened = RunDirectory(directory, fingerprint(recipe, source), keep=keep)
    work = Work(
        source,
        recipe,
        calibration,
        opened if ranks.alone else SharedRunDirectory(opened, ranks),
        output,
        overwrite=overwrite,
        spill=plan.spill,
        ranks=ranks,
    )
    seconds, warnings = work.run(progress)
    result = output if recipe.exports else directory
    return Compression(result, seconds, warnings, plan, peak_resident_bytes())


def _shared_calibration(recipe: Recipe, source: SourceModel, ranks: Ranks) -> CalibrationSet:
    calibration = read_calibration(recipe, source)
    if calibration.groups:
        calibration.share(ranks.rank, ranks.count)  # fewer sequences than processes are refused
    return calibration


def _default_directory(output: Path, recipe: Recipe) -> Path:
    """A hidden folder beside the output, or the output where nothing else will be there."""
    if not output.name:
        raise InputError(f"{output} cannot be replaced: give a folder to make as --output")
    return output.with_name(f".{output.name}.run") if recipe.exports else output


def _allowed(max_memory: str | int | None, device: str) -> int | None:
    allowed = read_bytes_of(max_memory)
    if allowed is not None and not is_cpu(device):
        raise InputError(
            f"max_memory counts the memory of this process, and device {device} has its own: "
            "leave one of them out"
        )
    return allowed


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


def read_calibration(recipe: Recipe, source: SourceModel) -> CalibrationSet:
    """The calibration sequences of all sources; none if the recipe has no calibration.

    Raises
    ------
    InputError
        If texts, images, the tokenizer or the processor cannot be read, or there is too little.
    """
    return gather(recipe.sources, source.path, source.config)


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
    if source.left_out:
        first, rest = source.left_out[:MOST_NAMED], len(source.left_out) - MOST_NAMED
        report.warn(
            "these tensors are left out of the result, since transformers has no place for them in "
            f"a model of type {source.config.model_type}: {', '.join(first)}"
            + (f" and {rest} more" if rest > 0 else "")
        )
    return report


def _run_stage(context: RunContext, stage: Modifier, name: str, watch: _Stopwatch) -> None:
    logger.info("%s begins", stage.type)
    context.report = RunReport()
    with watch.measure(stage.type):
        if stage.needs_calibration() or context.ranks.alone:
            stage.run(context)
        elif context.ranks.first:
            stage.run(replace(context, directory=context.directory.own, ranks=ALONE))
        context.ranks.wait()
    files = context.directory.files_written(stage.writes)
    finished = FinishedStage(files, context.report, context.directory.checksums(files))
    context.directory.mark_finished(name, finished)
    logger.info("%s took %.1f s", stage.type, watch.seconds[stage.type])


def _export(context: RunContext, output: Path, overwrite: bool, watch: _Stopwatch) -> None:
    """Run all exporters into a hidden folder and rename it when everything is in it."""
    with partial_output(output) as partial:
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

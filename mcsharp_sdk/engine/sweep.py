"""Run the variants of a recipe, sharing all work that the variation does not touch, and compare."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.arguments import (
    AnyPath,
    check_truth,
    model_path,
    optional_path,
    path_to_make,
    whole_number,
)
from mcsharp_sdk.artifact_file import read_json_file, write_json
from mcsharp_sdk.engine.default_dtype import float32_by_default
from mcsharp_sdk.engine.disk_space import check_disk_space
from mcsharp_sdk.engine.obstacles import explained
from mcsharp_sdk.engine.plan import make_plan
from mcsharp_sdk.engine.progress import check_progress
from mcsharp_sdk.engine.ranks import started_together
from mcsharp_sdk.engine.run_directory import RunDirectory
from mcsharp_sdk.engine.stage_store import StageStore
from mcsharp_sdk.engine.sweep_folder import WORK_FOLDER, Result, SweepFolder
from mcsharp_sdk.engine.sweep_plan import EvaluationSettings, PlannedVariant, SweepPlan, plan_sweep
from mcsharp_sdk.engine.work import Work
from mcsharp_sdk.errors import InputError, McSharpError
from mcsharp_sdk.evaluation.evaluate import evaluate
from mcsharp_sdk.folders import check_folder_to_make
from mcsharp_sdk.models.device import AnyDevice, device_name
from mcsharp_sdk.models.weight_checks import check_outer_weights
from mcsharp_sdk.recipe.library import RecipeLike
from mcsharp_sdk.recipe.overrides import Overrides

logger = logging.getLogger("mcsharp_sdk")

OnVariant = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sweep:
    """What ``sweep`` did.

    Attributes
    ----------
    output : the folder with ``sweep.json``, ``sweep.csv`` and ``sweep.svg``.
    varied : settings that were varied.
    results : one per variant, those of earlier calls among them.
    """

    output: Path
    varied: Sequence[str]
    results: Sequence[Result]

    @property
    def failures(self) -> list[Result]:
        """The variants that failed."""
        return [result for result in self.results if result.error]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        variants = [result.to_json() for result in self.results]
        return {"output": str(self.output), "varied": list(self.varied), "variants": variants}


@float32_by_default()
def sweep(
    recipe: RecipeLike,
    model: AnyPath,
    output: AnyPath,
    vary: Mapping[str, Sequence[Any]] | Sequence[str],
    *,
    text: AnyPath | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    overrides: Overrides = (),
    run_dir: AnyPath | None = None,
    keep_models: bool = False,
    overwrite: bool = False,
    device: AnyDevice = "cpu",
    progress: bool | None = None,
    on_variant: OnVariant | None = None,
) -> Sweep:
    """Compress a model as each variant of a recipe says, evaluate each, and compare them.

    A stage runs once for all variants in which everything that its result depends on is the same:
    its settings, the model, the calibration, and the stages that made what it reads or uses.

    A sweep that was cut off continues if it is started again with the same arguments, and more
    values may be given then: finished variants are not done again. A variant that fails does not
    stop the others; the same call tries it again.

    Parameters
    ----------
    recipe : a recipe file, the name of a recipe that comes with the package, or plain data.
    model : folder of a Hugging Face MoE model in safetensors.
    output : folder to make, or one of a sweep over the same settings to continue.
    vary : setting -> its values, e.g. ``{"stages.BitAllocation.target_bits": [2.0, 2.5]}``, or
        texts such as ``stages.BitAllocation.target_bits=2.0,2.5``. All combinations are run.
    text, window, max_tokens : of the evaluation, see :func:`mcsharp_sdk.evaluate`.
    overrides : settings that are the same for all variants.
    run_dir : where finished stages are kept, for other sweeps too. By default in ``output``, and
        removed as they are no longer needed.
    keep_models : keep the compressed models; by default each is deleted when it is evaluated.
    overwrite : delete the sweep that is in ``output``.
    device : where to compute, e.g. ``cpu`` or ``cuda:0``.
    progress : show progress bars; by default where standard error is a terminal.
    on_variant : called with name, number and count as the work on a variant begins.

    Raises
    ------
    InputError
        If something given is wrong, for whichever variant; nothing was written then.
    """
    if started_together() > 1:
        raise InputError("a sweep runs in one process: start it without torchrun")
    if window is not None:
        window = whole_number(window, "window")
    if max_tokens is not None:
        max_tokens = whole_number(max_tokens, "max_tokens")
    check_truth(keep_models=keep_models, overwrite=overwrite)
    check_progress(progress)
    place, target = device_name(device), path_to_make(output, "output", "a folder to make")
    kept = None if run_dir is None else path_to_make(run_dir, "run_dir", "a folder")
    text_file = optional_path(text, "text", "the file of the text")
    settings = EvaluationSettings(text_file, window, max_tokens)
    plan = plan_sweep(recipe, model_path(model), vary, overrides, settings, place)
    check_outer_weights(plan.source)
    folder = SweepFolder(target, plan, keep_models)
    folder.check(overwrite)
    work = kept if kept is not None else folder.path / WORK_FOLDER
    check_folder_to_make(work)
    _check_disk_space(plan, folder, work, overwrite)
    with folder.opened(overwrite):
        runner = _Runner(plan, folder, work, kept is not None, place, progress)
        results = runner.run(on_variant)
        if run_dir is None and not any(result.error for result in results):
            shutil.rmtree(work, ignore_errors=True)
    return Sweep(folder.path, plan.varied, results)


def _check_disk_space(plan: SweepPlan, folder: SweepFolder, work: Path, overwrite: bool) -> None:
    """Check that there is room for each variant that will be made, its run directory included."""
    for variant in plan.variants:
        if overwrite or folder.finished(variant) is None:
            planned = make_plan(variant.recipe, plan.source)
            check_disk_space(planned, plan.source, work / "runs" / variant.identity, work)


@dataclass(frozen=True)
class _Runner:
    """Runs what is not finished; ``work`` holds stages, run directories and models."""

    plan: SweepPlan
    folder: SweepFolder
    work: Path
    keep_stages: bool
    device: str
    progress: bool | None

    def run(self, on_variant: OnVariant | None) -> list[Result]:
        """The results of all variants, in order."""
        variants = self.plan.variants
        results = {v.name: r for v in variants if (r := self.folder.finished(v)) is not None}
        unfinished = [v for v in variants if v.name not in results]
        self.folder.write_comparison([results[v.name] for v in variants if v.name in results])
        for variant in list(unfinished):
            if on_variant is not None:
                on_variant(variant.name, variants.index(variant) + 1, len(variants))
            others = [v for v in unfinished if v is not variant]
            results[variant.name] = result = self._attempt(variant, self._store(others))
            if not result.error:
                unfinished.remove(variant)
            self._store(unfinished).drop_unwanted()
            self.folder.write_comparison([results[v.name] for v in variants if v.name in results])
        return [results[v.name] for v in variants]

    def _store(self, users: Sequence[PlannedVariant]) -> StageStore:
        """The finished stages, of which those that ``users`` can share are worth keeping."""
        wanted = None if self.keep_stages else {key for user in users for key in user.stage_keys}
        return StageStore(self.work / "stages", wanted)

    def _attempt(self, variant: PlannedVariant, store: StageStore) -> Result:
        try:
            with explained(self.work):
                return self._compress_and_evaluate(variant, store)
        except McSharpError as error:
            return Result(variant.name, variant.settings, error=str(error), cause=error)
        except Exception as error:  # of a stage of another package, or a fault: the others go on
            logger.exception("variant %s failed", variant.name)
            told = f"{type(error).__name__}: {error}"
            return Result(variant.name, variant.settings, error=told, cause=error)

    def _compress_and_evaluate(self, variant: PlannedVariant, store: StageStore) -> Result:
        model = self.work / "models" / variant.identity
        done = self._compressed(variant, model, store)
        settings = self.plan.evaluation
        found = evaluate(
            model,
            settings.text,
            window=settings.window,
            max_tokens=settings.max_tokens,
            device=self.device,
        ).to_json()
        del found["model"]  # a folder that will be gone, or elsewhere
        kept = None
        if self.folder.keep_models:
            target = self.folder.model(variant)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(model, target)
            kept = str(target.relative_to(self.folder.path))
        result = Result(variant.name, variant.settings, found, **done, model=kept)
        result = self.folder.keep(variant, result)
        shutil.rmtree(model, ignore_errors=True)
        _record(model).unlink()
        return result

    def _compressed(
        self, variant: PlannedVariant, model: Path, store: StageStore
    ) -> dict[str, Any]:
        """Make the model if a sweep that was cut off has not; seconds and warnings of that."""
        record = _record(model)
        if not (model.is_dir() and record.is_file()):
            directory = RunDirectory(
                self.work / "runs" / variant.identity, variant.fingerprint, keep=False
            )
            calibration = self.plan.calibration(variant.recipe)
            work = Work(
                self.plan.source,
                variant.recipe,
                calibration,
                directory,
                model,
                overwrite=True,
                store=store,
            )
            seconds, warnings = work.run(self.progress)
            write_json(record, {"seconds": dict(seconds), "warnings": list(warnings)})
        return read_json_file(record)


def _record(model: Path) -> Path:
    """The file beside a model that says how it was made, written when it is finished."""
    return model.with_name(f"{model.name}.json")

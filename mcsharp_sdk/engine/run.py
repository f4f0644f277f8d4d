"""Run a recipe on a model: check everything, run the stages, export, and only then show."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.arguments import (
    AnyPath,
    check_truth,
    model_path,
    path_to_make,
)
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.data.gathering import gather
from mcsharp_sdk.data.tokenise import check_tokenizer_files
from mcsharp_sdk.engine.budget import read_bytes_of
from mcsharp_sdk.engine.default_dtype import float32_by_default
from mcsharp_sdk.engine.disk_space import check_disk_space
from mcsharp_sdk.engine.fingerprint import fingerprint
from mcsharp_sdk.engine.output_folder import check_output, default_run_directory
from mcsharp_sdk.engine.plan import Plan, make_plan
from mcsharp_sdk.engine.progress import check_progress
from mcsharp_sdk.engine.publication import is_published
from mcsharp_sdk.engine.ranks import SharedRunDirectory, joined, own_device
from mcsharp_sdk.engine.run_directory import RunDirectory
from mcsharp_sdk.engine.work import Work
from mcsharp_sdk.errors import Checks, InputError
from mcsharp_sdk.folders import check_folder_to_make
from mcsharp_sdk.models.device import AnyDevice, device_name, is_cpu
from mcsharp_sdk.models.memory import peak_resident_bytes
from mcsharp_sdk.models.ranks import Ranks
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.weight_checks import check_outer_weights
from mcsharp_sdk.recipe.library import RecipeLike, as_recipe
from mcsharp_sdk.recipe.overrides import Overrides
from mcsharp_sdk.recipe.schema import Recipe


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


@float32_by_default()
def compress(
    recipe: Recipe | RecipeLike,
    model: AnyPath,
    output: AnyPath,
    *,
    run_dir: AnyPath | None = None,
    overrides: Overrides = (),
    overwrite: bool = False,
    device: AnyDevice = "cpu",
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
    recipe : a recipe, a recipe file, the name of a recipe that comes with the package, or plain
        data.
    model : folder of a Hugging Face MoE model in safetensors.
    output : folder to make.
    run_dir : where intermediate results are kept. By default beside the output, and removed when
        the run is finished.
    overrides : texts such as ``stages.BitAllocation.target_bits=2.0``, or a mapping from settings
        to values; not with a ``Recipe``.
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
    checked = as_recipe(recipe, overrides)
    source, target = model_path(model), path_to_make(output, "output", "a folder to make")
    directory = None if run_dir is None else path_to_make(run_dir, "run_dir", "a folder")
    place = own_device(device_name(device))
    check_truth(overwrite=overwrite)
    check_progress(progress)
    with joined() as ranks:
        return _compress(
            checked,
            source,
            target,
            directory,
            overwrite=overwrite,
            device=place,
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
    directory = run_dir if run_dir is not None else default_run_directory(output, recipe)
    published = not overwrite and is_published(directory, output, recipe)
    source = SourceModel(model, device)
    checks = Checks()
    if run_dir is not None or not recipe.exports:  # else it lies beside the output
        checks.result(lambda: check_folder_to_make(directory))
    if recipe.exports:
        checks.result(lambda: check_output(output, model, directory, overwrite or published))
    plan = checks.result(lambda: make_plan(recipe, source, allowed, ranks.count))
    if plan is not None and not published:
        checks.result(lambda: check_disk_space(plan, source, directory, output))
    checks.result(lambda: check_outer_weights(source))
    if recipe.exports and not recipe.sources:  # else the tokenizer is loaded
        checks.result(lambda: check_tokenizer_files(model))
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
    calibration.share(ranks.rank, ranks.count)  # fewer sequences than processes are refused
    return calibration


def _allowed(max_memory: str | int | None, device: str) -> int | None:
    allowed = read_bytes_of(max_memory)
    if allowed is not None and not is_cpu(device):
        raise InputError(
            f"max_memory counts the memory of this process, and device {device} has its own: "
            "leave one of them out"
        )
    return allowed


def read_calibration(recipe: Recipe, source: SourceModel) -> CalibrationSet:
    """The calibration sequences of all sources; none if the recipe has no calibration.

    Raises
    ------
    InputError
        If texts, images, the tokenizer or the processor cannot be read, or there is too little.
    """
    return gather(recipe.sources, source.path, source.config)

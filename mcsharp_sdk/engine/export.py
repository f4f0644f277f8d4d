"""Export from a model folder, without a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mcsharp_sdk.arguments import AnyPath, check_truth, model_path, path_to_make
from mcsharp_sdk.checked_files import renew_checksums
from mcsharp_sdk.engine.output_folder import check_target
from mcsharp_sdk.errors import InputError

if TYPE_CHECKING:
    from mcsharp_exporters.base import Exporter

AnyExporter = TypeVar("AnyExporter", bound="Exporter")

_ELSEWHERE = {
    "folder": "the output folder is given by itself",
    "type": "it is what is exported",
}
"""Settings of exporters that cannot be set here, and why."""


def export(
    kind: str,
    model: AnyPath,
    output: AnyPath | None = None,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write something down that a finished model folder holds.

    Parameters
    ----------
    kind : ``onnx_model`` or ``onnx_routers``.
    model : folder of an original or a compressed model.
    output : folder to make; by default ``model``/``kind``.
    overwrite : replace what is there.
    settings : of the exporter, e.g. ``dtype="fp16", pruning="rule"``.

    Returns
    -------
    What was written, as JSON values.

    Raises
    ------
    InputError
        If the exporter is unknown or works only at the end of a run, a setting is wrong, or the
        model cannot be read or lacks what is to be exported.
    """
    check_truth(overwrite=overwrite)
    if kind not in tuple(FOLDER_EXPORTS):
        raise InputError(
            f"{kind!r} cannot be exported from a model folder; {', '.join(FOLDER_EXPORTS)} can"
        )
    folder = model_path(model)
    target = folder / kind if output is None else path_to_make(output, "output", "a folder to make")
    check_target(target)
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise InputError(
            f"{target} exists already; give --overwrite to replace what an earlier export wrote "
            "there, or another folder as --output"
        )
    written = FOLDER_EXPORTS[kind](folder, target, overwrite, settings)
    if target.resolve().is_relative_to(folder.resolve()):
        renew_checksums(folder, target)
    return written


def _onnx_routers(
    model: Path, output: Path, overwrite: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    from mcsharp_exporters.onnx_routers import OnnxRoutersExporter, export_onnx_routers
    from mcsharp_exporters.router_pruning import RouterPruning, pruning_of_directory

    from mcsharp_sdk.models.directory import routers_of_directory

    chosen = _checked(OnnxRoutersExporter, "onnx_routers", settings)
    pruning = RouterPruning.choose(chosen.pruning, pruning_of_directory(model))
    routers = routers_of_directory(model)
    return export_onnx_routers(routers, output, chosen.dtype, pruning, overwrite=overwrite)


def _onnx_model(
    model: Path, output: Path, overwrite: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    from mcsharp_exporters.model_tensors import ModelTensors
    from mcsharp_exporters.onnx_model import OnnxModelExporter, export_onnx_model

    chosen = _checked(OnnxModelExporter, "onnx_model", settings)
    return export_onnx_model(ModelTensors.of_directory(model), output, chosen, overwrite=overwrite)


def _checked(exporter: type[AnyExporter], kind: str, settings: Mapping[str, Any]) -> AnyExporter:
    """An exporter with these settings; InputProblems names everything that is wrong with them."""
    from mcsharp_sdk.recipe.document import Document
    from mcsharp_sdk.recipe.load import checked_settings

    wrong = [name for name in _ELSEWHERE if name in settings]
    document = Document("", f"export of {kind}", data={**settings, "type": kind})
    return checked_settings(document, exporter, {name: _ELSEWHERE[name] for name in wrong})


FOLDER_EXPORTS: dict[str, Callable[[Path, Path, bool, Mapping[str, Any]], dict[str, Any]]] = {
    "onnx_model": _onnx_model,
    "onnx_routers": _onnx_routers,
}
"""Exporters that need no more than a model folder."""

"""Export from a model folder, without a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mcsharp_sdk.errors import InputError


def export(
    kind: str,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write something down that a finished model folder holds.

    Parameters
    ----------
    kind : ``onnx_routers``.
    model : folder of an original or a compressed model.
    output : folder to make; by default ``model``/``kind``.
    overwrite : replace what is there.
    settings : of the exporter, e.g. ``dtype="fp16"``.

    Returns
    -------
    What was written, as JSON values.

    Raises
    ------
    InputError
        If the exporter is unknown or works only at the end of a run, or the model cannot be read.
    """
    if kind not in FOLDER_EXPORTS:
        raise InputError(
            f"'{kind}' cannot be exported from a model folder; {', '.join(FOLDER_EXPORTS)} can"
        )
    folder = Path(model)
    target = folder / kind if output is None else Path(output)
    return FOLDER_EXPORTS[kind](folder, target, overwrite, settings)


def _onnx_routers(
    model: Path, output: Path, overwrite: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    from mcsharp_exporters.onnx_routers import export_onnx_routers
    from mcsharp_exporters.router_graph import DTYPES

    from mcsharp_sdk.models.directory import routers_of_directory

    unknown = sorted(set(settings) - {"dtype"})
    if unknown:
        raise InputError(f"onnx_routers has no setting {', '.join(unknown)}; it has dtype")
    if settings.get("dtype", "fp32") not in DTYPES:
        raise InputError(f"dtype {settings['dtype']!r} is none of {', '.join(DTYPES)}")
    routers = routers_of_directory(model)
    return export_onnx_routers(routers, output, overwrite=overwrite, **settings)


FOLDER_EXPORTS: dict[str, Callable[[Path, Path, bool, Mapping[str, Any]], dict[str, Any]]] = {
    "onnx_routers": _onnx_routers,
}
"""Exporters that need no more than a model folder."""

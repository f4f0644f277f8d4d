"""Evaluate an exported ONNX model: the artifact that ships, through onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mcsharp_sdk.arguments import LONG_DTYPES
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.perplexity import perplexity_of
from mcsharp_sdk.folders import folder_bytes

if TYPE_CHECKING:
    from mcsharp_exporters.onnx_manifest import ModelManifest
    from torch import Tensor


def exported_manifest(
    directory: Path, device: str, dtype: str, pruning: str | None
) -> ModelManifest | None:
    """The manifest of an exported model; None if the folder is another kind of model.

    Raises
    ------
    InputError
        If something is asked for that was settled when the model was exported, or a file is
        missing, cut short or changed.
    """
    from mcsharp_exporters.onnx_manifest import check_files, is_exported_model, read_manifest

    if not is_exported_model(directory):
        return None
    manifest = read_manifest(directory)
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"an ONNX model runs on auto, cpu or cuda, not on {device!r}")
    computes_in = LONG_DTYPES[manifest.precision]
    if dtype not in ("auto", computes_in):
        raise InputError(
            f"{directory} computes in {computes_in}: another precision is a setting of the export"
        )
    if pruning is not None and pruning != manifest.pruning:
        raise InputError(
            f"{directory} was exported with pruning {manifest.pruning!r}: "
            "another one is a setting of the export"
        )
    check_files(directory, manifest, hashes=True)
    return manifest


def measure_exported(
    directory: Path,
    manifest: ModelManifest,
    device: str,
    tokens: Tensor,
    window: int,
    track: Callable[[range], Iterable[int]],
) -> dict[str, Any]:
    """Fields of an :class:`~mcsharp_sdk.evaluation.evaluate.Evaluation`, but model and text.

    The files have been checked.
    """
    from mcsharp_exporters.onnx_model_runner import OnnxModel

    model = OnnxModel(directory, cast(Any, device), hashes=False)
    start = time.perf_counter()
    result = perplexity_of(model.logits, tokens, window, track=track)
    seconds = time.perf_counter() - start
    sizes = {entry.file: entry.bytes for entry in manifest.files}
    return {
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "window": window,
        "windows": result.windows,
        "compressed": manifest.compressed,
        "nominal_bits": manifest.nominal_bits,
        "stored_bits": manifest.stored_bits,
        "expert_nominal_bits": None,
        "expert_stored_bits": None,
        "bytes": sum(size for file, size in sizes.items() if file.startswith("model.onnx")),
        "directory_bytes": folder_bytes(directory),
        "parameters": manifest.parameters,
        "pruning": manifest.pruning,
        "activated_expert_ratio": None,
        "activated_expert_ratio_per_layer": {},
        "activated_bytes_per_token": None,
        "activated_parameters_per_token": None,
        "seconds": seconds,
        "device": model.provider,
        "dtype": LONG_DTYPES[manifest.precision],
    }

"""onnxruntime, and sessions of it on the provider that is wanted."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from mcsharp_sdk.errors import InputError, RunError

ProviderChoice = Literal["auto", "cuda", "cpu"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def check_provider(provider: str) -> None:
    """InputError unless it is a ``ProviderChoice``."""
    if provider not in get_args(ProviderChoice):
        raise InputError(f"provider {provider!r} is not known: give auto, cuda or cpu")


def import_onnxruntime() -> ModuleType:
    """onnxruntime; RunError if it is not installed, a warning if it is so twice."""
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RunError(
            "onnxruntime cannot be imported; install one of its builds: "
            "pip install 'mcsharp_sdk[cpu]', or 'mcsharp_sdk[gpu]' for CUDA"
        ) from error
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        warnings.warn(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install the one that you want",
            stacklevel=3,
        )
    return ort


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def execution_providers(ort: ModuleType, choice: ProviderChoice, strict: bool) -> list[Any]:
    """What to ask onnxruntime for. That it lists CUDA says only that its build could use it."""
    if choice == "cpu":
        return [CPU]
    if CUDA not in ort.get_available_providers():
        if strict:
            raise RunError(
                "this onnxruntime has no CUDA: uninstall onnxruntime, then "
                "pip install 'mcsharp_sdk[gpu]'"
            )
        return [CPU]
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    # TF32 keeps ten bits of the logits' mantissa: enough to change the choice of experts.
    cuda = (CUDA, {"use_tf32": "0"})
    return [cuda] if strict else [cuda, CPU]


def open_session(
    ort: ModuleType,
    path: Path,
    providers: list[Any],
    *,
    graph: bytes | None = None,
    strict: bool = False,
    threads: int | None = None,
) -> Any:
    """A session of the graph in a file.

    Parameters
    ----------
    providers : of :func:`execution_providers`.
    graph : the file's bytes, if they were read already.
    strict : no provider may stand in for another.
    threads : None for onnxruntime's default.

    Raises
    ------
    RunError
        If onnxruntime cannot open it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        return ort.InferenceSession(
            str(path) if graph is None else graph,
            options,
            providers=providers,
            enable_fallback=int(not strict),
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise RunError(f"{path}: onnxruntime cannot open it: {error}") from error

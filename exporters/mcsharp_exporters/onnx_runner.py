"""Run exported routers with onnxruntime."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch

from mcsharp_exporters.graph_nodes import DTYPES
from mcsharp_exporters.manifest_file import MANIFEST
from mcsharp_exporters.onnx_routers import (
    RouterFile,
    RouterManifest,
    read_manifest,
)
from mcsharp_exporters.pruning_graph import PROTECTED
from mcsharp_exporters.router_graph import HIDDEN_STATES, OUTPUTS
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.routing import Routing
from mcsharp_sdk.runtime.pruning_layout import PruningMode

ProviderChoice = Literal["auto", "cuda", "cpu"]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class RoutedArrays(NamedTuple):
    """As :class:`mcsharp_sdk.models.routing.Routing`, of numpy arrays."""

    indices: np.ndarray
    weights: np.ndarray
    keep: np.ndarray


class OnnxRouters:
    """The routers of one exported folder, ready to run.

    Parameters
    ----------
    folder : as written by ``export_onnx_routers``; every file is checked against the manifest.
    provider : ``cuda``, ``cpu``, or ``auto``: CUDA where it works, else the CPU.
    allow_fallback : with ``cuda``, whether the CPU may stand in (with a warning), or is an error.

    Raises
    ------
    InputError
        If the manifest is bad, or a file is missing or differs from it.
    RunError
        If onnxruntime is not installed, cannot open a file, or may not fall back and CUDA is not
        there.
    """

    def __init__(
        self,
        folder: str | Path,
        provider: ProviderChoice = "auto",
        allow_fallback: bool = True,
    ) -> None:
        if provider not in ("auto", "cuda", "cpu"):
            raise InputError(f"provider {provider!r} is not known: give auto, cuda or cpu")
        folder = Path(folder)
        manifest = read_manifest(folder)
        self._dtype = DTYPES[manifest.dtype]
        self.pruning: PruningMode = manifest.pruning
        self._entries = {entry.layer: entry for entry in manifest.layers}
        models = {entry.layer: _checked_bytes(folder, entry) for entry in manifest.layers}
        self._ort = import_onnxruntime()
        strict = provider == "cuda" and not allow_fallback
        providers = execution_providers(self._ort, provider, strict)
        self._sessions = {
            layer: _session(self._ort, folder / self._entries[layer].file, data, providers, strict)
            for layer, data in models.items()
        }
        for layer, session in self._sessions.items():
            _check_graph(folder, self._entries[layer], manifest, session)
        self.provider: str = self._slowest_provider()
        if provider == "cuda" and self.provider != CUDA:
            if strict:
                raise RunError(f"CUDA was asked for, but onnxruntime runs on {self.provider}")
            warnings.warn(f"CUDA is not there: routers run on {self.provider}", stacklevel=2)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that have a router here, ascending."""
        return tuple(sorted(self._entries))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that hidden states must have."""
        return self._dtype.torch

    @overload
    def __call__(
        self, layer: int, hidden: torch.Tensor, protected: torch.Tensor | None = None
    ) -> Routing: ...

    @overload
    def __call__(
        self, layer: int, hidden: np.ndarray, protected: np.ndarray | None = None
    ) -> RoutedArrays: ...

    def __call__(
        self,
        layer: int,
        hidden: torch.Tensor | np.ndarray,
        protected: torch.Tensor | np.ndarray | None = None,
    ) -> Routing | RoutedArrays:
        """Route tokens.

        Parameters
        ----------
        layer : one of ``layers``.
        hidden : (tokens, hidden) of ``dtype``. Tensors on a GPU travel through host memory.
        protected : (tokens,) bool, tokens that keep all experts in this layer; None for no token.
            Only routers whose ``pruning`` is ``rule`` or ``both`` take it.

        Returns
        -------
        indices, weights, keep
            (tokens, top_k) int64, float32 and bool; torch tensors on the device of ``hidden`` if
            that is a tensor, else numpy arrays. Where ``keep`` is false the weight is 0 and the
            index still names the expert that the router chose.

        Raises
        ------
        InputError
            If there is no such layer, ``hidden`` or ``protected`` has another type, shape or dtype,
            ``hidden`` holds NaN, or the routers do not take ``protected``.
        """
        self._check(layer, hidden)
        inputs = {HIDDEN_STATES: self._ort_value(hidden)}
        if PROTECTED in self._entries[layer].inputs:
            chosen = _protected(layer, protected, len(hidden))
            inputs[PROTECTED] = self._ort.OrtValue.ortvalue_from_numpy(chosen)
        elif protected is not None:
            raise InputError(
                f"the routers do not take protected tokens: they were exported with pruning "
                f"'{self.pruning}', not 'rule' or 'both'"
            )
        found = self._sessions[layer].run_with_ort_values(list(OUTPUTS), inputs)
        indices, weights, keep = (value.numpy() for value in found)
        if np.isnan(weights).any():
            raise InputError(f"router of layer {layer}: hidden states give weights that are NaN")
        if isinstance(hidden, np.ndarray):
            return RoutedArrays(indices, weights, keep)
        return Routing(*(torch.from_numpy(a).to(hidden.device) for a in (indices, weights, keep)))

    def _check(self, layer: int, hidden: torch.Tensor | np.ndarray) -> None:
        if layer not in self._entries:
            known = ", ".join(map(str, self.layers))
            raise InputError(f"layer {layer} has no exported router; layers are {known}")
        _check_type("hidden states", hidden)
        width, shape = self._entries[layer].hidden_size, list(hidden.shape)
        wanted, given = _dtype_name(self.dtype), _dtype_name(hidden.dtype)
        if len(shape) != 2 or shape[1] != width or given != wanted:
            raise InputError(
                f"router of layer {layer} takes {wanted} of shape [tokens, {width}], "
                f"got {given} {shape}"
            )

    def _ort_value(self, hidden: torch.Tensor | np.ndarray) -> Any:
        """The values as onnxruntime takes them; numpy has no bf16, so its bits go as uint16."""
        make, is_bf16 = self._ort.OrtValue, self.dtype == torch.bfloat16
        if isinstance(hidden, torch.Tensor):
            values = hidden.detach().cpu()
            hidden = (values.view(torch.int16) if is_bf16 else values).numpy()
        hidden = np.ascontiguousarray(hidden)
        if not is_bf16:
            return make.ortvalue_from_numpy(hidden)
        return make.ortvalue_from_numpy_with_onnx_type(hidden.view(np.uint16), self._dtype.onnx)

    def _slowest_provider(self) -> str:
        """The provider of all sessions; the CPU if they differ."""
        used = {str(session.get_providers()[0]) for session in self._sessions.values()}
        return used.pop() if len(used) == 1 else CPU


def _protected(layer: int, protected: torch.Tensor | np.ndarray | None, tokens: int) -> np.ndarray:
    """(tokens,) bool, all false if none is given."""
    if protected is None:
        return np.zeros(tokens, np.bool_)
    _check_type("protected tokens", protected)
    given, shape = _dtype_name(protected.dtype), list(protected.shape)
    if given != "bool" or shape != [tokens]:
        raise InputError(
            f"router of layer {layer} takes protected tokens as bool of shape [{tokens}], one for "
            f"each hidden state, got {given} {shape}"
        )
    if isinstance(protected, torch.Tensor):
        protected = protected.detach().cpu().numpy()
    return np.ascontiguousarray(protected)


def _check_type(what: str, given: object) -> None:
    if not isinstance(given, (torch.Tensor, np.ndarray)):
        raise InputError(
            f"{what} are a torch tensor or a numpy array, not of type {type(given).__name__}"
        )


def _dtype_name(dtype: torch.dtype | np.dtype) -> str:
    """The name that torch and numpy share, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _checked_bytes(folder: Path, entry: RouterFile) -> bytes:
    """A graph's bytes, read once, if they are those that the manifest promises."""
    path = folder / entry.file
    if not path.is_file():
        raise InputError(f"{path}: missing, but {MANIFEST} names it")
    size = path.stat().st_size
    if size != entry.bytes:
        raise InputError(f"{path}: has {size} bytes, {MANIFEST} says {entry.bytes}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{path}: its SHA-256 is not the one in {MANIFEST}")
    return data


def _check_graph(folder: Path, entry: RouterFile, manifest: RouterManifest, session: Any) -> None:
    """Refuse a graph that is another one than the manifest takes it for."""
    # Graphs of version 1 do not speak of pruning: they do none.
    says = {"pruning": "off", **session.get_modelmeta().custom_metadata_map}
    says["inputs"] = str(sorted(value.name for value in session.get_inputs()))
    wanted = entry.model_dump(include={"layer", "experts", "top_k", "hidden_size"})
    wanted |= {
        "dtype": manifest.dtype,
        "pruning": manifest.pruning,
        "inputs": sorted(entry.inputs),
    }
    for name, value in wanted.items():
        if says.get(name) != str(value):
            raise InputError(
                f"{folder / entry.file}: its {name} is {says.get(name)}, {MANIFEST} says {value}"
            )


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


def _session(ort: ModuleType, path: Path, data: bytes, providers: list[Any], strict: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        return ort.InferenceSession(
            data, options, providers=providers, enable_fallback=int(not strict)
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise RunError(f"{path}: onnxruntime cannot open it: {error}") from error

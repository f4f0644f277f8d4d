"""Run exported routers with onnxruntime; torch need not be installed."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from mcsharp_exporters.graph_names import HIDDEN_STATES, PROTECTED, ROUTER_OUTPUTS
from mcsharp_exporters.onnxruntime_session import (
    CPU,
    CUDA,
    ProviderChoice,
    check_provider,
    execution_providers,
    import_onnxruntime,
    open_session,
)
from mcsharp_exporters.router_manifest import RouterFile, RouterManifest, read_manifest
from mcsharp_sdk.arguments import LONG_DTYPES, path_argument
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.folders import MANIFEST_FILE
from mcsharp_sdk.runtime.pruning_modes import PruningMode

if TYPE_CHECKING:
    import torch

    from mcsharp_sdk.models.routing import Routing

BFLOAT16 = 16
"""``onnx.TensorProto.BFLOAT16``."""


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
        check_provider(provider)
        folder = path_argument(folder, "folder", "the folder of the routers")
        manifest = read_manifest(folder)
        self._dtype = LONG_DTYPES[manifest.dtype]
        self.pruning: PruningMode = manifest.pruning
        self._entries = {entry.layer: entry for entry in manifest.layers}
        models = {entry.layer: _checked_bytes(folder, entry) for entry in manifest.layers}
        self._ort = import_onnxruntime()
        strict = provider == "cuda" and not allow_fallback
        providers = execution_providers(self._ort, provider, strict)
        self._sessions = {
            layer: open_session(
                self._ort, folder / self._entries[layer].file, providers, graph=data, strict=strict
            )
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
        """Dtype that hidden states must have, one of torch."""
        import torch

        found: torch.dtype = getattr(torch, self._dtype)
        return found

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
        found = self._sessions[layer].run_with_ort_values(list(ROUTER_OUTPUTS), inputs)
        indices, weights, keep = (value.numpy() for value in found)
        if np.isnan(weights).any():
            raise InputError(f"router of layer {layer}: hidden states give weights that are NaN")
        if isinstance(hidden, np.ndarray):
            return RoutedArrays(indices, weights, keep)
        import torch

        from mcsharp_sdk.models.routing import Routing

        return Routing(*(torch.from_numpy(a).to(hidden.device) for a in (indices, weights, keep)))

    def _check(self, layer: int, hidden: torch.Tensor | np.ndarray) -> None:
        if layer not in self._entries:
            known = ", ".join(map(str, self.layers))
            raise InputError(f"layer {layer} has no exported router; layers are {known}")
        _check_type("hidden states", hidden)
        width, shape = self._entries[layer].hidden_size, list(hidden.shape)
        wanted, given = self._dtype, _dtype_name(hidden.dtype)
        if len(shape) != 2 or shape[1] != width or given != wanted:
            raise InputError(
                f"router of layer {layer} takes {wanted} of shape [tokens, {width}], "
                f"got {given} {shape}"
            )

    def _ort_value(self, hidden: torch.Tensor | np.ndarray) -> Any:
        """The values as onnxruntime takes them; bf16 goes as uint16."""
        make, values = self._ort.OrtValue, _array(hidden)
        if self._dtype != LONG_DTYPES["bf16"]:
            return make.ortvalue_from_numpy(values)
        return make.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), BFLOAT16)

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
    return _array(protected)


def _array(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """The values in host memory; numpy has no bf16, of which it gets the bits as int16."""
    if not isinstance(values, np.ndarray):
        import torch

        here = values.detach().cpu()
        values = (here.view(torch.int16) if here.dtype == torch.bfloat16 else here).numpy()
    return np.ascontiguousarray(values)


def _check_type(what: str, given: object) -> None:
    torch = sys.modules.get("torch")  # without it, there are no tensors
    if not isinstance(given, (np.ndarray, *([torch.Tensor] if torch else []))):
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
        raise InputError(f"{path}: missing, but {MANIFEST_FILE} names it")
    size = path.stat().st_size
    if size != entry.bytes:
        raise InputError(f"{path}: has {size} bytes, {MANIFEST_FILE} says {entry.bytes}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}")
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
                f"{folder / entry.file}: its {name} is {says.get(name)}, {MANIFEST_FILE} says "
                f"{value}"
            )

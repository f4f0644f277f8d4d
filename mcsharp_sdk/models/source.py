"""A model on disk whose modules are filled and emptied one at a time.

The module tree lives on the meta device. ``load`` fills chosen parts through transformers' own
checkpoint conversion (so that every family's disk layout is understood), ``free`` empties them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.architecture import (
    compute_dtype,
    empty_model,
    read_config,
    stored_dtype,
)
from mcsharp_sdk.models.config_file import check_layer_count, quantisation_method
from mcsharp_sdk.models.device import check_device
from mcsharp_sdk.models.expert_reading import StackedExperts
from mcsharp_sdk.models.expert_weights import ExpertWeights, LoadedExperts, StoredExperts
from mcsharp_sdk.models.experts import MATRICES, Matrix, parameter_name
from mcsharp_sdk.models.memory import keep_large_blocks_out_of_the_heap, release_free_memory
from mcsharp_sdk.models.read_ahead import ReadAhead, overlaps
from mcsharp_sdk.models.routing import Router, read_router, router_tensor_names
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.tensor_names import TensorNames
from mcsharp_sdk.models.topology import MoeBlock, Topology, read_topology
from mcsharp_sdk.models.weight_checks import check_finite, check_fit, check_unquantised


class SourceModel:
    """An uncompressed Mixture-of-Experts model, opened without loading its weights.

    Parameters
    ----------
    path : folder with ``config.json`` and safetensors.
    device : where parts are loaded to.
    dtype : to compute in; None for the one that ``compute_dtype`` gives.

    Attributes
    ----------
    overlaps : whether experts are read, and results written, beside the computing.
    model : the causal language model on the meta device.
    names : of its tensors, on disk and in the module tree.
    topology : where its layers, routers, experts and linears are.
    stored_dtype : the dtype of its weights on disk.
    dtype : the dtype that it computes in.
    """

    def __init__(self, path: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        check_device(device)
        self.overlaps = overlaps(device)
        keep_large_blocks_out_of_the_heap()
        self.path = path
        self.device = device
        self.config = read_config(path)
        if (method := quantisation_method(self.config)) is not None:
            raise InputError(
                f"{path} is already quantised (config.json: quant_method {method!r}): give the "
                "original model, or use `mcsharp inspect` to see what this one holds"
            )
        self.checkpoint = Checkpoint.open(path)
        check_unquantised(self.checkpoint)
        check_layer_count(self.config, path, len(self.checkpoint.tensors))
        self.stored_dtype = stored_dtype(self.config, path)
        self.dtype = dtype or compute_dtype(self.stored_dtype, device)
        self.model = empty_model(self.config, self.dtype)
        self.names = TensorNames(self.checkpoint, self.model)
        self.topology: Topology = read_topology(self.model, self.config)
        with _quiet_sequential_loading():
            check_fit(self)

    def layer_path(self, layer: int) -> str:
        """Module path of decoder layer ``layer``."""
        return self.topology.layer_path(layer)

    def layer(self, layer: int) -> nn.Module:
        """Decoder layer ``layer``, loaded or not."""
        return self.model.get_submodule(self.layer_path(layer))

    def outer_names(self) -> list[str]:
        """Names in the module tree of all tensors outside of the decoder layers, tied ones too."""
        names = {*self.names.memory.values(), *self.names.tied}
        return sorted(name for name in names if not self.topology.in_layers(name))

    def outer_disk_names(self) -> list[str]:
        """Names in the checkpoint of what is outside of the decoder layers."""
        placed = self.names.memory.items()
        return [disk for disk, name in placed if not self.topology.in_layers(name)]

    def fused_weights(self, layer: int) -> list[str]:
        """Full names of the fused expert weights of a MoE layer."""
        path = f"{self.layer_path(layer)}.{self.topology.moe[layer].experts}"
        experts = self.model.get_submodule(path)
        return [f"{path}.{parameter_name(experts, matrix)}" for matrix in MATRICES]

    def stacked_experts(self, layer: int) -> dict[Matrix, StackedExperts] | None:
        """Where the experts of a MoE layer lie on disk; None if they cannot be read one by one."""
        found: dict[Matrix, StackedExperts] = {}
        for matrix, name in zip(MATRICES, self.fused_weights(layer), strict=True):
            stacked = StackedExperts.find(
                self.checkpoint,
                name,
                self.model.get_parameter(name),
                self.names.sources.get(name, []),
                self.model,
                self.names.conversions,
            )
            if stacked is None:
                return None
            found[matrix] = stacked
        return found

    def load_layer(self, layer: int, *, by_expert: bool = False) -> ExpertWeights | None:
        """Fill a decoder layer; the weights of its routed experts, or None if it is dense.

        Parameters
        ----------
        by_expert : leave the experts on disk if the checkpoint lets them be read one by one.
        """
        path = f"{self.layer_path(layer)}."
        block = self.topology.moe.get(layer)
        stacked = self.stacked_experts(layer) if by_expert and block is not None else None
        self.load(path, but_not=self.fused_weights(layer) if stacked is not None else ())
        if block is None:
            return None
        module: Any = self.layer(layer).get_submodule(block.experts)
        if stacked is None:
            return LoadedExperts(module)
        ahead = ReadAhead(self.device) if self.overlaps else None
        return StoredExperts(module, stacked, self.device, ahead)

    def load(self, *prefixes: str, but_not: Iterable[str] = ()) -> None:
        """Fill every parameter and buffer whose name starts with one of ``prefixes``.

        Parameters
        ----------
        prefixes : starts of names in the module tree, e.g. ``model.layers.3.``.
        but_not : names to leave empty.

        Raises
        ------
        RunError
            If the checkpoint does not fill all of them, holds other shapes, or numbers that are
            NaN or infinite; names them.
        """
        excluded = frozenset(but_not)

        def wanted(name: str) -> bool:
            return name.startswith(prefixes) and name not in excluded

        mapping = self.names.conversions
        made = self.names.made_of
        slices = partial(self.checkpoint.slice, check=check_finite)
        lazy = {k: slices(k) for k in made if any(map(wanted, made[k]))}
        lazy |= {m: slices(k) for m, k in self.names.tied.items() if wanted(m)}
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=mapping,
        )
        with _quiet_sequential_loading():
            info, _ = convert_and_load_state_dict_in_model(self.model, lazy, settings)
        bad = [*info.mismatched_keys, *info.conversion_errors, *info.unexpected_keys]
        if bad:
            raise RunError(f"{self.path}: tensors do not fit the architecture: {bad[:5]}")
        empty = [n for n, t in self._tensors() if wanted(n) and t.is_meta]
        if empty:
            raise RunError(f"{self.path}: the checkpoint lacks {', '.join(empty[:5])}")

    def free(self, *prefixes: str) -> None:
        """Empty every parameter and buffer whose name starts with one of ``prefixes``.

        Buffers that are in no checkpoint (rotary tables) stay.
        """
        for path, module in self.model.named_modules():
            start = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None and f"{start}{name}".startswith(prefixes):
                    empty = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
                    module._parameters[name] = empty
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                if buffer is not None and f"{start}{name}".startswith(prefixes):
                    module._buffers[name] = buffer.to("meta")
        release_free_memory()

    def stored_tensors(
        self, *prefixes: str, but_not: Iterable[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors whose names in the module tree start so, by these names, in the stored dtype.

        What is float32 on disk stays so where the model computes in it. Tensors that are not on
        disk since they are tied to others are left out.
        """
        left_out = {*but_not, *self.names.tied}
        self.load(*prefixes, but_not=but_not)
        persistent = self.model.state_dict(keep_vars=True)
        for name, tensor in persistent.items():
            wanted = name.startswith(prefixes) and name not in left_out
            if wanted and not tensor.is_meta:
                own = {self.checkpoint.info(n).dtype for n, _ in self.names.sources.get(name, ())}
                promoted = tensor.dtype == self.dtype and own != {torch.float32}
                yield name, tensor.detach().to(self.stored_dtype if promoted else tensor.dtype)
        self.free(*prefixes)

    def routers(self) -> Iterator[Router]:
        """The routers of all MoE layers, one loaded at a time."""
        for index, block in self.topology.moe.items():
            path = f"{self.layer_path(index)}.{block.router}"
            names = router_tensor_names(self.names.memory.values(), path).values()
            self.load(*names)
            yield self.router(block)
            self.free(*names)

    def router(self, block: MoeBlock) -> Router:
        """The router of one loaded MoE layer."""
        layer = self.layer(block.layer)
        owner = layer.get_submodule(block.router.rpartition(".")[0])
        return read_router(layer.get_submodule(block.router), self.config, block.layer, owner)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()


@contextmanager
def _quiet_sequential_loading() -> Iterator[None]:
    """transformers' loader without its progress bar, one tensor at a time to bound memory."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before, bars = os.environ.get(variable), transformers_logging.is_progress_bar_enabled()
    os.environ[variable] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
        if bars:
            transformers_logging.enable_progress_bar()

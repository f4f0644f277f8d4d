"""The tensors of a finished model, one decoder layer at a time, be it in a folder or in a run.

transformers, which takes seconds to import, is imported when a folder is opened: recipes import
this module with the exporters that they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mcsharp_exporters.packed_product import stack
from mcsharp_exporters.router_pruning import (
    ModelPruning,
    pruning_of_folder,
    pruning_of_run,
)
from mcsharp_exporters.run_tensors import (
    AnyTensor,
    model_layout,
    named_layer_tensors,
    outer_tensors,
)
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.directory import CompressedFolder
from mcsharp_sdk.models.experts import Matrix, fused_weight, parameter_name
from mcsharp_sdk.models.routing import Router, router_from_tensors, router_tensor_names
from mcsharp_sdk.quantization.grid import REMOVED, PackedWeight, QuantizedWeight, unpack_weight
from mcsharp_sdk.runtime.layout import TENSORS, PackedLayout, members, stack_names

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.models.topology import Topology

Weight = QuantizedWeight | Tensor
"""A matrix [R, K]: codes with their grid, or the weights themselves."""


@dataclass(frozen=True)
class ModelTensors:
    """A model to be written down in another form.

    Attributes
    ----------
    path : folder of the model, or of the original that a run compresses.
    config : of transformers.
    model : its module tree, without weights.
    topology : where its parts are.
    layout : what is packed; of an uncompressed model, nothing.
    pruning : what it has to prune experts with; None for nothing.
    outer : gives name and tensor of all that is outside the decoder layers, one at a time.
    layer : gives name and tensor of one decoder layer.
    """

    path: Path
    config: Any
    model: Any
    topology: Topology
    layout: PackedLayout
    pruning: ModelPruning | None
    outer: Callable[[], Iterator[tuple[str, Tensor]]]
    layer: Callable[[int], Iterator[tuple[str, Tensor]]]

    @classmethod
    def of_directory(cls, path: Path) -> ModelTensors:
        """Those of a model folder, compressed or not.

        Raises
        ------
        InputError
            If it is no folder of a MoE model.
        """
        from mcsharp_sdk.models.architecture import empty_model

        folder = CompressedFolder.open(path)
        if folder is None:
            return _of_original(path)
        checkpoint, topology = folder.checkpoint, folder.topology

        def read(wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
            return ((n, checkpoint.read(n)) for n in checkpoint.names if wanted(n))

        return cls(
            path,
            folder.config,
            empty_model(folder.config, torch.float32),
            folder.topology,
            PackedLayout.from_dict(folder.config.quantization_config),
            pruning_of_folder(folder),
            lambda: read(lambda name: not topology.in_layers(name)),
            lambda index: read(lambda name: name.startswith(f"{topology.layer_path(index)}.")),
        )

    @classmethod
    def of_run(cls, context: RunContext) -> ModelTensors:
        """Those that the stages of a run leave behind."""
        source, layout = context.model, model_layout(context)
        return cls(
            source.path,
            source.config,
            source.model,
            source.topology,
            layout,
            pruning_of_run(context),
            lambda: _read(outer_tensors(source)),
            lambda index: _read(named_layer_tensors(context, layout, index)),
        )

    def read_layer(self, index: int) -> LayerTensors:
        """Read one decoder layer."""
        prefix = f"{self.topology.layer_path(index)}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.layer(index)}
        return LayerTensors(self, index, tensors)


def _read(tensors: Iterable[tuple[str, AnyTensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, read where they were not yet, one at a time."""
    for name, tensor in tensors:
        yield name, tensor if isinstance(tensor, Tensor) else tensor.read()


def _of_original(path: Path) -> ModelTensors:
    from mcsharp_sdk.models.source import SourceModel

    source = SourceModel(path)
    return ModelTensors(
        path,
        source.config,
        source.model,
        source.topology,
        PackedLayout(1, {}, {}),
        None,
        lambda: _read(outer_tensors(source)),
        lambda index: source.stored_tensors(f"{source.layer_path(index)}."),
    )


@dataclass(frozen=True)
class LayerTensors:
    """One decoder layer, read; paths are relative to it."""

    source: ModelTensors
    index: int
    tensors: Mapping[str, Tensor]

    def module(self, path: str) -> Any:
        """A module of the layer, without weights."""
        root = self.source.topology.layer_path(self.index)
        return self.source.model.get_submodule(f"{root}.{path}" if path else root)

    def has(self, path: str) -> bool:
        """Whether there is such a module."""
        try:
            self.module(path)
        except AttributeError:
            return False
        return True

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not packed.

        Raises
        ------
        InputError
            If it is missing.
        """
        if name not in self.tensors:
            raise InputError(f"{self.source.path}: decoder layer {self.index} lacks {name}")
        return self.tensors[name]

    def bias(self, path: str) -> Tensor | None:
        """The bias of a linear layer, [R]; None if it has none."""
        return self.tensors.get(f"{path}.bias")

    def linear(self, path: str) -> Weight:
        """The weight of a linear layer."""
        if path not in self.source.layout.linears:
            return self.tensor(f"{path}.weight")
        parts = (self.tensor(f"{path}.{part}") for part in TENSORS)
        columns = self.module(path).in_features
        return self._unpacked(PackedWeight(*parts), self.source.layout.linears[path], columns)

    def expert(self, matrix: Matrix, expert: int) -> Weight:
        """One matrix of one expert."""
        path = self.source.topology.moe[self.index].experts
        bits = self.source.layout.experts.get(self.index)
        experts = self.module(path)
        if bits is None:
            fused = self.tensor(f"{path}.{parameter_name(experts, matrix)}")
            return fused[expert]
        width = bits[expert]
        place = members(bits)[width].index(expert)
        parts = (self.tensor(f"{path}.{name}")[place] for name in stack_names(width, matrix))
        columns = fused_weight(experts, matrix).shape[2]
        return self._unpacked(PackedWeight(*parts), width, columns)

    @property
    def stored_experts(self) -> list[int]:
        """The experts that are not removed, ascending."""
        experts = range(self.source.topology.moe[self.index].num_experts)
        bits = self.source.layout.experts.get(self.index)
        return [e for e in experts if bits is None or bits[e] != REMOVED]

    def router(self) -> Router:
        """The router of the layer's mixture of experts."""
        path = self.source.topology.moe[self.index].router
        names = router_tensor_names(self.tensors, path)
        found = {short: self.tensors[name] for short, name in names.items()}
        return router_from_tensors(found, self.source.config, self.index)

    def _unpacked(self, packed: PackedWeight, bits: int, columns: int) -> QuantizedWeight:
        size = self.source.layout.group_size
        return unpack_weight(packed, bits=bits, group_size=size, columns=columns)


def join_rows(weights: list[Weight]) -> list[Weight]:
    """Neighbours that can be one matrix joined, rows below rows."""
    joined: list[Weight] = []
    for weight in weights:
        last = joined[-1] if joined else None
        if isinstance(last, QuantizedWeight) and isinstance(weight, QuantizedWeight):
            if last.bits == weight.bits:
                joined[-1] = stack([last, weight])
                continue
        elif isinstance(last, Tensor) and isinstance(weight, Tensor) and last.dtype == weight.dtype:
            joined[-1] = torch.cat([last, weight])
            continue
        joined.append(weight)
    return joined


def take_rows(weight: Weight, order: Tensor) -> Weight:
    """The rows of a matrix in another order."""
    if isinstance(weight, Tensor):
        return weight[order]
    return replace(
        weight, codes=weight.codes[order], scales=weight.scales[order], zeros=weight.zeros[order]
    )

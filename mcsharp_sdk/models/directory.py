"""Routers of a model folder, be it an original model or a compressed one.

transformers, which takes seconds to import, is imported when a folder is opened: recipes import
this module with the exporters that they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.config_file import METHOD, quantisation_method
from mcsharp_sdk.models.routing import Router, router_from_tensors, router_tensor_names
from mcsharp_sdk.models.shards import Checkpoint

if TYPE_CHECKING:
    from mcsharp_sdk.models.topology import Topology


@dataclass(frozen=True)
class CompressedFolder:
    """A compressed model on disk, whose tensors are named as in the module tree.

    Attributes
    ----------
    config : of transformers; it has a ``quantization_config``.
    topology : where routers and experts are.
    checkpoint : the tensors.
    """

    config: Any
    topology: Topology
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> CompressedFolder | None:
        """Open a folder; None if its model is an original, uncompressed one.

        Raises
        ------
        InputError
            If it is no folder of a MoE model, or something else quantised it.
        """
        from mcsharp_sdk.models.architecture import empty_model, read_config, stored_dtype
        from mcsharp_sdk.models.topology import read_topology

        config = read_config(path)
        method = quantisation_method(config)
        if method is None:
            return None
        if method != METHOD:
            raise InputError(
                f"{path} is quantised by {method!r}: give the original model, or one that mcsharp "
                "compressed"
            )
        model = empty_model(config, stored_dtype(config, path))
        return cls(config, read_topology(model, config), Checkpoint.open(path))

    def module_tensors(self, layer: int, path: str) -> dict[str, torch.Tensor]:
        """Tensors of a module within a decoder layer, by their names in that module."""
        prefix = f"{self.topology.layer_path(layer)}.{path}."
        names = [name for name in self.checkpoint.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.checkpoint.read(name) for name in names}

    def routers(self) -> Iterator[Router]:
        """The routers of all MoE layers, read one at a time."""
        for index, block in self.topology.moe.items():
            path = f"{self.topology.layer_path(index)}.{block.router}"
            names = router_tensor_names(self.checkpoint.names, path)
            tensors = {short: self.checkpoint.read(name) for short, name in names.items()}
            yield router_from_tensors(tensors, self.config, index)


def routers_of_directory(path: Path) -> Iterator[Router]:
    """The routers of all MoE layers, read one at a time and nothing else with them.

    Raises
    ------
    InputError
        If the folder holds no MoE model whose routing is known.
    """
    from mcsharp_sdk.models.source import SourceModel

    folder = CompressedFolder.open(path)
    yield from SourceModel(path).routers() if folder is None else folder.routers()

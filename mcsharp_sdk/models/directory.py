"""Routers of a model folder, be it an original model or a compressed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mcsharp_sdk.models.architecture import empty_model, read_config
from mcsharp_sdk.models.routing import Router, router_from_tensors
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.topology import read_topology


def routers_of_directory(path: Path) -> Iterator[Router]:
    """The routers of all MoE layers, read one at a time and nothing else with them.

    Raises
    ------
    InputError
        If the folder holds no MoE model whose routing is known.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None) is None:
        yield from SourceModel(path).routers()
        return
    model = empty_model(config, config.get_text_config().dtype or torch.float32)
    topology = read_topology(model, config)
    checkpoint = Checkpoint.open(path)
    for index, block in topology.moe.items():
        prefix = f"{topology.layers_path}.{index}.{block.router}."
        names = [name for name in checkpoint.names if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): checkpoint.read(name) for name in names}
        yield router_from_tensors(tensors, config, index)

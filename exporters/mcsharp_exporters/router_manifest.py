"""``manifest.json`` of exported routers: which files there are, and what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mcsharp_exporters.graph_names import DtypeName
from mcsharp_exporters.manifest_file import read_manifest_of
from mcsharp_sdk.runtime.pruning_modes import PruningMode

FORMAT_VERSION: Final = 2
"""Of graphs and manifest: 2 has pruning."""

FILE_PATTERN = r"^router_layer_[0-9]{5,9}\.onnx$"

Shape = list[int | str]


class RouterFile(BaseModel):
    """One line of the manifest: a layer's file, what it must hash to, and what it computes.

    ``thresholds`` or ``network_units`` say what prunes; a layer with neither keeps everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Annotated[int, Field(ge=0)]
    file: Annotated[str, Field(pattern=FILE_PATTERN)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(gt=0)]
    experts: Annotated[int, Field(gt=0)]
    top_k: Annotated[int, Field(gt=0)]
    hidden_size: Annotated[int, Field(gt=0)]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    settings: dict[str, Any]
    thresholds: list[float] | None = None
    network_units: int | None = None


class RouterManifest(BaseModel):
    """``manifest.json``: everything in the folder, by layer.

    Version 1 knew no pruning; it is still read, as that of routers that keep everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mcsharp.onnx_routers"] = "mcsharp.onnx_routers"
    version: Literal[1, 2] = FORMAT_VERSION
    sdk_version: str
    dtype: DtypeName
    pruning: PruningMode = "off"
    opset: int
    ir_version: int
    layers: Annotated[list[RouterFile], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_file_per_layer(self) -> RouterManifest:
        for values in ([e.layer for e in self.layers], [e.file for e in self.layers]):
            if len(set(values)) != len(values):
                raise ValueError("names a layer or a file twice")
        return self


def read_manifest(folder: str | Path) -> RouterManifest:
    """The folder's manifest, checked; InputError as of :func:`read_manifest_of`."""
    return read_manifest_of(RouterManifest, Path(folder), "ONNX routers")

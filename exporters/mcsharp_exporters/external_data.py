"""The file beside an ONNX graph that holds its large tensors, written as they come."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

import onnx
import torch
from onnx import TensorProto

from mcsharp_exporters.graph_nodes import DTYPES

ALIGNMENT = 64
"""Bytes; tensors start at multiples of it."""

ONNX_DTYPES = {kind.torch: kind.onnx for kind in DTYPES.values()} | {
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}
"""Dtypes that are stored."""


class ExternalData:
    """Writes tensors one behind the other; nothing stays in memory.

    Parameters
    ----------
    path : file to make; graphs name it without its folder, in which they must lie too.

    Attributes
    ----------
    bytes : written so far.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.bytes = 0

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def store(self, name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        """Write a tensor (a dtype of ``ONNX_DTYPES``); what a graph says of it."""
        self._write(b"\0" * (-self.bytes % ALIGNMENT))
        offset = self.bytes
        values = tensor.detach().cpu().contiguous()
        self._write(values.view(torch.uint8).reshape(-1).numpy().data)
        proto = TensorProto(
            name=name,
            data_type=ONNX_DTYPES[tensor.dtype],
            dims=list(tensor.shape),
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"location": self._name, "offset": offset, "length": values.nbytes}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    def sha256(self) -> str:
        """Hash of all that has been written."""
        return self._hash.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

"""Writing one safetensors file, atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk.artifact_file import atomic_file
from mcsharp_sdk.models.safetensors_file import DTYPE_NAMES, StoredTensor


def write_safetensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write one safetensors file so that ``path`` holds either all of it or what it held before.

    Parameters
    ----------
    path : the file to write; its folder exists.
    tensors : name -> tensor of any dtype in ``DTYPES``, on any device, of any strides. They are
        copied to the CPU, or read from where they are stored, one at a time.
    metadata : strings for the header's ``__metadata__``.

    Returns
    -------
    sha256 of the file's bytes.

    Raises
    ------
    TypeError
        If safetensors has no name for a tensor's dtype.
    """
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    if unknown:
        raise TypeError(f"safetensors cannot hold the dtype of {', '.join(unknown)}")
    # Wide elements first keeps every tensor aligned to its element size, as the library does it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for part in _file_parts(names, tensors, metadata or {}):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _file_parts(
    names: Iterable[str],
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    yield _header_bytes(names, tensors, metadata)
    for name in names:
        yield _raw_bytes(tensors[name])


def _header_bytes(
    names: Iterable[str],
    tensors: Mapping[str, torch.Tensor | StoredTensor],
    metadata: Mapping[str, str],
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw_bytes(given: torch.Tensor | StoredTensor) -> memoryview:
    tensor = given if isinstance(given, torch.Tensor) else given.read()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

"""One safetensors file, read with its header checked in full.

The format is 8 bytes (little-endian length N), N bytes of JSON, then the tensors' bytes back to
back. A file is trusted with nothing: every offset is checked before a tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mcsharp_sdk.errors import Problem, some_of

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library; a longer header is damage or an attack."""

_AGAIN = "get the file again"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; ``offset`` counts bytes from the start of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything a file's header says."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


class StoredTensor(Protocol):
    """A tensor that lies on disk and is read when it is needed."""

    @property
    def dtype(self) -> torch.dtype:
        """As on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def numel(self) -> int:
        """Number of elements."""

    def element_size(self) -> int:
        """Bytes of one."""

    def read(self) -> torch.Tensor:
        """The whole tensor, in memory."""


class _Damaged(Exception):
    """Nothing more of this header can be checked."""


def read_header(path: Path) -> tuple[Header, list[Problem]]:
    """Read and check the header of one safetensors file; no tensor is read.

    Parameters
    ----------
    path : an existing file.

    Returns
    -------
    The tensors whose entries are sound, in the order of their bytes, and the problems found.
    """
    try:
        entries, data_start, data_bytes = _parse(path)
    except (_Damaged, OSError) as error:
        return Header({}, {}), [Problem(path.name, str(error))]
    problems: list[Problem] = []
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        problems.append(Problem(path.name, "__metadata__ must map names to strings"))
        metadata = {}
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        fault, info = _tensor_info(entry, path, data_start)
        if info is None:
            problems.append(Problem(f"{path.name}: {name}", fault))
        else:
            tensors[name] = info
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    data_end = data_start + data_bytes
    whole = {n: info for n, info in tensors.items() if info.offset + info.nbytes <= data_end}
    if len(whole) < len(tensors):
        cut = some_of([name for name in tensors if name not in whole])
        told = f"truncated: ends at byte {data_end}, within or before {cut}; {_AGAIN}"
        problems.append(Problem(path.name, told))
    if not problems:  # a bad entry would show up again as a hole
        problems = _layout_problems(path, whole, data_start, data_end)
    return Header(whole, metadata), problems


def read_bytes(path: Path, offset: int, nbytes: int) -> torch.Tensor:
    """Read bytes of a file into a fresh uint8 tensor of shape [nbytes].

    Plain reads, not a memory map: mapped pages count as memory of this process until the map goes.

    Raises
    ------
    EOFError
        If the file ends first.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise EOFError(
                    f"{path} ends at byte {offset + done}: it changed since it was opened"
                )
            done += count
    return buffer


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, where the data starts, and how many bytes of data there are."""
    size = path.stat().st_size
    if size < 8:
        raise _Damaged(f"only {size} bytes: not a safetensors file")
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise _Damaged("only a pointer of git-lfs: run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise _Damaged(
                "this is no safetensors file, or its start is damaged: get it again (its header "
                f"would have {length} bytes, and at most {MAX_HEADER_BYTES} are allowed)"
            )
        if 8 + length > size:
            raise _Damaged(f"truncated: header of {length} bytes in a file of {size}; {_AGAIN}")
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"the header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _Damaged("the header is not a JSON object")
    return entries, 8 + length, size - 8 - length


def _object_without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Damaged(f"{key!r} stands twice in the header")
        result[key] = value
    return result


def _tensor_info(entry: Any, path: Path, data_start: int) -> tuple[str, TensorInfo | None]:
    """What is wrong with one header entry ("" if nothing), and the tensor if nothing is."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "needs dtype, shape and data_offsets", None
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        return f"dtype {entry['dtype']!r} is not supported", None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_counts(shape):
        return f"shape {shape!r} is not a list of sizes", None
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {offsets!r} are not [begin, end]", None
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        return f"shape {shape} of {entry['dtype']} needs {nbytes} bytes, has {end - begin}", None
    return "", TensorInfo(dtype, tuple(shape), nbytes, path, data_start + begin)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _layout_problems(
    path: Path, tensors: Mapping[str, TensorInfo], start: int, end: int
) -> list[Problem]:
    """Tensors must fill ``start`` to ``end``, without overlaps or holes."""
    problems = []
    position = start
    for name, info in tensors.items():
        if info.offset < position:
            problems.append(Problem(f"{path.name}: {name}", "overlaps the tensor before it"))
        elif info.offset > position:
            gap = info.offset - position
            problems.append(Problem(f"{path.name}: {name}", f"{gap} unused bytes before it"))
        position = max(position, info.offset + info.nbytes)
    if position < end:
        problems.append(Problem(path.name, f"{end - position} bytes after the last tensor"))
    return problems

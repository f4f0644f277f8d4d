"""A folder of safetensors files read as one checkpoint, safely and with little memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk.errors import InputError, InputProblems, Problem
from mcsharp_sdk.folders import NOT_GGUF
from mcsharp_sdk.models.safetensors_file import (
    DTYPE_NAMES,
    TensorInfo,
    read_bytes,
    read_header,
)
from mcsharp_sdk.models.safetensors_writing import write_safetensors

__all__ = ["Checkpoint", "TensorInfo", "TensorSlice", "write_safetensors"]

BASE_NAMES = ("model", "mcsharp")
"""Checkpoints go by these names: ``<base>.safetensors`` or ``<base>.safetensors.index.json``."""

TensorCheck = Callable[[torch.Tensor, TensorInfo, str], None]
"""Raises if something is wrong with a tensor of this info and name."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder, known from the files' headers and read one by one.

    Open one with :meth:`open`. No file stays open or mapped, so threads may share it.

    Attributes
    ----------
    directory : the folder.
    files : its weight files, in order.
    tensors : tensor name -> what the header says of it, in the order of files and bytes.
    metadata : ``__metadata__`` of all files together; later files win.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Find the safetensors files of a folder and check all their headers.

        ``model.safetensors`` comes before its index, as in transformers, then the same names with
        ``mcsharp``, then any single other safetensors file or index.

        Raises
        ------
        InputProblems
            If the checkpoint is damaged; every problem names its file and tensor.
        InputError
            If the folder holds no safetensors checkpoint, or only pickled weights.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such folder")
        source = _find_source(directory)
        weight_map: dict[str, str] = {}
        problems: list[Problem] = []
        files: tuple[Path, ...] = (source,)
        if source.suffix == ".json":
            weight_map, problems = _read_index(source)
            files = tuple(directory / name for name in dict.fromkeys(weight_map.values()))
        tensors, metadata, damaged, faults = _read_headers(files)
        problems += faults
        problems += [
            Problem(f"{file}: {name}", f"missing; {source.name} has it there")
            for name, file in weight_map.items()
            if file not in damaged and not _is_in(tensors, name, file)
        ]
        if problems:
            raise InputProblems(str(directory), problems)
        return cls(directory, files, tensors, metadata)

    @classmethod
    def of_file(cls, file: Path) -> Checkpoint:
        """One safetensors file by itself.

        Raises
        ------
        InputProblems
            If it is not there or damaged.
        """
        tensors, metadata, _, problems = _read_headers((file,))
        if problems:
            raise InputProblems(str(file), problems)
        return cls(file.parent, (file,), tensors, metadata)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of files and bytes."""
        return tuple(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, bytes and place of one tensor; ``KeyError`` if there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(f"no tensor {name!r} in {self.directory}") from None

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into fresh CPU memory, with the dtype and shape it has on disk."""
        info = self.info(name)
        return read_bytes(info.file, info.offset, info.nbytes).view(info.dtype).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read ``tensor[start:stop]`` along the first dimension, and no other bytes.

        Raises
        ------
        IndexError
            Unless ``0 <= start <= stop <= shape[0]``.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"{name} of shape {list(info.shape)} has no rows [{start}:{stop}]")
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        data = read_bytes(info.file, info.offset + start * row, (stop - start) * row)
        return data.view(info.dtype).view(stop - start, *info.shape[1:])

    def pieces(self, name: str, most_bytes: int) -> Iterator[torch.Tensor]:
        """A tensor in runs of rows of at most so many bytes, at least one row each."""
        info = self.info(name)
        if not info.shape or not info.nbytes:
            yield self.read(name)
            return
        rows = max(1, most_bytes * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], rows):
            yield self.read_rows(name, start, min(start + rows, info.shape[0]))

    def slice(self, name: str, check: TensorCheck | None = None) -> TensorSlice:
        """A handle that reads only when indexed; transformers' loader takes it as a tensor.

        Parameters
        ----------
        check : called with what was read, its info and name, before it is given out.
        """
        self.info(name)
        return TensorSlice(self, name, check)


@dataclass(frozen=True)
class TensorSlice:
    """Stands in for what safetensors' ``get_slice`` returns; reads when indexed."""

    checkpoint: Checkpoint
    name: str
    check: TensorCheck | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.checkpoint.info(self.name).shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype on disk."""
        return self.checkpoint.info(self.name).dtype

    def numel(self) -> int:
        """Number of elements."""
        return self.checkpoint.info(self.name).numel

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        return self._checked(self.checkpoint.read(self.name))

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor, as safetensors gives it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Dtype by its name in the file format, such as ``BF16``."""
        return DTYPE_NAMES[self.checkpoint.info(self.name).dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Index as a tensor; a slice along the first dimension reads only those rows."""
        first, *rest = index if isinstance(index, tuple) and index else (index,)
        if isinstance(first, slice) and first.step in (None, 1) and self.shape:
            start, stop, _ = first.indices(self.shape[0])
            rows = self._checked(self.checkpoint.read_rows(self.name, start, max(start, stop)))
            return rows[(slice(None), *rest)] if rest else rows
        return self._checked(self.checkpoint.read(self.name))[index]

    def _checked(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.check is not None:
            self.check(tensor, self.checkpoint.info(self.name), self.name)
        return tensor


def _find_source(directory: Path) -> Path:
    """The weight file or index that describes the whole checkpoint."""
    for base in BASE_NAMES:
        for suffix in (".safetensors", ".safetensors.index.json"):
            if (directory / f"{base}{suffix}").is_file():
                return directory / f"{base}{suffix}"
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{directory}: {len(found)} {pattern} files and nothing that says which belong to "
                f"the model; expected model.safetensors or model.safetensors.index.json"
            )
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{directory}: has only pickled weights ({', '.join(pickles[:3])}), which can run code "
            f"when opened; save the model as safetensors first (model.save_pretrained(folder))"
        )
    gguf = next(directory.glob("*.gguf"), None)
    if gguf is not None:
        raise InputError(f"{directory}: {gguf.name} is GGUF, {NOT_GGUF}")
    raise InputError(f"{directory}: no safetensors weights in this folder")


def _why_no_file(file: Path) -> str:
    if file.is_symlink():
        return f"is a link to {file.readlink()}, which is not there"
    return "is no file" if file.exists() else "missing, but the index names it"


def _read_headers(
    files: Sequence[Path],
) -> tuple[dict[str, TensorInfo], dict[str, str], set[str], list[Problem]]:
    """Tensors and metadata of all files, the names of those not fully readable, the problems."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    damaged: set[str] = set()
    problems: list[Problem] = []
    for file in files:
        if not file.is_file():
            damaged.add(file.name)
            problems.append(Problem(file.name, _why_no_file(file)))
            continue
        header, faults = read_header(file)
        if faults:
            damaged.add(file.name)
        problems += faults
        for name, info in header.tensors.items():
            first = tensors.setdefault(name, info)
            if first is not info:
                problems.append(Problem(f"{file.name}: {name}", f"is also in {first.file.name}"))
        metadata.update(header.metadata)
    return tensors, metadata, damaged, problems


def _read_index(path: Path) -> tuple[dict[str, str], list[Problem]]:
    """Tensor name -> file name of the sound entries of an index, and the problems of the others."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        return {}, [Problem(path.name, f"is not a JSON object with a weight_map ({error})")]
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [Problem(path.name, "weight_map must map tensor names to files")]
    bad = {file for file in map(str, weight_map.values()) if not _is_plain_name(file)}
    problems = [
        Problem(path.name, f"{file!r} is not the name of a safetensors file in this folder")
        for file in sorted(bad)
    ]
    sound = {name: str(file) for name, file in weight_map.items() if str(file) not in bad}
    return sound, problems


def _is_plain_name(name: str) -> bool:
    """Whether an index may name this file: nothing outside its own folder."""
    return name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _is_in(tensors: Mapping[str, TensorInfo], name: str, file_name: str) -> bool:
    return name in tensors and tensors[name].file.name == file_name

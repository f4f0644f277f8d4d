"""Room for activations: in memory, or in files of a folder that are mapped into it.

A file is unlinked as soon as it is mapped, so that nothing is left behind however the run ends. Its
space is reserved first: a full disk is an error then, and not a signal on a later write.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mcsharp_sdk.errors import RunError

SMALLEST_FILE = 2**20
"""Tensors of fewer bytes stay in memory."""


@dataclass
class Scratch:
    """Gives tensors to write activations into.

    Attributes
    ----------
    folder : where files are made; None keeps everything in memory.
    device : of the tensors; those in files are on the CPU always.
    """

    folder: Path | None = None
    device: str = "cpu"
    _maps: weakref.WeakSet[mmap.mmap] = field(default_factory=weakref.WeakSet)

    @property
    def spills(self) -> bool:
        """Whether tensors lie in files."""
        return self.folder is not None and torch.device(self.device).type == "cpu"

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; it takes memory, or disk, until it is no longer referred to.

        Raises
        ------
        RunError
            If the disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.folder is None or not self.spills or size < SMALLEST_FILE:
            return torch.empty(shape, dtype=dtype, device=self.device)
        mapped = _mapped_file(self.folder, size)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As :meth:`empty`, filled with zeros."""
        tensor = self.empty(*shape, dtype=dtype)
        for part in tensor.split(max(1, SMALLEST_FILE // max(1, tensor[:1].nbytes))):
            part.zero_()
            self.release()
        return tensor

    def release(self) -> None:
        """Stop counting pages of the files as this process's memory; their content stays."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _mapped_file(folder: Path, size: int) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".activations.", suffix=".tmp") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise RunError(
            f"{folder}: no room for {size / 1e9:.2f} GB of activations ({error.strerror}): free "
            "disk space, or allow more memory; the same command continues where it was"
        ) from error

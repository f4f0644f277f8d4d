"""Weight files of a compressed model: numbered shards and an index, always."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mcsharp_sdk.models.safetensors_file import StoredTensor
from mcsharp_sdk.models.shards import Checkpoint, write_safetensors


def shard_name(base: str, number: int, count: int) -> str:
    """File name of shard ``number`` (from 1) of ``count``."""
    return f"{base}-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, base: str, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index: tensor name -> file name."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def rename_weight_files(folder: Path, base: str) -> None:
    """Give the safetensors files of ``folder`` the names of shards of ``base``, with an index."""
    checkpoint = Checkpoint.open(folder)
    count = len(checkpoint.files)
    names = {
        file.name: shard_name(base, number, count)
        for number, file in enumerate(checkpoint.files, 1)
    }
    files = {name: names[checkpoint.info(name).file.name] for name in checkpoint.names}
    for file in checkpoint.files:
        file.rename(folder / names[file.name])
    for stale in folder.glob("*.safetensors.index.json"):
        stale.unlink()
    write_index(folder, base, files, checkpoint.nbytes)


class ShardWriter:
    """Writes tensors into shards of bounded size as they come, then an index.

    Tensors that are stored elsewhere are read one by one as their shard is written; others are held
    until then.

    Parameters
    ----------
    folder : where to write.
    base : start of the file names.
    limit : most bytes in a shard; a tensor larger than that gets a shard of its own.
    """

    def __init__(self, folder: Path, base: str, limit: int) -> None:
        self._folder, self._base, self._limit = folder, base, limit
        self._waiting: dict[str, Tensor | StoredTensor] = {}
        self._written: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._total = 0

    def add(self, name: str, tensor: Tensor | StoredTensor) -> None:
        """Take one tensor; it is on disk after ``finish`` at the latest."""
        if self._waiting and self._waiting_bytes() + _nbytes(tensor) > self._limit:
            self._flush()
        self._waiting[name] = tensor

    def _waiting_bytes(self) -> int:
        return sum(map(_nbytes, self._waiting.values()))

    def finish(self) -> None:
        """Write what waits, give the shards their numbers, and write the index."""
        self._flush()
        count = len(self._written)
        names = [shard_name(self._base, number, count) for number in range(1, count + 1)]
        for temporary, name in zip(self._written, names, strict=True):
            temporary.rename(self._folder / name)
        files = {tensor: names[shard] for tensor, shard in self._shard_of.items()}
        write_index(self._folder, self._base, files, self._total)

    def _flush(self) -> None:
        if not self._waiting:
            return
        file = self._folder / f"{self._base}-{len(self._written):05d}.safetensors"
        write_safetensors(file, self._waiting, {"format": "pt"})
        self._shard_of |= dict.fromkeys(self._waiting, len(self._written))
        self._written.append(file)
        self._total += self._waiting_bytes()
        self._waiting = {}


def _nbytes(tensor: Tensor | StoredTensor) -> int:
    return tensor.numel() * tensor.element_size()

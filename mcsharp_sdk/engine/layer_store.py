"""What a stage finished layer by layer, so that a run that is cut off continues there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mcsharp_sdk.checked_files import (
    DamagedFile,
    file_hash,
    read_checked_json,
    write_checked_json,
)
from mcsharp_sdk.engine.layer_writing import WritingAtOnce, WritingBehind
from mcsharp_sdk.models.shards import Checkpoint, TensorSlice, write_safetensors

FINISHED_FILE = "finished_stages.json"
"""In the run directory, above the stores: which stages are finished."""

SUMMARY_FILE = "summary.json"


class LayerStore:
    """Tensors and notes of one stage, a file of each per decoder layer.

    The notes hold the checksum of the tensors' file, and one of themselves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, layer: int) -> bool:
        """Whether the layer is finished: its notes are written last."""
        return self._notes(layer).exists()

    def write(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a finished layer."""
        self._keep(layer, tensors, notes)

    def writer(self, *, overlap: bool) -> WritingBehind | WritingAtOnce:
        """What writes layers as ``write`` does, or with ``overlap`` while the next is worked on.

        A context manager; other processes count on the layers only behind ``write_summary``.
        """
        return WritingBehind(self._keep) if overlap else WritingAtOnce(self.write)

    def _keep(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        digest = None
        if tensors:
            digest = write_safetensors(self._tensors(layer), dict(tensors), {"format": "pt"})
        write_checked_json(self._notes(layer), {"tensors_sha256": digest, "notes": dict(notes)})

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a finished layer; it may have none.

        Raises
        ------
        DamagedFile
            If they are not those that were written.
        """
        file = self._intact(layer)
        return {} if file is None else load_file(file)

    def slices(self, layer: int) -> dict[str, TensorSlice]:
        """As ``tensors``, each read when it is asked for; the whole file is checked at once."""
        file = self._intact(layer)
        if file is None:
            return {}
        checkpoint = Checkpoint.of_file(file)
        return {name: checkpoint.slice(name) for name in checkpoint.names}

    def notes(self, layer: int) -> dict[str, Any]:
        """The notes of a finished layer."""
        return dict(self._kept(layer)["notes"])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep what holds for all layers, once all of them are finished."""
        write_checked_json(self.folder / SUMMARY_FILE, summary)

    def is_complete(self) -> bool:
        """Whether all layers are finished: the summary is written behind them."""
        return (self.folder / SUMMARY_FILE).exists()

    def summary(self) -> dict[str, Any]:
        """What ``write_summary`` kept."""
        return dict(read_checked_json(self.folder / SUMMARY_FILE))

    def check(self) -> None:
        """Check all that is finished.

        Raises
        ------
        DamagedFile
            If something is not what was written.
        """
        for notes in sorted(self.folder.glob("layer_*.json")):
            self._intact(int(notes.stem.removeprefix("layer_")))
        if self.is_complete():
            self.summary()

    def _intact(self, layer: int) -> Path | None:
        """The file of a finished layer's tensors, checked; None if it has none."""
        digest = self._kept(layer)["tensors_sha256"]
        if digest is None:
            return None
        file = self._tensors(layer)
        if not file.is_file() or file_hash(file) != digest:
            state = "is damaged" if file.is_file() else "is gone"
            raise self._damaged(layer, f"{file} {state}")
        return file

    def _kept(self, layer: int) -> dict[str, Any]:
        try:
            return dict(read_checked_json(self._notes(layer)))
        except DamagedFile as error:
            raise self._damaged(layer, str(error)) from None

    def _damaged(self, layer: int, what: str) -> DamagedFile:
        """With what to do: without notes, and with no stage finished, only this layer is redone."""
        return DamagedFile(
            f"{what}. Delete {self._notes(layer).name} beside it and "
            f"{self.folder.parent / FINISHED_FILE}: the same command then makes this layer again"
        )

    def _tensors(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.safetensors"

    def _notes(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.json"

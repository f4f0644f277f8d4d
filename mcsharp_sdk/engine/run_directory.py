"""The folder in which a run keeps its artifacts, so that it can be looked into and resumed."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from mcsharp_sdk.artifact_file import Artifact, readable_json, write_text_atomically
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.shards import write_safetensors

FINGERPRINT_FILE = "fingerprint.json"
FINISHED_FILE = "finished_stages.json"
LOCK_FILE = "run.lock"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.json"


AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read, atomically."""
    write_text_atomically(path, readable_json(value) + "\n")


class RunDirectory:
    """A run's folder, locked against a second run while open.

    Use as a context manager.

    Parameters
    ----------
    path : the folder; made if it is not there.
    fingerprint : part -> hash of what the run depends on (recipe, model, data, version).
    keep : leave the folder when the run is over. Otherwise it goes with success, and with a failure
        before anything was finished; work that a second run can continue from always stays.

    Raises
    ------
    InputError
        If another run has the folder open, or it belongs to a run with another fingerprint; the
        message names the parts that differ.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], *, keep: bool = True) -> None:
        self.path = path
        self.keep = keep
        self.fingerprint = dict(fingerprint)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"the run directory {self.path} cannot be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InputError(f"{self.path} is in use by another run") from error
        self._check_fingerprint()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if not self.keep and (failure is None or not self._has_work()):
            shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock.close()

    def _has_work(self) -> bool:
        return any(file.suffix == ".json" for file in self.path.glob("*/*")) or bool(
            self.finished()
        )

    def _check_fingerprint(self) -> None:
        file = self.path / FINGERPRINT_FILE
        if not file.exists():
            write_json(file, self.fingerprint)
            return
        before = json.loads(file.read_text())
        keys = sorted(before.keys() | self.fingerprint.keys())
        changed = [key for key in keys if before.get(key) != self.fingerprint.get(key)]
        if changed:
            raise InputError(
                f"{self.path} belongs to another run: {', '.join(changed)} changed since it began. "
                "Delete that folder to begin again, or give another --run-dir to keep it"
            )

    def write(self, artifact: Artifact) -> None:
        """Keep an artifact."""
        artifact.save(self.path / artifact.FILE)

    def read(self, kind: type[AnyArtifact]) -> AnyArtifact:
        """The artifact of a kind that an earlier stage wrote."""
        return kind.load(self.path / kind.FILE)

    def has(self, kind: type[Artifact]) -> bool:
        """Whether an artifact of this kind was written."""
        return (self.path / kind.FILE).exists()

    def layers(self, name: str) -> LayerStore:
        """The store of a stage that writes layer by layer."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return LayerStore(folder)

    def finished(self) -> list[str]:
        """Keys of the stages that are done."""
        file = self.path / FINISHED_FILE
        return list(json.loads(file.read_text())) if file.exists() else []

    def mark_finished(self, stage: str, report: RunReport) -> None:
        """Record that a stage is done, and what is to be reported so far."""
        write_json(self.path / REPORT_FILE, report.to_dict())
        write_json(self.path / FINISHED_FILE, [*self.finished(), stage])

    def report(self) -> RunReport:
        """What the finished stages left to be reported."""
        file = self.path / REPORT_FILE
        return RunReport(**json.loads(file.read_text())) if file.exists() else RunReport()


class LayerStore:
    """Tensors and notes of one stage, a file of each per decoder layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, layer: int) -> bool:
        """Whether the layer is finished: its notes are written last."""
        return self._notes(layer).exists()

    def write(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a finished layer."""
        if tensors:
            write_safetensors(self._tensors(layer), dict(tensors), {"format": "pt"})
        write_json(self._notes(layer), notes)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a finished layer."""
        return load_file(self._tensors(layer))

    def notes(self, layer: int) -> dict[str, Any]:
        """The notes of a finished layer."""
        return dict(json.loads(self._notes(layer).read_text()))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep what holds for all layers, once all of them are finished."""
        write_json(self.folder / SUMMARY_FILE, summary)

    def summary(self) -> dict[str, Any]:
        """What ``write_summary`` kept."""
        return dict(json.loads((self.folder / SUMMARY_FILE).read_text()))

    def _tensors(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.safetensors"

    def _notes(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.json"

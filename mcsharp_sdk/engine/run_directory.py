"""The folder in which a run keeps its artifacts, so that it can be looked into and resumed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from mcsharp_sdk.artifact_file import Artifact, readable_json, write_text_atomically
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.shards import Checkpoint, TensorSlice, write_safetensors

FINGERPRINT_FILE = "fingerprint.json"
FINISHED_FILE = "finished_stages.json"
LOCK_FILE = "run.lock"
SUMMARY_FILE = "summary.json"

OWN_FILES = (FINGERPRINT_FILE, FINISHED_FILE, LOCK_FILE)
"""Files of a run directory that no stage wrote."""

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read, atomically."""
    write_text_atomically(path, readable_json(value) + "\n")


def lock(file: Path) -> IO[str]:
    """Lock a file, made if need be, until the stream that is returned is closed.

    Raises
    ------
    InputError
        If another process, or another stream of this one, holds it.
    """
    stream = file.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise InputError(f"{file.parent} is in use by another run") from error
    return stream


def link_files(files: Iterable[str], source: Path, target: Path) -> None:
    """Give ``target`` files of ``source``, by names relative to both.

    They are hard links where the file system has them, copies elsewhere. That is safe because a
    stage replaces its files as a whole and never writes into one.
    """
    for name in files:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        try:
            os.link(source / name, file)
        except OSError:
            shutil.copyfile(source / name, file)


@dataclass(frozen=True)
class FinishedStage:
    """What a finished stage left.

    Attributes
    ----------
    files : that it wrote, relative to the run directory.
    report : what it has to say.
    """

    files: tuple[str, ...] = ()
    report: RunReport = field(default_factory=RunReport)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"files": list(self.files), **self.report.to_dict()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FinishedStage:
        """What ``to_json`` gave."""
        report = RunReport(dict(content["stages"]), list(content["warnings"]))
        return cls(tuple(content["files"]), report)


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
            self._lock = lock(self.path / LOCK_FILE)
        except OSError as error:
            raise InputError(f"the run directory {self.path} cannot be used: {error}") from error
        self._check_fingerprint()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if not self.keep and (failure is None or not self._has_work()):
            shutil.rmtree(self.path)
        if self._lock is not None:
            self._lock.close()

    @property
    def own(self) -> RunDirectory:
        """The folder as this process alone uses it."""
        return self

    def _has_work(self) -> bool:
        return any(
            file.suffix in (".json", ".safetensors") for file in self.path.glob("*/*")
        ) or bool(self.finished())

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

    def finished(self) -> dict[str, FinishedStage]:
        """Key of each stage that is done -> what it left, in the order in which they ran."""
        file = self.path / FINISHED_FILE
        content = json.loads(file.read_text()) if file.exists() else {}
        return {key: FinishedStage.from_json(stage) for key, stage in content.items()}

    def mark_finished(self, key: str, stage: FinishedStage) -> None:
        """Record that a stage is done."""
        content = {name: done.to_json() for name, done in self.finished().items()}
        write_json(self.path / FINISHED_FILE, {**content, key: stage.to_json()})

    def files_written(self, artifact: str) -> tuple[str, ...]:
        """Files of the stage that has just run and writes ``artifact``, relative to the folder.

        These are all that no finished stage left, and the artifact's own even where an earlier
        stage had written it too.
        """
        known = {name for stage in self.finished().values() for name in stage.files}
        found = []
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            if not file.is_file() or file.name.startswith(".") or str(name) in OWN_FILES:
                continue
            own = name.parts[0] in (artifact, f"{artifact}.json")
            if own or str(name) not in known:
                found.append(str(name))
        return tuple(found)

    def report(self) -> RunReport:
        """What the finished stages left to be reported."""
        whole = RunReport()
        for stage in self.finished().values():
            whole.stages.update(stage.report.stages)
            whole.warnings += [w for w in stage.report.warnings if w not in whole.warnings]
        return whole


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
        """The tensors of a finished layer; it may have none."""
        file = self._tensors(layer)
        return load_file(file) if file.exists() or not self.has(layer) else {}

    def slices(self, layer: int) -> dict[str, TensorSlice]:
        """The tensors of a finished layer, each read when it is asked for."""
        file = self._tensors(layer)
        if not file.exists() and self.has(layer):
            return {}
        checkpoint = Checkpoint.of_file(file)
        return {name: checkpoint.slice(name) for name in checkpoint.names}

    def notes(self, layer: int) -> dict[str, Any]:
        """The notes of a finished layer."""
        return dict(json.loads(self._notes(layer).read_text()))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep what holds for all layers, once all of them are finished."""
        write_json(self.folder / SUMMARY_FILE, summary)

    def is_complete(self) -> bool:
        """Whether all layers are finished: the summary is written behind them."""
        return (self.folder / SUMMARY_FILE).exists()

    def summary(self) -> dict[str, Any]:
        """What ``write_summary`` kept."""
        return dict(json.loads((self.folder / SUMMARY_FILE).read_text()))

    def _tensors(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.safetensors"

    def _notes(self, layer: int) -> Path:
        return self.folder / f"layer_{layer:05d}.json"

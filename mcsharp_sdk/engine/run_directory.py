"""The folder in which a run keeps its artifacts, so that it can be looked into and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from mcsharp_sdk.artifact_file import TEMPORARY_FILES, Artifact
from mcsharp_sdk.checked_files import (
    DamagedFile,
    file_hash,
    read_checked_json,
    synced_hash,
    write_checked_json,
)
from mcsharp_sdk.engine.layer_store import FINISHED_FILE, LayerStore
from mcsharp_sdk.engine.report import RunReport
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.file_lock import lock

FINGERPRINT_FILE = "fingerprint.json"
LOCK_FILE = "run.lock"
PUBLISHED_FILE = "published.json"

OWN_FILES = (FINGERPRINT_FILE, FINISHED_FILE, LOCK_FILE, PUBLISHED_FILE)
"""Files of a run directory that no stage wrote."""

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


@dataclass(frozen=True)
class FinishedStage:
    """What a finished stage left.

    Attributes
    ----------
    files : that it wrote, relative to the run directory.
    report : what it has to say.
    checksums : file -> sha256 of those that have no checksum in themselves or in their notes.
    """

    files: tuple[str, ...] = ()
    report: RunReport = field(default_factory=RunReport)
    checksums: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "files": list(self.files),
            "checksums": dict(self.checksums),
            **self.report.to_dict(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> FinishedStage:
        """What ``to_json`` gave."""
        report = RunReport(dict(content["stages"]), list(content["warnings"]))
        return cls(tuple(content["files"]), report, dict(content.get("checksums", {})))


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
        If another run has the folder open, it is no run directory, it belongs to a run with
        another fingerprint, or a file of a finished stage is not what it was; the message names
        the parts or files that differ.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str], *, keep: bool = True) -> None:
        self.path = path
        self.keep = keep
        self.fingerprint = dict(fingerprint)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_own()
            self._lock = lock(self.path / LOCK_FILE)
        except OSError as error:
            raise InputError(
                f"the run directory {self.path} cannot be used: {error}; give another --run-dir"
            ) from error
        try:
            self._check_fingerprint()
            self._check_finished()
        except BaseException as error:
            self._lock.close()
            if isinstance(error, DamagedFile):
                raise InputError(f"{error}; {_begin_again(self.path)}") from None
            raise
        remove_temporary_files(self.path)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if not self.keep and (failure is None or not self._has_work()):
            self._remove()
        if self._lock is not None:
            self._lock.close()

    def _remove(self) -> None:
        """Delete the folder, so that what is left of it at any moment is a run less finished.

        What says that something is finished goes before the thing itself, and what says that all is
        finished goes last.
        """
        last = (FINGERPRINT_FILE, LOCK_FILE, PUBLISHED_FILE)
        (self.path / FINISHED_FILE).unlink(missing_ok=True)
        for notes in self.path.glob("*/*.json"):
            notes.unlink()
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in last:
                entry.unlink()
        for name in last:
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()

    @property
    def own(self) -> RunDirectory:
        """The folder as this process alone uses it."""
        return self

    def _has_work(self) -> bool:
        return any(
            file.suffix in (".json", ".safetensors") for file in self.path.glob("*/*")
        ) or bool(self.finished())

    def _check_own(self) -> None:
        """Refuse a folder that is not a run's before anything is written to it."""
        if (self.path / FINGERPRINT_FILE).exists():
            return
        begun = f".{FINGERPRINT_FILE}."  # by a run that was killed at once
        strangers = [
            file.name
            for file in self.path.iterdir()
            if file.name not in OWN_FILES and not file.name.startswith(begun)
        ]
        if strangers:
            raise InputError(
                f"{self.path} is no run directory: it has {min(strangers)}, but no "
                f"{FINGERPRINT_FILE}; give another --run-dir, or empty the folder yourself"
            )

    def _check_fingerprint(self) -> None:
        file = self.path / FINGERPRINT_FILE
        if not file.exists():
            write_checked_json(file, self.fingerprint)
            return
        try:
            before = read_checked_json(file)
        except DamagedFile as error:
            raise InputError(
                f"{error}, so which run {self.path} belongs to cannot be told: delete that folder "
                "to begin again"
            ) from None
        keys = sorted(before.keys() | self.fingerprint.keys())
        changed = [key for key in keys if before.get(key) != self.fingerprint.get(key)]
        if changed:
            raise InputError(
                f"{self.path} belongs to another run: {', '.join(changed)} changed since it began. "
                "Delete that folder to begin again, or give another --run-dir to keep it"
            )

    def _check_finished(self) -> None:
        for stage in self.finished().values():
            for name, digest in stage.checksums.items():
                file = self.path / name
                if not file.is_file() or file_hash(file) != digest:
                    state = "changed since its stage finished" if file.is_file() else "is gone"
                    raise DamagedFile(f"{file} {state}")

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
        content = read_checked_json(file) if file.exists() else {}
        return {key: FinishedStage.from_json(stage) for key, stage in content.items()}

    def mark_finished(self, key: str, stage: FinishedStage) -> None:
        """Record that a stage is done."""
        content = {name: done.to_json() for name, done in self.finished().items()}
        write_checked_json(self.path / FINISHED_FILE, {**content, key: stage.to_json()})

    def checksums(self, files: Iterable[str]) -> dict[str, str]:
        """Those of ``files`` that have no checksum in themselves or their notes -> sha256."""
        return {name: synced_hash(self.path / name) for name in files if "/" not in name}

    def mark_published(self, what: Mapping[str, str]) -> None:
        """Record what is about to come to its place as the result of the run."""
        write_checked_json(self.path / PUBLISHED_FILE, dict(what))

    def files_written(self, artifact: str) -> tuple[str, ...]:
        """Files of the stage that has just run and writes ``artifact``, relative to the folder.

        These are all that no finished stage left, and the artifact's own: where a run was killed
        while its folder was deleted, an earlier stage, done again, counts what was left among its.
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


def remove_temporary_files(folder: Path) -> None:
    """Delete what a run that was killed had begun to write."""
    for file in folder.rglob(TEMPORARY_FILES):
        if file.is_file():
            file.unlink()


def _begin_again(folder: Path) -> str:
    return (
        f"delete {folder / FINISHED_FILE} and the damaged file: the same command then does again "
        "what is not intact"
    )

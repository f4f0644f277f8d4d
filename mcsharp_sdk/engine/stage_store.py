"""Finished stages kept under what their results depend on, so that runs share them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from mcsharp_sdk.artifact_file import read_json_file, write_json
from mcsharp_sdk.checked_files import DamagedFile, file_hash
from mcsharp_sdk.engine.layer_store import LayerStore
from mcsharp_sdk.engine.run_directory import FinishedStage, RunDirectory
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.file_lock import InUse
from mcsharp_sdk.partial_folder import partial_folder

logger = logging.getLogger("mcsharp_sdk")

RECORD_FILE = "finished_stage.json"
FILES_FOLDER = "files"


class StageStore:
    """A folder of finished stages: key -> the files that the stage wrote, and its report.

    An entry is made under another name and renamed, so that one that is there is whole.

    Parameters
    ----------
    path : the folder; made with the first entry.
    wanted : keys that are worth keeping; None for all.
    """

    def __init__(self, path: Path, wanted: Collection[str] | None = None) -> None:
        self.path = path
        self.wanted = wanted

    def give(self, key: str, directory: RunDirectory, name: str) -> bool:
        """Put a stage's result into a run directory and mark it finished there as ``name``.

        Returns
        -------
        Whether there is such a result. One that is damaged is deleted, and is none.
        """
        entry = self.path / key
        if not entry.is_dir():
            return False
        stage = _kept_stage(entry)
        if stage is None:
            logger.warning("%s is damaged and deleted: the stage is done again", entry)
            shutil.rmtree(entry)
            return False
        _link_files(stage.files, entry / FILES_FOLDER, directory.path)
        directory.mark_finished(name, stage)
        return True

    def keep(self, key: str, directory: RunDirectory, stage: FinishedStage) -> None:
        """Keep what a stage left in a run directory, if it is wanted and not there yet."""
        entry = self.path / key
        if entry.is_dir() or (self.wanted is not None and key not in self.wanted):
            return
        try:
            with partial_folder(entry) as partial:
                _link_files(stage.files, directory.path, partial / FILES_FOLDER)
                write_json(partial / RECORD_FILE, stage.to_json())
                if not entry.is_dir():
                    partial.rename(entry)
        except InUse:
            logger.info("another sweep is keeping %s", entry)

    def drop_unwanted(self) -> None:
        """Delete the entries that are not wanted, and what a killed sweep had begun."""
        if self.wanted is None or not self.path.is_dir():
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name not in self.wanted:
                shutil.rmtree(entry)


def _kept_stage(entry: Path) -> FinishedStage | None:
    """What an entry holds; None if it is damaged."""
    files = entry / FILES_FOLDER
    try:
        stage = FinishedStage.from_json(read_json_file(entry / RECORD_FILE))
        whole = all((files / name).is_file() for name in stage.files) and all(
            file_hash(files / name) == digest for name, digest in stage.checksums.items()
        )
        for folder in {Path(name).parent for name in stage.files if "/" in name}:
            LayerStore(files / folder).check()
    except (InputError, DamagedFile, OSError, KeyError, TypeError, ValueError):
        return None
    return stage if whole else None


def _link_files(files: Iterable[str], source: Path, target: Path) -> None:
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

"""Folders with checksums: what is written is on disk, and reading them needs nothing but reads."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from mcsharp_sdk.checked_files import changed_files, read_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.bin", "b.bin", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_files_are_on_disk_before_their_checksums(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    write_checksums(folder)
    assert synced[:2] == [(folder / name).stat().st_ino for name in ("a.bin", "b.bin")]
    expected = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.bin", "b.bin")}
    assert read_checksums(folder) == expected


def test_files_on_a_system_that_cannot_sync_are_verified(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checksums(folder)

    def refused(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")  # what squashfs says

    monkeypatch.setattr(os, "fsync", refused)
    assert changed_files(folder, read_checksums(folder)) == []
    (folder / "b.bin").write_text("B.bin")
    assert [problem.where for problem in changed_files(folder, read_checksums(folder))] == ["b.bin"]

"""Joining the processes of a run that torchrun started, and their view of the run directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from mcsharp_sdk.artifact_file import Artifact
from mcsharp_sdk.engine.run_directory import FinishedStage, LayerStore, RunDirectory
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.ranks import ALONE, Ranks

LONGEST_WAIT = timedelta(hours=24)
"""For another process, e.g. while it writes the result. One that ends is noticed at once."""


def started_together() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return started_together() == 1 or os.environ["RANK"] == "0"


def own_device(device: str) -> str:
    """The device of this process: of several on one machine, each has a GPU of its own."""
    if started_together() == 1 or device != "cuda":
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started together, or this one alone.

    Raises
    ------
    RunError
        If they do not find each other, or this one is told to stop since another one failed.
    """
    count = started_together()
    if count == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the {count} processes do not find each other: {error}") from error
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        yield ranks
        ranks.wait()
        dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    raise RunError(
        f"rank {os.environ.get('RANK', '?')} was told to stop, as another rank failed or the "
        "launcher was stopped. The same command continues from the last finished layer"
    )


class SharedRunDirectory(RunDirectory):
    """A run directory that several processes see: the first one writes, and its answers count.

    All processes must ask and write in the same order. Tensors are read from the files, so the
    folder must be on a file system that all machines share.
    """

    def __init__(self, own: RunDirectory, ranks: Ranks) -> None:
        super().__init__(own.path, own.fingerprint, keep=own.keep)
        self._own, self._ranks = own, ranks

    @property
    def own(self) -> RunDirectory:
        """The folder as the first process alone uses it."""
        return self._own

    def __enter__(self) -> Self:
        problem = ""
        if self._ranks.first:
            try:
                self._own.__enter__()
            except InputError as error:
                problem = str(error)
        problem = self._ranks.share(problem)
        if problem:
            raise InputError(problem)
        self._check_seen()
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        if self._ranks.first:
            self._own.__exit__(failure, *rest)

    def _check_seen(self) -> None:
        """Refuse a run whose processes do not see the same folder."""
        unseen = [
            str(rank)
            for rank, seen in enumerate(self._ranks.collect(self.path.is_dir()))
            if not seen
        ]
        if unseen:
            raise InputError(
                f"the run directory {self.path} is not seen by rank {', '.join(unseen)}: give a "
                "--run-dir on a file system that all machines share"
            )

    def write(self, artifact: Artifact) -> None:
        """Keep an artifact."""
        if self._ranks.first:
            super().write(artifact)
        self._ranks.wait()

    def has(self, kind: type[Artifact]) -> bool:
        """Whether the first process sees it."""
        return self._ranks.share(super().has(kind))

    def layers(self, name: str) -> LayerStore:
        """The store of a stage that writes layer by layer."""
        folder = self.path / name
        if self._ranks.first:
            folder.mkdir(exist_ok=True)
        self._ranks.wait()
        return SharedLayerStore(LayerStore(folder), self._ranks)

    def finished(self) -> dict[str, FinishedStage]:
        """As the first process sees it."""
        return self._ranks.share(super().finished())

    def mark_finished(self, key: str, stage: FinishedStage) -> None:
        """Record that a stage is done."""
        if self._ranks.first:
            self._own.mark_finished(key, stage)
        self._ranks.wait()

    def files_written(self, artifact: str) -> tuple[str, ...]:
        """As the first process sees it."""
        return self._ranks.share(self._own.files_written(artifact) if self._ranks.first else ())


class SharedLayerStore(LayerStore):
    """A layer store that several processes see, as :class:`SharedRunDirectory`."""

    def __init__(self, own: LayerStore, ranks: Ranks) -> None:
        super().__init__(own.folder)
        self._ranks = ranks

    def has(self, layer: int) -> bool:
        """Whether the layer is finished."""
        return self._ranks.share(super().has(layer))

    def write(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a finished layer."""
        self._keep(layer, tensors, notes)
        self._ranks.wait()

    def _keep(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if self._ranks.first:
            super()._keep(layer, tensors, notes)

    def notes(self, layer: int) -> dict[str, Any]:
        """The notes of a finished layer."""
        return self._ranks.share(super().notes(layer) if self._ranks.first else {})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep what holds for all layers."""
        if self._ranks.first:
            super().write_summary(summary)
        self._ranks.wait()

    def is_complete(self) -> bool:
        """Whether all layers are finished."""
        return self._ranks.share(super().is_complete())

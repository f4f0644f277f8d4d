"""Weights that a background thread reads while others are computed with.

It does all that reading takes: the disk, the check for numbers that are not finite, the conversion,
and on a GPU the copy, which runs in a stream of its own beside the computing. An error is raised
where the weights are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError

VARIABLE = "MCSHARP_OVERLAP"
"""Environment variable that turns overlapping on (1) or off (0), whatever the device."""


def overlaps(device: str) -> bool:
    """Whether reading and writing overlap with computing: on a GPU, unless ``VARIABLE`` is set.

    On a CPU they would take processor time and memory from the computing.

    Raises
    ------
    InputError
        If the variable is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE, "")
    if given not in ("", "0", "1"):
        raise InputError(f"{VARIABLE}={given}: it can be 1, to overlap reading, or 0")
    return given == "1" if given else torch.device(device).type == "cuda"


class ReadAhead:
    """Tensors that are being read, each until it is taken.

    Parameters
    ----------
    device : that they are read to.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._coming: dict[Hashable, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}

    def __len__(self) -> int:
        return len(self._coming)

    def begin(self, key: Hashable, read: Callable[[], Tensor]) -> None:
        """Begin to read, behind all that was begun before, unless that was begun for ``key``."""
        if key not in self._coming:
            self._coming[key] = _thread(os.getpid()).submit(self._read, read)

    def take(self, key: Hashable) -> Tensor | None:
        """What was read for ``key``; waits for it. None if it was not begun, or taken already."""
        coming = self._coming.pop(key, None)
        if coming is None:
            return None
        tensor, copied = coming.result()
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            tensor.record_stream(stream)
        return tensor

    def drop(self, key: Hashable) -> None:
        """Forget what was begun for ``key``, if anything was."""
        coming = self._coming.pop(key, None)
        if coming is not None:
            coming.cancel()

    @torch.no_grad()
    def _read(self, read: Callable[[], Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return read(), None
        stream = _stream(self._device)
        with torch.cuda.stream(stream):
            return read(), stream.record_event()


def to_device(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A tensor in memory on a device; to a GPU by way of pinned memory, so that nothing waits."""
    if torch.device(device).type != "cuda":
        return tensor.to(device, dtype)
    return tensor.pin_memory().to(device, non_blocking=True).to(dtype)


@cache
def _thread(process: int) -> ThreadPoolExecutor:
    """The thread of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(1, thread_name_prefix="mcsharp-read")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

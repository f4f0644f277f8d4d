"""Finished layers written by a background thread while the next one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

from torch import Tensor

Keep = Callable[[int, Mapping[str, Tensor], Mapping[str, Any]], None]
"""Writes the tensors and notes of a layer, so that they are durable when it returns."""


class WritingBehind:
    """Writes layers one behind the other, at most one at a time.

    Use as a context manager: when it is left, all is written. What goes wrong with a layer is
    raised at the next one, or then.

    Parameters
    ----------
    keep : what writes a layer.
    """

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mcsharp-write")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._writing is not None:
            wait([self._writing])
        self._thread.shutdown()
        if failure is None:
            self._finish()

    def write(self, layer: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Begin to write a layer, once the one before is written; its tensors must not change."""
        self._finish()
        self._writing = self._thread.submit(self._keep, layer, tensors, notes)

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.result()


class WritingAtOnce:
    """The same without a thread: each layer is written before the next begins."""

    def __init__(self, keep: Keep) -> None:
        self.write = keep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to be written."""

"""Progress on a terminal: a bar per stage with the time left; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mcsharp_sdk.arguments import shown
from mcsharp_sdk.errors import InputError

Item = TypeVar("Item")


def check_progress(progress: object) -> None:
    """InputError unless ``progress`` is True, False, or None for where there is a terminal."""
    if progress is not None and not isinstance(progress, bool):
        raise InputError(
            f"progress is True, False or None, not {shown(progress)}: it shows bars, or does not"
        )


class ProgressBars:
    """Bars on standard error. Use as a context manager.

    Parameters
    ----------
    visible : None shows them exactly if standard error is a terminal.
    """

    def __init__(self, visible: bool | None = None) -> None:
        self.console = Console(stderr=True, emoji=False)
        shown = self.console.is_terminal if visible is None else visible
        self._bars = Progress(
            TextColumn("{task.description:<32}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not shown,
        )

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def track(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Pass ``items`` on, moving a bar with each one finished."""
        total = len(items) if isinstance(items, Sized) else None
        bar = self._bars.add_task(description, total=total)
        for item in items:
            yield item
            self._bars.advance(bar)

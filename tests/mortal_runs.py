"""Runs in processes of their own, which end where a test says.

The processes are forked from one that has imported what a run needs, so that each begins at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mcsharp_sdk
from mcsharp_sdk.recipe.schema import Recipe

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
"""Audit events of what changes a folder; opening to write is looked at besides."""

_PRELOADED = [
    *("mcsharp_sdk.engine.run", "mcsharp_sdk.modifiers.layer_quantisation"),
    *("mcsharp_sdk.modifiers.top_any_block", "mcsharp_sdk.modifiers.protection_measurement"),
    *("mcsharp_sdk.evaluation.loading", "mcsharp_exporters.safetensors_model"),
    "transformers.models.mixtral.modeling_mixtral",
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Command:
    """A call of ``compress``: recipe as plain data, model and output, and its other arguments.

    ``environment`` is set in a process of its own.
    """

    recipe: Mapping[str, Any]
    model: Path
    output: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Call it in this process."""
        recipe = Recipe.from_dict(dict(self.recipe))
        mcsharp_sdk.compress(recipe, self.model, self.output, progress=False, **dict(self.settings))


@dataclass(frozen=True)
class Death:
    """When a run ends.

    Attributes
    ----------
    folder : whose changes are counted.
    change : number of the change, from 1, in front of which it happens; 0 for never.
    by : signal that the process gets then; None if instead a file takes all space of the disk.
    file_limit : most bytes of one file (RLIMIT_FSIZE); 0 for no limit.
    log : where each file that comes to its place is noted, a line each.
    """

    folder: Path
    change: int = 0
    by: int | None = signal.SIGKILL
    file_limit: int = 0
    log: Path | None = None


@dataclass(frozen=True)
class End:
    """How a run ended: exit code of the process (negative: by a signal), and the error if any."""

    code: int
    error: str


def run(command: Command, death: Death, seconds: float | None = None) -> End:
    """Run a command in a process of its own.

    Parameters
    ----------
    seconds : after which it is killed if it still runs.
    """
    errors = death.folder.with_name(f"{death.folder.name}.error")
    errors.unlink(missing_ok=True)
    process = _processes.Process(target=_mortal, args=(command, death, errors))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return End(process.exitcode, errors.read_text() if errors.exists() else "")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def fill(folder: Path) -> None:
    """Take all space of the file system that a folder is on, with the file ``hog``."""
    with (folder / "hog").open("wb", buffering=0) as hog, suppress(OSError):
        while True:
            hog.write(bytes(4096))


def _mortal(command: Command, death: Death, errors: Path) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(command.environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if death.file_limit:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.file_limit, most))
    sys.addaudithook(_reaper(death))
    try:
        command.run()
    except BaseException as error:
        errors.write_text(f"{type(error).__name__}: {error}")
        os._exit(getattr(error, "exit_code", 1))
    os._exit(0)


def _reaper(death: Death) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that counts changes of the folder and kills at the one."""
    folder, count = f"{death.folder}/", 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if not (writes or event in CHANGES) or folder not in str(arguments[0]):
            return
        count += 1
        if count == death.change and death.by is not None:
            os.kill(os.getpid(), death.by)
        elif count == death.change:
            fill(death.folder)
        if death.log is not None and event == "os.rename":
            with open(death.log, "a") as log:
                log.write(json.dumps(str(arguments[1])) + "\n")

    return look

"""Which kernel is fastest from how many tokens on, as measured on this machine; kept in a file.

The file is ``kernel_crossovers.json`` in the user's cache folder. It holds, for each device with
the versions of what its kernels are made by, what ``mcsharp inspect DIR --kernels --measure``
found. Where it says nothing, kernels are chosen by numbers of tokens that are built in.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mcsharp_sdk._version import __version__
from mcsharp_sdk.artifact_file import VERSION, check_version, read_json_object, write_json
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.kernels.case import Case, LayerCase

VARIABLE = "MCSHARP_CROSSOVERS"
"""Environment variable that names another file, or is ``off``."""

OFF = "off"
FILE = "kernel_crossovers.json"

Steps = tuple[tuple[int, str], ...]
"""Tokens from which on a kernel is fastest, and its name; ascending, the first from 1."""

Table = Mapping[str, Mapping[str, Steps]]
"""Device (:func:`device_name`) -> what is multiplied (``key`` of a case) -> steps."""


def crossover_file() -> Path | None:
    """The file that crossovers are kept in; None if they are switched off."""
    return _file(os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@cache
def _file(given: str | None, cache_home: str | None) -> Path | None:
    if given == OFF:
        return None
    if given:
        return Path(given)
    return Path(cache_home or os.path.expanduser("~/.cache")) / "mcsharp_sdk" / FILE


def fastest(case: Case | LayerCase, tokens: int) -> str:
    """Name of what was measured to be fastest on this machine; empty if nothing was measured."""
    found = measured(case.device)
    steps = found.get(case.key(), ()) if found else ()
    return next((name for first, name in reversed(steps) if first <= tokens), "")


def measured(device: str) -> Mapping[str, Steps]:
    """What was measured on a kind of device.

    A file that cannot be read is left out with a warning.
    """
    file = crossover_file()
    return {} if file is None else _of_device(file, device)


def warn_unfit(case: Case | LayerCase, name: str) -> None:
    """Say, once, that the file names something that cannot be used."""
    _warn_unfit(case.key(), name)


@cache
def _warn_unfit(key: str, name: str) -> None:
    warnings.warn(
        f"{crossover_file()}: {name!r} cannot be used for {key}, and what is built in is used: "
        "measure again",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def device_name(device: str) -> str:
    """The hardware behind a kind of device, and the versions of what its kernels are made by."""
    compiler = "triton" if device == "cuda" else "numba"
    made_by = f"mcsharp_sdk {__version__}, torch {torch.__version__}, {_version_of(compiler)}"
    return f"{hardware(device)}; {made_by}"


@cache
def hardware(device: str) -> str:
    """What a kind of device is called; GPUs of several kinds all together."""
    if device != "cuda":
        return _processor()
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    return " and ".join(sorted(names))


def read(file: Path) -> Table:
    """The content of a file of crossovers; empty if there is no file.

    Raises
    ------
    InputError
        If it is anything else.
    """
    if not file.exists():
        return {}
    try:
        content = read_json_object(file)
        check_version(content)
        devices = content.get("devices")
        if not isinstance(devices, dict) or not all(isinstance(d, dict) for d in devices.values()):
            raise InputError("has no 'devices' that map names to measurements")
        return {
            device: {key: _read_steps(key, steps) for key, steps in found.items()}
            for device, found in devices.items()
        }
    except InputError as error:
        raise InputError(
            f"{file}: {error}: delete it and measure again, or give another file in {VARIABLE}"
        ) from None


def save(device: str, found: Mapping[str, Steps]) -> Path:
    """Add what was measured on a kind of device to the file; all else in it stays.

    Raises
    ------
    InputError
        If crossovers are switched off, or the file is something else or cannot be written.
    """
    file = crossover_file()
    if file is None:
        raise InputError(f"{VARIABLE}={OFF}: measured crossovers have no file to be kept in")
    table = {name: dict(known) for name, known in read(file).items()}
    table.setdefault(device_name(device), {}).update(found)
    try:
        write_json(file, {"version": VERSION, "devices": _plain(table)})
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({error.strerror}): give another file in {VARIABLE}"
        ) from error
    _of_device.cache_clear()
    return file


@cache
def _of_device(file: Path, device: str) -> Mapping[str, Steps]:
    try:
        return read(file).get(device_name(device), {})
    except InputError as error:
        warnings.warn(f"measured crossovers are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}


def _plain(table: Table) -> dict[str, Any]:
    return {
        device: {key: [list(step) for step in steps] for key, steps in found.items()}
        for device, found in table.items()
    }


def _read_steps(key: str, value: Any) -> Steps:
    """Steps from JSON values."""
    whole = isinstance(value, list) and all(
        isinstance(step, list)
        and len(step) == 2
        and type(step[0]) is int
        and isinstance(step[1], str)
        for step in value
    )
    steps = tuple((step[0], step[1]) for step in value) if whole else ()
    if not steps or steps[0][0] != 1 or any(a[0] >= b[0] for a, b in pairwise(steps)):
        raise InputError(f"{key!r} must have pairs of tokens, ascending from 1, and a kernel")
    return steps


def _version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _processor() -> str:
    """The name of the processor, as the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()

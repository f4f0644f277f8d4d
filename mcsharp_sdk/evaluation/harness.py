"""EleutherAI's lm-evaluation-harness itself: imported on demand, its tasks, its use of networks."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcsharp_sdk.errors import InputError, Problem, raise_problems


def import_harness() -> Any:
    """The package lm-eval; InputError says how to install it."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise InputError(
            f"tasks need EleutherAI's lm-eval, which cannot be imported ({error}): "
            "pip install 'mcsharp_sdk[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def load_tasks(harness: Any, include: Path | None, wanted: Iterable[str]) -> Any:
    """lm-eval's index of tasks, with all that are wanted loaded once, so that data is at hand.

    Parameters
    ----------
    include : folder with task files of your own; None for lm-eval's alone.
    wanted : names of tasks.

    Raises
    ------
    InputError
        If there is no such folder, or with every task that is not known or has no data.
    """
    if include is not None and not include.is_dir():
        raise InputError(f"{include} is no folder: give that of your task files")
    names = dict.fromkeys(wanted)
    manager = _index(harness, include, names)
    known = set(manager.all_tasks)
    problems = [Problem(n, _unknown(n, known)) for n in names if n not in known]
    for name in (n for n in names if n in known):
        try:
            manager.load([name])
        except Exception as error:  # lm-eval and datasets raise whatever they please
            problems.append(Problem(name, _no_data(error)))
    raise_problems("the list of tasks", problems)
    return manager


def _index(harness: Any, include: Path | None, names: Iterable[str]) -> Any:
    """The user's own tasks if they have all the names, since lm-eval's thousands take long to read;
    else all that there are."""
    if include is None:
        return harness.tasks.TaskManager()
    own = harness.tasks.TaskManager(include_path=str(include), include_defaults=False)
    if set(names) <= set(own.all_tasks):
        return own
    return harness.tasks.TaskManager(include_path=str(include))


def _unknown(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"lm-eval knows no such task{hint} Give a folder with task files of your own to include"


def _no_data(error: Exception) -> str:
    told = str(error).strip().splitlines() or [""]
    return (
        f"its data cannot be read ({type(error).__name__}: {told[0]}): put it into the cache of "
        "the package datasets, or allow a download"
    )


@contextmanager
def network(allowed: bool) -> Iterator[None]:
    """Keep Hugging Face's packages off the network unless it is allowed."""
    import datasets
    import huggingface_hub.constants

    switches = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [(module, name, getattr(module, name)) for module, name in switches]
    try:
        if not allowed:
            for module, name in switches:
                setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)

"""Time kernels against each other, and find from how many tokens on which is fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch

from mcsharp_sdk.kernels.crossovers import Steps

TOKENS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 256)
"""Numbers of tokens that are timed; between two of them times are taken to be linear."""

LAYER_TOKENS = (*TOKENS, 1024, 4096)
"""The same for layers of experts, each of which gets a share of the tokens."""

ROUNDS = 7
TRIALS = 2
"""Rounds after which what is far behind is given up."""

FAR_BEHIND = 1.5
MARGIN = 0.03
"""A kernel has to be faster by this share to take over: less is within the noise."""

Run = Callable[[int], object]
"""Does the work once, for so many tokens."""


def find_steps(candidates: Mapping[str, Run], device: str, tokens: Sequence[int] = TOKENS) -> Steps:
    """From how many tokens on each candidate is fastest.

    Parameters
    ----------
    candidates : name -> what to time; of equal ones the first is taken.
    device : kind of device that they run on, which is waited for.
    tokens : numbers of tokens that are timed, ascending from 1.
    """
    return crossovers({number: _seconds(candidates, number, device) for number in tokens})


def crossovers(seconds: Mapping[int, Mapping[str, float]]) -> Steps:
    """Steps from measured times.

    Parameters
    ----------
    seconds : tokens, ascending from 1 -> name -> seconds, of the same names throughout.
    """
    numbers = list(seconds)
    best = min(seconds[numbers[0]], key=lambda name: seconds[numbers[0]][name])
    steps = [(1, best)]
    for before, after in pairwise(numbers):
        fastest = min(seconds[after], key=lambda name: seconds[after][name])
        if seconds[after][fastest] < (1 - MARGIN) * seconds[after][best]:
            meeting = _meeting(seconds, best, fastest, before, after)
            best = fastest
            steps.append((meeting, best))
    return tuple(steps)


def _meeting(
    seconds: Mapping[int, Mapping[str, float]], old: str, new: str, before: int, after: int
) -> int:
    """The first number of tokens for which ``new`` is faster, if times are linear in between."""
    behind = seconds[before][new] - seconds[before][old]
    ahead = seconds[after][old] - seconds[after][new]
    share = max(0.0, behind) / (max(0.0, behind) + ahead)
    return min(after, before + 1 + int(share * (after - before)))


def _seconds(candidates: Mapping[str, Run], tokens: int, device: str) -> dict[str, float]:
    """Median seconds of each candidate, taken in turns behind a call to warm up."""
    spent: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run(tokens)
    for number in range(ROUNDS):
        least = min(min(times, default=0.0) for times in spent.values())
        for name, run in candidates.items():
            if number < TRIALS or min(spent[name]) <= FAR_BEHIND * least:
                spent[name].append(_timed(run, tokens, device))
    return {name: statistics.median(times) for name, times in spent.items()}


def _timed(run: Run, tokens: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    wait()
    start = time.perf_counter()
    run(tokens)
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    """A CPU is never behind."""

"""Shares of a job on as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

SMALL = 2**21
"""Multiplications below which another thread costs more than it saves."""


def in_shares(job: Callable[[int, int], None], work: float) -> None:
    """Call ``job(share, shares)`` for every share, side by side; return when all are done.

    ``job`` must release Python's lock while it works. torch's own threads sleep meanwhile.

    Parameters
    ----------
    work : multiplications, all shares together; decides how many there are.
    """
    shares = max(1, min(torch.get_num_threads(), int(work / SMALL)))
    if shares == 1:
        job(0, 1)
        return
    others = [_pool(os.getpid()).submit(job, share, shares) for share in range(1, shares)]
    try:
        job(0, shares)
    finally:
        for other in others:
            other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mcsharp-kernel")

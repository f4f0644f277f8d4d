"""Memory of tensors while something runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """The most bytes of tensors that were held at once while something ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    del kept
    results: Any = profiled.profiler
    events = [one for one in results.kineto_results.events() if one.name() == "[memory]"]
    events.sort(key=lambda one: one.start_ns())
    return max(accumulate(one.nbytes() for one in events))

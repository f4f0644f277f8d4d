"""Experts that are worked on together, as many as a working set holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES
from mcsharp_sdk.models.memory import release_free_memory

WORKING_SET_BYTES = 256 * 2**20
"""Memory for the float32 weights and Hessians of the experts that are quantised together."""


def expert_chunks(runs: ExpertRuns) -> Iterator[list[int]]:
    """Experts in runs that fit the working set together; at least one a run.

    What a run has freed is given back to the system before the next begins. The weights of the
    next are expected meanwhile.
    """
    size = experts_at_once([runs.weights.shape(matrix) for matrix in MATRICES])
    for start in range(0, len(runs.experts), size):
        runs.weights.expect(runs.experts[start + size : start + 2 * size])
        yield list(runs.experts[start : start + size])
        release_free_memory()


def experts_at_once(shapes: Sequence[tuple[int, int]]) -> int:
    """Experts with matrices of such shapes, (R, K), that fit the working set together."""
    each = max(4 * (3 * rows * columns + 3 * columns**2) for rows, columns in shapes)
    return max(1, WORKING_SET_BYTES // each)

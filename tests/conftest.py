"""Helpers that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests may run beside other work: threads of OpenMP that wait do not spin for long.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Of processes side by side each has one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whatever was measured on this machine, tests see what is built in.
os.environ["MCSHARP_CROSSOVERS"] = "off"

SHARED = Path(os.environ.get("MCSHARP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_path() -> Callable[[str], Path]:
    """Path below the folder of shared models and texts; the test is skipped where it is absent."""

    def find(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            pytest.skip(f"{relative} is not there: it belongs to the shared models and texts")
        return path

    return find

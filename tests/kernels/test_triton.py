"""Triton kernels without a GPU: in its interpreter, and compiled for GPUs that are not there.

Both need a process of their own: the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

# Seconds of work each, but of many small steps, which a busy machine stretches.
pytestmark = pytest.mark.timeout(1200)

HERE = Path(__file__).parent
TESTS = HERE.parent
CAPABILITIES = (80, 90, 100)
"""Ampere, Hopper and Blackwell."""

ALL_CAPABILITIES = (*CAPABILITIES, 89, 120)
"""With those of smaller GPUs, whose shared memory is less than half as large."""


def in_new_process(*arguments: str, **environment: str) -> None:
    """Run python, and show what it printed if it failed."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "cases", sorted((HERE / "interpreted").glob("cases_*.py")), ids=lambda p: p.stem
)
def test_kernels_in_the_interpreter(cases: Path) -> None:
    in_new_process(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases), TRITON_INTERPRET="1"
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_for_a_gpu(capability: int, tmp_path: Path) -> None:
    in_new_process(
        str(HERE / "compile_kernels.py"), str(capability), TRITON_CACHE_DIR=str(tmp_path)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", ALL_CAPABILITIES)
def test_every_variant_compiles_for_every_gpu(capability: int, tmp_path: Path) -> None:
    in_new_process(
        str(HERE / "compile_kernels.py"), str(capability), "--all", TRITON_CACHE_DIR=str(tmp_path)
    )  # fmt: skip

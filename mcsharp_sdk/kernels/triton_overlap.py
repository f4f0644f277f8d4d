"""Launches that overlap, inside Triton kernels: for compute capability 9 and more.

A kernel that is launched for it may begin when every program of the kernel before it has called
:func:`let_next_begin` or has ended. What that kernel and all before it wrote, it has only after
:func:`wait_for_last`, but for what was there before that kernel let it begin. Every program waits
before it ends, since what waits for its kernel counts on all before it.

Triton 3.4 has functions for this too, but cannot compile them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def let_next_begin():
    """The next kernel may begin, as far as this program is concerned."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_last():
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )

"""What compiled kernels can run on: the processor, numba, and the shapes that they take."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from mcsharp_sdk.kernels.case import Case
from mcsharp_sdk.quantization.packing import BLOCK

FEATURES = frozenset({"avx2", "fma", "f16c"})
"""What the processor needs, in LLVM's names."""

VNNI = (frozenset({"avx512vnni", "avx512vl"}), frozenset({"avxvnni"}))
"""Either of these multiplies bytes without an intermediate sum in 16 bits."""

VECTOR = 32


@cache
def missing_support() -> str:
    """Why no kernel can be compiled here; empty if one can."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'mcsharp_sdk[cpu]'"
    if lacking := sorted(FEATURES - cpu_features()):
        return f"this processor lacks {', '.join(lacking)}"
    return ""


def has_vnni() -> bool:
    """Whether the processor multiplies bytes four at a time."""
    return any(needed <= cpu_features() for needed in VNNI)


def has_wide_vnni() -> bool:
    """Whether the processor does so in vectors of 512 bits."""
    return "avx512vnni" in cpu_features()


@cache
def cpu_features() -> frozenset[str]:
    """What the processor that numba compiles for can do, in LLVM's names, such as ``avx2``."""
    from numba.core.registry import cpu_target

    found = cpu_target.target_context.codegen()._tm_features
    return frozenset(name[1:] for name in found.split(",") if name.startswith("+"))


def unfit_shape(case: Case) -> str:
    """Why compiled kernels cannot take a matrix; empty if they can."""
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    if reason := missing_support():
        return reason
    if case.group_size % BLOCK and (BLOCK % case.group_size or case.group_size % VECTOR):
        return f"group size {case.group_size} is not 32, 64 or a multiple of 128"
    return ""

"""Whether the expert statistics that a recipe measures hold what its allocation needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mcsharp_sdk.allocation.baselines import ALLOCATORS
from mcsharp_sdk.errors import Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.expert_stats import ExpertStats
from mcsharp_sdk.quantization.grid import REMOVED

if TYPE_CHECKING:
    from mcsharp_sdk.modifiers.bit_allocation import BitAllocation

BLOCK_SCORES = ("predicted_block_cosine", "block_cosine")
ERRORS = ("quant_error", "hessian_error")


def unmeasured(allocation: BitAllocation, earlier: Sequence[Modifier]) -> list[Problem]:
    """What the last ExpertStats among the earlier stages does not measure, though it is needed.

    Nothing if statistics come from a file, or from a stage of another kind.
    """
    measured = [stage for stage in earlier if isinstance(stage, ExpertStats)]
    if allocation.factors is not None or not measured:
        return []
    statistics, needs = measured[-1], ALLOCATORS[allocation.allocator].needs
    problems = []
    if needs in BLOCK_SCORES and not statistics.block_scores:
        message = f"{allocation.allocator} needs 'block_scores: true' in ExpertStats"
        problems.append(Problem("allocator", message))
    if allocation.loss_weighting and not statistics.loss_tokens:
        message = "needs gradients of the loss: give ExpertStats 'loss_tokens: 4096'"
        problems.append(Problem("loss_weighting", message))
    if needs == "hessian_error" and REMOVED in allocation.widths:
        message = f"{allocation.allocator} knows no cost of removing an expert: take 0 out"
        problems.append(Problem("widths", message))
    missing = sorted(set(allocation.widths) - {*statistics.bits, REMOVED})
    if needs in ERRORS and missing:
        widths = ", ".join(map(str, missing))
        message = f"ExpertStats measures no error at {widths} bits: add {widths} to its 'bits'"
        problems.append(Problem("widths", message))
    return problems

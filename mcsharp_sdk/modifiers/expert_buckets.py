"""The packed experts of one layer, stacked by width as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mcsharp_sdk.models.expert_runs import ExpertRuns
from mcsharp_sdk.models.experts import MATRICES, Matrix
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.quantization.grid import REMOVED, PackedWeight
from mcsharp_sdk.runtime.layout import TENSORS, empty_packed, members, stack_names


class ExpertBuckets:
    """Takes packed experts one by one, so that no copy of all of them is needed to stack them.

    Parameters
    ----------
    bits : width of each expert.
    scratch : where the stacks are kept.
    """

    def __init__(self, bits: Sequence[int], scratch: Scratch) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._scratch = scratch
        self._bits = bits
        self._members = members(bits)

    def put(self, matrix: Matrix, expert: int, packed: PackedWeight) -> None:
        """Take one matrix of an expert."""
        experts = self._members[self._bits[expert]]
        for part, name in zip(TENSORS, stack_names(self._bits[expert], matrix), strict=True):
            tensor = getattr(packed, part)
            if name not in self.tensors:
                shape = (len(experts), *tensor.shape)
                self.tensors[name] = self._scratch.empty(*shape, dtype=tensor.dtype)
            self.tensors[name][experts.index(expert)] = tensor
        self._scratch.release()

    def gather(self, owned: Sequence[Sequence[int]], group_size: int, runs: ExpertRuns) -> None:
        """Take the experts that other processes have worked on, from them.

        Parameters
        ----------
        owned : experts of each process.
        """
        ranks = runs.routed.ranks
        for owner, experts in enumerate(owned):
            for expert in experts:
                if self._bits[expert] == REMOVED:
                    continue
                for matrix in MATRICES:
                    rows, columns = runs.weights.shape(matrix)
                    bits = self._bits[expert]
                    empty = empty_packed(rows, columns, bits, group_size)
                    packed = self._own(matrix, expert) if owner == ranks.rank else empty
                    for part in TENSORS:
                        ranks.spread(getattr(packed, part), owner)
                    if owner != ranks.rank:
                        self.put(matrix, expert, packed)

    def _own(self, matrix: Matrix, expert: int) -> PackedWeight:
        width = self._bits[expert]
        slot = self._members[width].index(expert)
        stacks = (self.tensors[name] for name in stack_names(width, matrix))
        return PackedWeight(*(stack[slot].contiguous() for stack in stacks))

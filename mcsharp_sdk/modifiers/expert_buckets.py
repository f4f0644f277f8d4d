"""The packed experts of one layer, stacked by width as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mcsharp_sdk.models.experts import Matrix
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.quantization.grid import PackedWeight
from mcsharp_sdk.runtime.layout import TENSORS, bucket_name, members, tensor_name


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
        for part in TENSORS:
            tensor = getattr(packed, part)
            name = f"{bucket_name(self._bits[expert])}.{tensor_name(matrix, part)}"
            if name not in self.tensors:
                shape = (len(experts), *tensor.shape)
                self.tensors[name] = self._scratch.empty(*shape, dtype=tensor.dtype)
            self.tensors[name][experts.index(expert)] = tensor
        self._scratch.release()

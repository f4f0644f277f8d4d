"""The weights of one layer's routed experts, asked for one expert at a time.

They are in memory with the rest of the layer, or read from disk when they are asked for. Whoever
works on an expert says when it is done with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from mcsharp_sdk.models.bfloat16 import linear
from mcsharp_sdk.models.expert_reading import StackedExperts
from mcsharp_sdk.models.experts import MATRICES, Matrix, activate, finish, fused_weight
from mcsharp_sdk.models.read_ahead import ReadAhead


class ExpertWeights(ABC):
    """Weights of the routed experts of one layer.

    Attributes
    ----------
    module : the fused experts; its weights may be empty, its biases and norms are loaded.
    """

    module: Any

    @abstractmethod
    def read(self, matrix: Matrix, expert: int) -> Tensor:
        """[R, K], in the model's dtype; not to be changed in place."""

    @abstractmethod
    def replace(self, matrix: Matrix, expert: int, weight: Tensor) -> None:
        """Give an expert another weight, [R, K] of any float dtype, until it is released."""

    @abstractmethod
    def release(self, expert: int) -> None:
        """Nothing more is asked of this expert for now."""

    def expect(self, experts: Sequence[int]) -> None:  # noqa: B027 (most need not prepare)
        """These are read next, behind those in use: they may be fetched from now on."""

    @property
    @abstractmethod
    def in_memory(self) -> bool:
        """Whether the module's own forward can run."""

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return int(self.module.num_experts)

    def shape(self, matrix: Matrix) -> tuple[int, int]:
        """(R, K) of one expert's matrix."""
        _, rows, columns = fused_weight(self.module, matrix).shape
        return rows, columns

    def activated(self, expert: int, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Inputs of the down projection, [n, K], from what the expert gets, [n, hidden].

        ``weight`` stands in for the expert's own gate and up projections.
        """
        first = self.read("gate_up", expert) if weight is None else weight
        return activate(self.module, linear(tokens, first), expert)

    def finished(self, expert: int, inner: Tensor, weight: Tensor | None = None) -> Tensor:
        """An expert's output, [n, hidden], from the inputs of its down projection, [n, K]."""
        down = self.read("down", expert) if weight is None else weight
        return finish(self.module, linear(inner, down), expert)


@dataclass
class LoadedExperts(ExpertWeights):
    """Weights that are in memory."""

    module: Any

    @property
    def in_memory(self) -> bool:
        """Always."""
        return True

    def read(self, matrix: Matrix, expert: int) -> Tensor:
        """A view of the fused parameter."""
        return fused_weight(self.module, matrix)[expert]

    def replace(self, matrix: Matrix, expert: int, weight: Tensor) -> None:
        """Write into the fused parameter; this stays when the expert is released."""
        fused_weight(self.module, matrix)[expert] = weight

    def release(self, expert: int) -> None:
        """Nothing to do."""


@dataclass
class StoredExperts(ExpertWeights):
    """Weights that are on disk; those in use are in memory.

    Attributes
    ----------
    stacked : matrix -> where the fused parameter lies on disk.
    device : where experts are read to.
    ahead : reads those that are expected; None to read them when they are asked for.
    """

    module: Any
    stacked: Mapping[Matrix, StackedExperts]
    device: str
    ahead: ReadAhead | None = None
    _in_use: dict[tuple[Matrix, int], Tensor] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Never."""
        return False

    def expect(self, experts: Sequence[int]) -> None:
        """Begin to read them in the background, if that is wanted."""
        if self.ahead is None:
            return
        for expert in experts:
            for matrix in MATRICES:
                if (matrix, expert) not in self._in_use:
                    self.ahead.begin((matrix, expert), partial(self._from_disk, matrix, expert))

    def read(self, matrix: Matrix, expert: int) -> Tensor:
        """From disk, unless the expert is in use."""
        found = self._in_use.get((matrix, expert))
        if found is None:
            found = None if self.ahead is None else self.ahead.take((matrix, expert))
            found = self._from_disk(matrix, expert) if found is None else found
            self._in_use[matrix, expert] = found
        return found

    def replace(self, matrix: Matrix, expert: int, weight: Tensor) -> None:
        """Kept in memory until the expert is released; what is on disk stays."""
        dtype = fused_weight(self.module, matrix).dtype
        self._in_use[matrix, expert] = weight.to(dtype)

    def release(self, expert: int) -> None:
        """Forget the expert."""
        for matrix in MATRICES:
            self._in_use.pop((matrix, expert), None)
            if self.ahead is not None:
                self.ahead.drop((matrix, expert))

    def _from_disk(self, matrix: Matrix, expert: int) -> Tensor:
        found = self.stacked[matrix].read(expert, self.device)
        return found.t() if self.module.is_transposed else found

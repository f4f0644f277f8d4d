"""Modules whose tensors are moved with a model, but not cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsDtypes(nn.Module):
    """Its tensors, and those of its children, keep their dtypes where a model around it is cast."""

    def keeps_dtype(self, tensor: Tensor) -> bool:
        """Whether one of its tensors is not to be cast."""
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What all of ``to``, ``half``, ``float``, ``cuda`` … go through."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            if found.dtype == tensor.dtype or not self.keeps_dtype(tensor):
                return found
            return tensor.to(found.device)

        return super()._apply(moved, recurse)

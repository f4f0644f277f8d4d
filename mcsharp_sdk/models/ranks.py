"""The processes of a run, and what they tell each other.

Each has some of the calibration sequences, and works on some of the experts of a layer. All call
the same functions here in the same order; alone, these do nothing. Tensors on the CPU travel by
gloo, those on a GPU by nccl, both as raw bytes, so that any dtype can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcsharp_sdk.errors import RunError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes
    ----------
    rank : its number, from 0.
    count : of processes.

    Raises
    ------
    RunError
        From every method, if another process has gone.
    """

    rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by its sum over all processes; it is the same on all."""
        if not self.alone:
            self._call(dist.all_reduce, tensor)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over all processes, in float64."""
        return float(self.sum_(torch.tensor(number, dtype=torch.float64)))

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of every process, one after the other; n may differ."""
        if self.alone:
            return rows
        counts = torch.zeros(self.count, dtype=torch.int64)
        counts[self.rank] = len(rows)
        found = [rows.new_empty(int(n), *rows.shape[1:]) for n in self.sum_(counts)]
        found[self.rank] = rows.contiguous()
        for owner, part in enumerate(found):
            self.spread(part, owner)
        return torch.cat(found)

    def spread(self, tensor: Tensor, owner: int) -> Tensor:
        """Give a contiguous tensor of one process to all; the others' are overwritten."""
        if not self.alone and tensor.numel():
            self._call(dist.broadcast, tensor.view(-1).view(torch.uint8), src=owner)
        return tensor

    def share(self, value: Value) -> Value:
        """What the first process has, a plain value."""
        if self.alone:
            return value
        box: list[Any] = [value]
        self._call(dist.broadcast_object_list, box, src=0)
        found: Value = box[0]
        return found

    def collect(self, value: Value) -> list[Value]:
        """The plain values of all processes, in order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        self._call(dist.all_gather_object, found, value)
        return found

    def swap(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send consecutive rows of [n, ...] to each process, and get theirs, in order.

        Parameters
        ----------
        sent, received : how many rows go to each process, and come from each.
        """
        if self.alone:
            return rows
        width = rows[:1].nbytes if len(rows) else rows.new_empty(1, *rows.shape[1:]).nbytes
        found = rows.new_empty(sum(received), *rows.shape[1:])
        self._call(
            dist.all_to_all_single,
            found.view(-1).view(torch.uint8),
            rows.contiguous().view(-1).view(torch.uint8),
            [n * width for n in received],
            [n * width for n in sent],
        )
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        self.total(0.0)

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            function(*arguments, **named)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"rank {self.rank} of {self.count} lost another rank ({reason}): see the messages "
                "of the others. The same command continues from the last finished layer"
            ) from error


ALONE = Ranks()


def divide(costs: Sequence[float], count: int) -> list[list[int]]:
    """Divide pieces of work so that the most that anybody has is little.

    The dearest piece goes to whoever has least, and so on; ties go to the lower number.

    Returns
    -------
    Pieces of each of ``count``, ascending.
    """
    owned: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(count), key=lambda r: (loads[r], r))
        owned[owner].append(piece)
        loads[owner] += costs[piece]
    return [sorted(pieces) for pieces in owned]

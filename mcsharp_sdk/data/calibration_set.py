"""Calibration sequences as a model gets them: of several lengths, from several sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mcsharp_sdk.errors import InputError

FEWER = (
    "{sequences} sequences cannot be divided among {processes} processes: give more sequences, or "
    "start fewer processes"
)


@dataclass(frozen=True)
class SampleGroup:
    """Sequences of one length from one source.

    Attributes
    ----------
    inputs : name of a model input -> tensor. ``input_ids`` is int64 (sequences, length), without
        padding. There are others (``pixel_values``, …) only where there is one sequence.
    source : index into :attr:`CalibrationSet.sources`.

    Raises
    ------
    InputError
        If the inputs are not so.
    """

    inputs: Mapping[str, Tensor]
    source: int = 0

    def __post_init__(self) -> None:
        tokens = self.inputs.get("input_ids")
        if tokens is None or tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise InputError("calibration: 'input_ids' must be int64 of shape (sequences, length)")
        if len(self.inputs) > 1 and len(tokens) != 1:
            raise InputError(
                "calibration: inputs besides 'input_ids' go with one sequence at a time"
            )

    @property
    def tokens(self) -> Tensor:
        """(sequences, length) int64."""
        return self.inputs["input_ids"]

    @property
    def has_images(self) -> bool:
        """Whether there is more than tokens."""
        return len(self.inputs) > 1

    def split(self, sequences: int) -> Iterator[SampleGroup]:
        """Groups of at most so many sequences."""
        if self.tokens.shape[0] <= sequences:
            yield self
            return
        for part in self.tokens.split(sequences):
            yield SampleGroup({"input_ids": part}, self.source)


@dataclass(frozen=True)
class CalibrationSet:
    """What a run measures with.

    The T tokens of the set are those of its groups, one after the other.

    Attributes
    ----------
    groups : in order.
    sources : a name for each source, all different.
    """

    groups: tuple[SampleGroup, ...]
    sources: tuple[str, ...]

    @classmethod
    def of_tokens(cls, tokens: Tensor, source: str = "calibration") -> CalibrationSet:
        """A plain text's, (sequences, length) int64; empty if there are no sequences."""
        groups = (SampleGroup({"input_ids": tokens}),) if tokens.numel() else ()
        return cls(groups, (source,))

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(group.tokens.numel() for group in self.groups)

    @property
    def num_sequences(self) -> int:
        """Sequences of all groups."""
        return sum(len(group.tokens) for group in self.groups)

    @property
    def has_images(self) -> bool:
        """Whether a group has more than tokens."""
        return any(group.has_images for group in self.groups)

    def batches(self, tokens: int) -> Iterator[SampleGroup]:
        """The set in groups of at most so many tokens, at least one sequence each."""
        for group in self.groups:
            yield from group.split(max(1, tokens // group.tokens.shape[1]))

    def first(self, tokens: int) -> CalibrationSet:
        """The first whole sequences of as many tokens as there may be, at least one sequence."""
        chosen: list[SampleGroup] = []
        for group in self.groups:
            fitting = tokens // group.tokens.shape[1]
            if fitting < 1 and chosen:  # below 0 behind a first one that was too long
                break
            part = next(group.split(max(1, fitting)))
            chosen.append(part)
            tokens -= part.tokens.numel()
            if len(part.tokens) < len(group.tokens):
                break
        return replace(self, groups=tuple(chosen))

    def share(self, part: int, parts: int) -> CalibrationSet:
        """One of so many consecutive parts, of as equal numbers of sequences as can be.

        Raises
        ------
        InputError
            If there are fewer sequences than parts, but some.
        """
        if parts == 1 or not self.groups:
            return self
        count = self.num_sequences
        if count < parts:
            raise InputError(f"calibration: {FEWER.format(sequences=count, processes=parts)}")
        start, stop, done = count * part // parts, count * (part + 1) // parts, 0
        chosen: list[SampleGroup] = []
        for group in self.groups:
            first, last = max(start - done, 0), min(stop - done, len(group.tokens))
            if first < last and last - first == len(group.tokens):
                chosen.append(group)
            elif first < last:
                chosen.append(SampleGroup({"input_ids": group.tokens[first:last]}, group.source))
            done += len(group.tokens)
        return replace(self, groups=tuple(chosen))

    def describe(self) -> str:
        """How much there is, e.g. ``128 x 2048 calibration tokens``; per source if of several."""
        parts = []
        for index, name in enumerate(self.sources):
            lengths = [group.tokens.shape for group in self.groups if group.source == index]
            count = sum(n for n, _ in lengths)
            if len({length for _, length in lengths}) == 1:
                size = f"{count} x {lengths[0][1]} calibration tokens"
            else:
                size = f"{count} sequences of {sum(n * length for n, length in lengths)} "
                size += "calibration tokens"
            parts.append(size if len(self.sources) == 1 else f"{size} of {name}")
        return " and ".join(parts)

"""Reading one expert of a layer from disk, whatever the layout of the checkpoint.

transformers stacks the experts of a layer into 3-D parameters when it loads them. Here its
conversions run on what belongs to one expert alone: its own tensors where each expert has some, or
its share of the first dimension where experts are stacked on disk already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter, dot_natural_key

from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.read_ahead import to_device
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.weight_checks import check_finite

Sources = Sequence[tuple[str, str | None]]
"""Names on disk of what a parameter is made of, and what converts the data, if anything does."""


@dataclass(frozen=True)
class StackedExperts:
    """Where one fused parameter of a layer's experts lies on disk.

    Attributes
    ----------
    checkpoint : that holds it.
    name : of the parameter in the module tree.
    like : the parameter, empty; experts come first.
    parts : pattern of the conversion -> names on disk, either of one stacked tensor or of one for
        each expert, in order.
    converter : what makes the parameter of them; None if the data is the same.
    model : that the conversion may ask about its configuration.
    """

    checkpoint: Checkpoint
    name: str
    like: Tensor
    parts: Mapping[str, Sequence[str]]
    converter: WeightConverter | None
    model: Any

    @classmethod
    def find(
        cls,
        checkpoint: Checkpoint,
        name: str,
        like: Tensor,
        sources: Sources,
        model: Any,
        conversions: Sequence[Any],
    ) -> StackedExperts | None:
        """How to read the parameter by expert; None if its layout does not allow it."""
        parts: dict[str, list[str]] = {}
        for disk, pattern in sources:
            parts.setdefault(pattern or "", []).append(disk)
        converter = None
        if "" not in parts:
            known = (c for c in conversions if isinstance(c, WeightConverter))
            converter = next((c for c in known if parts.keys() <= set(c.source_patterns)), None)
        found = cls(
            checkpoint,
            name,
            like,
            {p: sorted(names, key=dot_natural_key) for p, names in parts.items()},
            converter,
            model,
        )
        return found if found._fits() else None

    def _fits(self) -> bool:
        experts = len(self.like)
        if self.converter is None:
            shapes = [self.checkpoint.info(n).shape for n in self.parts.get("", [])]
            return shapes == [tuple(self.like.shape)]
        if len(self.converter.target_patterns) > 1 or not self.parts:
            return False
        return all(
            len(names) == experts
            or (len(names) == 1 and self.checkpoint.info(names[0]).shape[0] % experts == 0)
            for names in self.parts.values()
        )

    def read(self, expert: int, device: str) -> Tensor:
        """One expert of the parameter, in its dtype, without the first dimension.

        Raises
        ------
        RunError
            If what is on disk does not fit the architecture, or is not all finite numbers.
        """
        if self.converter is None:
            (name,) = self.parts[""]
            rows = self._rows(name, expert, expert + 1)[0]
            return to_device(rows, device, self.like.dtype)
        converter = deepcopy(self.converter)
        for pattern, names in self.parts.items():
            converter.add_tensor(self.name, names[0], pattern, self._reader(names, expert, device))
        model = _OfOneExpert(self.model, self.name, self.like[:1])
        found = converter.convert(self.name, model=model, config=self.model.config)
        tensor = next(iter(found.values()), None)
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if tensor is None or tensor.shape != (1, *self.like.shape[1:]):
            raise RunError(
                f"{self.checkpoint.directory}: {self.name}: expert {expert} does not fit the "
                f"architecture: expected shape {list(self.like.shape[1:])}"
            )
        return tensor[0]

    def _reader(self, names: Sequence[str], expert: int, device: str) -> Any:
        """A function that reads what one expert has of a part of the conversion."""

        def read() -> Tensor:
            if len(names) > 1 or len(self.like) == 1:
                name = names[min(expert, len(names) - 1)]
                tensor = self._rows(name, 0, self.checkpoint.info(name).shape[0])
            else:
                rows = self.checkpoint.info(names[0]).shape[0] // len(self.like)
                tensor = self._rows(names[0], expert * rows, (expert + 1) * rows)
            return to_device(tensor, device, self.like.dtype)

        return read

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor on disk, all of them numbers."""
        rows = self.checkpoint.read_rows(name, start, stop)
        check_finite(rows, self.checkpoint.info(name), name)
        return rows


class _OfOneExpert:
    """A model in which one fused parameter has one expert: some conversions go by its shape."""

    def __init__(self, model: Any, name: str, parameter: Tensor) -> None:
        self._model, self._name, self._parameter = model, name, parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        """As the model's."""
        found: Tensor = self._model.get_parameter(name)
        return self._parameter if name == self._name else found

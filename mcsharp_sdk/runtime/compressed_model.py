"""What a loaded compressed model can do beyond its stock class."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mcsharp_sdk.checked_files import write_checksums
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.runtime.layout import WEIGHTS_NAME
from mcsharp_sdk.runtime.pruned_routing import expert_pruning, set_expert_pruning
from mcsharp_sdk.runtime.pruning_layout import PruningMode
from mcsharp_sdk.runtime.saving import rename_weight_files


class CompressedModelMixin:
    """What a compressed model does differently from its stock class."""

    @property
    def expert_pruning(self) -> PruningMode:
        """How it prunes its experts now: ``off``, ``rule``, ``learned`` or ``both``."""
        return expert_pruning(self)

    def set_expert_pruning(self, mode: str) -> None:
        """Choose how it prunes its experts from now on; no weight is loaded again.

        Parameters
        ----------
        mode : ``off``, ``rule``, ``learned`` or ``both``, as far as the model has data for it. See
            :mod:`mcsharp_sdk.runtime.pruned_routing`.

        Raises
        ------
        InputError
            If the model has no data for this mode, or its attention implementation cannot tell
            what the mode needs.
        """
        set_expert_pruning(self, mode)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move it to a device, like any model; it keeps its dtypes.

        Raises
        ------
        InputError
            With a dtype, or a tensor to take one from.
        """
        if any(isinstance(given, torch.dtype | Tensor) for given in (*args, *kwargs.values())):
            self._refuse_cast()
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def _refuse_cast(self) -> NoReturn:
        """Scales of packed weights are float16, networks of pruners float32, whatever computes."""
        raise InputError(
            "a compressed model cannot be cast as a whole, its packed weights have dtypes of their "
            "own: load it with from_pretrained(..., dtype=...) instead"
        )

    half = float = bfloat16 = double = _refuse_cast

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by its stock class, since a file cannot name a class made here."""
        whole: Any = super().__reduce_ex__(protocol)
        return _unfilled, (type(self).__bases__[1],), *whole[2:]

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save under the file names of compressed models, so that it can be loaded again.

        Of several processes that have the model, the main one alone writes.

        Raises
        ------
        InputError
            With ``push_to_hub=True``: save first, then upload the folder.
        """
        if kwargs.pop("push_to_hub", False):
            raise InputError("save the compressed model first, then upload its folder")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, **kwargs)  # type: ignore[misc]
            rename_weight_files(Path(temporary), WEIGHTS_NAME)
            files = sorted(Path(temporary).iterdir())
            for file in files:
                shutil.move(file, folder / file.name)
            write_checksums(folder, [file.name for file in files])


_SAVABLE_CLASSES: dict[type, type] = {}


def make_savable(model: Any) -> None:
    """Give a loaded compressed model its own ``save_pretrained``; the class keeps its name."""
    if not isinstance(model, CompressedModelMixin):
        model.__class__ = _savable_class(type(model))


def _savable_class(original: type) -> type:
    """The class of compressed models of a stock class; always the same one."""
    if original not in _SAVABLE_CLASSES:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        _SAVABLE_CLASSES[original] = type(
            original.__name__, (CompressedModelMixin, original), names
        )
    return _SAVABLE_CLASSES[original]


def _unfilled(original: type) -> Any:
    """A compressed model without its state, for pickle and copies."""
    savable: Any = _savable_class(original)
    return savable.__new__(savable)

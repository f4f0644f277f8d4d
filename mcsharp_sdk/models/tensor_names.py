"""Which tensors on disk become which of the module tree, by transformers' own rules."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mcsharp_sdk.models.normal_form import weight_conversions
from mcsharp_sdk.models.shards import Checkpoint


class TensorNames:
    """Names on disk, and names in the module tree.

    Parameters
    ----------
    checkpoint : what is on disk.
    model : the module tree, empty or not.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self._checkpoint = checkpoint
        self._model = model

    @cached_property
    def conversions(self) -> list[Any]:
        """How tensors on disk become those of the module tree."""
        return weight_conversions(self._model)

    @cached_property
    def renamed(self) -> dict[str, tuple[str, str | None]]:
        """Name on disk -> name by transformers' rules, and what converts the data, if it is.

        Those for which the module tree has no place are among them.
        """
        mapping = self.conversions
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        tree = self._model.state_dict()
        prefix = self._model.base_model_prefix
        found = {}
        for name in self._checkpoint.names:
            found[name] = rename_source_key(name, renamings, converters, prefix, tree)
            if found[name][0] not in tree and name in tree:  # the loader then keeps the name
                found[name] = rename_source_key(name, [], [], prefix, tree)
        return found

    @cached_property
    def placed(self) -> dict[str, tuple[str, str | None]]:
        """What of ``renamed`` the module tree has, by the loader's own test."""
        tree = self._model.state_dict().keys()
        return {disk: found for disk, found in self.renamed.items() if found[0] in tree}

    @cached_property
    def memory(self) -> dict[str, str]:
        """Name on disk -> name in the module tree (for fused tensors, many to one)."""
        return {name: memory for name, (memory, _) in self.placed.items()}

    @cached_property
    def verbatim(self) -> dict[str, str]:
        """Name in the module tree -> name on disk, of tensors that have the same data in both."""
        return {memory: name for name, (memory, pattern) in self.placed.items() if not pattern}

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Names on disk for which the architecture has no place, as of multi-token prediction."""
        return tuple(name for name in self.renamed if name not in self.placed)

    @cached_property
    def sources(self) -> dict[str, list[tuple[str, str | None]]]:
        """Name in the module tree -> names on disk that it is made of, each with its pattern."""
        found: dict[str, list[tuple[str, str | None]]] = {}
        for disk, (memory, pattern) in self.placed.items():
            found.setdefault(memory, []).append((disk, pattern))
        return found

    @cached_property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """Name on disk -> the names in the module tree that are made of it, mostly one.

        ernie4_5_vl_moe keeps the experts of text and of images in one list.
        """
        several = [
            converter.target_patterns
            for converter in self.conversions
            if isinstance(converter, WeightConverter) and len(converter.target_patterns) > 1
        ]
        return {
            disk: next(
                (tuple(name.replace(t[0], other) for other in t) for t in several if t[0] in name),
                (name,),
            )
            for disk, name in self.memory.items()
        }

    @cached_property
    def tied(self) -> dict[str, str]:
        """Name in the module tree of a tensor that is not on disk -> name on disk of its twin."""
        on_disk = {memory: name for name, memory in self.memory.items()}
        return {
            name: on_disk[twin]
            for name, twin in self._model.all_tied_weights_keys.items()
            if name not in on_disk and twin in on_disk
        }

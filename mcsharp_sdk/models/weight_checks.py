"""Whether the tensors of a checkpoint are those of its architecture, and are numbers.

What fits is told from headers alone: transformers' own conversion runs on empty tensors of the
shapes that the headers give, so that every family's disk layout is understood.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from mcsharp_sdk.errors import MOST_MISFITS, InputError, Problem, RunError, raise_problems
from mcsharp_sdk.models.normal_form import weight_conversions
from mcsharp_sdk.models.safetensors_file import DTYPE_NAMES, TensorInfo
from mcsharp_sdk.models.shards import Checkpoint

if TYPE_CHECKING:
    from mcsharp_sdk.models.source import SourceModel

QUANTISED_TENSORS = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|absmax|SCB)$")
"""Names of tensors that GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes store."""

CHUNK = 1 << 22
"""Numbers that are looked at together."""

PIECE_BYTES = 256 << 20
"""Most bytes of a tensor that are read at a time, unless a single row is larger."""


def check_unquantised(checkpoint: Checkpoint) -> None:
    """InputError if tensors are packed by some method, whatever config.json says."""
    packed = next((name for name in checkpoint.names if QUANTISED_TENSORS.search(name)), None)
    if packed is not None:
        raise InputError(
            f"{checkpoint.directory} is already quantised: {checkpoint.info(packed).file.name} has "
            f"{packed}; give the original model"
        )


def check_finite(tensor: Tensor, info: TensorInfo, name: str) -> None:
    """Raise RunError, which names file and tensor, if a number of it is NaN or infinite."""
    count = count_not_finite(tensor)
    if count:
        raise RunError(
            f"{info.file}: {name}: {count} of {tensor.numel()} numbers are NaN or infinite; the "
            "model is damaged: get this file again"
        )


def count_not_finite(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite; 0 for whole numbers. Little memory is taken."""
    if not tensor.is_floating_point():
        return 0
    count = 0
    for chunk in tensor.reshape(-1).split(CHUNK):
        if not chunk.numel():
            continue
        wide = chunk if chunk.dtype.itemsize > 1 else chunk.float()
        least, most = torch.aminmax(wide)
        if not (torch.isfinite(least) and torch.isfinite(most)):
            count += int((~torch.isfinite(wide)).sum())
    return count


def numbers_of(checkpoint: Checkpoint, name: str) -> list[Problem]:
    """What is wrong with the numbers of a tensor; it is read in pieces."""
    info = checkpoint.info(name)
    if not info.dtype.is_floating_point:
        return []
    wrong = sum(count_not_finite(piece) for piece in checkpoint.pieces(name, PIECE_BYTES))
    where = f"{info.file.name}: {name}"
    return [Problem(where, f"{wrong} numbers are NaN or infinite")] if wrong else []


def check_outer_weights(source: SourceModel) -> None:
    """Check the numbers of all that is outside of the decoder layers, such as embedding and head.

    They are few beside those of the layers, which are checked as each is loaded.

    Raises
    ------
    InputProblems
        With each tensor that has numbers that are NaN or infinite.
    """
    names = source.outer_disk_names()
    problems = [problem for name in names for problem in numbers_of(source.checkpoint, name)]
    raise_problems(str(source.path), problems)


def check_fit(source: SourceModel) -> None:
    """Check from headers that the checkpoint holds the tensors of the architecture.

    Raises
    ------
    InputProblems
        With the tensors that have other shapes, are missing, or belong to further layers.
    """
    raise_problems(str(source.path), list(_misfits(source)), MOST_MISFITS)


@dataclass(frozen=True)
class _EmptySlice:
    """Stands in for a tensor on disk; gives an empty one of its shape."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.info.dtype]

    def __getitem__(self, index: Any) -> Tensor:
        return torch.empty(self.info.shape, dtype=self.info.dtype, device="meta")[index]


def _misfits(source: SourceModel) -> Iterator[Problem]:
    yield from _whole_numbers(source)
    repeated = _repeated_layers(source)
    info = _dry_load(source, repeated)
    places = _Places(source)
    for name, found, wanted in sorted(info.mismatched_keys):
        yield Problem(
            places.of(name),
            f"{name} is {list(found)} on disk, but {list(wanted)} by config.json"
            f"{_hint(source, name, found, wanted)}",
        )
    for name, error in sorted(info.conversion_errors.items()):
        reason = str(error).strip().splitlines()[-1]
        yield Problem(places.of(name), f"{name} cannot be made of what is on disk: {reason}")
    spared = [*source.names.tied, *info.conversion_errors, *(m[0] for m in info.mismatched_keys)]
    absent = _not_ignored(info.missing_keys - {*spared}, _patterns(source.model, "missing"))
    for name in sorted(absent):
        if _layer_of(source, name) in repeated:
            continue
        yield Problem("", f"{name}: there is no such tensor, but config.json asks for it")
    extra = _not_ignored(info.unexpected_keys, _patterns(source.model, "unexpected"))
    yield from _further_layers(source, extra, places)


def _whole_numbers(source: SourceModel) -> Iterator[Problem]:
    """Tensors of whole numbers where the architecture has others: codes of some quantisation."""
    tree = source.model.state_dict()
    for disk, (memory, _) in source.names.renamed.items():
        info, wanted = source.checkpoint.info(disk), tree.get(memory)
        if wanted is not None and wanted.is_floating_point() and not info.dtype.is_floating_point:
            kind = DTYPE_NAMES[info.dtype]
            told = f"{disk} is {kind}, whole numbers: give the model before it was quantised"
            yield Problem(info.file.name, told)


def _layer_of(source: SourceModel, name: str) -> int | None:
    """The decoder layer that a name in the module tree lies in."""
    path, _, rest = name.partition(f"{source.topology.layers_path}.")
    number = rest.partition(".")[0]
    return int(number) if not path and number.isdecimal() else None


def _repeated_layers(source: SourceModel) -> set[int]:
    """Decoder layers that are on disk, and in the module tree, just as an earlier one is.

    They need not be checked again, which for a model of 50 000 tensors takes minutes.
    """
    kinds: dict[int, list[tuple[str, str, Any, Any]]] = {}
    for disk, (memory, _) in source.names.renamed.items():
        layer, info = _layer_of(source, memory), source.checkpoint.info(disk)
        if layer is not None:
            within = disk.replace(f".{layer}.", ".", 1), memory.replace(f".{layer}.", ".", 1)
            kinds.setdefault(layer, []).append((*within, info.shape, str(info.dtype)))
    for layer in range(source.topology.num_layers):
        tree = source.layer(layer).state_dict(keep_vars=True)
        wanted = [("", name, tuple(tensor.shape), "") for name, tensor in tree.items()]
        kinds.setdefault(layer, []).extend(wanted)
    first: dict[tuple[Any, ...], int] = {}
    for layer, kind in sorted(kinds.items()):
        first.setdefault(tuple(sorted(kind, key=str)), layer)
    return {layer for layer in kinds if layer not in set(first.values())}


def _dry_load(source: SourceModel, without: Collection[int]) -> Any:
    """What transformers' loader says of the headers; the model is left as it was."""
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in source.model.modules()]
    settings = LoadStateDictConfig(
        device_map={"": "meta"},
        dtype=source.dtype,
        dtype_plan=source.model._get_dtype_plan(source.dtype),
        weight_mapping=weight_conversions(source.model),
    )
    slices = {
        name: _EmptySlice(source.checkpoint.info(name))
        for name, (memory, _) in source.names.renamed.items()
        if _layer_of(source, memory) not in without
    }
    try:
        info, _ = convert_and_load_state_dict_in_model(source.model, slices, settings)
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
    return info


def _hint(source: SourceModel, name: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    """That the numbers of experts differ, if that is it."""
    have, want = list(found), list(wanted)
    is_expert = any(
        name.startswith(f"{source.layer_path(index)}.{block.experts}.")
        for index, block in source.topology.moe.items()
    )
    if is_expert and have[1:] == want[1:]:
        return f": {have[0]} experts are stored, config.json says {want[0]}"
    return ""


def _further_layers(
    source: SourceModel, names: Iterable[str], places: _Places
) -> Iterator[Problem]:
    """Of stored tensors without a place, those of decoder layers that config.json lacks."""
    layer = re.compile(rf"{re.escape(source.topology.layers_path)}\.(\d+)\.")
    count = source.topology.num_layers
    beyond: dict[int, str] = {}
    for name in sorted(names):
        found = layer.match(name)
        if found and int(found[1]) >= count:
            beyond.setdefault(int(found[1]), name)
    for index, name in sorted(beyond.items()):
        yield Problem(
            places.of(name), f"decoder layer {index} is stored, config.json says {count} layers"
        )


class _Places:
    """Where tensors of the module tree are on disk."""

    def __init__(self, source: SourceModel) -> None:
        self._checkpoint = source.checkpoint
        self._disk: dict[str, list[str]] = {}
        for disk, (memory, _) in source.names.renamed.items():
            self._disk.setdefault(memory, []).append(disk)

    def of(self, name: str) -> str:
        """File and name of the first tensor on disk that it is made of; empty if there is none."""
        names = self._disk.get(name)
        if not names:
            return ""
        file: Path = self._checkpoint.info(names[0]).file
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{file.name}: {names[0]}{more}"


def _patterns(model: nn.Module, kind: str) -> list[str]:
    return list(getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ())


def _not_ignored(names: Iterable[str], patterns: list[str]) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns)]

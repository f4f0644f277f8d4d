"""The bit map: a width for every expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mcsharp_sdk.artifact_file import VERSION, Artifact, check_version, finite_number, index, listed
from mcsharp_sdk.errors import InputError

WIDEST = 16


@dataclass(frozen=True)
class BitMap(Artifact):
    """A bit width for every expert.

    Attributes
    ----------
    bits : decoder layer -> width of each expert, in bits; 0 for one that is removed.
    objective : decoder layer -> PMQ cost of these widths, or None where it is not known.
    allocator : what chose the widths, or None for a map made by hand.
    in_order : the file was a plain list, so the keys of ``bits`` count MoE layers and are not
        decoder layers yet; ``for_model`` turns them into decoder layers.
    """

    NAME: ClassVar[str] = "bit_allocation"
    FILE: ClassVar[str] = "bit_allocation.json"

    bits: Mapping[int, tuple[int, ...]]
    objective: Mapping[int, float] | None = None
    allocator: str | None = None
    in_order: bool = False

    def __post_init__(self) -> None:
        if not self.bits:
            raise InputError("there are no layers")
        for layer, widths in self.bits.items():
            if not widths:
                raise InputError(f"layer {layer}: no widths")
            for expert, width in enumerate(widths):
                if type(width) is not int or not 0 <= width <= WIDEST:
                    raise InputError(
                        f"layer {layer}: expert {expert}: {width!r} is no width; "
                        f"it must be a whole number from 0 to {WIDEST}"
                    )
        unknown = sorted(set(self.objective or ()) - set(self.bits))
        if unknown:
            raise InputError(
                f"objective: names layer {listed(unknown)}; 'bits' has {listed(sorted(self.bits))}"
            )

    @property
    def nominal_bits(self) -> float:
        """Mean width over all experts of all layers."""
        return sum(map(sum, self.bits.values())) / sum(map(len, self.bits.values()))

    def for_model(self, experts: Mapping[int, int]) -> BitMap:
        """The map with decoder layers as keys, checked against a model.

        Parameters
        ----------
        experts : decoder layer -> number of experts, for each MoE layer of the model.

        Raises
        ------
        InputError
            If layers are missing or too many, or a layer has another number of experts.
        """
        bits, objective = dict(self.bits), self.objective
        if self.in_order:
            if len(bits) != len(experts):
                raise InputError(
                    f"the map has {len(bits)} layers, but the model has {len(experts)} MoE layers"
                )
            decoder_layer = dict(zip(sorted(bits), sorted(experts), strict=True))
            bits = {decoder_layer[k]: v for k, v in bits.items()}
            objective = objective and {decoder_layer[k]: v for k, v in objective.items()}
        check_layers({layer: len(widths) for layer, widths in bits.items()}, experts)
        return BitMap(bits, objective, self.allocator)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"version": VERSION, "bits": _by_layer(self.bits, list)}
        if self.in_order:
            content["bits"] = list(content["bits"].values())
        content["nominal_bits"] = self.nominal_bits
        if self.objective is not None:
            content["objective"] = _by_layer(self.objective, float)
        if self.allocator is not None:
            content["allocator"] = self.allocator
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BitMap:
        check_version(content)
        bits = content.get("bits")
        if not isinstance(bits, dict | list):
            raise InputError(
                "'bits' must be an object, decoder layer -> list of widths, "
                "or a list with one list of widths per MoE layer"
            )
        objective = content.get("objective")
        allocator = content.get("allocator")
        rows: Iterable[tuple[Any, Any]] = (
            enumerate(bits) if isinstance(bits, list) else bits.items()
        )
        return cls(
            bits={index(k, "bits: layer"): _widths(k, v) for k, v in rows},
            objective=_objective(objective) if isinstance(objective, dict) else None,
            allocator=None if allocator is None else str(allocator),
            in_order=isinstance(bits, list),
        )


def check_layers(given: Mapping[int, int], model: Mapping[int, int]) -> None:
    """Compare decoder layer -> number of experts of an artifact with the model's.

    Raises
    ------
    InputError
        If a layer is missing or too many, or its number of experts differs.
    """
    missing = sorted(set(model) - set(given))
    unknown = sorted(set(given) - set(model))
    if missing or unknown:
        wrong = f"has nothing for layer {listed(missing)}" if missing else ""
        if unknown:
            wrong += (" and " if wrong else "") + f"names layer {listed(unknown)}"
        raise InputError(f"{wrong}; the model's MoE layers are {listed(sorted(model))}")
    for layer in sorted(model):
        if given[layer] != model[layer]:
            raise InputError(
                f"layer {layer} has {given[layer]} experts, but the model's has {model[layer]}"
            )


def _widths(layer: Any, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise InputError(f"layer {layer}: must be a list of widths")
    return tuple(values)


def _objective(values: Mapping[str, Any]) -> dict[int, float]:
    return {
        index(layer, "objective: layer"): finite_number(f"objective: layer {layer}", value)
        for layer, value in values.items()
    }


def _by_layer(values: Mapping[int, Any], convert: Any) -> dict[str, Any]:
    return {str(layer): convert(values[layer]) for layer in sorted(values)}

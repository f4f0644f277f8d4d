"""What the stages hand to each other: files that a person can read, and write by hand.

Loading one says which file, layer and expert is wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mcsharp_sdk.artifact_file import (
    VERSION,
    Artifact,
    FloatArray,
    check_version,
    index,
    listed,
    numbers,
    optional_index,
    per_expert,
)
from mcsharp_sdk.errors import InputError

WIDEST = 16


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration tells about the E experts of one MoE layer.

    Attributes
    ----------
    layer : index of the decoder layer.
    activation_count : (E,) float64, tokens that selected each expert.
    routing_weight_sum : (E,) float64, router probability of the expert summed over those tokens,
        before renormalisation over the selected experts.
    quant_error : width -> (E,) float64, Frobenius norm of the change of the output when this one
        expert is quantised to that width.
    tokens : calibration tokens, or None where unknown.
    drop_error : (E,) float64, the same norm when the expert is removed, or None.
    """

    layer: int
    activation_count: FloatArray
    routing_weight_sum: FloatArray
    quant_error: Mapping[int, FloatArray] = field(default_factory=dict)
    tokens: int | None = None
    drop_error: FloatArray | None = None

    def __post_init__(self) -> None:
        here = f"layer {self.layer}"
        experts = len(self.activation_count)
        if not experts:
            raise InputError(f"{here}: activation_count is empty")
        for name in ("activation_count", "routing_weight_sum", "drop_error"):
            if getattr(self, name) is not None:
                values = per_expert(f"{here}: {name}", getattr(self, name), experts)
                object.__setattr__(self, name, values)
        errors = {
            width: per_expert(f"{here}: quant_error at {width} bits", values, experts)
            for width, values in sorted(self.quant_error.items())
        }
        object.__setattr__(self, "quant_error", errors)

    @property
    def num_experts(self) -> int:
        return len(self.activation_count)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths whose error is known, ascending."""
        return tuple(self.quant_error)

    def errors_at(self, widths: Sequence[int]) -> FloatArray:
        """(E, widths) errors; InputError if the error at a width was not measured."""
        missing = [w for w in widths if w not in self.quant_error]
        if missing:
            raise InputError(
                f"layer {self.layer}: no quantisation error at {listed(missing)} bits; "
                f"there are errors at {listed(self.widths) or 'no'} bits"
            )
        return np.stack([self.quant_error[w] for w in widths], axis=1)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"layer": self.layer}
        if self.tokens is not None:
            content["tokens"] = self.tokens
        content["activation_count"] = self.activation_count.tolist()
        content["routing_weight_sum"] = self.routing_weight_sum.tolist()
        content["quant_error"] = [
            {str(width): float(values[e]) for width, values in self.quant_error.items()}
            for e in range(self.num_experts)
        ]
        if self.drop_error is not None:
            content["drop_error"] = self.drop_error.tolist()
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LayerStatistics:
        layer = index(content.get("layer"), "layer")
        here = f"layer {layer}"
        missing = [k for k in ("activation_count", "routing_weight_sum") if k not in content]
        if missing:
            raise InputError(f"{here}: {missing[0]} is missing")
        count = numbers(f"{here}: activation_count", content["activation_count"])
        drop = content.get("drop_error")
        tokens = content.get("tokens")
        return cls(
            layer=layer,
            activation_count=count,
            routing_weight_sum=numbers(
                f"{here}: routing_weight_sum", content["routing_weight_sum"]
            ),
            quant_error=_errors_by_width(here, content.get("quant_error", []), len(count)),
            tokens=None if tokens is None else index(tokens, f"{here}: tokens"),
            drop_error=None if drop is None else numbers(f"{here}: drop_error", drop),
        )


@dataclass(frozen=True, eq=False)
class ExpertStatistics(Artifact):
    """Statistics of every MoE layer of a model.

    Attributes
    ----------
    model, source : what was measured, and how; for the reader.
    num_experts : experts per MoE layer, or None where layers differ or it is not said.
    top_k : experts per token, or None where it is not said.
    layers : ascending decoder layers.
    """

    NAME: ClassVar[str] = "expert_statistics"
    FILE: ClassVar[str] = "expert_statistics.json"

    model: str
    source: str
    num_experts: int | None
    top_k: int | None
    layers: tuple[LayerStatistics, ...]

    def __post_init__(self) -> None:
        layers = tuple(sorted(self.layers, key=lambda s: s.layer))
        object.__setattr__(self, "layers", layers)
        if not layers:
            raise InputError("there are no layers")
        twice = [a.layer for a, b in itertools.pairwise(layers) if a.layer == b.layer]
        if twice:
            raise InputError(f"layer {twice[0]} stands there twice")
        for layer in layers:
            if self.num_experts not in (None, layer.num_experts):
                raise InputError(
                    f"layer {layer.layer} has {layer.num_experts} experts, "
                    f"but num_experts is {self.num_experts}"
                )

    def experts(self) -> dict[int, int]:
        """Decoder layer -> number of experts."""
        return {s.layer: s.num_experts for s in self.layers}

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.model,
            "source": self.source,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "layers": [s.to_json() for s in self.layers],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExpertStatistics:
        check_version(content)
        layers = content.get("layers")
        if not isinstance(layers, list) or not all(isinstance(s, dict) for s in layers):
            raise InputError("'layers' must be a list with one object per MoE layer")
        return cls(
            model=str(content.get("model", "")),
            source=str(content.get("source", "")),
            num_experts=optional_index(content, "num_experts"),
            top_k=optional_index(content, "top_k"),
            layers=tuple(LayerStatistics.from_json(s) for s in layers),
        )


@dataclass(frozen=True)
class BitMap(Artifact):
    """A bit width for every expert.

    Attributes
    ----------
    bits : decoder layer -> width of each expert, in bits.
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
                if type(width) is not int or not 1 <= width <= WIDEST:
                    raise InputError(
                        f"layer {layer}: expert {expert}: {width!r} is no width; "
                        f"it must be a whole number from 1 to {WIDEST}"
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


def _errors_by_width(here: str, rows: Any, experts: int) -> dict[int, FloatArray]:
    """A list with {width: error} per expert, as width -> (E,) errors."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{here}: quant_error must be a list with one object per expert")
    if rows and len(rows) != experts:
        raise InputError(f"{here}: quant_error: {len(rows)} values for {experts} experts")
    widths = sorted({index(w, f"{here}: quant_error: width") for row in rows for w in row})
    for expert, row in enumerate(rows):
        for width in widths:
            if str(width) not in row:
                raise InputError(
                    f"{here}: quant_error: expert {expert} has none at {width} bits, others have"
                )
    return {
        w: numbers(f"{here}: quant_error at {w} bits", [row[str(w)] for row in rows])
        for w in widths
    }


def _widths(layer: Any, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise InputError(f"layer {layer}: must be a list of widths")
    return tuple(values)


def _objective(values: Mapping[str, Any]) -> dict[int, float]:
    for layer, value in values.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"objective: layer {layer}: {value!r} is not a finite number")
    return {index(layer, "objective: layer"): float(v) for layer, v in values.items()}


def _by_layer(values: Mapping[int, Any], convert: Any) -> dict[str, Any]:
    return {str(layer): convert(values[layer]) for layer in sorted(values)}

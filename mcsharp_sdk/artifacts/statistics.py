"""Expert statistics: how often each expert is used, and what quantising it costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mcsharp_sdk.artifact_file import (
    VERSION,
    Artifact,
    FloatArray,
    check_version,
    finite_number,
    index,
    listed,
    numbers,
    optional_index,
    per_expert,
)
from mcsharp_sdk.artifacts.domain_shift import DomainShift
from mcsharp_sdk.artifacts.layer_lists import layer_rows, ordered_layers
from mcsharp_sdk.artifacts.source_statistics import SourceStatistics, read_sources
from mcsharp_sdk.errors import InputError


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
    drop_error : (E,) float64, the same norm when the expert is removed, which zeroes its weights
        and leaves its biases; or None.
    sources : the counts and sums of each source; empty if there is only one.
    hessian_error : width -> (E,) float64, mean eigenvalue of the Hessian times the squared change
        of the weights at that width, summed over the expert's matrices (HAWQ-V2).
    block_cosine : mean cosine between what enters and what leaves the decoder layer, or None.
    predicted_block_cosine : the same as a predictor has it that saw other tokens, or None.
    loss_sensitivity : mean square of the loss's gradient by an element of the block's output, or
        None.
    """

    layer: int
    activation_count: FloatArray
    routing_weight_sum: FloatArray
    quant_error: Mapping[int, FloatArray] = field(default_factory=dict)
    tokens: int | None = None
    drop_error: FloatArray | None = None
    sources: tuple[SourceStatistics, ...] = ()
    hessian_error: Mapping[int, FloatArray] = field(default_factory=dict)
    block_cosine: float | None = None
    predicted_block_cosine: float | None = None
    loss_sensitivity: float | None = None

    def __post_init__(self) -> None:
        here = f"layer {self.layer}"
        experts = len(self.activation_count)
        if not experts:
            raise InputError(f"{here}: activation_count is empty")
        for name in ("activation_count", "routing_weight_sum", "drop_error"):
            if getattr(self, name) is not None:
                values = per_expert(f"{here}: {name}", getattr(self, name), experts)
                object.__setattr__(self, name, values)
        for name in ("quant_error", "hessian_error"):
            errors = {
                width: per_expert(f"{here}: {name} at {width} bits", values, experts)
                for width, values in sorted(getattr(self, name).items())
            }
            object.__setattr__(self, name, errors)
        for source in self.sources:
            for name in ("activation_count", "routing_weight_sum"):
                per_expert(f"{here}: {source.source}: {name}", getattr(source, name), experts)

    @property
    def num_experts(self) -> int:
        return len(self.activation_count)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths whose error is known, ascending."""
        return tuple(self.quant_error)

    @property
    def errors(self) -> Mapping[int, FloatArray]:
        """``quant_error``, and at 0 bits, where an expert is removed, its drop error."""
        dropped = {} if self.drop_error is None else {0: self.drop_error}
        return {**dropped, **self.quant_error}

    def errors_at(self, widths: Sequence[int]) -> FloatArray:
        """(E, widths) of ``errors``; InputError if that at a width was not measured."""
        return self._at(widths, self.errors, "quantisation error")

    def hessian_errors_at(self, widths: Sequence[int]) -> FloatArray:
        """(E, widths) Hessian errors; InputError if that at a width was not measured."""
        return self._at(widths, self.hessian_error, "Hessian error")

    def _at(self, widths: Sequence[int], errors: Mapping[int, FloatArray], what: str) -> FloatArray:
        missing = [w for w in widths if w not in errors]
        if missing:
            raise InputError(
                f"layer {self.layer}: no {what} at {listed(missing)} bits; "
                f"there are errors at {listed(errors) or 'no'} bits"
            )
        return np.stack([errors[w] for w in widths], axis=1)

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {"layer": self.layer}
        if self.tokens is not None:
            content["tokens"] = self.tokens
        content["activation_count"] = self.activation_count.tolist()
        content["routing_weight_sum"] = self.routing_weight_sum.tolist()
        content["quant_error"] = self._by_expert(self.quant_error)
        if self.hessian_error:
            content["hessian_error"] = self._by_expert(self.hessian_error)
        if self.drop_error is not None:
            content["drop_error"] = self.drop_error.tolist()
        for name in _LAYER_NUMBERS:
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        if self.sources:
            content["sources"] = [source.to_json() for source in self.sources]
        return content

    def _by_expert(self, errors: Mapping[int, FloatArray]) -> list[dict[str, float]]:
        return [
            {str(width): float(values[e]) for width, values in errors.items()}
            for e in range(self.num_experts)
        ]

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
            quant_error=_errors_by_width(here, content, "quant_error", len(count)),
            hessian_error=_errors_by_width(here, content, "hessian_error", len(count)),
            tokens=None if tokens is None else index(tokens, f"{here}: tokens"),
            drop_error=None if drop is None else numbers(f"{here}: drop_error", drop),
            sources=read_sources(here, content.get("sources", [])),
            **{
                name: finite_number(f"{here}: {name}", content[name])
                for name in _LAYER_NUMBERS
                if content.get(name) is not None
            },
        )


_LAYER_NUMBERS = ("block_cosine", "predicted_block_cosine", "loss_sensitivity")
"""What is one number of a layer, where it was measured."""


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
        object.__setattr__(self, "layers", ordered_layers(self.layers))
        for layer in self.layers:
            if self.num_experts not in (None, layer.num_experts):
                raise InputError(
                    f"layer {layer.layer} has {layer.num_experts} experts, "
                    f"but num_experts is {self.num_experts}"
                )

    @classmethod
    def unmeasured(cls, experts: Mapping[int, int]) -> ExpertStatistics:
        """Of a model with so many experts per MoE layer (decoder layer -> count): all zero."""
        layers = (LayerStatistics(n, np.zeros(e), np.zeros(e)) for n, e in experts.items())
        return cls("", "nothing was measured", None, None, tuple(layers))

    def experts(self) -> dict[int, int]:
        """Decoder layer -> number of experts."""
        return {s.layer: s.num_experts for s in self.layers}

    def domain_shift(self) -> tuple[DomainShift, ...]:
        """How differently the sources use the experts: per layer and pair of sources.

        Empty if there is only one source.
        """
        return tuple(
            DomainShift.between(s.layer, first, second)
            for s in self.layers
            for first, second in itertools.combinations(s.sources, 2)
        )

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
        return cls(
            model=str(content.get("model", "")),
            source=str(content.get("source", "")),
            num_experts=optional_index(content, "num_experts"),
            top_k=optional_index(content, "top_k"),
            layers=tuple(map(LayerStatistics.from_json, layer_rows(content))),
        )


def _errors_by_width(
    here: str, content: Mapping[str, Any], name: str, experts: int
) -> dict[int, FloatArray]:
    """A list with {width: error} per expert, as width -> (E,) errors."""
    rows, where = content.get(name, []), f"{here}: {name}"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where} must be a list with one object per expert")
    if rows and len(rows) != experts:
        raise InputError(f"{where}: {len(rows)} values for {experts} experts")
    widths = sorted({index(w, f"{where}: width") for row in rows for w in row})
    for expert, row in enumerate(rows):
        for width in widths:
            if str(width) not in row:
                raise InputError(f"{where}: expert {expert} has none at {width} bits, others have")
    return {w: numbers(f"{where} at {w} bits", [row[str(w)] for row in rows]) for w in widths}

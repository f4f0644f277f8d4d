"""GPTQQuantize: quantise experts at their allocated widths, and the other linears at one width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from mcsharp_sdk.artifacts import QUANTIZED_WEIGHTS, BitMap
from mcsharp_sdk.errors import InputError, Problem
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.quantisation_warnings import quantisation_warnings
from mcsharp_sdk.quantization.grid import REMOVED, WIDTHS
from mcsharp_sdk.recipe.paths import RecipePath

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext
    from mcsharp_sdk.engine.run_directory import LayerStore
    from mcsharp_sdk.models.streamed_layer import StreamedLayer
    from mcsharp_sdk.modifiers.layer_quantisation import LayerQuantiser
    from mcsharp_sdk.runtime.layout import PackedLayout


class GPTQQuantize(Modifier):
    """Quantise the model, one decoder layer at a time, on the outputs of the layers before it.

    GPTQ (arXiv 2210.17323) with one Hessian per expert, gate and up sharing theirs. ``mode: paper``
    and ``mode: released`` follow MC (arXiv 2410.06270) and its released code; ``best`` is ours.
    Without a calibration, which ``rtn`` and ``hqq`` do not need, the model is not run.
    """

    type: Literal["GPTQQuantize"] = "GPTQQuantize"
    mode: Annotated[
        Literal["best", "paper", "released"],
        Field(description="Whose choices the other settings default to."),
    ] = "best"
    quantizer: Annotated[
        Literal["gptq", "rtn", "hqq", "lwc"],
        Field(
            description="gptq, or without compensation: rtn, round to nearest; hqq, "
            "half-quadratic; lwc, learned clipping (OmniQuant). rtn and hqq need no calibration."
        ),
    ] = "gptq"
    group_size: Annotated[
        int, Field(ge=8, description="Columns that share a scale and a zero point.")
    ] = 128
    other_bits: Annotated[
        int | None,
        Field(
            description="Width of attention, shared experts and dense MLPs (1, 2, 3, 4 or 8); null "
            "keeps them."
        ),
    ] = 4
    router_bits: Annotated[
        Literal[4, 8] | None,
        Field(description="Round router weights to this many bits; null keeps them."),
    ] = None
    bits: Annotated[
        RecipePath | int | None,
        Field(
            description="A bit map file, or one width (1, 2, 3, 4 or 8) for all experts, in place "
            "of a stage's."
        ),
    ] = None
    damping: Annotated[
        float, Field(gt=0, lt=1, description="Share of the Hessian's mean diagonal added to it.")
    ] = 0.01
    token_damping: Annotated[
        float,
        Field(
            ge=0,
            description="Further damping, this times columns by tokens that a Hessian is of: "
            "what few tokens say is trusted less (gptq; others ignore it).",
        ),
    ] = 0.0
    hessian_weighting: Annotated[
        Literal["none", "routing"],
        Field(description="Weigh tokens in an expert's Hessian by their routing weight squared."),
    ] = "none"
    clip_search: Annotated[
        Literal["wide", "narrow", "none"],
        Field(description="How far below a group's range its grid is searched."),
    ] = "wide"
    binary: Annotated[
        Literal["optimised", "released", "paper"],
        Field(description="How the scale of 1-bit weights is found."),
    ] = "optimised"
    compensate_within_block: Annotated[
        bool, Field(description="Pass errors on inside a block at 3 bits and fewer.")
    ] = True
    propagation: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the errors of its inputs that a matrix makes up for (gptq; "
            "others ignore it); above 0 the original model is run beside the quantised one.",
        ),
    ] = 0.0
    rotation: Annotated[
        Literal["none", "hadamard"],
        Field(
            description="Quantise experts with the inputs of their matrices turned by Hadamard "
            "matrices, as the model then does when it runs."
        ),
    ] = "none"
    refinements: Annotated[
        int | None,
        Field(
            ge=0,
            description="Rounds of choosing codes and scales once more, given all others (gptq; "
            "others ignore it); 0 is scales alone, null nothing.",
        ),
    ] = None

    reads: ClassVar[tuple[str, ...]] = (BitMap.NAME,)
    writes: ClassVar[str] = QUANTIZED_WEIGHTS
    uses_calibration: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"binary": "paper", "router_bits": 4, "clip_search": "narrow"},
        "released": {
            "binary": "released",
            "clip_search": "narrow",
            "compensate_within_block": False,
        },
    }

    @field_validator("other_bits")
    @classmethod
    def _other_width(cls, bits: int | None) -> int | None:
        return bits if bits is None else _known_width(bits)

    @field_validator("bits")
    @classmethod
    def _expert_width(cls, bits: Path | int | None) -> Path | int | None:
        return _known_width(bits) if isinstance(bits, int) else bits

    @property
    def propagates(self) -> bool:
        """Whether matrices make up for the errors of their inputs."""
        return self.propagation > 0 and self.quantizer == "gptq"

    @property
    def rotated(self) -> bool:
        """Whether experts are quantised with their inputs turned."""
        return self.rotation != "none"

    def why_not_shared(self) -> str | None:
        if not self.propagates:
            return super().why_not_shared()
        return (
            "the original model is run beside the quantised one by one process: start one process, "
            "or set 'propagation: 0'"
        )

    def needs(self) -> tuple[str, ...]:
        return () if self.bits is not None else self.reads

    def needs_calibration(self) -> bool:
        return self.quantizer not in _WITHOUT_CALIBRATION

    def files(self) -> dict[str, Path]:
        return {"bits": self.bits} if isinstance(self.bits, Path) else {}

    def check_experts(self, experts: Mapping[int, int]) -> list[Problem]:
        """Whether a given bit map fits the model and its widths can be stored."""
        if not isinstance(self.bits, Path):
            return []
        try:
            self.given_map(experts)
        except InputError as error:
            return [Problem("bits", str(error))]
        return []

    def run(self, context: RunContext) -> None:
        from mcsharp_sdk.modifiers.original_model import OriginalModel

        layout = self._layout(context)
        quantiser, model = self.quantiser(), OriginalModel()
        layers = context.layers(self.writes)
        with layers.writer(overlap=context.model.overlaps) as writer:
            for layer in context.stream("quantising", by_expert=True):
                widths = layout.experts.get(layer.index)
                original = model.layer(layer) if self.propagates else None
                if layers.has(layer.index):
                    if original is not None:
                        original.advance()
                    if context.calibrated:
                        _restore(layer, layers, layout)
                else:
                    tensors, notes = quantiser.quantise(layer, widths, original)
                    writer.write(layer.index, tensors, notes.to_json())
                    del tensors  # they go when they are written
        layers.write_summary(layout.to_dict())
        self._report(context, layers)

    def _bit_map(self, context: RunContext) -> BitMap:
        experts = context.model.topology.experts_per_layer()
        if self.bits is None:
            return _storable(context.read(BitMap).for_model(experts))
        return self.given_map(experts)

    def given_map(self, experts: Mapping[int, int]) -> BitMap:
        """The bit map that ``bits`` gives, for a model with so many experts per MoE layer.

        Raises
        ------
        InputError
            If the file does not fit the model, or a width cannot be stored.
        """
        if isinstance(self.bits, Path):
            return _storable(BitMap.load(self.bits).for_model(experts))
        assert self.bits is not None, "only stages with bits are asked for their map"
        return BitMap({layer: (self.bits,) * n for layer, n in experts.items()})

    def quantiser(self) -> LayerQuantiser:
        """What quantises layers with these settings."""
        from mcsharp_sdk.modifiers.layer_quantisation import LayerQuantiser
        from mcsharp_sdk.modifiers.matrix_quantisation import QuantizerSettings
        from mcsharp_sdk.quantization.search import GridSettings

        settings = QuantizerSettings(
            quantizer=self.quantizer,
            grid=GridSettings(
                group_size=self.group_size, binary=self.binary, **_CLIP_SEARCH[self.clip_search]
            ),
            damping=self.damping,
            token_damping=self.token_damping,
            routing_weighted=self.hessian_weighting == "routing",
            compensate_within_block=self.compensate_within_block,
            propagation=self.propagation,
            refinements=self.refinements,
        )
        return LayerQuantiser(settings, self.other_bits, self.router_bits, self.rotated)

    def _layout(self, context: RunContext) -> PackedLayout:
        """Which tensors of the model are packed, and how."""
        from mcsharp_sdk.runtime.layout import PackedLayout

        names = {n for linears in context.model.topology.linears.values() for n in linears}
        linears = {} if self.other_bits is None else dict.fromkeys(sorted(names), self.other_bits)
        experts = dict(self._bit_map(context).bits)
        return PackedLayout(self.group_size, experts, linears, rotated=self.rotated)

    def _report(self, context: RunContext, layers: LayerStore) -> None:
        if self.bits is not None and context.directory.has(BitMap):
            context.report.warn(
                f"'bits: {self.bits}' stands in place of the widths that an earlier stage chose: "
                "leave that stage out, or 'bits'"
            )
        for kept in context.model.topology.kept_experts:
            context.report.warn(f"these experts are not compressed, but kept as they are: {kept}")
        if self.other_bits is not None and context.model.topology.kept_linears:
            names = ", ".join(context.model.topology.kept_linears)
            context.report.warn(f"these linear layers keep their precision: {names}")
        notes = {index: layers.notes(index) for index in range(context.model.topology.num_layers)}
        for warning in quantisation_warnings(notes):
            context.report.warn(warning)
        context.report.stages[self.type] = {"layers": {str(i): note for i, note in notes.items()}}


_WITHOUT_CALIBRATION = ("rtn", "hqq")
"""Quantisers that can do with the weights alone."""

_CLIP_SEARCH: Mapping[str, Mapping[str, Any]] = {
    "wide": {},
    "narrow": {"clip_ratios": (1.0, 0.95, 0.9, 0.85, 0.8), "refinements": 0},
    "none": {"clip_ratios": (1.0,), "refinements": 0},
}
"""Name -> settings of the grid search; ``wide`` is the grid's own default."""


def _restore(layer: StreamedLayer, layers: LayerStore, layout: PackedLayout) -> None:
    """Give a layer the weights that an earlier run has quantised it to."""
    from mcsharp_sdk.models.expert_runs import run_experts
    from mcsharp_sdk.modifiers.layer_restoration import restore_packed

    restore_packed(layer, layers.slices(layer.index), layout)
    if layer.index in layout.experts:
        layer.expert_outputs = run_experts(layer, last=True)


def _storable(bit_map: BitMap) -> BitMap:
    """The map itself; InputError if a width cannot be stored."""
    for width in {w for widths in bit_map.bits.values() for w in widths} - {REMOVED}:
        _known_width(width)
    return bit_map


def _known_width(bits: int) -> int:
    if bits not in WIDTHS:
        raise InputError(f"{bits} is no width that can be stored; these are {list(WIDTHS)}")
    return bits

"""BitAllocation: choose a bit width per expert under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from mcsharp_sdk.allocation.baselines import ALLOCATORS, AllocatorName, Budget, spread_evenly
from mcsharp_sdk.allocation.solver import BudgetRule, check_budget
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, check_layers
from mcsharp_sdk.errors import InputError, Problem
from mcsharp_sdk.modifiers.allocation_needs import unmeasured
from mcsharp_sdk.modifiers.base import Modifier
from mcsharp_sdk.modifiers.layer_factors import factors_of
from mcsharp_sdk.modifiers.width_allocation import allocate, weights_of
from mcsharp_sdk.recipe.paths import RecipePath

if TYPE_CHECKING:
    from mcsharp_sdk.engine.context import RunContext

Width = Annotated[int, Field(ge=0, le=4)]
Exponent = Annotated[float, Field(ge=0, le=16)]

_PAPER_EXPONENTS = {"alpha": 1.0, "beta": 1.0, "gamma": 2.0}


class BitAllocation(Modifier):
    """Choose a bit width per expert under a budget (PMQ, MC arXiv 2410.06270, Eq. 4).

    Minimises Σ φ^α · w^β · ε^γ, with φ how often the expert is selected, w its summed routing
    weight, ε the error at the width. ``mode: paper`` and ``mode: released`` are MC and its released
    code. ``best`` is ours: the errors of ExpertStats already count how often and how strongly an
    expert is used, so the least sum of squared errors is what is wanted (α = β = 0, γ = 2).
    """

    type: Literal["BitAllocation"] = "BitAllocation"
    target_bits: Annotated[
        float,
        Field(
            gt=0,
            le=4,
            description="Average width of the experts, in bits. The budget is this times the "
            "number of experts, rounded down to whole bits.",
        ),
    ]
    mode: Annotated[
        Literal["best", "paper", "released"],
        Field(description="Whose choices the other settings default to."),
    ] = "best"
    allocator: Annotated[
        AllocatorName,
        Field(
            description="How widths are chosen. "
            + "; ".join(f"{name}: {a.summary}" for name, a in ALLOCATORS.items())
            + "."
        ),
    ] = "pmq"
    alpha: Annotated[Exponent, Field(description="Exponent of the selection frequency.")] = 0.0
    beta: Annotated[Exponent, Field(description="Exponent of the routing weight.")] = 0.0
    gamma: Annotated[Exponent, Field(description="Exponent of the quantisation error.")] = 2.0
    budget: Annotated[
        BudgetRule, Field(description="Use at_most the budget, or exact: all of it, no more.")
    ] = "at_most"
    budget_scope: Annotated[
        Literal["layer", "global"],
        Field(
            description="One budget per layer, or one for all layers together (gamma 2 only); the "
            "block score allocators always have one."
        ),
    ] = "layer"
    loss_weighting: Annotated[
        bool | None,
        Field(
            description="With one budget for all layers, weigh errors by how much the loss feels "
            "them in their layer; null does so where the statistics say it."
        ),
    ] = None
    at_least: dict[int, Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: {3: 1, 2: 1},
        description="Width -> how many experts must have it, in each budget. Without this "
        "setting, one of 3 and one of 2 bits where these are candidates.",
    )
    widths: Annotated[
        tuple[Width, ...],
        Field(
            min_length=1,
            description="Candidate widths, in bits; 0 lets experts be removed where that costs "
            "less.",
        ),
    ] = (1, 2, 3)
    seed: Annotated[int, Field(ge=0, description="Seed of the random allocator.")] = 0
    factors: Annotated[
        RecipePath | None,
        Field(description="File of expert statistics, in place of measuring them."),
    ] = None

    reads: ClassVar[tuple[str, ...]] = (ExpertStatistics.NAME,)
    uses: ClassVar[tuple[str, ...]] = reads  # for what a map costs, where none are needed
    writes: ClassVar[str] = BitMap.NAME
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "best": {"alpha": 0.0, "beta": 0.0, "gamma": 2.0, "budget": "at_most"},
        "paper": {**_PAPER_EXPONENTS, "budget": "exact"},
        "released": {"alpha": 1.0, "beta": 1.5, "gamma": 1.0, "budget": "at_most"},
    }

    @field_validator("widths")
    @classmethod
    def _ascending(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(widths)))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        narrowest, widest = self.widths[0], self.widths[-1]
        if not narrowest <= self.target_bits <= widest:
            raise ValueError(
                f"target_bits = {self.target_bits:g} cannot be met with widths of "
                f"{narrowest} to {widest} bits"
            )
        stray = [w for w in self.at_least if w not in self.widths]
        if stray and "at_least" in self.model_fields_set:
            raise ValueError(f"at_least names width {stray[0]}, which is not among the widths")
        if self.loss_weighting and self.budget_scope != "global":
            raise ValueError("loss_weighting compares layers, so it goes with budget_scope: global")
        needs = ALLOCATORS[self.allocator].needs
        if self.loss_weighting and needs != "quant_error":
            raise ValueError(
                f"loss_weighting weighs quantisation errors, which {self.allocator} does not use"
            )
        if self.budget == "exact" and ALLOCATORS[self.allocator].whole_model:
            raise ValueError(
                f"{self.allocator} widens whole layers, which seldom use exactly the budget: give "
                "'budget: at_most'"
            )
        if self.budget_scope == "global" and needs == "quant_error" and self.gamma != 2:
            raise ValueError(
                "gamma must be 2 with budget_scope: global, where errors of different layers "
                "are added up: only squared errors add"
            )
        return self

    def needs(self) -> tuple[str, ...]:
        blind = ALLOCATORS[self.allocator].blind
        return () if blind or self.factors is not None else self.reads

    def files(self) -> dict[str, Path]:
        return {} if self.factors is None else {"factors": self.factors}

    @property
    def whole_model(self) -> bool:
        """Whether there is one budget for all layers."""
        return self.budget_scope == "global" or ALLOCATORS[self.allocator].whole_model

    @property
    def solves(self) -> bool:
        """Whether the integer program is solved."""
        return ALLOCATORS[self.allocator].solves

    def required_widths(self) -> dict[int, int]:
        """``at_least`` as it holds for this allocator and these widths."""
        if not ALLOCATORS[self.allocator].keeps_required:
            return {}
        return {w: n for w, n in self.at_least.items() if n and w in self.widths}

    def budget_bits(self, experts: int) -> int:
        """Whole bits that so many experts may use."""
        return math.floor(self.target_bits * experts + 1e-9)

    def budget_of(self, layers: Sequence[int]) -> Budget:
        """What layers of so many experts each have to meet together."""
        bits = self.budget_bits(sum(layers))
        return Budget(bits, self.budget, self.required_widths(), layers)

    def check_earlier(self, stages: Sequence[Modifier]) -> list[Problem]:
        """Whether ExpertStats measures what the allocator and its settings need."""
        return unmeasured(self, stages)

    def check_experts(self, experts: Mapping[int, int]) -> list[Problem]:
        """Whether the budget can be met, and a given factor file fits the model."""
        problems = []
        counts = [sum(experts.values())] if self.whole_model else experts.values()
        for count in sorted({n for n in counts if n}):
            try:
                self._check_budget(count)
            except InputError as error:
                problems.append(Problem("target_bits", f"{error}{self._remedy()}"))
        return [*problems, *self._check_factors(experts)]

    def _check_budget(self, experts: int) -> None:
        """InfeasibleBudget if so many experts cannot meet the budget."""
        budget = self.budget_of([experts])
        if self.allocator == "uniform":  # knows two neighbouring widths, and looks at no costs
            spread_evenly(np.zeros((experts, len(self.widths))), self.widths, budget)
            return
        check_budget(
            experts, self.widths, budget.bits, budget_rule=budget.rule, at_least=budget.at_least
        )

    def _check_factors(self, experts: Mapping[int, int]) -> list[Problem]:
        if self.factors is None:
            return []
        try:
            statistics = ExpertStatistics.load(self.factors)
            try:
                check_layers(statistics.experts(), experts)
                for layer in statistics.layers:
                    factors_of(layer, self.widths, ALLOCATORS[self.allocator].needs)
                weights_of(statistics.layers, self)
            except InputError as error:
                raise InputError(f"{self.factors}: {error}") from None
        except InputError as error:
            return [Problem("factors", str(error))]
        return []

    def _remedy(self) -> str:
        return "; with 'at_least: {}' no width is required" if self.required_widths() else ""

    def run(self, context: RunContext) -> None:
        bit_map = allocate(self._statistics(context), self, track=context.track)
        context.write(bit_map)

    def _statistics(self, context: RunContext) -> ExpertStatistics | Path:
        if self.factors is not None:
            return self.factors
        if self.needs() or context.directory.has(ExpertStatistics):
            return context.read(ExpertStatistics)
        return ExpertStatistics.unmeasured(context.model.topology.experts_per_layer())

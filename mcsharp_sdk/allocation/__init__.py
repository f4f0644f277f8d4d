"""Which expert gets how many bits: pure functions over numbers, no recipe, no file, no model."""

from mcsharp_sdk.allocation.baselines import ALLOCATORS, Allocator
from mcsharp_sdk.allocation.significance import Exponents, Factors, allocation_cost
from mcsharp_sdk.allocation.solver import InfeasibleBudget, check_budget, solve_bit_allocation

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "Exponents",
    "Factors",
    "InfeasibleBudget",
    "allocation_cost",
    "check_budget",
    "solve_bit_allocation",
]

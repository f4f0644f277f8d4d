"""Choose bit widths from expert statistics alone, and compare allocators at equal bits.

Run:  python examples/allocate_from_factors.py [FACTORS.json]

Without a file it makes up two layers of four experts. ``mcsharp allocate`` does the same.
"""

from __future__ import annotations

import sys

import numpy as np

from mcsharp_sdk import allocate
from mcsharp_sdk.artifacts import ExpertStatistics, LayerStatistics
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation


def main() -> None:
    """Print each allocator's widths of the first layer, and their cost over all layers."""
    statistics = ExpertStatistics.load(sys.argv[1]) if len(sys.argv) > 1 else made_up()
    for name in ("pmq", "frequency", "f_norm", "random"):
        settings = BitAllocation(target_bits=2.0, mode="released", allocator=name)
        bit_map = allocate(statistics, settings)
        cost = sum((bit_map.objective or {}).values())
        first = next(iter(bit_map.bits.values()))
        print(f"{name:10} {first}  {bit_map.nominal_bits:.2f} bits, cost {cost:.4g}")


def made_up() -> ExpertStatistics:
    """Statistics of a model that does not exist: the first expert is used most."""
    use = np.array([400.0, 300.0, 200.0, 124.0])
    error = np.array([3.0, 6.0, 4.0, 5.0])
    layers = [
        LayerStatistics(
            layer=index,
            activation_count=use,
            routing_weight_sum=use * 0.6,
            quant_error={1: error * 8, 2: error * 3, 3: error},
        )
        for index in range(2)
    ]
    return ExpertStatistics("made up", "this example", 4, 2, tuple(layers))


if __name__ == "__main__":
    main()

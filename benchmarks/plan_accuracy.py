"""How near to reality is what ``mcsharp plan`` says of memory, disk and time?

Makes a Mixtral-architecture model of random weights as ``peak_memory.py`` does, plans a recipe on
it, runs it in a process of its own, and prints what was said beside what was measured.

    python benchmarks/plan_accuracy.py [--layers 2] [--hidden 2048] [--intermediate 2560] \
        [--experts 8] [--sequences 16] [--length 512] [--spill]

``--spill`` allows so little memory that activations lie on disk. ``--sequences 0`` does without a
calibration: uniform widths, and rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peak_memory import make_model, save_tokenizer

MARGIN = 0.25
"""How far off a prediction may be."""


def recipe(sequences: int, length: int) -> Any:
    """All three stages of a compression, or what does not measure."""
    from mcsharp_sdk import Recipe

    if not sequences:
        allocation = {"type": "BitAllocation", "target_bits": 2.5, "allocator": "uniform"}
        return Recipe.from_dict(
            {"version": 1, "stages": [allocation, {"type": "GPTQQuantize", "quantizer": "rtn"}]}
        )
    calibration = {"source": "embedded", "sequences": sequences, "length": length}
    stages = [
        {"type": "ExpertStats", "group_size": 128},
        {"type": "BitAllocation", "target_bits": 2.5},
        {"type": "GPTQQuantize", "group_size": 128},
    ]
    return Recipe.from_dict(
        {
            "version": 1,
            "calibration": {**calibration, "sampling": "first"},
            "stages": stages,
        }
    )


def run(folder: Path, sequences: int, length: int, spill: bool) -> None:
    """Plan and compress; prints the result as JSON."""
    import mcsharp_sdk

    chosen = recipe(sequences, length)
    allowed = mcsharp_sdk.plan(chosen, folder / "model").least_memory if spill else None
    allowed = None if allowed is None else int(allowed * 1.01)
    done = mcsharp_sdk.compress(
        chosen,
        folder / "model",
        folder / "out",
        run_dir=folder / "run",
        progress=False,
        max_memory=allowed,
    )
    print(json.dumps(done.to_json()))


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a folder, and below."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def comparisons(done: dict[str, Any], folder: Path) -> Iterator[tuple[str, float, float, str]]:
    """Name, said, measured, unit."""
    plan = done["plan"]
    yield "peak memory", plan["peak_memory"] / 1e9, done["peak_memory"] / 1e9, "GB"
    yield "output", plan["output_bytes"] / 1e9, weight_bytes(folder / "out") / 1e9, "GB"
    if not plan["spill"]:
        yield "run directory", plan["run_bytes"] / 1e9, weight_bytes(folder / "run") / 1e9, "GB"
    for stage in plan["stages"]:
        if stage["seconds"]:
            yield stage["stage"], stage["seconds"], done["seconds"][stage["stage"]], "s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=2560)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--spill", action="store_true")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run, given.sequences, given.length, given.spill)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        sizes = (given.layers, given.hidden, given.intermediate, given.experts)
        make_model(folder / "model", *sizes)
        save_tokenizer(folder / "model")
        command = [sys.executable, __file__, "--run", scratch, *sys.argv[1:]]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for name, said, measured, unit in comparisons(json.loads(output), folder):
            off = said / measured - 1
            verdict = "" if abs(off) <= MARGIN else f"  beyond {MARGIN:.0%}"
            print(f"{name:15s} {said:9.2f} {measured:9.2f} {unit:3s} {off:+6.0%}{verdict}")


if __name__ == "__main__":
    main()

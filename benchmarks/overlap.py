"""What does reading and writing beside the computing gain when a model is compressed?

Makes a Mixtral-architecture model of random weights on disk and quantises it with MCSHARP_OVERLAP
off and on, in turns, each time in a process of its own. Before each run the system is told to
forget the model's files (posix_fadvise), so that they are read from the disk, or from what is
behind it: how long that takes by itself is printed first. A host that caches the disk makes it
look faster than a disk is.

    python benchmarks/overlap.py [--layers 2] [--quantizer rtn] [--device cpu] [--rounds 3] \
        [--disk MB_PER_SECOND] [--text FILE --sequences 128 --length 2048]

``--quantizer rtn`` computes least, so that reading weighs most; ``gptq`` is what is used, with
``--clip-search`` as recipes have it. Without a text a short one that comes along is used. With
``--disk`` every read of weights also sleeps for as long as a disk of that speed would take: a model
of a slow disk or a network, not one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peak_memory import make_model, save_tokenizer

VOCABULARY = 4096
STAGE = "GPTQQuantize"


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(folder: Path) -> float:
    """Seconds that reading the files takes by itself."""
    forget(folder)
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass
    return time.perf_counter() - start


def slow_down(megabytes: float) -> None:
    """Let each read of weights sleep as long as a disk of so many megabytes a second takes."""
    from mcsharp_sdk.models import shards

    read = shards.read_bytes

    def slow(path: Path, offset: int, nbytes: int) -> Tensor:
        time.sleep(nbytes / megabytes / 1e6)
        return read(path, offset, nbytes)

    shards.read_bytes = slow


def compress(folder: Path, given: argparse.Namespace) -> None:
    """Quantise the model; prints seconds of the stage and the device's peak of memory as JSON."""
    import torch

    import mcsharp_sdk

    if given.disk:
        slow_down(given.disk)
    stage = {"type": STAGE, "bits": 2, "quantizer": given.quantizer}
    stage["clip_search"] = given.clip_search
    calibration = {"source": "embedded", "sequences": given.sequences, "length": given.length}
    calibration["sampling"] = "first"
    if given.text:
        calibration |= {"source": "text", "path": str(given.text)}
    recipe = mcsharp_sdk.Recipe.from_dict(
        {"version": 1, "calibration": calibration, "stages": [stage]}
    )
    done = mcsharp_sdk.compress(
        recipe,
        folder / "model",
        folder / "out",
        device=given.device,
        progress=False,
        overwrite=True,
    )
    peak = done.peak_memory
    if given.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(given.device)
    print(json.dumps({"seconds": done.seconds[STAGE], "peak": peak}))


def run(scratch: str, overlap: str) -> dict[str, float]:
    """Compress in a process of its own, with the model's files forgotten."""
    forget(Path(scratch) / "model")
    output = subprocess.run(
        [sys.executable, __file__, "--work", scratch, *sys.argv[1:]],
        env={**os.environ, "MCSHARP_OVERLAP": overlap},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--quantizer", default="rtn")
    parser.add_argument("--clip-search", default="none")
    parser.add_argument("--text", type=lambda name: Path(name).resolve())
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disk", type=float, help="megabytes per second of a disk to model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        compress(given.work, given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        shape = (given.layers, given.hidden, given.intermediate, given.experts)
        size = make_model(model, *shape)
        save_tokenizer(model, VOCABULARY)
        print(f"{size / 1e9:.2f} GB, {given.quantizer} on {given.device}")
        print(f"reading all of it: {reading(model):.1f} s", flush=True)
        rounds = [{overlap: run(scratch, overlap) for overlap in "01"} for _ in range(given.rounds)]
    for overlap, name in (("0", "one after the other"), ("1", "overlapping")):
        seconds = statistics.median(each[overlap]["seconds"] for each in rounds)
        peak = max(each[overlap]["peak"] for each in rounds)
        print(f"{name:20} {seconds:7.1f} s {peak / 1e9:6.2f} GB at its peak")
    ratio = statistics.median(each["1"]["seconds"] / each["0"]["seconds"] for each in rounds)
    print(f"time of the second over the first, median of the rounds: {ratio:.3f}")


if __name__ == "__main__":
    main()

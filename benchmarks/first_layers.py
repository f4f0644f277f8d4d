"""A copy of a model with its first layers only: for trying things in a fraction of the time.

    python benchmarks/first_layers.py MODEL OUTPUT --layers 8

What such a copy says is far from what the whole model would say, but how far a quantised copy is
from it can be compared between methods.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.runtime.saving import ShardWriter

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def first_layers(model: Path, output: Path, layers: int) -> None:
    """Copy a model whose layers are called ``model.layers.N``, in shards of a gigabyte."""
    output.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copyfile(file, output / file.name)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    checkpoint = Checkpoint.open(model)
    writer = ShardWriter(output, "model", 10**9)
    for name in checkpoint.names:
        layer = name.removeprefix("model.layers.").split(".")[0]
        if not name.startswith("model.layers.") or int(layer) < layers:
            writer.add(name, checkpoint.read(name))
    writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    first_layers(arguments.model, arguments.output, arguments.layers)


if __name__ == "__main__":
    main()

"""Do layers of Mixtral-8x7B's exact shapes compress under a hard limit of memory?

Writes random bf16 weights of these shapes to disk, a shard of one expert at a time, and compresses
them in a process that may not have more than ``--limit`` of data in memory (RLIMIT_DATA: whatever
is beyond fails to be allocated). Prints the peak of resident memory beside what was planned.

    python benchmarks/mixtral_layers.py [--layers 2] [--experts 8] [--limit 8GB] \
        [--sequences 8] [--length 128] [--stats] [--clip-search none]

The default quantises all experts to 2 bits by GPTQ; ``--stats`` measures the experts first.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peak_memory import save_tokenizer

HIDDEN, INTERMEDIATE, TOP_K, VOCABULARY = 4096, 14336, 2, 32000


class Shards:
    """Writes shards of random tensors as they come, and the index."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.folder, self.total = folder, 0
        self.weight_map: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(0)

    def add(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """One shard."""
        import torch
        from safetensors.torch import save_file

        file = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=self.generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, self.folder / file, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)
        self.total += sum(t.nbytes for t in tensors.values())

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_model(folder: Path, layers: int, experts: int) -> int:
    """Write the model; returns its bytes."""
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=min(TOP_K, experts),
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    ).save_pretrained(folder)
    shards = Shards(folder)
    outer = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shards.add({**outer, "lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for layer in range(layers):
        path = f"model.layers.{layer}"
        attention: dict[str, tuple[int, ...]] = {
            f"{path}.self_attn.{name}_proj.weight": (HIDDEN if name in "qo" else 1024, HIDDEN)
            for name in "qkvo"
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        attention |= {f"{path}.{name}.weight": (HIDDEN,) for name in norms}
        shards.add({**attention, f"{path}.block_sparse_moe.gate.weight": (experts, HIDDEN)})
        for expert in range(experts):
            own = f"{path}.block_sparse_moe.experts.{expert}"
            shapes = {f"{own}.w{n}.weight": (INTERMEDIATE, HIDDEN) for n in (1, 3)}
            shards.add({**shapes, f"{own}.w2.weight": (HIDDEN, INTERMEDIATE)})
    shards.finish()
    save_tokenizer(folder, VOCABULARY)
    return shards.total


def compress(folder: Path, given: argparse.Namespace) -> None:
    """Compress under the limit; prints the result as JSON."""
    import mcsharp_sdk
    from mcsharp_sdk.engine.budget import read_bytes_of

    limit = read_bytes_of(given.limit)
    assert limit is not None
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    calibration = {"sequences": given.sequences, "length": given.length, "sampling": "first"}
    quantise: dict[str, Any] = {"type": "GPTQQuantize", "clip_search": given.clip_search}
    stages = [{**quantise, "bits": 2}]
    if given.stats:
        allocate = {"type": "BitAllocation", "target_bits": 2.5}
        stages = [{"type": "ExpertStats"}, allocate, quantise]
    recipe = mcsharp_sdk.Recipe.from_dict(
        {"version": 1, "calibration": {"source": "embedded", **calibration}, "stages": stages}
    )
    done = mcsharp_sdk.compress(
        recipe, folder / "model", folder / "out", max_memory=given.limit, progress=False
    )
    print(json.dumps(done.to_json()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--limit", default="8GB")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--stats", action="store_true")
    parser.add_argument("--clip-search", default="none")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        compress(given.work, given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "model").mkdir()
        size = make_model(Path(scratch) / "model", given.layers, given.experts)
        print(f"model           {size / 1e9:7.2f} GB", flush=True)
        command = [sys.executable, __file__, "--work", scratch, *sys.argv[1:]]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    done = json.loads(output)
    print(f"limit           {given.limit:>10s}")
    print(f"planned peak    {done['plan']['peak_memory'] / 1e9:7.2f} GB")
    print(f"measured peak   {done['peak_memory'] / 1e9:7.2f} GB")
    for stage, seconds in done["seconds"].items():
        print(f"{stage:15s} {seconds:7.1f} s")


if __name__ == "__main__":
    main()

"""How much memory does compressing a model take, against the size of the model?

Makes a Mixtral-architecture model of random weights on disk, one layer at a time (by default 12
layers, 3 GB), compresses it in a process of its own and prints that process's peak of resident
memory, next to what the interpreter takes with its imports and to the activations.

    python benchmarks/peak_memory.py [--layers 12] [--hidden 2048] [--intermediate 2560] \
        [--experts 8] [--errors gptq]

``--errors rtn`` measures the experts by round-to-nearest, in a third of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOP_K, VOCABULARY = 2, 4096
SEQUENCES, LENGTH = 16, 512


def make_model(folder: Path, layers: int, hidden: int, intermediate: int, experts: int) -> int:
    """Write a random model in shards of one layer each; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 256,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16) * 0.02
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())

    head = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
    }
    save(1, {**head, "model.norm.weight": (hidden,)})
    for layer in range(layers):
        save(layer + 2, layer_shapes(f"model.layers.{layer}.", hidden, intermediate, experts))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def layer_shapes(
    prefix: str, hidden: int, intermediate: int, experts: int
) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder layer as Mixtral has them on disk."""
    keys = hidden // 2
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "block_sparse_moe.gate.weight": (experts, hidden),
    }
    for expert in range(experts):
        path = f"block_sparse_moe.experts.{expert}"
        shapes[f"{path}.w1.weight"] = shapes[f"{path}.w3.weight"] = (intermediate, hidden)
        shapes[f"{path}.w2.weight"] = (hidden, intermediate)
    return {prefix + name: shape for name, shape in shapes.items()}


def save_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level tokenizer, one token per byte; the rest of the vocabulary never occurs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = (f"<{number}>" for number in range(len(alphabet), vocabulary))
    tokens = {token: number for number, token in enumerate([*alphabet, *spare])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def compress(model: Path, output: Path, errors: str) -> None:
    """Compress and print the peak of resident memory, in bytes, before and after."""
    import mcsharp_sdk
    from mcsharp_sdk.engine import run  # noqa: F401  brings torch and transformers along
    from mcsharp_sdk.models.memory import peak_resident_bytes

    imports = peak_resident_bytes()
    calibration = {
        "source": "embedded",
        "sequences": SEQUENCES,
        "length": LENGTH,
        "sampling": "first",
    }
    stages = [
        {"type": "ExpertStats", "group_size": 128, "quantizer": errors},
        {"type": "BitAllocation", "target_bits": 2.5},
        {"type": "GPTQQuantize", "group_size": 128},
    ]
    recipe = mcsharp_sdk.Recipe.from_dict(
        {"version": 1, "calibration": calibration, "stages": stages}
    )
    done = mcsharp_sdk.compress(recipe, model, output, progress=False)
    measured = {
        "imports": imports,
        "peak": done.peak_memory,
        "planned": done.plan.peak_memory,
        "seconds": dict(done.seconds),
    }
    print(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=2560)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--errors", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--compress", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compress:
        model, output = arguments.compress
        compress(model, output, arguments.errors)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        sizes = (arguments.layers, arguments.hidden, arguments.intermediate, arguments.experts)
        size = make_model(model, *sizes)
        save_tokenizer(model)
        command = [sys.executable, __file__, "--errors", arguments.errors]
        command += ["--compress", str(model), str(Path(scratch) / "out")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    # In bfloat16: hidden states before a layer, those before its experts, and the experts' outputs.
    activations = 3 * SEQUENCES * LENGTH * arguments.hidden * 2
    print(f"model                     {size / 1e9:6.2f} GB in {arguments.layers} layers")
    print(f"interpreter with imports  {found['imports'] / 1e9:6.2f} GB")
    print(f"peak of resident memory   {found['peak'] / 1e9:6.2f} GB")
    print(f"planned                   {found['planned'] / 1e9:6.2f} GB")
    print(f"of which activations      {activations / 1e9:6.2f} GB")
    print(f"peak without activations  {(found['peak'] - activations) / 1e9:6.2f} GB")
    for stage, seconds in found["seconds"].items():
        print(f"{stage:25s} {seconds / arguments.layers:6.1f} s a layer")


if __name__ == "__main__":
    main()

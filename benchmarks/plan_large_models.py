"""What does ``mcsharp plan`` say of Mixtral-8x22B and DeepSeek-V3?

Writes configs and safetensors files with true headers and no data (sparse files, which take no room
on disk), and plans a recipe of all three stages on 128 x 2048 tokens. Nothing is run. Times are for
the machine that the script runs on.

    python benchmarks/plan_large_models.py [--max-memory 24GB] [--processes 8]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def write_sparse(file: Path, shapes: Shapes) -> None:
    """A safetensors file of bf16 tensors whose data are holes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def mlp(path: str, hidden: int, intermediate: int, names: tuple[str, str, str]) -> Shapes:
    """Gate, up and down."""
    gate, up, down = names
    return {
        f"{path}.{gate}.weight": (intermediate, hidden),
        f"{path}.{up}.weight": (intermediate, hidden),
        f"{path}.{down}.weight": (hidden, intermediate),
    }


def mixtral_8x22b() -> tuple[Any, Iterator[Shapes]]:
    """Config and tensors of each layer."""
    from transformers import MixtralConfig

    hidden, intermediate, layers = 6144, 16384, 56
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=48,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=65536,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )

    def tensors() -> Iterator[Shapes]:
        yield outer(32000, hidden)
        for layer in range(layers):
            path = f"model.layers.{layer}"
            shapes: Shapes = norms(path, hidden)
            for name, rows in (("q", 6144), ("k", 1024), ("v", 1024)):
                shapes[f"{path}.self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{path}.self_attn.o_proj.weight"] = (hidden, 6144)
            shapes[f"{path}.block_sparse_moe.gate.weight"] = (8, hidden)
            for expert in range(8):
                own = f"{path}.block_sparse_moe.experts.{expert}"
                shapes |= mlp(own, hidden, intermediate, ("w1", "w3", "w2"))
            yield shapes

    return config, tensors()


def deepseek_v3() -> tuple[Any, Iterator[Shapes]]:
    """Config and tensors of each layer, as if stored in bf16; without the prediction layer."""
    from transformers import DeepseekV3Config

    config: Any = DeepseekV3Config(dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"])
    hidden, names = config.hidden_size, ("gate_proj", "up_proj", "down_proj")
    heads, query = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim

    def attention(path: str) -> Shapes:
        return {
            f"{path}.q_a_proj.weight": (config.q_lora_rank, hidden),
            f"{path}.q_a_layernorm.weight": (config.q_lora_rank,),
            f"{path}.q_b_proj.weight": (heads * query, config.q_lora_rank),
            f"{path}.kv_a_proj_with_mqa.weight": (
                config.kv_lora_rank + config.qk_rope_head_dim,
                hidden,
            ),
            f"{path}.kv_a_layernorm.weight": (config.kv_lora_rank,),
            f"{path}.kv_b_proj.weight": (
                heads * (config.qk_nope_head_dim + config.v_head_dim),
                config.kv_lora_rank,
            ),
            f"{path}.o_proj.weight": (hidden, heads * config.v_head_dim),
        }

    def tensors() -> Iterator[Shapes]:
        yield outer(config.vocab_size, hidden)
        for layer in range(config.num_hidden_layers):
            path = f"model.layers.{layer}"
            shapes = {**norms(path, hidden), **attention(f"{path}.self_attn")}
            if layer < config.first_k_dense_replace:
                yield {**shapes, **mlp(f"{path}.mlp", hidden, config.intermediate_size, names)}
                continue
            experts, size = config.n_routed_experts, config.moe_intermediate_size
            shapes[f"{path}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{path}.mlp.gate.e_score_correction_bias"] = (experts,)
            shapes |= mlp(f"{path}.mlp.shared_experts", hidden, size, names)
            for expert in range(experts):
                shapes |= mlp(f"{path}.mlp.experts.{expert}", hidden, size, names)
            yield shapes

    return config, tensors()


def outer(vocabulary: int, hidden: int) -> Shapes:
    """What is outside of the layers."""
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }


def norms(path: str, hidden: int) -> Shapes:
    """The two norms of a layer."""
    return {
        f"{path}.{name}.weight": (hidden,)
        for name in ("input_layernorm", "post_attention_layernorm")
    }


def write_model(folder: Path, config: Any, tensors: Iterator[Shapes]) -> None:
    """Config, sparse shards and index."""
    folder.mkdir()
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(tensors, 1):
        file = f"model-{number:05d}.safetensors"
        write_sparse(folder / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    from mcsharp_sdk import Recipe, plan
    from mcsharp_sdk.cli.plan import show_plan
    from mcsharp_sdk.errors import InputError

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--max-memory")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"source": "embedded", "sequences": 128, "length": 2048},
            "stages": [
                {"type": "ExpertStats"},
                {"type": "BitAllocation", "target_bits": 2.5},
                {"type": "GPTQQuantize"},
            ],
        }
    )
    models = {"Mixtral-8x22B": mixtral_8x22b, "DeepSeek-V3": deepseek_v3}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in models.items():
            write_model(Path(scratch) / name, *make())
            try:
                show_plan(
                    plan(
                        recipe,
                        Path(scratch) / name,
                        max_memory=given.max_memory,
                        processes=given.processes,
                    )
                )
            except InputError as error:
                print(f"{name}: {error}")


if __name__ == "__main__":
    main()

"""``genai_config.json``: what onnxruntime-genai must know of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcsharp_exporters.graph_names import (
    ATTENTION_MASK,
    CACHED,
    INPUT_IDS,
    LOGITS,
    PAST,
    PRESENT,
)
from mcsharp_exporters.model_graph import cache_shape
from mcsharp_exporters.output_folder import GENERATION_CONFIG

GENAI_CONFIG = "genai_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

MODEL_TYPE = "decoder"
"""onnxruntime-genai's name of any model of ids, mask and cache; it knows no MoE family by name."""

MOST_POSITIONS = 4096
"""``max_length`` unless the model has fewer: onnxruntime-genai allocates the cache for so many.
The caller may ask for others."""

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Settings that are taken from the model's generation_config.json."""

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""What tokenizer.json alone describes, by the name that onnxruntime-genai knows."""

KNOWN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer")
"""Names of the same in transformers, which onnxruntime-genai does not know."""


def genai_config(config: Any, folder: Path, graph_file: str) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    Parameters
    ----------
    config : of transformers.
    folder : where the model's generation_config.json is, if it has one.
    graph_file : name of the ONNX file.
    """
    cache = cache_shape(config)
    generation = _json(folder / GENERATION_CONFIG)
    tokens = {name: _token(name, generation, config) for name in ("bos", "eos", "pad")}
    ending = tokens["eos"]
    first_end = ending[0] if isinstance(ending, list) else ending
    return {
        "model": {
            "type": MODEL_TYPE,
            **{
                f"{name}_token_id": first_end or 0 if value is None else value
                for name, value in tokens.items()
            },
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph_file,
                "head_size": cache.head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": cache.heads,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    **{f"past_{p}_names": PAST.format(layer="%d", part=p) for p in CACHED},
                },
                "outputs": {
                    "logits": LOGITS,
                    **{f"present_{p}_names": PRESENT.format(layer="%d", part=p) for p in CACHED},
                },
            },
        },
        "search": {
            "do_sample": False,
            **{name: generation[name] for name in SAMPLING if generation.get(name) is not None},
            "max_length": min(config.max_position_embeddings, MOST_POSITIONS),
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def adapt_tokenizer(folder: Path) -> None:
    """Give the tokenizer's class the name that onnxruntime-genai knows it by.

    Only names for "what tokenizer.json says" are exchanged; transformers reads both.
    """
    path = folder / TOKENIZER_CONFIG
    settings = _json(path)
    if settings.get("tokenizer_class") in KNOWN_CLASSES:
        settings["tokenizer_class"] = TOKENIZER_CLASS
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _token(name: str, generation: dict[str, Any], config: Any) -> Any:
    """A special token's number, or several; None if the model has none."""
    key = f"{name}_token_id"
    found = generation.get(key)
    return getattr(config, key, None) if found is None else found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}

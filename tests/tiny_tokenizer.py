"""A tokenizer for tiny models: one token per ASCII character, its code."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tiny_tokenizer(folder: Path, vocabulary: int = 128, **special: str) -> None:
    """Save it beside a model of that vocabulary; ``special`` are tokens such as ``eos_token``."""
    words = {chr(code): code for code in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

"""The embedded model's card."""

from __future__ import annotations

HEAD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# mcsharp embedded model

A small Mixture-of-Experts language model to try mcsharp_sdk on, without a download. It has the
Mixtral architecture and is really trained, so that compression costs it something; it is of no use
as a language model.
"""

FACTS = {
    "architecture": "{num_hidden_layers} layers of {num_local_experts} experts, "
    "top-{num_experts_per_tok}, hidden {hidden_size}, intermediate {intermediate_size}, "
    "tied embeddings",
    "parameters": "{parameters:,}, stored in bfloat16",
    "tokenizer": "byte-level BPE, {vocabulary:,} entries",
    "trained on": "{training_tokens:,} tokens of text, {seen_tokens:,} seen, "
    "in windows of {window}",
    "training time": "{minutes:.0f} minutes on {threads} shared CPU cores",
    "held-out perplexity": "**{perplexity:.2f}** on {held_out_tokens:,} tokens, "
    "non-overlapping windows of {window}, computed in float32",
}

BODY = """
## Text

Read from the Python {python} that ran the training: the language reference in `pydoc_data.topics`,
the docstrings of the standard library, and its source. Of the training windows, {prose_share:.0%}
are docstrings and reference, the others source. The held-out text is the docstrings of whole
modules that were kept from training: {held_out_modules}. Other Python versions word some docstrings
otherwise, so the perplexity measured there differs a little.

The text is under the PSF licence (https://docs.python.org/3/license.html) and does not come with
the model.

## Made by

`python -m mcsharp_sdk.embedded.train OUT`, from nothing: AdamW, {steps} steps of {batch} windows,
seed {seed}, with a load-balancing loss per layer.

## Limits

It was trained on {window} tokens at a time: longer windows give worse numbers. What it writes looks
like Python documentation and means nothing. Its experts are few and small, so results on it say
that mcsharp_sdk works, not how well a method does on a large model.
"""


def model_card(**facts: object) -> str:
    """The card with the facts of one training filled in."""
    table = "\n".join(f"| {name} | {value} |" for name, value in FACTS.items())
    return f"{HEAD}\n| | |\n|---|---|\n{table}\n{BODY}".format(**facts)

"""Errors in the report are those of a layer's matrices on the inputs of the original model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import QUANTISE, calibration_tokens, load, pruning_recipe, run, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor

from mcsharp_sdk.engine.layer_store import LayerStore
from mcsharp_sdk.modifiers.layer_notes import LayerNotes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def attention_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Linear of the first layer's attention -> what it is called with, [T, columns]."""
    inputs: dict[str, Tensor] = {}
    for name in ATTENTION:
        linear = getattr(model.model.layers[0].self_attn, name)
        linear.register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.update({name: arguments[0].flatten(0, 1)})
        )
    model(tokens, use_cache=False)
    return inputs


@torch.no_grad()
def test_the_first_layers_attention_has_the_error_that_its_outputs_have(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    model = save_tiny_model(tmp_path / "model", "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(model)
    run(model, pruning_recipe(text, {**QUANTISE, "other_bits": 2}), tmp_path)
    original, packed = load(model), load(tmp_path / "out")
    inputs = attention_inputs(original, calibration_tokens(text))
    error, output = 0.0, 0.0
    for name, given in inputs.items():
        true = getattr(original.model.layers[0].self_attn, name)(given)
        found = getattr(packed.model.layers[0].self_attn, name)(given)
        error += float((found - true).double().square().sum())
        output += float(true.double().square().sum())
    report = json.loads((tmp_path / "out" / "mcsharp_report.json").read_text())
    notes = report["stages"]["GPTQQuantize"]["layers"]["0"]
    told = notes["squared_error"]["self_attn"] / notes["squared_output"]["self_attn"]
    assert math.sqrt(told) == pytest.approx(math.sqrt(error / output), rel=0.01)
    assert notes["squared_error"]["experts"] > 0


def test_errors_that_are_not_known_are_kept_as_such(tmp_path: Path) -> None:
    notes = LayerNotes()
    notes.add_error("experts", math.nan, math.nan)
    notes.add_error("experts", 1.0, 2.0)
    notes.add_error("self_attn", 1.0, 2.0)
    store = LayerStore(tmp_path)
    store.write(0, {}, notes.to_json())
    assert store.notes(0)["squared_error"] == {"experts": None, "self_attn": 1.0}
    assert store.notes(0)["squared_output"] == {"experts": None, "self_attn": 2.0}

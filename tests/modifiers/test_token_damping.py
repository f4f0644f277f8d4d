"""More damping where fewer tokens speak for a Hessian."""

from __future__ import annotations

from pathlib import Path

import torch
from pruning_runs import LENGTH, QUANTISE, SEQUENCES, pruning_recipe, run, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor

from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.source import SourceModel

COARSE = {**QUANTISE, "bits": 2, "other_bits": 2}
SHARE = 2.0


def first_layer(model: Path, text: Path, folder: Path, **settings: float) -> dict[str, Tensor]:
    """The packed tensors of a model's first layer, quantised with these settings."""
    folder.mkdir()
    run(model, pruning_recipe(text, {**COARSE, **settings}), folder)
    checkpoint = Checkpoint.open(folder / "out")
    return {name: checkpoint.read(name) for name in checkpoint.names if ".layers.0." in name}


def test_it_is_damping_of_columns_by_tokens(tmp_path: Path) -> None:
    """All tokens reach attention, and fewer each expert, whose damping is then larger."""
    text = write_text(tmp_path)
    model = save_tiny_model(tmp_path / "model", "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(model)
    columns = SourceModel(model).config.hidden_size
    as_one = 0.01 + SHARE * columns / (SEQUENCES * LENGTH)
    found = first_layer(model, text, tmp_path / "a", token_damping=SHARE)
    same = first_layer(model, text, tmp_path / "b", damping=as_one)
    plain = first_layer(model, text, tmp_path / "c")
    attention = [name for name in found if "self_attn" in name and name.endswith("qweight")]
    experts = [name for name in found if "experts" in name and name.endswith("gate_up_qweight")]
    assert attention
    assert experts
    assert all(torch.equal(found[name], same[name]) for name in attention)
    assert any(not torch.equal(found[name], plain[name]) for name in attention)
    assert any(not torch.equal(found[name], same[name]) for name in experts)

"""Short runs of pruning stages on tiny models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import mcsharp_sdk
from mcsharp_sdk.engine.run_directory import LayerStore
from mcsharp_sdk.models.experts import is_experts
from mcsharp_sdk.recipe.schema import Recipe

SEQUENCES, LENGTH = 6, 32
QUANTISE: dict[str, Any] = {"type": "GPTQQuantize", "bits": 3, "group_size": 16}


def write_text(folder: Path) -> Path:
    """A calibration text of as many characters as the runs take tokens, and more."""
    file = folder / "text.txt"
    file.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    return file


def write_models(folder: Path) -> dict[str, Path]:
    """mixtral has k = 2; deepseek_v3 has k = 3, unsorted slots, sigmoid scores, a dense layer."""
    folders = {}
    for family in ("mixtral", "deepseek_v3"):
        folders[family] = save_tiny_model(folder / family, family)
        save_tiny_tokenizer(folders[family])
    return folders


def calibration_tokens(text: Path) -> Tensor:
    """The tokens that the runs take: those of the tiny tokenizer are ASCII codes."""
    codes = [ord(c) for c in text.read_text()[: SEQUENCES * LENGTH]]
    return torch.tensor(codes).view(SEQUENCES, LENGTH)


def pruning_recipe(text: Path, *stages: dict[str, Any], **parts: Any) -> Recipe:
    """A recipe of these stages on the first tokens of the text."""
    calibration = {"source": "text", "path": str(text), "sampling": "first"}
    sizes = {"sequences": SEQUENCES, "length": LENGTH}
    return Recipe.from_dict(
        {"version": 1, "calibration": {**calibration, **sizes}, "stages": list(stages), **parts}
    )


def run(model: Path, recipe: Recipe, work: Path) -> Any:
    """Run it into ``work/out``; what stages made stays in ``work/run``."""
    return mcsharp_sdk.compress(
        recipe, model, work / "out", run_dir=work / "run", progress=False, overwrite=True
    )


@contextmanager
def cut_off_after(layers: int) -> Iterator[None]:
    """What runs inside must be interrupted when so many layers are written, and is."""
    write, done = LayerStore.write, 0

    def write_or_end(self: LayerStore, *arguments: Any) -> None:
        nonlocal done
        if done == layers:
            raise KeyboardInterrupt
        done += 1
        write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStore, "write", write_or_end)
        with pytest.raises(KeyboardInterrupt):
            yield


def load(folder: Path, **settings: Any) -> Any:
    """The model in float32, its experts run one by one."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", **settings
    ).eval()


def experts_of(model: Any) -> dict[int, Any]:
    """Decoder layer -> the module of its experts."""
    layers = enumerate(model.model.layers)
    found = {index: list(filter(is_experts, layer.modules())) for index, layer in layers}
    return {index: modules[0] for index, modules in found.items() if modules}


@torch.no_grad()
def expert_calls(model: Any, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Decoder layer -> what its experts are called with: hidden states, indices, weights."""
    calls: dict[int, Any] = {}
    handles = [
        experts.register_forward_pre_hook(
            lambda _, arguments, index=index: calls.update({index: arguments})
        )
        for index, experts in experts_of(model).items()
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def kept_shares(model: Any, tokens: Tensor) -> dict[int, float]:
    """Decoder layer -> share of slots that the loaded model does not drop."""
    experts = experts_of(model)
    calls: Sequence[tuple[int, Any]] = list(expert_calls(model, tokens).items())
    return {i: float((c[1] < experts[i].num_experts).double().mean()) for i, c in calls}

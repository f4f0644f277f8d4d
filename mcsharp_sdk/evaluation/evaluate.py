"""Evaluate a model folder on a text: perplexity, bits, bytes, and the experts it really uses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsharp_sdk.arguments import given_path
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.activation import ExpertActivity, watch_experts
from mcsharp_sdk.evaluation.cost import ModelCost, cost_facts, model_cost
from mcsharp_sdk.evaluation.exported import exported_manifest, measure_exported
from mcsharp_sdk.evaluation.loading import (
    check_pruning,
    choose_device,
    choose_dtype,
    dtype_name,
    load_model,
)
from mcsharp_sdk.evaluation.perplexity import Observer, perplexity
from mcsharp_sdk.evaluation.text import choose_window, named_pieces, read_tokens
from mcsharp_sdk.models.source import read_config
from mcsharp_sdk.runtime.pruned_routing import expert_pruning


@dataclass(frozen=True)
class Evaluation:
    """One model on one text.

    Attributes
    ----------
    model, text : folder of the model, file of the text.
    perplexity : exp of the mean loss over non-overlapping windows.
    nll : mean loss in nats.
    tokens : tokens of the text that were used.
    window, windows : tokens per window, and how many windows there were.
    compressed : whether mcsharp_sdk packed the model.
    nominal_bits, stored_bits : mean width of the quantised weights (uncompressed: of all weights
        that could be quantised), and 8·bytes of all that is kept for them per weight.
    expert_nominal_bits, expert_stored_bits : the same of the routed experts; None without any.
    bytes : size of the weight files.
    directory_bytes : size of everything in the folder.
    parameters : of the whole model.
    pruning : how experts were pruned: ``off``, ``rule``, ``learned`` or ``both``.
    activated_expert_ratio : activated (token, expert) pairs over tokens·k; None where nobody can
        look inside: an ONNX model.
    activated_expert_ratio_per_layer : the same per decoder layer that has experts; then empty.
    activated_bytes_per_token : mean bytes of stored weights that a token of this text reads; then
        None. Original dbrx and llama4 do not show which experts they use: there it is with experts
        used equally often.
    activated_parameters_per_token : mean number of those weights; then None.
    seconds : of the forward passes, loading excluded.
    device, dtype : where (of an ONNX model, by which provider) and in which dtype it was computed.
    """

    model: str
    text: str
    perplexity: float
    nll: float
    tokens: int
    window: int
    windows: int
    compressed: bool
    nominal_bits: float
    stored_bits: float
    expert_nominal_bits: float | None
    expert_stored_bits: float | None
    bytes: int
    directory_bytes: int
    parameters: int
    pruning: str
    activated_expert_ratio: float | None
    activated_expert_ratio_per_layer: dict[int, float]
    activated_bytes_per_token: float | None
    activated_parameters_per_token: float | None
    seconds: float
    device: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """These attributes as plain data for JSON; an infinite perplexity is null."""
        finite = self.perplexity if math.isfinite(self.perplexity) else None
        return {**asdict(self), "perplexity": finite}


def evaluate(
    model_dir: str | Path,
    text: str | Path | None = None,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    pruning: str | None = None,
    track: Callable[[range], Iterable[int]] = iter,
) -> Evaluation:
    """Evaluate a model, compressed or not, or one that was exported as ONNX.

    Parameters
    ----------
    model_dir : folder with config, safetensors and tokenizer, or as the exporter ``onnx_model``
        wrote it; that runs with onnxruntime, in the precision and pruning of the export.
    text : a file of UTF-8 text, JSON lines or parquet; None for the embedded evaluation text.
    window : tokens per window; None for 2048, or all the model's positions if fewer.
    max_tokens : use only so many tokens from the start of the text.
    device : ``auto`` (GPUs where there are any), or a device of torch.
    dtype : to compute in: ``auto`` (the checkpoint's, but float32 for float16 on a CPU),
        ``float32``, ``bfloat16`` or ``float16``, by name or as torch's.
    pruning : how to prune experts: ``off``, ``rule``, ``learned`` or ``both``, as far as the model
        can; None for as it was made.
    track : wraps the range of windows, e.g. to show progress.

    Raises
    ------
    InputError
        If the folder, its tokenizer, the text, the window, the device, the dtype or the pruning
        cannot be used.
    """
    directory, dtype = given_path(model_dir, "model_dir"), dtype_name(dtype)
    manifest = exported_manifest(directory, device, dtype, pruning)
    if manifest is not None:
        length = choose_window(window, manifest.context_length)
        name, pieces = named_pieces(text)
        tokens = read_tokens(name, pieces, directory, max_tokens, manifest.vocabulary)
        measured = measure_exported(directory, manifest, device, tokens, length, track)
        return Evaluation(model=str(directory), text=name, **measured)
    conditions = prepare(
        directory,
        text,
        window=window,
        max_tokens=max_tokens,
        device=device,
        dtype=dtype,
        pruning=pruning,
    )
    return measure(conditions, conditions.load(), track=track)


@dataclass(frozen=True)
class Conditions:
    """One model and all that is needed to evaluate it, checked.

    Attributes
    ----------
    directory, cost : the model's folder, and what it costs.
    text, tokens : name of the text, and its tokens, (n,) int64.
    vocabulary : how many words the model predicts.
    window : tokens per window.
    device, dtype : where and in which dtype to compute.
    pruning : as asked for; None for as the model was made.
    """

    directory: Path
    cost: ModelCost
    text: str
    tokens: Tensor
    vocabulary: int
    window: int
    device: str
    dtype: torch.dtype
    pruning: str | None

    def load(self) -> Any:
        """The model, ready to run."""
        return load_model(self.directory, self.device, self.dtype, self.pruning)


def prepare(
    model_dir: str | Path,
    text: str | Path | None = None,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    pruning: str | None = None,
) -> Conditions:
    """Check everything that :func:`evaluate` takes, and read the text; no weight is loaded."""
    directory, dtype = given_path(model_dir, "model_dir"), dtype_name(dtype)
    if exported_manifest(directory, device, dtype, pruning) is not None:
        raise InputError(
            f"{directory} is a model as ONNX, which is evaluated by itself: leave out --compare, "
            "--reference and --save"
        )
    config = read_config(directory)
    cost = model_cost(directory)
    check_pruning(pruning, directory)
    text_config = config.get_text_config()
    window = choose_window(window, getattr(text_config, "max_position_embeddings", None))
    place = choose_device(device)
    computed_in = choose_dtype(dtype, config, directory, place)
    name, pieces = named_pieces(text)
    words = text_config.vocab_size
    tokens = read_tokens(name, pieces, directory, max_tokens, words)
    return Conditions(directory, cost, name, tokens, words, window, place, computed_in, pruning)


def measure(
    conditions: Conditions,
    model: Any,
    *,
    track: Callable[[range], Iterable[int]] = iter,
    observe: Observer | None = None,
) -> Evaluation:
    """Evaluate a loaded model; ``track`` and ``observe`` as in :func:`perplexity`."""
    start = time.perf_counter()
    with watch_experts(model) as activity:
        result = perplexity(
            model, conditions.tokens, conditions.window, track=track, observe=observe
        )
    return Evaluation(
        model=str(conditions.directory),
        text=conditions.text,
        perplexity=result.perplexity,
        nll=result.nll,
        tokens=result.tokens,
        window=conditions.window,
        windows=result.windows,
        pruning=expert_pruning(model),
        seconds=time.perf_counter() - start,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        **_cost_fields(conditions.cost),
        **_activity_fields(activity, conditions.cost),
    )


def _cost_fields(cost: ModelCost) -> dict[str, Any]:
    facts = cost_facts(cost)
    return {name: facts[name] for name in _COST_FIELDS}


_COST_FIELDS = (
    "compressed",
    "nominal_bits",
    "stored_bits",
    "expert_nominal_bits",
    "expert_stored_bits",
    "bytes",
    "directory_bytes",
    "parameters",
)


def _activity_fields(activity: ExpertActivity, cost: ModelCost) -> dict[str, Any]:
    # None where nobody could watch: experts are then taken to be used equally often.
    used = {layer: seen.frequency for layer, seen in activity.layers.items()} or None
    return {
        "activated_expert_ratio": activity.ratio,
        "activated_expert_ratio_per_layer": {k: s.ratio for k, s in activity.layers.items()},
        "activated_bytes_per_token": cost.activated_bytes(used),
        "activated_parameters_per_token": cost.activated_parameters(used),
    }

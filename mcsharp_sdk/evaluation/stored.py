"""What each tensor of a model folder is for: its role, its weights and their width.

Read from names and headers alone, so that it works for every family without building the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mcsharp_sdk.errors import InputError, Problem, raise_problems
from mcsharp_sdk.folders import CONFIG_FILE
from mcsharp_sdk.models.config_file import check_config
from mcsharp_sdk.models.safetensors_file import TensorInfo
from mcsharp_sdk.runtime.layout import METHOD, PackedLayout, members

Role = Literal["experts", "attention", "linears", "router", "embeddings", "head", "vision", "other"]

_ROLE_NAMES: tuple[tuple[Role, str], ...] = (
    ("vision", r"(^|\.)(visual|vision\w*|audio\w*|\w*projector|resampler\w*)\."),
    ("vision", r"^(image_newline|view_seperator)$"),
    ("other", r"norm\w*(\.(weight|bias|scale))?$|\.conv1d\."),
    ("head", r"(^|\.)(lm_head|embed_out|output_layer)\."),
    ("embeddings", r"(^|\.)(embed_tokens|word_embeddings|embed_in|wte|wpe)\."),
    ("router", r"\.(gate|router|shared_expert_gate|moe_statics|pruner)\.|e_score_correction_bias$"),
    ("experts", r"\.experts\.|\.block_sparse_moe\.(in|out)put_linear\."),
    ("attention", r"\.\w*(attn|attention)\w*\."),
    ("linears", r"\.\d+\."),
    ("other", r""),
)
"""Role and the names that have it; the first match counts. ``linears`` are the other linear layers
of the decoder (dense MLP, shared experts), ``vision`` is what only images (or sound) go through,
``other`` is norms and all else outside the decoder."""

ROLES = tuple((role, re.compile(pattern)) for role, pattern in _ROLE_NAMES)

QUANTISABLE: frozenset[Role] = frozenset({"experts", "attention", "linears"})

READABLE_METHODS = (None, METHOD, "fp8")
"""Quantisation methods whose stored shapes tell how many weights there are."""

_BUCKET = re.compile(r"\.width_(?P<bits>\d+)\.(gate_up|down)_(?P<part>qweight|scales|zeros)$")
_LINEAR = re.compile(r"\.\d+\.(?P<path>.+)\.(?P<part>qweight|scales|zeros)$")
_SINGLE_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class TensorCost:
    """What one tensor of the folder is for, and holds.

    Attributes
    ----------
    name : as stored.
    role : what it is for.
    info : dtype, shape and place.
    parameters : weights that it holds; 0 for scales and zero points. In packed rows the columns
        count rounded up to a multiple of 8, which is exact for all common sizes.
    bits : nominal width of one of them.
    quantised : whether it belongs to the quantised weights; in an uncompressed model, to those
        that could be (matrices of experts, attention and other linear layers).
    """

    name: str
    role: Role
    info: TensorInfo
    parameters: int
    bits: int
    quantised: bool

    @property
    def layer(self) -> int:
        """Index of the decoder layer that it belongs to."""
        return layer_of(self.name)


def role_of(name: str) -> Role:
    """Role of a tensor by its name, on disk or in memory."""
    return next(role for role, pattern in ROLES if pattern.search(name))


def layer_of(name: str) -> int:
    """Decoder layer of a module or tensor: the first number between dots of its name."""
    found = _LAYER.search(name)
    if found is None:
        raise ValueError(f"{name} is in no decoder layer")
    return int(found[1])


def read_config_json(directory: Path) -> dict[str, Any]:
    """The folder's ``config.json``; InputError if it is absent or no JSON object."""
    return check_config(directory)


def read_layout(config: Mapping[str, Any], directory: Path) -> PackedLayout | None:
    """How the folder's weights are packed; None if they are not.

    Raises
    ------
    InputError
        If the layout is malformed, or the model is packed by a method that hides weight counts.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise InputError(f"{directory / CONFIG_FILE}: quantization_config is no object")
    method = settings.get("quant_method")
    if method not in READABLE_METHODS:
        raise InputError(
            f"{directory} is quantised by {method!r}, whose storage mcsharp_sdk cannot count: give "
            "the original model, or one that mcsharp compressed"
        )
    return PackedLayout.from_dict(settings) if method == METHOD else None


def classify(
    tensors: Mapping[str, TensorInfo],
    layout: PackedLayout | None,
    subject: str,
    experts: int | None = None,
) -> list[TensorCost]:
    """Role, weights and width of every tensor.

    Parameters
    ----------
    tensors : of the whole checkpoint.
    layout : how they are packed, if any are.
    subject : what to call the model in an error.
    experts : routed experts of a layer, where the config says it; single experts beyond are those
        of image tokens.

    Raises
    ------
    InputProblems
        If the layout and the stored tensors disagree.
    """
    if layout is None or not layout.packs:
        return [_plain(name, info, experts) for name, info in tensors.items()]
    raise_problems(subject, [*_wrong_buckets(tensors, layout), *_missing_linears(tensors, layout)])
    return [
        _packed(name, info, layout) or replace(_plain(name, info, experts), quantised=False)
        for name, info in tensors.items()
    ]


def expert_sizes(
    tensors: Iterable[TensorCost],
    layout: PackedLayout | None,
    size: Callable[[TensorCost], int],
    experts: int | None = None,
) -> dict[int, tuple[float, ...]]:
    """Decoder layer -> size of each routed expert, in order of expert; 0 of those removed.

    ``size`` is what of a tensor is added up, e.g. its bytes; experts share a stack equally, of
    which there are as many as it has slices, or ``experts`` if that is less.
    """
    sizes: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for layer, bits in (layout.experts if layout else {}).items():
        sizes[layer].update(dict.fromkeys(range(len(bits)), 0.0))
    for tensor in tensors:
        if tensor.role == "experts":
            owners = _owners(tensor, layout, experts)
            for expert in owners:
                sizes[tensor.layer][expert] += size(tensor) / len(owners)
    return {
        layer: tuple(found[expert] for expert in sorted(found))
        for layer, found in sorted(sizes.items())
    }


def _plain(name: str, info: TensorInfo, experts: int | None) -> TensorCost:
    single = _SINGLE_EXPERT.search(name)
    beyond = single is not None and experts is not None and int(single[1]) >= experts
    role = "vision" if beyond else role_of(name)
    scale = name.endswith("_scale_inv")  # of a checkpoint stored in fp8
    matrix = scale or (len(info.shape) >= 2 and not name.endswith("bias"))
    parameters = 0 if scale else info.numel
    width = 8 * info.dtype.itemsize
    return TensorCost(name, role, info, parameters, width, role in QUANTISABLE and matrix)


def _packed(name: str, info: TensorInfo, layout: PackedLayout) -> TensorCost | None:
    """The tensor if it is part of a packed weight, else None."""
    if bucket := _BUCKET.search(name):
        part, bits = bucket["part"], int(bucket["bits"])
    elif (linear := _LINEAR.search(name)) and linear["path"] in layout.linears:
        part, bits = linear["part"], layout.linears[linear["path"]]
    else:
        return None
    weights = info.nbytes * 8 // bits if part == "qweight" else 0
    return TensorCost(name, role_of(name), info, weights, bits, quantised=True)


def _owners(tensor: TensorCost, layout: PackedLayout | None, experts: int | None) -> Sequence[int]:
    """The experts that share a tensor equally."""
    if layout is not None and (bucket := _BUCKET.search(tensor.name)):
        return members(layout.experts[tensor.layer])[int(bucket["bits"])]
    single = _SINGLE_EXPERT.search(tensor.name)
    slices = tensor.info.shape[0]  # of dbrx the rows of all experts
    return [int(single[1])] if single else range(min(slices, experts or slices))


def _wrong_buckets(tensors: Mapping[str, TensorInfo], layout: PackedLayout) -> Iterator[Problem]:
    """Each width of each layer must be stored for as many experts as the config gives it to."""
    stored: dict[tuple[int, int], set[int]] = defaultdict(set)
    for name, info in tensors.items():
        if bucket := _BUCKET.search(name):
            stored[layer_of(name), int(bucket["bits"])].add(info.shape[0])
    wanted = {
        (layer, width): {len(experts)}
        for layer, bits in layout.experts.items()
        for width, experts in members(bits).items()
    }
    for layer, width in sorted(stored.keys() | wanted.keys()):
        in_file, in_config = stored.get((layer, width), {0}), wanted.get((layer, width), {0})
        if in_file != in_config:
            counts = "/".join(map(str, sorted(in_file)))
            yield Problem(
                f"decoder layer {layer}",
                f"{counts} experts of {width} bits are stored, config.json says {min(in_config)}",
            )


def _missing_linears(tensors: Mapping[str, TensorInfo], layout: PackedLayout) -> Iterator[Problem]:
    matches = (_LINEAR.search(name) for name in tensors)
    stored = {match["path"] for match in matches if match and match["part"] == "qweight"}
    for path in sorted(layout.linears.keys() - stored):
        yield Problem(CONFIG_FILE, f"says that {path} is packed, but no layer has it so")

"""What a model on disk costs: bytes, parameters and bits by role, from config and headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.stored import (
    Role,
    TensorCost,
    classify,
    expert_sizes,
    read_config_json,
    read_layout,
)
from mcsharp_sdk.folders import CONFIG_FILE, folder_bytes
from mcsharp_sdk.models.shards import Checkpoint
from mcsharp_sdk.models.topology import NUM_EXPERTS_SETTING, TOP_K_SETTINGS


@dataclass(frozen=True)
class Share:
    """Parameters and bytes of one role."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Bits:
    """Width of some weights.

    Attributes
    ----------
    weights : how many there are, those of removed experts with them.
    nominal : mean bit width, as papers count; 0 for what is removed.
    stored : 8·bytes of everything kept for them (codes, scales, zeros, padding) over ``weights``.
    """

    weights: int
    nominal: float
    stored: float


@dataclass(frozen=True)
class ModelCost:
    """Costs of one model folder.

    Attributes
    ----------
    compressed : whether mcsharp_sdk packed any of it.
    weight_bytes : size of the weight files.
    directory_bytes : size of all files in the folder.
    roles : role -> its share.
    bits : of the quantised weights; of an uncompressed model, of all weights that could be
        (experts and linears).
    expert_bits : the same of the routed experts alone; None without any.
    group_size : columns per scale, None if uncompressed.
    expert_bytes, expert_parameters : decoder layer -> bytes and weights of each routed expert.
    top_k : experts per token, in the layer where they are most; 0 without any.
    always_read_bytes : bytes of weights that every token reads: all but the routed experts and
        what only images go through, and of an embedding table that is not also the head one row.
    always_read_parameters : how many weights those are.
    """

    compressed: bool
    weight_bytes: int
    directory_bytes: int
    roles: Mapping[Role, Share]
    bits: Bits
    expert_bits: Bits | None
    group_size: int | None
    expert_bytes: Mapping[int, tuple[float, ...]]
    expert_parameters: Mapping[int, tuple[float, ...]]
    top_k: int
    always_read_bytes: int
    always_read_parameters: int

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(share.parameters for share in self.roles.values())

    def activated_bytes(self, frequency: Mapping[int, Sequence[float]] | None = None) -> float:
        """Bytes of weights read per token.

        Parameters
        ----------
        frequency : decoder layer -> share of tokens that use each expert, as measured; layers
            that it lacks were not run. Without it, each expert is taken to be used by k/E of the
            tokens.
        """
        return self.always_read_bytes + self._routed(self.expert_bytes, frequency)

    def activated_parameters(self, frequency: Mapping[int, Sequence[float]] | None = None) -> float:
        """Weights that a token is computed with; ``frequency`` as in :meth:`activated_bytes`."""
        return self.always_read_parameters + self._routed(self.expert_parameters, frequency)

    def _routed(
        self,
        sizes: Mapping[int, Sequence[float]],
        frequency: Mapping[int, Sequence[float]] | None,
    ) -> float:
        routed = 0.0
        for layer, of_layer in sizes.items():
            if frequency is None:
                routed += self.top_k * sum(of_layer) / len(of_layer)
            elif layer in frequency:
                routed += sum(f * size for f, size in zip(frequency[layer], of_layer, strict=True))
        return routed


def cost_facts(cost: ModelCost) -> dict[str, Any]:
    """Costs as plain data for JSON, under the names that all verbs use."""
    experts = cost.expert_bits
    return {
        "compressed": cost.compressed,
        "parameters": cost.parameters,
        "bytes": cost.weight_bytes,
        "directory_bytes": cost.directory_bytes,
        "nominal_bits": cost.bits.nominal,
        "stored_bits": cost.bits.stored,
        "expert_nominal_bits": experts.nominal if experts else None,
        "expert_stored_bits": experts.stored if experts else None,
        "group_size": cost.group_size,
        "activated_bytes_per_token": cost.activated_bytes(),
        "activated_parameters_per_token": cost.activated_parameters(),
        "roles": {role: asdict(share) for role, share in cost.roles.items()},
    }


def model_cost(directory: str | Path) -> ModelCost:
    """Add up what the folder's config and safetensors headers say; no weight is read.

    Raises
    ------
    InputError
        If the folder is no model, its checkpoint is damaged, another method's packing hides how
        many weights there are, or the config's widths and the stored tensors disagree.
    """
    directory = Path(directory)
    config = read_config_json(directory)
    layout = read_layout(config, directory)
    checkpoint = Checkpoint.open(directory)
    count = _num_experts(config)
    tensors = classify(checkpoint.tensors, layout, str(directory), count)
    experts = expert_sizes(tensors, layout, lambda tensor: tensor.info.nbytes, count)
    parameters = expert_sizes(tensors, layout, lambda tensor: tensor.parameters, count)
    quantised = [tensor for tensor in tensors if tensor.quantised]
    gone = _removed_weights(parameters)
    return ModelCost(
        compressed=layout is not None and layout.packs,
        weight_bytes=sum(file.stat().st_size for file in checkpoint.files),
        directory_bytes=folder_bytes(directory),
        roles=_shares(tensors),
        bits=_bits(quantised, gone),
        expert_bits=_bits((t for t in quantised if t.role == "experts"), gone) if experts else None,
        group_size=layout.group_size if layout and layout.packs else None,
        expert_bytes=experts,
        expert_parameters=parameters,
        top_k=_top_k(config, directory) if experts else 0,
        always_read_bytes=_always_read(tensors, lambda tensor: tensor.info.nbytes),
        always_read_parameters=_always_read(tensors, lambda tensor: tensor.parameters),
    )


def _shares(tensors: Iterable[TensorCost]) -> dict[Role, Share]:
    parameters: dict[Role, int] = defaultdict(int)
    size: dict[Role, int] = defaultdict(int)
    for tensor in tensors:
        parameters[tensor.role] += tensor.parameters
        size[tensor.role] += tensor.info.nbytes
    return {role: Share(parameters[role], size[role]) for role in parameters}


def _removed_weights(parameters: Mapping[int, Sequence[float]]) -> int:
    """Weights that removed experts had: as many as others, in their layer or else the largest."""
    largest = max((max(sizes) for sizes in parameters.values()), default=0.0)
    gone = (sizes.count(0.0) * (max(sizes) or largest) for sizes in parameters.values())
    return round(sum(gone))


def _bits(tensors: Iterable[TensorCost], removed: int) -> Bits:
    """Of tensors, and of so many weights that are removed."""
    chosen = list(tensors)
    weights = sum(tensor.parameters for tensor in chosen) + removed
    if not weights:
        return Bits(0, 0.0, 0.0)
    nominal = sum(tensor.bits * tensor.parameters for tensor in chosen)
    stored = sum(8 * tensor.info.nbytes for tensor in chosen)
    return Bits(weights, nominal / weights, stored / weights)


def _always_read(tensors: Sequence[TensorCost], size: Callable[[TensorCost], int]) -> int:
    """Sizes of what every token reads; see :class:`ModelCost`."""
    has_head = any(tensor.role == "head" for tensor in tensors)

    def read(tensor: TensorCost) -> int:
        one_row = tensor.role == "embeddings" and has_head
        return size(tensor) // tensor.info.shape[0] if one_row else size(tensor)

    return sum(read(tensor) for tensor in tensors if tensor.role not in ("experts", "vision"))


def _places(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of a config that tell about experts."""
    text = config.get("text_config") or config.get("language_config") or config
    return (text, text.get("ffn_config") or {})


def _num_experts(config: Mapping[str, Any]) -> int | None:
    """Routed experts of a layer, where only the config tells it; None where shapes do."""
    for value in (place.get(NUM_EXPERTS_SETTING) for place in _places(config)):
        count = value[0] if isinstance(value, list) and value else value
        if isinstance(count, int) and count > 0:
            return count
    return None


def _top_k(config: Mapping[str, Any], directory: Path) -> int:
    places = _places(config)
    for value in (place.get(name) for place in places for name in TOP_K_SETTINGS):
        if isinstance(value, int):
            return value
        if isinstance(value, list) and value:
            return max(int(k) for k in value)
    raise InputError(
        f"{directory / CONFIG_FILE} does not say how many experts a token uses; "
        f"looked for {', '.join(TOP_K_SETTINGS)}"
    )

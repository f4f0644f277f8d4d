"""Run a model on calibration tokens one decoder layer at a time.

The arguments of each layer (masks, rotary tables, cache flags) are captured by
:mod:`mcsharp_sdk.models.embedding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.models.embedding import embed
from mcsharp_sdk.models.expert_runs import run_experts
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.scratch import Scratch
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.streamed_layer import StreamedLayer


def advance(layer: StreamedLayer) -> None:
    """Move a layer's activations on through it as it is now."""
    if layer.expert_outputs is None and layer.experts and not layer.experts.in_memory:
        layer.expert_outputs = run_experts(layer, last=True)
    if layer.expert_outputs is None:
        layer.inputs.advance(layer.module, layer.index)
    else:
        layer.advance_with(layer.expert_outputs)
        layer.expert_outputs = None


@torch.no_grad()
def stream_layers(
    source: SourceModel,
    calibration: CalibrationSet,
    track: Callable[[range], Iterator[int]] = iter,  # type: ignore[assignment]
    *,
    by_expert: bool = False,
    scratch: Scratch | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[StreamedLayer]:
    """Yield each decoder layer, loaded, with the activations that reach it.

    The consumer may change the layer's weights: the hidden states move on through the layer as the
    consumer leaves it, and the layer is freed. Through the last layer they do not move: nobody is
    behind it. Peak memory is one layer and the activations.

    Parameters
    ----------
    by_expert : leave routed experts on disk, to be read one by one through ``layer.experts``. What
        the consumer makes of them is seen by the layers behind only through
        ``layer.expert_outputs``.
    scratch : where activations are kept; by default in memory.
    ranks : the processes that share the calibration set. Each runs some of its sequences.

    Raises
    ------
    InputError
        If the model does more between its layers than adding.
    """
    inputs = embed(source, calibration.share(ranks.rank, ranks.count), scratch)
    inputs.ranks = ranks
    for index in track(range(source.topology.num_layers)):
        experts = source.load_layer(index, by_expert=by_expert)
        layer = StreamedLayer(source, index, source.layer(index), inputs, experts)
        yield layer
        if not layer.is_last:
            advance(layer)
        source.free(f"{source.layer_path(index)}.")

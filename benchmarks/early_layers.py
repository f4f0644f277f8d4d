"""What settings of GPTQQuantize do to a model whose first layers alone are quantised.

    python benchmarks/early_layers.py MODEL CALIBRATION.txt EVALUATION.txt … \
        --factors expert_statistics.json [--layers 4] [--bits 2.5] [--tokens 2048] \
        [--settings none propagation=0.5 propagation=0.5,refinements=2]

The layers behind them stay as they are, so that the whole model says what the errors of the first
ones are worth, in a fraction of the time of quantising it. For each text it prints d, which is
ln(perplexity) above the original's, and the Kullback-Leibler divergence from the original's
predictions, which changes less by chance. Texts go through the layers beside the calibration text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from method_runs import markdown
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk import Recipe, allocate
from mcsharp_sdk.data.calibration_set import CalibrationSet
from mcsharp_sdk.data.tokenise import load_tokenizer, token_stream
from mcsharp_sdk.engine.run import read_calibration
from mcsharp_sdk.models.embedding import embed
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.models.stream import stream_layers
from mcsharp_sdk.models.streamed_layer import LayerInputs
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize
from mcsharp_sdk.modifiers.original_model import OriginalModel


@dataclass(frozen=True)
class Texts:
    """Evaluation texts, each so many windows [n, length] of tokens, and a model's head."""

    source: SourceModel
    windows: Mapping[str, Tensor]

    @classmethod
    def read(cls, source: SourceModel, files: Sequence[Path], tokens: int, length: int) -> Texts:
        """The first tokens of each text."""
        tokenizer = load_tokenizer(source.path)
        streams = {f.stem: token_stream(f.read_text(), tokenizer, limit=tokens) for f in files}
        return cls(source, {name: ids.view(-1, length) for name, ids in streams.items()})

    def inputs(self) -> LayerInputs:
        """All windows in front of the first layer."""
        return embed(self.source, CalibrationSet.of_tokens(torch.cat(list(self.windows.values()))))

    def run(self, inputs: LayerInputs, first: int) -> None:
        """Move on through the original layers from ``first`` on."""
        for index in range(first, self.source.topology.num_layers):
            self.source.load_layer(index)
            inputs.advance(self.source.layer(index), index)
            self.source.free(f"{self.source.layer_path(index)}.")

    def logits(self, inputs: LayerInputs) -> Iterator[Tensor]:
        """Of each window, [length, vocabulary], from what is behind the last layer."""
        model = self.source.model
        names = [name for name, _ in model.named_parameters() if ".layers." not in name]
        self.source.load(*names)
        norm, head = model.base_model.norm, model.get_output_embeddings()
        for hidden in inputs.hidden:
            for window in hidden:
                yield F.linear(norm(window), head.weight)


def compared(texts: Texts, inputs: LayerInputs, original: Sequence[Tensor]) -> dict[str, Any]:
    """Text -> d and divergence, [2], on the windows' tokens but the first."""
    found: dict[str, Any] = {}
    each = zip(texts.logits(inputs), original, strict=True)
    for name, windows in texts.windows.items():
        sums = torch.zeros(2, dtype=torch.float64)
        for ids in windows:
            logits, reference = next(each)
            new, old = (F.log_softmax(z[:-1].float(), -1) for z in (logits, reference))
            loss = (old - new).gather(1, ids[1:, None]).mean()
            sums += torch.stack([loss, (old.exp() * (old - new)).sum(-1).mean()]).double()
        found[name] = (sums / len(windows)).tolist()
    return found


def quantised(given: argparse.Namespace, settings: str, texts: Texts) -> LayerInputs:
    """The texts behind all layers, of which the first were quantised with these settings."""
    source = texts.source
    values = {} if settings == "none" else dict(s.split("=") for s in settings.split(","))
    stage = GPTQQuantize(group_size=given.group_size, **{k: _value(v) for k, v in values.items()})
    calibration = {
        "source": "text",
        "path": str(given.calibration.absolute()),
        "sampling": "random",
        "sequences": given.sequences,
        "length": given.length,
    }
    stages = [{"type": "GPTQQuantize", "bits": 2}]  # for its calibration alone
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages})
    widths = allocate(given.factors, BitAllocation(target_bits=given.bits)).bits
    quantiser, model, inputs = stage.quantiser(), OriginalModel(), texts.inputs()
    layers = stream_layers(source, read_calibration(recipe, source))
    for _, layer in zip(range(given.layers), layers, strict=False):
        original = model.layer(layer) if stage.propagates else None
        quantiser.quantise(layer, widths[layer.index], original)
        inputs.advance(layer.module, layer.index)
    texts.run(inputs, given.layers)
    return inputs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--factors", type=Path, required=True, help="expert statistics of MODEL")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["none", "propagation=0.5", "refinements=2", "propagation=0.5,refinements=2"],
        help="settings of GPTQQuantize, NAME=VALUE,NAME=VALUE …, or: none",
    )
    given = parser.parse_args()
    texts = Texts.read(SourceModel(given.model), given.evaluations, given.tokens, given.length)
    inputs = texts.inputs()
    texts.run(inputs, 0)
    original = list(texts.logits(inputs))
    rows = []
    for settings in given.settings:
        start = time.perf_counter()
        found = compared(texts, quantised(given, settings, texts), original)
        told = [f"{value:.4f}" for pair in found.values() for value in pair]
        rows.append([settings, *told, f"{time.perf_counter() - start:.0f}"])
        print(" ".join(rows[-1]), flush=True)
    head = [f"{what} on {name}" for name in texts.windows for what in ("d", "KL")]
    print(f"\n{markdown(['settings', *head, 's'], rows)}")


if __name__ == "__main__":
    main()

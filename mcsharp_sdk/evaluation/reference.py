"""What the original model says, kept so that compressed ones can be compared with it.

Logits of a text are far too large to keep: 300,000 tokens with 32,000 words are 38 GB. What the
model's body gives, of which the head makes the logits, is a tenth or less of that. So the original
runs once, its body's output goes to a temporary folder on disk, the body is freed, and the head
makes the logits again, a few positions at a time, while a compressed model runs. Never are two
models in memory.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.evaluate import Conditions, Evaluation, measure
from mcsharp_sdk.evaluation.perplexity import (
    has_separate_head,
    head_logits,
    window_batches,
    windows_together,
)

HIDDEN, LOGITS = "last_hidden_state", "logits"


class Reference:
    """The original's logits on a text.

    Parameters
    ----------
    conditions : the original, its text and windows.
    folder : an empty folder for what is kept: tokens x hidden size values in the dtype of the
        computation; of a model whose head cannot run alone, tokens x vocabulary.
    track : wraps the range of forwards, e.g. to show progress.

    Attributes
    ----------
    evaluation : of the original itself.
    """

    def __init__(
        self,
        conditions: Conditions,
        folder: Path,
        track: Callable[[range], Iterable[int]] = iter,
    ) -> None:
        self._folder = folder
        window = conditions.window
        self._batches = window_batches(conditions.tokens, window, windows_together(window))
        self._model = conditions.load()
        self._separate = has_separate_head(self._model)
        self._check_room(conditions)
        self._output: Any = None
        self._kept = 0
        self._at_hand: tuple[int, dict[str, Tensor]] = (-1, {})
        if self._separate:
            hook = self._model.base_model.register_forward_hook(self._keep_hidden)
            self.evaluation: Evaluation = measure(conditions, self._model, track=track)
            hook.remove()
            _free_body(self._model)
        else:
            self.evaluation = measure(
                conditions, self._model, track=track, observe=self._keep_logits
            )
            self._model = None

    @torch.inference_mode()
    def logits(self, batch: int, positions: Tensor) -> Tensor:
        """Logits (b, p, vocabulary) at positions (p,) of a batch of windows."""
        kept = self._read(batch)
        if not self._separate:
            return kept[LOGITS][:, positions.cpu()]
        device = self._model.get_input_embeddings().weight.device
        output = copy.copy(self._output)
        output[HIDDEN] = kept[HIDDEN].to(device)
        ids = self._batches[batch].to(device)
        return head_logits(self._model, ids, output, positions.to(device))

    def _read(self, batch: int) -> dict[str, Tensor]:
        """What is kept of a batch, which is asked for many times before the next one."""
        if self._at_hand[0] != batch:
            self._at_hand = batch, load_file(self._file(batch))
        return self._at_hand[1]

    def _keep_hidden(self, _body: Any, _arguments: Any, output: Any) -> None:
        """Keep a batch's output of the body. The head's own calls give the same object again."""
        if output is self._output:
            return
        self._output = output
        save_file({HIDDEN: output[HIDDEN].cpu().contiguous()}, self._file(self._kept))
        self._kept += 1

    def _keep_logits(self, batch: int, _positions: Tensor, logits: Tensor) -> None:
        save_file({LOGITS: logits.cpu().contiguous()}, self._file(batch))

    def _file(self, batch: int) -> Path:
        return self._folder / f"batch_{batch:05d}.safetensors"

    def _check_room(self, conditions: Conditions) -> None:
        text = self._model.config.get_text_config()
        values = text.hidden_size if self._separate else text.vocab_size
        needed = conditions.tokens.numel() * values * conditions.dtype.itemsize
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise InputError(
                f"comparing on {conditions.tokens.numel():,} tokens takes {needed / 1e9:.1f} GB in "
                f"{self._folder.parent}, where {free / 1e9:.1f} GB are free: give fewer "
                "tokens, or another folder in the environment variable TMPDIR"
            )


class Distance:
    """How far a model's predictions are from the original's, summed while it runs.

    KL(p ‖ q) = Σ p ln(p/q), with p of the original and q of the compressed model, in nats: in
    float32 from the logits, summed in float64.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._divergence = 0.0
        self._agreed = 0
        self._count = 0

    def observe(self, batch: int, positions: Tensor, logits: Tensor) -> None:
        """Compare logits (b, p, vocabulary) at positions (p,) of a batch of windows."""
        original = self._reference.logits(batch, positions).to(logits.device)
        own = F.log_softmax(logits.float(), -1)
        true = F.log_softmax(original.float(), -1)
        self._divergence += (
            F.kl_div(own, true, reduction="none", log_target=True).sum(dtype=torch.float64).item()
        )
        self._agreed += int((logits.argmax(-1) == original.argmax(-1)).sum())
        self._count += own.shape[0] * own.shape[1]

    @property
    def kl_divergence(self) -> float:
        """Mean over all predicted tokens, in nats."""
        return self._divergence / self._count

    @property
    def top1_agreement(self) -> float:
        """Share of the predicted tokens where both models' likeliest token is the same."""
        return self._agreed / self._count


def _free_body(model: Any) -> None:
    """Let go of all weights but those of the head and what it shares."""
    head = model.get_output_embeddings()
    kept = {id(tensor) for tensor in (*head.parameters(), *head.buffers())}
    kept |= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for tensor in (*model.base_model.parameters(), *model.base_model.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.new_empty(0)

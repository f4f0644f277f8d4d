"""Several models on one text, side by side, and how far each is from the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mcsharp_sdk.arguments import AnyPath, list_argument, model_path, optional_path
from mcsharp_sdk.errors import InputError, Problem, raise_problems
from mcsharp_sdk.evaluation.evaluate import Conditions, Evaluation, measure, prepare
from mcsharp_sdk.evaluation.loading import AnyDtype
from mcsharp_sdk.evaluation.reference import Distance, Reference
from mcsharp_sdk.evaluation.saved import save_evaluation
from mcsharp_sdk.models.device import AnyDevice, device_name

Track = Callable[[range], Iterable[int]]


@dataclass(frozen=True)
class Compared:
    """One model of a comparison.

    Attributes
    ----------
    evaluation : of the model.
    kl_divergence : mean KL divergence of its predictions from the original's, in nats; None
        without an original.
    top1_agreement : share of predictions whose likeliest token is the original's; None likewise.
    """

    evaluation: Evaluation
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The evaluation's values and the two of this class, as plain data for JSON."""
        return {
            **self.evaluation.to_json(),
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
        }


@dataclass(frozen=True)
class Comparison:
    """Models on one text.

    Attributes
    ----------
    models : in the order in which they were given.
    reference : the original; None if none was given.
    """

    models: Sequence[Compared]
    reference: Evaluation | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "reference": self.reference and self.reference.to_json(),
            "models": [compared.to_json() for compared in self.models],
        }

    def save(self) -> list[Path]:
        """Keep each model's figures in its folder, for its report; the files written."""
        reference = self.reference and self.reference.to_json()
        return [
            save_evaluation(
                Path(compared.evaluation.model), {**compared.to_json(), "reference": reference}
            )
            for compared in self.models
        ]


def compare(
    model_dirs: Sequence[AnyPath],
    text: AnyPath | None = None,
    *,
    reference: AnyPath | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    device: AnyDevice = "auto",
    dtype: AnyDtype = "auto",
    pruning: str | None = None,
    track: Track = iter,
    on_model: Callable[[str], None] = lambda name: None,
    on_result: Callable[[Comparison], None] = lambda found: None,
) -> Comparison:
    """Evaluate several models on the same text, one after the other.

    One model is in memory at a time, and of the original only its head while the others run. What
    the head needs is kept on disk meanwhile, in a temporary folder: see
    :mod:`mcsharp_sdk.evaluation.reference`.

    Parameters
    ----------
    model_dirs : folders of models, compressed or not, with one tokenizer.
    text, window, max_tokens, device, dtype, track : as in :func:`evaluate`. Without ``window``, it
        is the largest that all models can read.
    reference : folder of the original; with it, KL divergence and top-1 agreement are measured.
    pruning : as in :func:`evaluate`, for all models but the original.
    on_model : called with the folder of the model that is next.
    on_result : called with a comparison of each model alone as soon as it is measured, e.g. to save
        it: what a later model fails at does not cost the earlier ones.

    Raises
    ------
    InputProblems
        With everything that is wrong with any of the folders, or if a model has another vocabulary
        than the original, before work begins.
    InputError
        If there is no folder, or no list of them, the tokenizers differ, or the disk has no room
        for the original's outputs.
    """
    given = list_argument(model_dirs, "model_dirs")
    directories = [model_path(one, f"model_dirs[{i}]") for i, one in enumerate(given)]
    if not directories:
        raise InputError("there is nothing to compare: give one model folder or more")
    place, file = device_name(device), optional_path(text, "text", "the file of the text")
    settings = {"window": window, "max_tokens": max_tokens, "device": place, "dtype": dtype}
    wanted = [(folder, pruning) for folder in directories]
    wanted += [] if reference is None else [(model_path(reference, "reference"), None)]
    conditions = _prepare(wanted, file, settings)
    original = conditions.pop() if reference is not None else None
    if original is not None:
        _check_vocabularies(conditions, original)
    with TemporaryDirectory(prefix="mcsharp_reference_") as folder:
        known = None
        if original is not None:
            on_model(str(original.directory))
            known = Reference(original, Path(folder), track)
        of_original = known.evaluation if known else None
        models = []
        for one in conditions:
            on_model(str(one.directory))
            models.append(_measure(one, known, track))
            on_result(Comparison(models[-1:], of_original))
    return Comparison(models, of_original)


def _check_vocabularies(conditions: Sequence[Conditions], original: Conditions) -> None:
    problems = [
        Problem(
            str(one.directory),
            f"it predicts {one.vocabulary} words and {original.directory} "
            f"{original.vocabulary}: their predictions do not compare, so leave the reference out",
        )
        for one in conditions
        if one.vocabulary != original.vocabulary
    ]
    raise_problems("the comparison", problems)


def _measure(conditions: Conditions, reference: Reference | None, track: Track) -> Compared:
    model = conditions.load()
    try:
        if reference is None:
            return Compared(measure(conditions, model, track=track))
        distance = Distance(reference)
        found = measure(conditions, model, track=track, observe=distance.observe)
        return Compared(found, distance.kl_divergence, distance.top1_agreement)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _prepare(
    wanted: Sequence[tuple[Path, str | None]],
    text: Path | None,
    settings: dict[str, Any],
) -> list[Conditions]:
    """Conditions of all models, with one window and the same tokens."""
    found, problems = [], []
    for folder, pruning in wanted:
        try:
            found.append(prepare(folder, text, pruning=pruning, **settings))
        except InputError as error:
            problems.append(Problem(str(folder), str(error)))
    raise_problems("the comparison", problems)
    if settings["window"] is None:
        window = min(conditions.window for conditions in found)
        if any(conditions.window != window for conditions in found):
            return _prepare(wanted, text, {**settings, "window": window})
    for other in found[1:]:
        if not torch.equal(other.tokens, found[0].tokens):
            raise InputError(
                f"{found[0].directory} and {other.directory} cut the text into different tokens, "
                "so that neither their perplexities nor their predictions compare: compare models "
                "with one tokenizer"
            )
    return found

"""Distances to the original, against both whole models in memory and float64."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_runs import QUANTISE, load, pruning_recipe, run, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import Tensor

from mcsharp_sdk import compare, evaluate
from mcsharp_sdk.cli import main
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation import reference as reference_module
from mcsharp_sdk.evaluation.evaluate import Conditions, prepare
from mcsharp_sdk.evaluation.perplexity import has_separate_head
from mcsharp_sdk.evaluation.reference import Reference
from mcsharp_sdk.evaluation.saved import read_evaluations
from mcsharp_sdk.folders import EVALUATION_FILE

WINDOW, TOKENS = 40, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``original``, ``two`` (2 bits) and ``pruned`` (3 bits and pruned), with a text beside."""
    folder = tmp_path_factory.mktemp("models")
    text = write_text(folder)
    original = save_tiny_model(folder / "original", "mixtral", initializer_range=0.2)
    save_tiny_tokenizer(original)
    stages = {
        "pruned": [QUANTISE, {"type": "TokenProtection"}],
        "two": [{**QUANTISE, "bits": 2}],
    }
    for name, chosen in stages.items():
        run(original, pruning_recipe(text, *chosen), folder / f"{name}_work")
        (folder / f"{name}_work" / "out").rename(folder / name)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return {"text": folder / "text.txt", "window": WINDOW, "max_tokens": TOKENS, "device": "cpu"}


@torch.no_grad()
def whole_distance(original: Any, other: Any, text: Path) -> tuple[float, float]:
    """KL divergence and agreement with both models in memory, in float64."""
    tokens = torch.tensor([ord(c) for c in text.read_text()[:TOKENS]])
    divergences: list[Tensor] = []
    agreed: list[Tensor] = []
    for part in tokens.split(WINDOW):
        p, q = (
            m(input_ids=part[None]).logits[0, :-1].double().softmax(-1) for m in (original, other)
        )
        divergences.append((p * (p / q).log()).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
    return float(torch.cat(divergences).mean()), float(torch.cat(agreed).double().mean())


def test_distances_are_those_of_whole_models(folder: Path) -> None:
    found = compare(
        [folder / "two", folder / "pruned"], reference=folder / "original", **settings(folder)
    )
    original = load(folder / "original")
    for compared, name in zip(found.models, ("two", "pruned"), strict=True):
        divergence, agreement = whole_distance(original, load(folder / name), folder / "text.txt")
        assert divergence > 1e-3
        assert compared.kl_divergence == pytest.approx(divergence, rel=1e-3)
        assert compared.top1_agreement == pytest.approx(agreement, abs=1.5 / TOKENS)


def test_all_else_is_what_evaluate_says(folder: Path) -> None:
    found = compare([folder / "two"], reference=folder / "original", **settings(folder))
    assert found.reference is not None
    for name, evaluation in (("two", found.models[0].evaluation), ("original", found.reference)):
        alone = evaluate(folder / name, **settings(folder)).to_json()
        assert {**evaluation.to_json(), "seconds": 0} == {**alone, "seconds": 0}


def test_a_model_is_no_distance_from_itself(folder: Path) -> None:
    original = folder / "original"
    (itself,) = compare([original], reference=original, **settings(folder)).models
    assert itself.kl_divergence == pytest.approx(0, abs=1e-12)
    assert itself.top1_agreement == 1.0


def test_a_head_that_cannot_run_alone_gives_the_same_distances(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for name, spread in (("original", 0.2), ("other", 0.21)):
        save_tiny_tokenizer(save_tiny_model(tmp_path / name, "llama4", initializer_range=spread))
    original, other = (load(tmp_path / name) for name in ("original", "other"))
    assert not has_separate_head(original)
    (found,) = compare(
        [tmp_path / "other"], reference=tmp_path / "original", **settings(tmp_path)
    ).models
    divergence, agreement = whole_distance(original, other, text)
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert found.top1_agreement == pytest.approx(agreement, abs=1.5 / TOKENS)


def test_only_embedding_and_head_of_the_original_stay_in_memory(
    folder: Path, tmp_path: Path
) -> None:
    kept = Reference(prepare(folder / "original", **settings(folder)), tmp_path)
    held = sum(p.numel() for p in (*kept._model.parameters(), *kept._model.buffers()))
    model = load(folder / "original")
    head = (
        model.get_output_embeddings().weight.numel() + model.get_input_embeddings().weight.numel()
    )
    assert held == head < sum(p.numel() for p in model.parameters()) / 2
    hidden = model.config.hidden_size
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 4 * TOKENS * hidden <= stored < 4 * TOKENS * hidden + 8192


def test_parameters_per_token_are_those_that_a_token_meets(folder: Path) -> None:
    """All but the unused rows of the table and the experts that are not chosen."""
    found = evaluate(folder / "original", **settings(folder))
    model = load(folder / "original")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    table = model.get_input_embeddings().weight
    others = sum(p.numel() for p in model.parameters()) - experts - table.numel() + table.shape[1]
    chosen = model.config.num_experts_per_tok / model.config.num_local_experts
    assert found.activated_parameters_per_token == pytest.approx(others + experts * chosen)
    two = evaluate(folder / "two", **settings(folder))
    assert two.activated_parameters_per_token == pytest.approx(others + experts * chosen)


def test_what_is_saved_is_read_again_and_replaced_under_the_same_conditions(folder: Path) -> None:
    found = compare([folder / "two"], reference=folder / "original", **settings(folder))
    for _ in range(2):
        assert found.save() == [folder / "two" / EVALUATION_FILE]
    compare([folder / "two"], **{**settings(folder), "max_tokens": 100}).save()
    first, second = read_evaluations(folder / "two")
    assert first == json.loads(
        json.dumps({**found.models[0].to_json(), "reference": found.to_json()["reference"]})
    )
    assert (second["tokens"], second["kl_divergence"], second["reference"]) == (100, None, None)


def test_all_that_is_wrong_is_told_together(folder: Path) -> None:
    with pytest.raises(InputProblems) as caught:
        compare([folder / "absent", folder / "two", folder], **settings(folder))
    assert [problem.where for problem in caught.value.problems] == [
        str(folder / "absent"),
        str(folder),
    ]
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])


@pytest.mark.parametrize("given", ["out", Path("out")])
def test_one_folder_is_no_list_of_folders(given: Any) -> None:
    with pytest.raises(InputError, match="model_dirs is a list: give"):
        compare(given)


def test_models_before_one_that_fails_are_not_lost(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [shutil.copytree(folder / name, tmp_path / name) for name in ("two", "pruned")]
    (tmp_path / "two" / EVALUATION_FILE).unlink(missing_ok=True)
    load_whole = Conditions.load

    def fail(self: Conditions) -> Any:
        if self.directory.name == "pruned":
            raise RuntimeError("no memory left")
        return load_whole(self)

    monkeypatch.setattr(Conditions, "load", fail)
    options = ["--text", folder / "text.txt", "--window", WINDOW, "--max-tokens", TOKENS]
    options += ["--reference", folder / "original", "--save", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main.run([str(part) for part in ("evaluate", "--compare", *models, *options)])
    assert end.value.code == 1
    monkeypatch.undo()
    (expected,) = compare(models[:1], reference=folder / "original", **settings(folder)).models
    (kept,) = read_evaluations(tmp_path / "two")
    assert kept["kl_divergence"] == expected.kl_divergence
    assert kept["reference"]["perplexity"] > 1
    shown = capsys.readouterr()
    assert f"{expected.evaluation.perplexity:.4g}" in shown.out
    assert "no memory left" in shown.err


def test_models_of_other_vocabularies_have_no_distance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_tokenizer(save_tiny_model(tmp_path, "mixtral", vocab_size=144))
    assert len(compare([folder / "two", tmp_path], **settings(folder)).models) == 2
    monkeypatch.setattr(Conditions, "load", lambda self: pytest.fail("loaded"))
    with pytest.raises(InputProblems, match="predicts 144 words and .*original 128: their pred"):
        compare([folder / "two", tmp_path], reference=folder / "original", **settings(folder))


def test_models_with_other_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "mixtral")
    save_tiny_tokenizer(tmp_path, vocabulary=100)
    with pytest.raises(InputError, match="different tokens"):
        compare([folder / "two", tmp_path], **settings(folder))


def test_a_full_disk_is_told_before_the_original_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(reference_module.shutil, "disk_usage", lambda _: usage(1, 1, 10))
    with pytest.raises(InputError, match="give fewer tokens"):
        compare([folder / "two"], reference=folder / "original", **settings(folder))


@pytest.mark.parametrize("content", ["[]", "{", '{"evaluations": 3}', '{"evaluations": [{}]}'])
def test_a_damaged_file_of_evaluations_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / EVALUATION_FILE).write_text(content)
    with pytest.raises(InputError, match=EVALUATION_FILE):
        read_evaluations(tmp_path)

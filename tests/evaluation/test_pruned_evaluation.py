"""Evaluation and inspection of models that prune experts, against the slow reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command_line import run
from pruned_models import SlowPruning, networks, pruning_layout, save_pruned, stock_model
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.evaluation.evaluate import evaluate
from mcsharp_sdk.evaluation.inspection import inspect
from mcsharp_sdk.runtime.pruning_layout import PruningLayout

TEXT = "".join(chr(33 + 7 * i * i % 89) for i in range(120))
WINDOW = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlowPruning]:
    """A folder of a packed model with rule and networks, and its reference."""
    stock, topology = stock_model("deepseek_v3")
    layout = pruning_layout(topology, "rule")
    nets = networks(topology, stock.config.hidden_size, trained=True)
    folder = tmp_path_factory.mktemp("model")
    save_pruned(folder, stock, topology, layout, nets, packed=True)
    save_tiny_tokenizer(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder, SlowPruning(stock, topology, layout, nets)


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("unpruned"), "mixtral")
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("mode", [None, "off", "rule", "learned", "both"])
def test_shares_bytes_and_perplexity_are_those_of_the_mode(
    made: tuple[Path, SlowPruning], mode: str | None
) -> None:
    folder, reference = made
    result = evaluate(folder, folder / "text.txt", window=WINDOW, device="cpu", pruning=mode)
    reference.mode = mode or "rule"
    assert result.pruning == reference.mode
    tokens = torch.tensor([ord(letter) for letter in TEXT])
    used = {layer: torch.zeros(8) for layer in (1, 2)}
    losses = []
    for window in tokens.split(WINDOW):
        chances = reference.logits(window)[:-1].log_softmax(-1)
        losses.append(-chances.gather(1, window[1:, None]))
        for layer, index in reference.choices.items():
            used[layer] += index.flatten().bincount(minlength=9)[:8]
    assert result.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-3)
    shares = {layer: counts.sum().item() / (3 * len(TEXT)) for layer, counts in used.items()}
    assert result.activated_expert_ratio_per_layer == pytest.approx(shares)
    assert result.activated_expert_ratio == pytest.approx(sum(shares.values()) / 2)
    frequency = {layer: (counts / len(TEXT)).tolist() for layer, counts in used.items()}
    read = model_cost(folder).activated_bytes(frequency)
    assert result.activated_bytes_per_token == pytest.approx(read)
    assert (result.activated_expert_ratio == 1.0) == (mode == "off")


def test_networks_count_as_router(made: tuple[Path, SlowPruning]) -> None:
    folder, reference = made
    cost, network = model_cost(folder), reference.nets[1]
    size = sum(p.numel() for p in network.parameters())
    gates = sum(
        p.numel() for n, p in reference.model.named_parameters() if n.endswith("gate.weight")
    )
    biases = 2 * 8
    assert cost.roles["router"].parameters == 2 * size + gates + biases
    assert {len(sizes) for sizes in cost.expert_bytes.values()} == {8}
    assert cost.expert_bits is not None
    assert cost.expert_bits.nominal == 4


def test_a_model_that_is_only_pruned_is_not_compressed(tmp_path: Path) -> None:
    stock, topology = stock_model("mixtral")
    layout = dataclasses.replace(pruning_layout(topology, "rule", "none"), learned=None)
    save_pruned(tmp_path, stock, topology, layout, {}, packed=False)
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    result = evaluate(tmp_path, tmp_path / "text.txt", window=WINDOW, device="cpu")
    assert result.pruning == "rule"
    assert not result.compressed
    assert result.nominal_bits == 32
    assert result.activated_expert_ratio is not None
    assert 0.5 < result.activated_expert_ratio < 1
    found = inspect(tmp_path)
    assert found.widths is None
    assert found.pruning == layout


def test_modes_without_data_are_refused_before_the_model_is_loaded(
    made: tuple[Path, SlowPruning], unpruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcsharp_sdk.evaluation.evaluate.load_model", None)
    with pytest.raises(InputError, match="'learned' is not possible: .* has none; only 'off' is"):
        evaluate(unpruned, pruning="learned")
    with pytest.raises(InputError, match="'always' is not possible.*can do off, rule, learned"):
        evaluate(made[0], pruning="always")


def test_off_is_possible_for_every_model(unpruned: Path) -> None:
    assert evaluate(unpruned, max_tokens=20, device="cpu", pruning="off").pruning == "off"


def test_the_command_takes_a_mode_and_shows_the_layers(
    made: tuple[Path, SlowPruning], unpruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made[0]
    options = ("--text", folder / "text.txt", "--device", "cpu")
    assert run("evaluate", folder, *options, "--pruning", "learned") == 0
    shown = capsys.readouterr().out
    result = evaluate(folder, folder / "text.txt", device="cpu", pruning="learned")
    for share in result.activated_expert_ratio_per_layer.values():
        assert f"{share:.1%}" in shown
    assert run("evaluate", folder, *options, "--pruning", "off", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pruning"] == "off"
    assert run("evaluate", unpruned, "--pruning", "rule") == 2
    assert "only 'off' is" in capsys.readouterr().err


def test_inspection_shows_the_pruning(
    made: tuple[Path, SlowPruning], unpruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, reference = made
    assert run("inspect", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert PruningLayout.from_dict(found["pruning"]) == reference.layout
    assert run("inspect", folder) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("rule when loaded", "metric attention", "protects 0.2", "0.6 to 0.8", "6 units"):
        assert part in shown
    assert run("inspect", unpruned, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pruning"] is None

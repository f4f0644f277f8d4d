"""mcsharp export, and the function behind it: settings and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pruned_models import networks, pruning_layout, save_pruned, stock_model

import mcsharp_sdk
from mcsharp_sdk.cli.main import run
from mcsharp_sdk.errors import InputError


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(["export", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is loaded with pruning ``both``."""
    model, topology = stock_model("mixtral")
    nets = networks(topology, model.config.hidden_size, trained=True)
    folder = tmp_path_factory.mktemp("pruned")
    return save_pruned(folder, model, topology, pruning_layout(topology), nets, packed=True)


@pytest.mark.parametrize(
    ("options", "pruning", "dtype"),
    [
        ((), "both", "fp32"),
        (("--set", "pruning=rule"), "rule", "fp32"),
        (("--set", "pruning=off", "--dtype", "fp16"), "off", "fp16"),
        (("--set", "pruning=learned", "--set", "dtype=bf16"), "learned", "bf16"),
    ],
)
def test_settings_are_taken(
    pruned: Path, options: tuple[str, ...], pruning: str, dtype: str, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "routers"
    assert export("onnx_routers", pruned, "--output", output, "--json", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["pruning"], printed["dtype"]) == (pruning, dtype)
    assert printed == json.loads((output / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "pruning=rulez"), "did you mean 'rule'?"),
        (("--set", "prunning=rule"), "did you mean 'pruning'?"),
        (("--set", "pruning"), "write it as target=value"),
        (("--dtype", "fp8"), "dtype: should be 'fp32', 'fp16' or 'bf16', not 'fp8'"),
        (("--set", "folder=x"), "folder: cannot be set here"),
    ],
)
def test_wrong_settings_are_explained(
    pruned: Path, options: tuple[str, ...], message: str, tmp_path: Path, capsys: Any
) -> None:
    assert export("onnx_routers", pruned, "--output", tmp_path / "o", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_everything_that_is_wrong_is_said_at_once(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        mcsharp_sdk.export("onnx_routers", pruned, tmp_path / "o", dtype="fp8", pruning=3, type="x")
    assert all(f"  {name}: " in str(error.value) for name in ("dtype", "pruning", "type"))


def test_only_exporters_that_need_no_run_can_be_called(pruned: Path) -> None:
    with pytest.raises(InputError, match="'safetensors' cannot be exported from a model folder"):
        mcsharp_sdk.export("safetensors", pruned)

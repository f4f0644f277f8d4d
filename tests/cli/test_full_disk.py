"""Verbs whose file does not fit: they name it, say what to do, and leave nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from tiny_models import save_tiny_model

from mcsharp_sdk.artifact_file import atomic_file
from mcsharp_sdk.engine.obstacles import disk_obstacle

STAGE = "{type: GPTQQuantize, bits: 4, quantizer: rtn, group_size: 32}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compressed model and a file of expert statistics."""
    folder = tmp_path_factory.mktemp("base")
    model = save_tiny_model(folder / "model", "mixtral")
    (folder / "recipe.yaml").write_text(f"{{version: 1, stages: [{STAGE}]}}")
    recipe = folder / "recipe.yaml"
    assert run("compress", recipe, "--model", model, "--output", folder / "done") == 0
    errors = [{"1": 3.0, "2": 2.0, "3": 1.0}, {"1": 6.0, "2": 3.0, "3": 2.0}] * 400
    layer = {"layer": 0, "activation_count": [3] * 800, "routing_weight_sum": [1] * 800}
    statistics = {"layers": [{**layer, "quant_error": errors}]}
    (folder / "factors.json").write_text(json.dumps(statistics))
    return folder


@pytest.mark.parametrize(
    ("command", "named", "code"),
    [
        ("export onnx_model done", "done/onnx_model", 1),
        ("export onnx_routers done --output routers", "routers", 1),
        ("report done", "done/mcsharp_report.html", 1),
        ("report done --output page.html", "page.html", 1),
        ("allocate factors.json --target-bits 2 --output map.json", "map.json", 1),
        ("recipes cp quickstart mine.yaml", "mine.yaml", 2),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_of_it_is_left(
    command: str, named: str, code: int, base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    limit = 1 if code == 1 else 0  # in KiB; importing torch takes a small temporary file
    verb = f"ulimit -f {limit} && exec {sys.executable} -m mcsharp_sdk.cli {command}"
    done = subprocess.run(["bash", "-c", verb], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code
    if code == 1:
        expected = f"{named}: a file would be larger than allowed (see `ulimit -f`): raise"
        assert f"error: {expected} the limit, then run the same command again" in done.stderr
    else:
        assert f"'{named}' cannot be written: File too large" in done.stderr
    assert "OSError" not in done.stderr
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_error_of_writing_gets_the_name_of_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space") as caught,
        atomic_file(tmp_path / "whole"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert disk_obstacle(caught.value) == (
        f"{tmp_path / 'whole'}: no space is left on the disk: make room"
    )


def test_of_a_copy_the_file_that_is_written_is_named() -> None:
    error = OSError(28, "No space left on device", "original", None, "copy")
    assert disk_obstacle(error) == "copy: no space is left on the disk: make room"
    assert disk_obstacle(OSError(2, "No such file or directory", "absent")) is None

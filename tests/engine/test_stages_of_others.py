"""Stages that other packages bring: what they write is checked, and their code counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

import mcsharp_sdk
from mcsharp_sdk.artifacts import BitMap
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.modifiers.gptq_quantize import GPTQQuantize

STAGE = """
from typing import Any, ClassVar, Literal

from mcsharp_sdk.artifacts import BitMap
from mcsharp_sdk.modifiers.base import Modifier


class OneWidth(Modifier):
    type: Literal["OneWidth"] = "OneWidth"
    writes: ClassVar[str] = BitMap.NAME

    def run(self, context: Any) -> None:
        experts = context.model.topology.experts_per_layer()
        {work}
"""
WRITES = "context.write(BitMap({{layer: ({width},) * n for layer, n in experts.items()}}))"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", "mixtral")


def stage(folder: Path, work: str) -> Any:
    """The stage as it is when its file holds such work."""
    file = folder / "stages_of_others.py"
    file.write_text(STAGE.format(work=work))
    spec = importlib.util.spec_from_file_location("stages_of_others", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.OneWidth()


def compress(folder: Path, model: Path, work: str, **settings: Any) -> BitMap:
    """What the work gives."""
    quantise = GPTQQuantize(quantizer="rtn", group_size=16)
    recipe = mcsharp_sdk.Recipe(version=1, stages=(stage(folder, work), quantise))
    mcsharp_sdk.compress(recipe, model, folder / "out", progress=False, **settings)
    return BitMap.load(folder / "out" / BitMap.FILE)


def test_a_run_does_not_go_on_with_what_other_code_left(model: Path, tmp_path: Path) -> None:
    kept = {"run_dir": tmp_path / "run", "overwrite": True}
    assert compress(tmp_path, model, WRITES.format(width=2), **kept).nominal_bits == 2
    with pytest.raises(InputError, match=r"code of stages\[0\]"):
        compress(tmp_path, model, WRITES.format(width=3), **kept)
    assert compress(tmp_path, model, WRITES.format(width=2), **kept).nominal_bits == 2


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("pass", "OneWidth did not write its result: .*'bit_allocation'"),
        ("context.write(BitMap({0: (2, 2)}))", "the bit map that a stage made has nothing for"),
    ],
)
def test_what_a_stage_does_not_write_as_it_should_is_told_at_once(
    work: str, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        compress(tmp_path, model, work)


def test_a_width_that_cannot_be_stored_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 is no width that can be stored"):
        compress(tmp_path, model, WRITES.format(width=5))

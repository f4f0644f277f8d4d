"""A text and tiny models that tests of the stages calibrate on and change."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruning_runs import write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """mixtral has k = 2; deepseek_v3 has k = 3, unsorted slots, sigmoid scores, a dense layer."""
    folders = {}
    for family in ("mixtral", "deepseek_v3"):
        folders[family] = save_tiny_model(tmp_path_factory.mktemp(family), family)
        save_tiny_tokenizer(folders[family])
    return folders

"""mcsharp schema."""

from __future__ import annotations

import json

import pytest

from mcsharp_sdk.cli.main import run
from mcsharp_sdk.recipe import json_schema


def test_the_schema_is_printed_as_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["schema"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(json_schema()))

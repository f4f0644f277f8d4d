"""The sample plug-in, installed as a package manager would: by a folder of metadata on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from plugin_folder import install

ENTRY_POINTS = """\
[mcsharp_sdk.modifiers]
Measure = sample_plugin:Measure
Decide = sample_plugin:Decide
Broken = package_that_is_not_there:Broken
NotAStage = sample_plugin:Options
Misnamed = sample_plugin:Measure
[mcsharp_sdk.exporters]
listing = sample_plugin:Listing
"""


@pytest.fixture(scope="session", autouse=True)
def _sample_plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    install(folder, "sample-plugin", ENTRY_POINTS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))

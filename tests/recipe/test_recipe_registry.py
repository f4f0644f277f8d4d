"""Stages and exporters from entry points."""

from __future__ import annotations

from pathlib import Path

import pytest
import sample_plugin
from plugin_folder import install

from mcsharp_sdk.recipe.registry import EXPORTERS, MODIFIERS, PluginError


def test_what_packages_offer_is_found_by_name() -> None:
    assert MODIFIERS.load("Measure") is sample_plugin.Measure
    assert EXPORTERS.load("listing") is sample_plugin.Listing
    assert {"Measure", "Decide", "Broken", "ExpertStats"} <= set(MODIFIERS.names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("measure", "unknown stage 'measure'; did you mean 'Measure'?"),
        ("Broken", "stage 'Broken' of sample-plugin 1.0 cannot be imported: ModuleNotFoundError"),
        ("NotAStage", "stage 'NotAStage' of sample-plugin 1.0 is no Modifier"),
        ("Misnamed", "stage 'Misnamed' of sample-plugin 1.0 calls itself 'Measure'"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_package(name: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        MODIFIERS.load(name)
    assert str(caught.value).startswith(message)


def test_a_broken_plugin_does_not_hide_the_others() -> None:
    usable = dict(MODIFIERS.usable())
    assert usable["Broken"] is None
    assert usable["Measure"] is sample_plugin.Measure


def test_two_packages_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "rival", "[mcsharp_sdk.modifiers]\nMeasure = sample_plugin:Decide\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"offered by rival 1\.0 and sample-plugin 1\.0"):
        MODIFIERS.load("Measure")

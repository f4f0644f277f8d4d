"""The stored description of expert pruning: written, read, and refused when malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.pruning_layout import (
    DROP_INSIGNIFICANT,
    RULE_METRICS,
    LearnedPruning,
    PruningLayout,
    RulePruning,
)

_share = st.floats(0, 1)
_layer = st.integers(0, 90)
_rules = st.builds(
    RulePruning,
    metric=st.sampled_from(RULE_METRICS),
    protect_ratio=_share,
    drop_ratio=_share,
    thresholds=st.dictionaries(_layer, st.lists(_share, max_size=5).map(tuple), max_size=3),
)
_learned = st.builds(
    LearnedPruning, units=st.integers(1, 99), layers=st.sets(_layer).map(lambda s: tuple(sorted(s)))
)
_layouts = st.one_of(
    st.builds(PruningLayout, mode=st.sampled_from(["off", "rule"]), rule=_rules),
    st.builds(PruningLayout, mode=st.sampled_from(["off", "learned"]), learned=_learned),
    st.builds(PruningLayout, mode=st.just("learned"), rule=_rules, learned=_learned),
)
RULE = RulePruning("attention", 0.02, 0.0, {0: (0.5,)})
LEARNED = LearnedPruning(8, (0, 2))


@given(_layouts)
def test_a_layout_survives_being_written_and_read(layout: PruningLayout) -> None:
    written = json.loads(json.dumps(PackedLayout(64, {0: (2, 2)}, {}, layout).to_dict()))
    assert PackedLayout.from_dict(written).pruning == layout


def test_a_model_without_pruning_says_nothing_of_it() -> None:
    assert "pruning" not in PackedLayout(64, {}, {}).to_dict()
    assert PackedLayout.from_dict(PackedLayout(64, {}, {}).to_dict()).pruning is None


def test_a_model_that_is_only_pruned_packs_nothing() -> None:
    assert not PackedLayout(64, {}, {}, PruningLayout("rule", RULE)).packs
    assert PackedLayout(64, {0: (2,)}, {}).packs
    assert PackedLayout(64, {}, {"self_attn.q_proj": 4}).packs


@pytest.mark.parametrize(
    ("layout", "modes"),
    [
        (PruningLayout("off", RULE), ("off", "rule")),
        (PruningLayout("off", None, LEARNED), ("off", "learned")),
        (PruningLayout("both", RULE, LEARNED), ("off", "rule", "learned", "both")),
        (
            PruningLayout("rule", RulePruning(DROP_INSIGNIFICANT, 0, 0.1, {0: (0.0,)}), LEARNED),
            ("off", "rule", "learned"),
        ),
    ],
)
def test_the_modes_are_those_that_there_is_data_for(
    layout: PruningLayout, modes: tuple[str, ...]
) -> None:
    assert layout.modes == modes
    for mode in ("off", "rule", "learned", "both", "always"):
        if mode in modes:
            layout.check_mode(mode)
        else:
            with pytest.raises(InputError, match=f"'{mode}' is not possible.*off, "):
                layout.check_mode(mode)


@pytest.mark.parametrize(
    ("metric", "protect", "drop", "importance"),
    [
        ("attention", 0.02, 0.5, "attention"),
        ("kurtosis", 0.02, 0.0, "kurtosis"),
        ("kurtosis", 0.0, 0.5, None),
        ("none", 0.02, 0.5, None),
        (DROP_INSIGNIFICANT, 0.02, 0.5, "attention"),
        (DROP_INSIGNIFICANT, 0.02, 0.0, None),
    ],
)
def test_tokens_are_ranked_only_where_it_matters(
    metric: str, protect: float, drop: float, importance: str | None
) -> None:
    assert RulePruning(metric, protect, drop, {}).importance == importance


GOOD: dict[str, Any] = PruningLayout("both", RULE, LEARNED).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "always"}, "'always' is not possible"),
        ({"mode": "both", "learned": None}, "no learned pruning"),
        ({"mode": "rule", "rule": None}, "no pruning rule"),
        ({"mode": "off", "rule": None, "learned": None}, "neither"),
        ({"mode": ["rule"]}, "not possible"),
        ({"rule": {**GOOD["rule"], "metric": "size"}}, "no token metric 'size'"),
        ({"rule": {**GOOD["rule"], "protect_ratio": 1.5}}, "protect_ratio: 1.5"),
        ({"rule": {**GOOD["rule"], "drop_ratio": float("nan")}}, "drop_ratio: nan"),
        ({"rule": {**GOOD["rule"], "thresholds": {"0": [2.0]}}}, "decoder layer 0: 2.0"),
        ({"rule": {**GOOD["rule"], "thresholds": {"zero": [0.5]}}}, "malformed"),
        ({"rule": {**GOOD["rule"], "thresholds": None}}, "malformed"),
        ({"rule": {"metric": "mean"}}, "malformed"),
        ({"rule": 3}, "malformed"),
        ({"learned": {"units": 0, "layers": [0]}}, "not 0"),
        ({"learned": {"units": 1e300, "layers": [0]}}, "1 to 4096 units"),
        ({"learned": {"units": 4, "layers": [2, 0]}}, "not ascending"),
        ({"learned": {"units": 4}}, "malformed"),
        ({"modes": "rule"}, "pruning: it has modes, which this mcsharp_sdk does not know"),
        ({"rule": {**GOOD["rule"], "drop": 0.1}}, "pruning: rule has drop, which"),
        ({"learned": {**GOOD["learned"], "bias": True}}, "pruning: learned has bias, which"),
    ],
)
def test_a_malformed_description_is_refused(change: dict[str, Any], message: str) -> None:
    packed = PackedLayout(64, {0: (2, 2)}, {}).to_dict()
    with pytest.raises(InputError, match=message):
        PackedLayout.from_dict({**packed, "pruning": {**GOOD, **change}})


def test_the_mode_is_not_optional() -> None:
    with pytest.raises(InputError, match="malformed"):
        PruningLayout.from_dict({"rule": RULE.to_dict()})

"""The stored format's description: written, read, and refused when malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.quantization.grid import REMOVED, WIDTHS
from mcsharp_sdk.runtime.layout import PackedLayout, members, removed

_widths = st.sampled_from(WIDTHS)
_of_experts = st.sampled_from([REMOVED, *WIDTHS])
_layouts = st.builds(
    PackedLayout,
    group_size=st.integers(1, 1024),
    experts=st.dictionaries(
        st.integers(0, 90), st.lists(_of_experts, min_size=1, max_size=12).map(tuple), max_size=4
    ),
    linears=st.dictionaries(st.sampled_from(["self_attn.q_proj", "mlp.up_proj"]), _widths),
    rotated=st.booleans(),
)


@given(_layouts)
def test_a_layout_survives_being_written_and_read(layout: PackedLayout) -> None:
    assert PackedLayout.from_dict(layout.to_dict()) == layout


@given(st.lists(_of_experts, min_size=1, max_size=20))
def test_every_expert_is_in_the_bucket_of_its_width(bits: list[int]) -> None:
    found = members(bits)
    everyone = [*removed(bits), *(e for experts in found.values() for e in experts)]
    assert sorted(everyone) == list(range(len(bits)))
    assert REMOVED not in found
    assert all(bits[e] == width for width, experts in found.items() for e in experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": None}, "format_version None"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": "many"}, "malformed"),
        ({"experts": {"0": [2, 5]}}, r"\[2, 5\]"),
        ({"experts": {"zero": [2]}}, "malformed"),
        ({"experts": None}, "malformed"),
        ({"linears": {"self_attn.q_proj": 7}}, r"\[2, 7\]"),
        ({"linears": {"self_attn.q_proj": 0}}, r"\[0, 2\]"),
        ({"rotation": "random"}, "malformed.*rotation 'random'"),
        ({"rotations": "hadamard"}, "has rotations, which this mcsharp_sdk does not know"),
        ({"order": [0], "bias": 1}, "has bias, order, .* or a newer version wrote it"),
    ],
)
def test_a_malformed_layout_is_refused(change: dict[str, object], message: str) -> None:
    good = PackedLayout(64, {0: (2, 2)}, {}).to_dict()
    with pytest.raises(InputError, match=message):
        PackedLayout.from_dict({**good, **change})

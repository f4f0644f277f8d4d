"""Artifacts as files: what is saved is read again, and what is wrong is named."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mcsharp_sdk.artifact_file import readable_json, write_text_atomically
from mcsharp_sdk.artifacts import (
    BitMap,
    ExpertStatistics,
    LayerProtection,
    LayerStatistics,
    TokenProtectionRule,
    TopAnyTraining,
    TrainingCurve,
)
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.models.safetensors_writing import write_safetensors


def statistics_json() -> dict[str, Any]:
    def layer(index: int) -> dict[str, Any]:
        return {
            "layer": index,
            "activation_count": [3.0, 1.0],
            "routing_weight_sum": [0.1, 0.7],
            "quant_error": [{"1": 4.5, "2": 2.25}, {"1": 1e-12, "2": 0.0}],
        }

    return {
        "model": "m",
        "source": "s",
        "num_experts": 2,
        "top_k": 2,
        "layers": [layer(0), layer(2)],
    }


def write(folder: Path, content: Any) -> Path:
    path = folder / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_statistics_are_read_by_width_and_layer(tmp_path: Path) -> None:
    statistics = ExpertStatistics.load(write(tmp_path, statistics_json()))
    assert statistics.experts() == {0: 2, 2: 2}
    layer = statistics.layers[1]
    assert (layer.layer, layer.widths, layer.tokens, layer.drop_error) == (2, (1, 2), None, None)
    assert layer.errors_at([2, 1]).tolist() == [[2.25, 4.5], [0.0, 1e-12]]
    with pytest.raises(InputError, match="layer 2: no quantisation error at 3 bits; there are er"):
        layer.errors_at([1, 3])


def test_a_layer_has_experts() -> None:
    with pytest.raises(InputError, match="layer 7: activation_count is empty"):
        LayerStatistics(7, np.zeros(0), np.zeros(0))


FLOATS = st.floats(min_value=0, allow_infinity=False, allow_nan=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(FLOATS, min_size=2, max_size=2), st.integers(0, 200))
def test_floats_survive_saving(values: list[float], layer: int) -> None:
    one = LayerStatistics(
        layer, np.array(values), np.array(values), {2: np.array(values)}, 5, np.array(values)
    )
    other = LayerStatistics(layer + 1, np.ones(3), np.ones(3))
    written = ExpertStatistics("m", "s", None, None, (other, one))
    text = json.loads(readable_json(written.to_json()))
    read = ExpertStatistics.from_json(text)
    assert read.to_json() == written.to_json()
    assert read.layers[0].quant_error[2].tolist() == values
    assert (read.layers[0].tokens, read.experts()) == (5, {layer: 2, layer + 1: 3})


def test_published_factors_are_read(shared_path: Callable[[str], Path]) -> None:
    statistics = ExpertStatistics.load(shared_path("reference/mixtral_8x7b_factors.json"))
    assert statistics.experts() == dict.fromkeys(range(32), 8)
    assert {layer.widths for layer in statistics.layers} == {(1, 2, 3)}
    assert statistics.layers[0].activation_count[7] == 72331.0


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("version", to=2), "version 2 is not known"),
        (change("layers", to={}), "'layers' must be a list"),
        (change("layers", to=[]), "there are no layers"),
        (change("layers", 1, "layer", to=0), "layer 0 stands there twice"),
        (change("layers", 1, "layer", to=-1), "layer: -1 must be a whole number"),
        (change("num_experts", to=4), "layer 0 has 2 experts, but num_experts is 4"),
        (
            change("layers", 1, "activation_count", 0, to=-1.0),
            r"layer 2: activation_count: expert 0: -1\.0 must be finite and not negative",
        ),
        (
            change("layers", 1, "routing_weight_sum", 1, to=float("nan")),
            "layer 2: routing_weight_sum: expert 1: nan must be finite",
        ),
        (change("layers", 0, "activation_count", to=[]), "quant_error: 2 values for 0 experts"),
        (
            change("layers", 0, "routing_weight_sum", to=[1.0]),
            "layer 0: routing_weight_sum: 1 values for 2 experts",
        ),
        (
            change("layers", 0, "routing_weight_sum", 1, to="much"),
            "layer 0: routing_weight_sum: expert 1: 'much' is not a number",
        ),
        (
            change("layers", 0, "activation_count", 1, to=10**400),
            "layer 0: activation_count: a number is too large",
        ),
        (
            change("layers", 0, "quant_error", 1, to={"1": 1.0}),
            "layer 0: quant_error: expert 1 has none at 2 bits",
        ),
        (
            change("layers", 0, "quant_error", 0, "2", to=float("inf")),
            "layer 0: quant_error at 2 bits: expert 0: inf must be finite",
        ),
        (change("layers", 0, "quant_error", to=[{}]), "quant_error: 1 values for 2 experts"),
        (change("layers", 0, "quant_error", 0, to={"two": 1}), "quant_error: width: 'two' must be"),
        (change("layers", 0, "drop_error", to=[1.0]), "layer 0: drop_error: 1 values for 2"),
        (change("layers", 0, "tokens", to=1.5), "layer 0: tokens: 1.5 must be a whole number"),
        (
            change("layers", 0, "block_cosine", to=10**400),
            "layer 0: block_cosine: 10*0 must be a finite number",
        ),
        (
            change("layers", 0, "loss_sensitivity", to=True),
            "layer 0: loss_sensitivity: True must be a finite number",
        ),
        (
            lambda content: content["layers"][1].pop("activation_count"),
            "layer 2: activation_count is",
        ),
    ],
)
def test_wrong_statistics_are_named(
    damage: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    content = statistics_json()
    damage(content)
    with pytest.raises(InputError, match=message) as raised:
        ExpertStatistics.load(write(tmp_path, content))
    assert str(raised.value).startswith(str(tmp_path / "given.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "must hold one JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"bits": {"0": [1], "0": [2]}}', "the key '0' stands twice"),
    ],
)
def test_files_that_are_no_json_object_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        BitMap.load(write(tmp_path, text))


def test_a_missing_file_or_a_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        BitMap.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        BitMap.load(tmp_path)


def test_bit_map_survives_saving_and_is_readable(tmp_path: Path) -> None:
    written = BitMap({3: (2, 3), 1: (1, 1)}, {1: 0.1, 3: 2.5}, "pmq")
    path = tmp_path / "new" / "map.json"
    written.save(path)
    assert BitMap.load(path) == written
    assert written.nominal_bits == 1.75
    assert '    "1": [1, 1],\n    "3": [2, 3]\n' in path.read_text()


def test_a_list_counts_moe_layers_in_order(tmp_path: Path) -> None:
    given = BitMap.load(write(tmp_path, {"note": "by hand", "bits": [[1, 2], [3, 3, 3]]}))
    placed = given.for_model({1: 2, 4: 3})
    assert placed.bits == {1: (1, 2), 4: (3, 3, 3)}
    given.save(tmp_path / "again.json")
    assert BitMap.load(tmp_path / "again.json") == given
    with pytest.raises(InputError, match="the map has 2 layers, but the model has 1 MoE layers"):
        given.for_model({1: 2})


def test_published_map_is_read(shared_path: Callable[[str], Path]) -> None:
    published = BitMap.load(shared_path("reference/mixtral_8x7b_allocation_16bit.json"))
    placed = published.for_model(dict.fromkeys(range(32), 8))
    assert placed.bits[31] == (2, 3, 2, 3, 1, 1, 2, 2)
    assert placed.nominal_bits == 2.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {0: 2, 1: 2},
            "has nothing for layer 1 and names layer 5; the model's MoE layers are 0, 1",
        ),
        ({0: 2, 5: 8}, "layer 5 has 2 experts, but the model's has 8"),
    ],
)
def test_a_map_of_another_model_is_refused(model: dict[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BitMap({0: (1, 2), 5: (2, 2)}).for_model(model)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (None, "'bits' must be an object"),
        ({}, "there are no layers"),
        ({"0": []}, "layer 0: no widths"),
        ({"0": 2}, "layer 0: must be a list of widths"),
        ({"0": [2, -1]}, "layer 0: expert 1: -1 is no width"),
        ({"0": [2.5]}, "layer 0: expert 0: 2.5 is no width"),
        ({"0": [True]}, "layer 0: expert 0: True is no width"),
        ({"0": [17]}, "from 0 to 16"),
        ({"01": [2]}, "bits: layer: '01' must be a whole number"),
    ],
)
def test_wrong_maps_are_named(bits: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        BitMap.load(write(tmp_path, {"version": 1, "bits": bits}))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"5": 1.0}, "objective: names layer 5; 'bits' has 0, 1"),
        ({"0": "dear"}, "objective: layer 0: 'dear' must be a finite number"),
        ({"0": 10**400}, "objective: layer 0: 10*0 must be a finite number"),
        ({"x": 1.0}, "objective: layer: 'x' must be a whole number"),
    ],
)
def test_wrong_costs_are_named(objective: Any, message: str, tmp_path: Path) -> None:
    content = {"bits": [[2, 3], [2, 2]], "objective": objective}
    with pytest.raises(InputError, match=message):
        BitMap.load(write(tmp_path, content))


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    BitMap({0: (1,)}).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        BitMap({0: (2,)}, objective={0: float("nan")}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444


def test_a_file_is_written_with_the_rights_that_new_files_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # it is the whole process's: threads share it
        write_text_atomically(tmp_path / "new.txt", "ünï\n")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.txt").stat().st_mode) == 0o640
    assert (tmp_path / "new.txt").read_bytes() == "ünï\n".encode()


def test_threads_that_write_the_same_file_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    first, second = {"a": torch.zeros(99)}, {"a": torch.ones(2)}

    class Slow:
        """A stored tensor; while it is read, another thread writes the file."""

        dtype, shape = torch.float32, (99,)

        def numel(self) -> int:
            return 99

        def element_size(self) -> int:
            return 4

        def read(self) -> torch.Tensor:
            other = threading.Thread(target=write_safetensors, args=(path, second))
            other.start()
            other.join()
            assert torch.equal(load_file(path)["a"], second["a"])
            return first["a"]

    write_safetensors(path, {"a": Slow()})
    assert torch.equal(load_file(path)["a"], first["a"])
    assert list(tmp_path.iterdir()) == [path]


def protection(**changes: Any) -> dict[str, Any]:
    layer = {"layer": 1, "thresholds": [0.5, 0.25], "cost": 0.1, "keep_ratio": 0.75}
    return {"metric": "attention", "protect_ratio": 0.02, "layers": [{**layer, **changes}]}


def test_a_protection_rule_survives_saving(tmp_path: Path) -> None:
    layers = (
        LayerProtection(3, (0.1,), 0.2, 0.9, pruned=False),
        LayerProtection(1, (1 / 3,), 1e-9, 0.5),
    )
    written = TokenProtectionRule("none", 0.0, 0.25, layers)
    written.save(tmp_path / "rule.json")
    assert TokenProtectionRule.load(tmp_path / "rule.json") == written
    assert [found.layer for found in written.layers] == [1, 3]
    assert written.thresholds() == {1: (1 / 3,)}


def test_a_rule_written_by_hand_needs_little(tmp_path: Path) -> None:
    read = TokenProtectionRule.load(write(tmp_path, protection()))
    assert (read.drop_ratio, read.layers[0].pruned) == (0.0, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"thresholds": [0.5, 1.5]},
            r"layer 1: thresholds: rank 2: 1\.5 must be a number from 0 to 1",
        ),
        ({"thresholds": 0.5}, "layer 1: thresholds must be a list"),
        ({"cost": -1}, "layer 1: cost: -1 must be a finite number, 0 or more"),
        ({"keep_ratio": "all"}, "layer 1: keep_ratio: 'all' must be a number"),
        ({"pruned": 1}, "layer 1: pruned must be true or false, not 1"),
        ({"layer": -1}, "layer: -1 must be a whole number"),
    ],
)
def test_wrong_rules_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        TokenProtectionRule.load(write(tmp_path, protection(**changes)))


def test_a_rule_has_each_layer_once() -> None:
    layer = LayerProtection(0, (0.5,), 0.0, 1.0)
    with pytest.raises(InputError, match="layer 0 stands there twice"):
        TokenProtectionRule("none", 0.0, 0.0, (layer, layer))
    with pytest.raises(InputError, match="protect_ratio: 2.0 must be a number from 0 to 1"):
        TokenProtectionRule("none", 2.0, 0.0, (layer,))


def test_a_training_survives_saving_and_is_checked(tmp_path: Path) -> None:
    curve = TrainingCurve([0.1, 1 / 3], [0.1, 0.2], [1.0, 0.9], [2.0, 1.0], [0.0, 1e-30])
    written = TopAnyTraining("block", {"0": curve}, {0: 0.8})
    path = tmp_path / "training.json"
    written.save(path)
    assert TopAnyTraining.load(path) == written
    content = json.loads(path.read_text())
    del content["curves"]["0"]["loss"]
    with pytest.raises(InputError, match="curves: 0: must have loss, error, keep_ratio"):
        TopAnyTraining.load(write(tmp_path, content))
    with pytest.raises(InputError, match="keep_ratio has 1 values, but loss has 2"):
        TrainingCurve([1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(InputError, match="error has a value that is not finite"):
        TrainingCurve([1.0], [float("nan")], [1.0], [1.0], [1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ratio": {"0": "most"}}, "keep_ratio: layer 0: 'most' must be a number"),
        ({"keep_ratio": {"0": None}}, "keep_ratio: layer 0: None must be a number"),
        ({"keep_ratio": {"0": [1]}}, r"keep_ratio: layer 0: \[1\] must be a number"),
        ({"keep_ratio": {"0": 1.5}}, r"keep_ratio: layer 0: 1\.5 must be a number from 0 to 1"),
        ({"loss": [1.0, [2.0]]}, "curves: 0: loss must be a list of numbers"),
        ({"loss": [[1.0]]}, "curves: 0: loss must be a list of numbers"),
        ({"loss": ["1"]}, "curves: 0: loss must be a list of numbers"),
        ({"loss": [10**400]}, "curves: 0: loss must be a list of numbers"),
        ({"loss": 1.0}, "curves: 0: loss must be a list of numbers"),
    ],
)
def test_wrong_trainings_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    names = ("loss", "error", "keep_ratio", "temperature", "penalty")
    curve = {**{name: [1.0] for name in names}, **{k: v for k, v in changes.items() if k == "loss"}}
    ratios = changes.get("keep_ratio", {"0": 0.5})
    with pytest.raises(InputError, match=message):
        TopAnyTraining.load(write(tmp_path, {"curves": {"0": curve}, "keep_ratio": ratios}))

"""mcsharp allocate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mcsharp_sdk.artifacts import BitMap
from mcsharp_sdk.cli.main import run


def allocate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run(["allocate", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    path = tmp_path / "factors.json"
    layer = {
        "layer": 3,
        "activation_count": [4.0, 2.0, 1.0, 1.0],
        "routing_weight_sum": [1.0, 1.0, 1.0, 1.0],
        "quant_error": [{"1": 4 * e, "2": 2 * e, "3": e} for e in (9.0, 3.0, 1.0, 0.5)],
    }
    path.write_text(json.dumps({"model": "m", "layers": [layer]}))
    return path


def test_the_published_map_comes_out_as_json(
    shared_path: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = shared_path("reference/mixtral_8x7b_allocation_16bit.json")
    given = shared_path("reference/mixtral_8x7b_factors.json")
    exponents = ["--set", "alpha=1.0", "--set", "beta=1.5", "--set", "gamma=1"]
    assert allocate(given, "--target-bits", 2.0, *exponents, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["bits"].values()) == json.loads(reference.read_text())["bits"]
    assert list(printed["bits"]) == [str(layer) for layer in range(32)]
    assert printed["nominal_bits"] == 2.0
    assert set(printed["objective"]["layers"]) == set(printed["bits"])
    assert printed["objective"]["total"] == pytest.approx(
        sum(printed["objective"]["layers"].values())
    )


@pytest.mark.parametrize(
    ("bits", "options", "told"),
    [
        (2.2, (), "the budget of each layer is rounded down to whole bits: 8.8 for 4 experts"),
        (2.2, ("--set", "budget_scope=global"), "the budget of all layers together is rounded"),
        (2.25, (), None),
    ],
)
def test_a_budget_that_is_rounded_down_is_said_so(
    bits: float,
    options: tuple[str, ...],
    told: str | None,
    factors: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert allocate(factors, "--target-bits", bits, *options) == 0
    printed = capsys.readouterr().out
    if told is None:
        assert "rounded" not in printed
    else:
        assert told in printed
        assert "become 8, 2 each" in printed


def test_the_map_is_shown_as_a_table_and_saved(
    factors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "map.json"
    assert allocate(factors, "--target-bits", 2, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "3 3 1 1" not in printed
    assert "3 2 2 1" in printed
    assert "nominal bits 2, cost" in printed
    assert BitMap.load(output).bits == {3: (3, 2, 2, 1)}


def test_a_file_that_is_there_is_kept(
    factors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "map.json"
    output.write_text("mine")
    assert allocate(factors, "--target-bits", 2, "--output", output) == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert allocate(factors, "--target-bits", 2, "--output", output, "--overwrite") == 0
    assert BitMap.load(output).nominal_bits == 2.0


def test_all_that_is_wrong_with_the_settings_is_told_at_once(
    factors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["alpa=1", "mode=relased", "factors=x.json", "beta"]
    arguments = [part for text in wrong for part in ("--set", text)]
    assert allocate(factors, "--target-bits", 5, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for text in (
        "target_bits: should be at most 4.0, not 5.0",
        "--set alpa=1: alpa: no such setting; did you mean 'alpha'?",
        "did you mean 'released'?",
        "--set factors=x.json: factors: cannot be set here: it is the argument",
        "--set beta: write it as target=value",
    ):
        assert text in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bits", "1.0"], "cannot use at most 4 bits; 7 to 11 bits are possible"),
        (
            ["--target-bits", "2", "--set", "widths=[1, 2, 4]"],
            "layer 3: no quantisation error at 4",
        ),
        (["--target-bits", "2", "--set", "gamma=16", "--set", "alpha=17"], "alpha"),
    ],
)
def test_what_cannot_be_solved_is_bad_input(
    factors: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert allocate(factors, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_factor_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert allocate(tmp_path / "absent.json", "--target-bits", 2) == 2
    assert "absent.json: there is no such file" in capsys.readouterr().err

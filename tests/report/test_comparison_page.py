"""Several runs on one page: the front, the conditions that all share, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import read_page, table_called, table_rows

from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation.saved import save_evaluation
from mcsharp_sdk.report import write_comparison
from mcsharp_sdk.report.comparison import FRONT, pareto_front

coordinates = st.integers(0, 5).map(float)
clouds = st.dictionaries(st.text("abcdefgh", min_size=1), st.tuples(coordinates, coordinates))


@given(clouds)
def test_the_front_is_what_no_other_point_beats(points: Mapping[str, tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    unbeaten = {n for n, p in points.items() if not any(beats(q, p) for q in points.values())}
    front = pareto_front(points)
    assert set(front) == unbeaten
    assert [points[name] for name in front] == sorted(points[name] for name in front)


def evaluation(**changes: Any) -> dict[str, Any]:
    return {
        "text": "texts/wiki.txt",
        "tokens": 1000,
        "window": 100,
        "perplexity": 10.0,
        "nominal_bits": 2.5,
        "stored_bits": 2.8,
        "bytes": 10_000_000,
        "activated_bytes_per_token": 5e6,
        "activated_parameters_per_token": 1e6,
        "activated_expert_ratio": 1.0,
        "kl_divergence": None,
        "top1_agreement": None,
        **changes,
    }


def model(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    (folder / name).mkdir()
    for row in rows:
        save_evaluation(folder / name, row)
    return folder / name


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    bits = {"small": (2.0, 12.0, 0.4), "large": (3.0, 9.0, 0.1), "bad": (3.1, 13.0, 0.5)}
    reference = {"reference": {"perplexity": 8.0}}
    return [
        model(
            tmp_path,
            name,
            evaluation(
                stored_bits=b, perplexity=p, kl_divergence=kl, bytes=int(b * 1e6), **reference
            ),
        )
        for name, (b, p, kl) in bits.items()
    ]


def test_the_page_draws_each_quality_against_each_cost_that_differs(
    runs: list[Path], tmp_path: Path
) -> None:
    page = read_page(write_comparison(runs, tmp_path / "page.html").read_text())
    captions = [table.find("caption")[0].text for table in page.find("table")]
    assert captions == [
        "perplexity against stored bits per quantised weight",
        "perplexity against weights on disk, MB",
        "KL divergence (nats) against stored bits per quantised weight",
        "KL divergence (nats) against weights on disk, MB",
        "Quality and cost",
    ]
    rows = table_rows(table_called(page, captions[0]))
    assert rows == {
        str(runs[0]): ["2", "12", "yes"],
        str(runs[1]): ["3", "9", "yes"],
        str(runs[2]): ["3.1", "13", "no"],
    }
    texts = [text.text for text in page.find("svg")[0].find("text")]
    assert {FRONT, "original", *map(str, runs)} <= set(texts)
    assert "original" not in [text.text for text in page.find("svg")[2].find("text")]


def test_a_picture_alone_is_svg(runs: list[Path], tmp_path: Path) -> None:
    assert write_comparison(runs, tmp_path / "front.svg").read_text().startswith("<svg ")


def test_runs_are_compared_under_the_conditions_that_all_share(tmp_path: Path) -> None:
    shared, later = evaluation(perplexity=11.0), evaluation(tokens=500, perplexity=99.0)
    runs = [
        model(tmp_path, "one", shared, later),
        model(tmp_path, "two", evaluation(text="elsewhere/wiki.txt", stored_bits=2.0)),
    ]
    page = read_page(write_comparison(runs, tmp_path / "page.html").read_text())
    rows = table_rows(table_called(page, "Quality and cost"))
    assert [cells[0] for cells in rows.values()] == ["11", "10"]
    (tmp_path / "three").mkdir()
    save_evaluation(tmp_path / "three", evaluation(window=7))
    with pytest.raises(InputError, match="no text, window and number of tokens"):
        write_comparison([*runs, tmp_path / "three"], tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_variants_of_a_sweep_are_runs(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    results = [
        {"name": "2", "evaluation": evaluation(stored_bits=2.0)},
        {"name": "3", "evaluation": {}},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"variants": results}))
    page = read_page(write_comparison([sweep], tmp_path / "page.html").read_text())
    assert list(table_rows(table_called(page, "Quality and cost"))) == [f"{sweep}: 2"]


def test_folders_without_evaluation_are_named_together_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputProblems) as caught:
        write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    assert [p.where for p in caught.value.problems] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert "mcsharp evaluate --compare" in str(caught.value)


def test_an_infinite_perplexity_is_shown_and_no_reason_to_show_nothing(
    runs: list[Path], tmp_path: Path
) -> None:
    runs.append(model(tmp_path, "broken", evaluation(perplexity=None, stored_bits=1.0)))
    page = read_page(write_comparison(runs, tmp_path / "page.html").read_text())
    rows = table_rows(table_called(page, "perplexity against stored bits per quantised weight"))
    assert rows[str(runs[-1])] == ["1", "infinite", "no"]
    assert rows[str(runs[0])] == ["2", "12", "yes"]
    assert write_comparison(runs, tmp_path / "front.svg").read_text().startswith("<svg ")

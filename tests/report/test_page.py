"""The page of a run: it says what the artifacts say, to every reader, and needs nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import Element, read_page, table_called, table_rows
from pruning_runs import run, write_text
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk import compare
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics, TokenProtectionRule, TopAnyTraining
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.folders import PAGE_FILE
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.report import write_report
from mcsharp_sdk.report.elements import bytes_text, cell_text

EVIL = "<script>alert('&\"')</script>"
STAGES: list[dict[str, Any]] = [
    {"type": "ExpertStats", "group_size": 16, "coverage": 95},
    {"type": "BitAllocation", "target_bits": 2.25},
    {"type": "GPTQQuantize", "group_size": 16},
    {"type": "TokenProtection"},
    {"type": "TopAnyRouter", "scope": "block", "steps": 20},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages on two texts, with a model and a text of bad names."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny_model(folder / "<b>model & 'co'", "mixtral")
    save_tiny_tokenizer(model)
    first = write_text(folder)
    second = folder / f"{EVIL.replace('/', '')}.txt"
    second.write_text(first.read_text()[::-1])
    size = {"source": "text", "sampling": "first", "length": 32}
    sources = [
        {**size, "path": str(first), "sequences": 4},
        {**size, "path": str(second), "sequences": 2},
    ]
    recipe = Recipe.from_text(
        f"# {EVIL}\n" + json.dumps({"version": 1, "calibration": sources, "stages": STAGES})
    )
    run(model, recipe, folder)
    return folder / "out"


@pytest.fixture(scope="module")
def text(done: Path) -> str:
    return (done / PAGE_FILE).read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    return read_page(text)


def test_compress_writes_the_page_that_the_function_writes(
    done: Path, text: str, tmp_path: Path
) -> None:
    assert write_report(done, tmp_path / "other.html") == tmp_path / "other.html"
    assert (tmp_path / "other.html").read_text() == text


def test_the_page_is_html_that_needs_nothing_but_itself(text: str, page: Element) -> None:
    assert text.startswith("<!DOCTYPE html>") or text.lstrip().startswith("<!DOCTYPE html>")
    assert page.find("script") == []
    every = [e for tag in set(re.findall(r"<([a-z]+)", text)) for e in page.find(tag)]
    assert not {"src", "xlink:href", "srcset", "onload", "onclick"} & {
        name for element in every for name in element.attributes
    }
    links = [e.attributes["href"] for e in page.find("a")]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    outside = set(re.findall(r"https?://[^\"'\s<]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()


def test_anchors_lead_somewhere_and_ids_are_unique(page: Element) -> None:
    ids = [e.attributes["id"] for tag in ("main", "section", "h2") for e in page.find(tag)]
    assert len(set(ids)) == len(ids)
    assert {link.attributes["href"][1:] for link in page.find("a")} <= set(ids)


def test_nothing_that_was_given_becomes_markup(text: str, page: Element) -> None:
    assert "<script" not in text
    assert "<b>" not in text
    assert EVIL in page.find("code")[-1].text
    assert page.find("h1")[0].text == "<b>model & 'co', compressed"
    assert any(EVIL.replace("/", "") in svg.attributes["aria-label"] for svg in page.find("svg"))


def test_a_screen_reader_gets_headings_labels_and_the_numbers_behind_each_picture(
    page: Element,
) -> None:
    assert page.find("html")[0].attributes["lang"] == "en-GB"
    assert [len(page.find(tag)) for tag in ("h1", "main", "title")][:2] == [1, 1]
    assert [h.text for h in page.find("h2")] == [
        "What was done",
        "Before and after",
        "Size by role",
        "Bit map",
        "How the experts are used",
        "What quantising each expert costs",
        "Coverage",
        "Quantisation error per layer",
        "Experts kept at run time",
        "Warnings",
        "The recipe as run",
    ]
    for figure in page.find("figure"):
        (svg,) = figure.find("svg")
        assert svg.attributes["role"] == "img"
        assert svg.children[0].tag == "title"
        assert svg.children[0].text in svg.attributes["aria-label"]
        assert figure.find("figcaption")[0].text
        (table,) = figure.find("details")[0].find("table")
        assert table_rows(table)
        assert {th.attributes["scope"] for th in table.find("th")} == {"col", "row"}
    assert len(page.find("figure")) == 15


def test_maps_of_each_source_show_its_own_use(done: Path, page: Element) -> None:
    statistics = ExpertStatistics.load(done / ExpertStatistics.FILE)
    for position in (0, 1):
        name = statistics.layers[0].sources[position].source
        rows = table_rows(table_called(page, f"Frequency, {name}, % of tokens"))
        for layer in statistics.layers:
            source = layer.sources[position]
            shares = 100 * source.activation_count / source.tokens
            assert rows[f"layer {layer.layer}"] == [cell_text(float(s)) for s in shares]
    assert "How differently the sources use the experts" in {
        caption.text for caption in page.find("caption")
    }


def test_errors_and_bits_are_those_of_the_artifacts(done: Path, page: Element) -> None:
    statistics = ExpertStatistics.load(done / ExpertStatistics.FILE)
    bits = BitMap.load(done / BitMap.FILE).bits
    for width in (1, 2, 3):
        name = f"Error at {width} bit{'s' * (width > 1)}, norm of the output's change"
        rows = table_rows(table_called(page, name))
        for layer in statistics.layers:
            errors = [cell_text(float(e)) for e in layer.quant_error[width]]
            assert rows[f"layer {layer.layer}"] == errors
    widths = table_rows(table_called(page, "Bits per expert, bits"))
    assert widths == {f"layer {n}": [str(w) for w in row] for n, row in bits.items()}
    cells = [t.text for t in page.find("svg")[1].find("title") if t.text.startswith("layer")]
    assert cells == [
        f"layer {n}, expert {e}: {w}" for n, row in bits.items() for e, w in enumerate(row)
    ]


def test_an_error_that_is_not_known_is_a_dash(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done, folder)
    report = json.loads((folder / "mcsharp_report.json").read_text())
    layers = report["stages"]["GPTQQuantize"]["layers"]
    layers["1"]["squared_error"]["experts"] = layers["1"]["squared_output"]["experts"] = None
    (folder / "mcsharp_report.json").write_text(json.dumps(report))
    page = read_page(write_report(folder).read_text())
    rows = table_rows(table_called(page, "Relative output error"))
    for layer, notes in layers.items():
        squares = zip(
            notes["squared_error"].values(), notes["squared_output"].values(), strict=True
        )
        expected = ["–" if of is None else cell_text(math.sqrt(e / of)) for e, of in squares]
        assert rows[f"layer {layer}"] == expected
        assert expected.count("–") == (layer == "1")


def test_starved_experts_are_named(done: Path, page: Element) -> None:
    statistics = ExpertStatistics.load(done / ExpertStatistics.FILE)
    starved = {
        f"layer {layer.layer}, expert {expert}": f"{int(count)}"
        for layer in statistics.layers
        for expert, count in enumerate(layer.activation_count)
        if count < 95
    }
    assert starved, "the case is none"
    rows = table_rows(table_called(page, "Starved experts"))
    assert {name: cells[0] for name, cells in rows.items()} == starved


def test_sizes_and_kept_shares_are_those_of_the_model(done: Path, page: Element) -> None:
    cost = model_cost(done)
    sizes = table_rows(table_called(page, "Weights on disk by role"))
    assert {role: cells[1] for role, cells in sizes.items() if role != "all"} == {
        role: bytes_text(share.bytes) for role, share in cost.roles.items()
    }
    original = model_cost(done.parent / "<b>model & 'co'")
    assert sizes["experts"][0] == bytes_text(original.roles["experts"].bytes)
    kept = table_rows(table_called(page, "Experts kept"))
    rule = TokenProtectionRule.load(done / TokenProtectionRule.FILE)
    networks = TopAnyTraining.load(done / TopAnyTraining.FILE)
    for found in rule.layers:
        shares = (found.keep_ratio, networks.keep_ratio[found.layer])
        assert kept[f"layer {found.layer}"] == [f"{share:.1%}" for share in shares]


def test_all_warnings_and_the_recipe_are_there(done: Path, page: Element) -> None:
    report = json.loads((done / "mcsharp_report.json").read_text())
    assert report["warnings"], "the case is none"
    (section,) = page.find("section", id="warnings")
    assert [item.text for item in section.find("li")] == [
        " ".join(warning.split()) for warning in report["warnings"]
    ]
    recipe = " ".join((done / "recipe.yaml").read_text().split())
    assert page.find("code")[-1].text == recipe


def test_a_saved_evaluation_appears_beside_the_original(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done, folder)
    corpus = done.parent / "text.txt"
    original = done.parent / "<b>model & 'co'"
    found = compare([folder], corpus, reference=original, window=32, max_tokens=128, device="cpu")
    found.save()
    page = read_page(write_report(folder).read_text())
    rows = table_rows(table_called(page, "Quality on text.txt, 128 tokens in windows of 32"))
    assert found.reference is not None
    (compared,) = found.models
    assert rows["perplexity"] == [
        cell_text(found.reference.perplexity),
        cell_text(compared.evaluation.perplexity),
    ]
    assert rows["top-1 agreement with the original"] == ["–", f"{compared.top1_agreement:.1%}"]
    assert "mcsharp evaluate" not in page.find("main")[0].text


def test_a_folder_without_artifacts_still_has_a_page(done: Path, tmp_path: Path) -> None:
    for file in done.iterdir():
        if file.suffix == ".safetensors" or file.name in (
            "config.json",
            "mcsharp.safetensors.index.json",
        ):
            shutil.copy(file, tmp_path)
    page = read_page(write_report(tmp_path).read_text())
    headings = [h.text for h in page.find("h2")]
    assert headings == ["Before and after", "Size by role", "Bit map", "Warnings"]


@pytest.mark.parametrize("file", [ExpertStatistics.FILE, "mcsharp_report.json", "recipe.yaml"])
def test_a_damaged_file_is_named(file: str, done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(done, folder)
    (folder / file).write_text("{")
    with pytest.raises(InputError, match=re.escape(file)):
        write_report(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []

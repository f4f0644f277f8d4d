"""What the pages say is so: commands, snippets, recipes, links, tables and the import order."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

import mcsharp_sdk
from mcsharp_sdk.artifacts import BitMap, ExpertStatistics
from mcsharp_sdk.cli.main import VERBS, app
from mcsharp_sdk.quantization.packing import packed_bytes
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.runtime.layout import PackedLayout
from mcsharp_sdk.runtime.pruning_layout import PruningLayout

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(mcsharp [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:mcsharp_sdk|exporters|docs|tests|recipes|examples)/[\w./-]*\w)/?`")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of a page in one of the languages."""
    return [text for name, text in BLOCK.findall(page.read_text()) if name in languages]


def script(path: str) -> ModuleType:
    """A script of the repository, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Links and paths


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = PATH.findall(page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


# Commands


@every_page
def test_command_lines_are_accepted_by_the_command_line(page: Path) -> None:
    for command in command_lines(page):
        parse_command(shlex.split(command, comments=True)[1:])


def command_lines(page: Path) -> Iterator[str]:
    for block in blocks(page, "", "sh", "bash"):
        for line in block.splitlines():
            if line.startswith("mcsharp "):
                yield line.partition(" > ")[0]


def parse_command(arguments: list[str]) -> None:
    """Let the command line read the arguments, without doing anything."""
    group: Any = get_command(app)
    parent = group.make_context("mcsharp", ["--", *arguments], resilient_parsing=True)
    name, command, rest = group.resolve_command(parent, arguments)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(parent, rest)
    command.make_context(name, list(rest), parent=parent)


@every_page
def test_commands_in_running_text_exist_with_their_options(page: Path) -> None:
    for text in INLINE.findall(BLOCK.sub("", page.read_text())):
        words = text.split()[1:]
        if words[0].startswith("-") or words[0] == "…":
            continue
        assert words[0] in VERBS, text
        group: Any = get_command(app)
        _, command, _ = group.resolve_command(group.make_context("", ["--help-me"], **_LAX), words)
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, text


_LAX: dict[str, Any] = {"resilient_parsing": True, "ignore_unknown_options": True}


def test_the_page_of_the_command_line_names_all_verbs_and_those_that_print_json() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(VERBS)
    told = re.findall(
        r"`(\w+)(?: ls)?`", page.partition("**`--json`**")[2].partition(" have it")[0]
    )
    assert told == [verb for verb in VERBS if has_option(verb, "--json")]


def has_option(verb: str, option: str) -> bool:
    """Whether a verb, or one of those in it, has an option."""
    group: Any = get_command(app)
    _, command, _ = group.resolve_command(group.make_context("", ["--help-me"], **_LAX), [verb])
    commands = getattr(command, "commands", {verb: command}).values()
    return any(option in p.opts for found in commands for p in found.params)


# Python


@every_page
def test_python_snippets_compile_and_their_imports_resolve(page: Path) -> None:
    for snippet in blocks(page, "python"):
        check_python(snippet)


@every_page
def test_excerpts_are_in_the_files_that_they_name(page: Path) -> None:
    for block in blocks(page, "py"):
        first, _, excerpt = block.partition("\n")
        assert excerpt in (ROOT / first.removeprefix("# ")).read_text(), excerpt


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_imports_and_calls_of_examples_resolve(example: Path) -> None:
    check_python(example.read_text())


OPTIONAL = ("onnxruntime_genai",)
"""Modules of extras that not every machine can have beside the others."""


def check_python(source: str) -> None:
    """Check imports, and the keywords of calls of the package's own functions."""
    tree = ast.parse(source)
    known: dict[str, Any] = dict(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in OPTIONAL:
                    pytest.importorskip(alias.name)
                known[alias.asname or alias.name] = importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        check_call(call, known)


def check_call(call: ast.Call, known: dict[str, Any]) -> None:
    if isinstance(call.func, ast.Attribute) and is_ours(owner := called(call.func.value, known)):
        assert hasattr(owner, call.func.attr), f"{owner} has no {call.func.attr}"
    function = called(call.func, known)
    if not callable(function) or not is_ours(function):
        return
    keywords = {k.arg: None for k in call.keywords if k.arg}
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    inspect.signature(function).bind(*call.args, **keywords)


def is_ours(found: Any) -> bool:
    name = getattr(found, "__module__", None) or getattr(found, "__name__", None) or ""
    return str(name).startswith(("mcsharp_sdk", "mcsharp_exporters"))


def called(node: ast.expr, known: dict[str, Any]) -> Any:
    """What an expression such as ``Recipe.from_file`` names; None if it is not known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(called(node.value, known), node.attr, None)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# Recipes and files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the files that recipes of the pages name."""
    for name in ("corpus.txt", "pairs.jsonl", "factors.json", "my_map.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@every_page
def test_recipes_are_right(page: Path, files: Path) -> None:
    for block in blocks(page, "yaml"):
        found = yaml.safe_load(block)
        if found is None:
            continue
        if "version" in found:
            Recipe.from_text(block, base=files)
        else:
            rest = Recipe.from_text(blocks(ROOT / "README.md", "yaml")[0], base=files).settings()
            Recipe.from_dict({**rest, **found}, base=files)


@every_page
def test_json_files_are_what_they_are_shown_as(page: Path) -> None:
    for block in blocks(page, "json"):
        content = json.loads(block)
        if "quant_method" in content:
            assert PackedLayout.from_dict(content).to_dict() == content
        elif "mode" in content:
            assert PruningLayout.from_dict(content).to_dict() == content
        elif "layers" in content:
            ExpertStatistics.from_json(content)


def test_bit_maps_in_running_text_can_be_read() -> None:
    shown = re.findall(r'`(\{"bits":.*?\})`', (ROOT / "docs/recipes.md").read_text())
    assert len(shown) == 2
    assert [tuple(BitMap.from_json(json.loads(s)).bits.values()) for s in shown] == [((2, 3),)] * 2


def test_the_error_shown_is_the_error_told(files: Path) -> None:
    wrong = (
        "version: 1\ncalibration: {source: text, path: corpus.txt}\nstages:\n"
        "  - {type: ExpertStats}\n  - {type: BitAllocation, targetbits: 2.5}\n"
        "  - {type: GPTQQuantize}\n\nexports:\n  - {type: onnx_router}\n"
    )
    with pytest.raises(mcsharp_sdk.errors.InputError) as caught:
        Recipe.from_text(wrong, base=files)
    page = (ROOT / "docs/recipes.md").read_text()
    assert f"error: {caught.value}\n" in page


# Tables


def test_tables_of_settings_are_up_to_date() -> None:
    settings = script("docs/generate_settings.py")
    page = settings.PAGE.read_text()
    assert settings.updated(page) == page, "run: python docs/generate_settings.py"


def test_tables_of_families_are_up_to_date() -> None:
    families = script("docs/generate_families.py")
    page = families.PAGE.read_text()
    assert families.updated(page) == page, "run: python docs/generate_families.py"


def test_stored_bits_are_those_of_the_table() -> None:
    page = (ROOT / "docs/quantisation.md").read_text()
    sizes = [int(size) for size in re.findall(r"group (\d+) (?=\|)", page)]
    rows = re.findall(r"^\| (\d) \| ([\d. |]+) \|$", page, re.MULTILINE)
    assert [int(width) for width, _ in rows] == [1, 2, 3, 4]
    rows_of_matrix, columns = 256, 1024
    for width, cells in rows:
        for size, cell in zip(sizes, cells.split(" | "), strict=True):
            groups = columns // size
            codes = rows_of_matrix * packed_bytes(columns, int(width))
            zeros = groups * packed_bytes(rows_of_matrix, int(width))
            stored = 8 * (codes + zeros + 2 * rows_of_matrix * groups) / (rows_of_matrix * columns)
            assert stored == pytest.approx(float(cell), abs=6e-4)


# The picture


def test_the_picture_can_be_drawn_again() -> None:
    errors = [{"1": 3.0, "2": 2.0, "3": 1.0}, {"1": 6.0, "2": 3.0, "3": 2.0}]
    layer = {"layer": 0, "activation_count": [3, 4], "routing_weight_sum": [1, 2]}
    statistics = {"layers": [{**layer, "quant_error": errors}]}
    picture = script("docs/images/draw_overview.py").draw(
        ExpertStatistics.from_json(statistics), BitMap({0: (1, 3)})
    )
    drawn, kept = (
        {element.tag for element in ET.fromstring(text).iter()}
        for text in (picture, (ROOT / "docs/images/overview.svg").read_text())
    )
    assert drawn == kept


# Import order


def test_building_blocks_are_public_names_of_their_packages() -> None:
    page = (ROOT / "docs/python_api.md").read_text()
    rows = re.findall(r"^\| `(mcsharp_sdk\.\w+)` \| (`.*?`) \|", page, re.MULTILINE)
    assert rows
    for package, names in rows:
        public = importlib.import_module(package).__all__
        assert set(re.findall(r"`(\w+)`", names)) <= set(public)


def test_packages_import_only_what_stands_below_them() -> None:
    order = re.findall(r"^\| `(\w+)` \|", section("Packages"), re.MULTILINE)
    height = {name: -index for index, name in enumerate(order)}
    upwards = [
        f"{file.relative_to(ROOT)}: {module}"
        for package in order
        for file in package_folder(package)
        for module in imported_at_the_top(file)
        if module != "mcsharp_sdk.recipe.paths"
        if height.get(package_of(module), -len(order)) > height[package]
    ]
    assert upwards == []
    on_disk = {p.parent.name for p in ROOT.glob("mcsharp_sdk/*/__init__.py")}
    assert on_disk | {"mcsharp_exporters"} == set(order)


def section(title: str) -> str:
    page = (ROOT / "docs/architecture.md").read_text()
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def package_folder(package: str) -> list[Path]:
    folder = "exporters/mcsharp_exporters" if package == "mcsharp_exporters" else ""
    return sorted((ROOT / (folder or f"mcsharp_sdk/{package}")).rglob("*.py"))


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "mcsharp_sdk" and len(parts) > 1 else parts[0]


def imported_at_the_top(file: Path) -> list[str]:
    """Modules that a file imports when it is imported."""
    body = ast.parse(file.read_text()).body
    return [
        module
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        if module
    ]

"""Pages in a real browser: both themes, and no sideways scrolling on a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from mcsharp_sdk.report.elements import Page, Section, Table, Tile
from mcsharp_sdk.report.measured import map_figure
from mcsharp_sdk.report.page import render
from mcsharp_sdk.report.plot import line_plot
from mcsharp_sdk.report.shading import Gradual

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
PHONE = 360

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: it is a package of Debian"
)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with all that is wide: a map of many experts, a plot, a long table, long words."""
    values = {layer: [float(layer * e) for e in range(64)] for layer in range(4)}
    figure = map_figure(
        values, Gradual.over([0, 189]), title="Map", unit="values", shown=lambda v: f"{v:g}"
    )
    plot = line_plot({"a": [(0, 1), (1, 2)]}, title="Plot", x_label="x", y_label="y")
    long = "word" * 60
    section = Section(
        "all",
        "All that there is",
        [long],
        [Table("Table", ["", *map(str, range(40))], [["row", *range(40)]])],
        [long],
        [[figure, type(figure)(plot, long, figure.table)]],
        code=long,
    )
    tiles = [Tile("label", "12,345.6 MB", "of much more")] * 5
    file = tmp_path / "page.html"
    file.write_text(render(Page(f"model-{long}", "summary", tiles, [section], "footer")))
    return file


def browse(work: Path, address: Path, *options: str) -> str:
    """Standard output of a headless run without a network."""
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--allow-file-access-from-files", f"--user-data-dir={work / 'profile'}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", *options, address.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout


def test_a_phone_shows_the_whole_width(page: Path, tmp_path: Path) -> None:
    """A frame as wide as a phone tells how wide its content is, and how many parts have a size."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe id=f src=page.html width={PHONE} height=800></iframe><script>"
        "onload = () => { const d = document.getElementById('f').contentDocument;"
        "document.title = [d.documentElement.scrollWidth,"
        "...[...d.querySelectorAll('svg')].map(s => Math.round(s.getBoundingClientRect().width))"
        "].join(' '); }</script>"
    )
    dump = browse(tmp_path, frame, "--dump-dom")
    found = re.search(r"<title>([\d ]+)</title>", dump)
    assert found, dump
    width, *pictures = map(int, found[1].split())
    assert width == PHONE
    assert len(pictures) == 2
    assert min(pictures) > PHONE, "pictures keep their size, and scroll in their own box"


def test_the_page_follows_the_theme_of_the_system(page: Path, tmp_path: Path) -> None:
    corners = []
    for scheme in (0, 1):  # Blink's PreferredColorScheme: dark, light
        picture = tmp_path / f"{scheme}.png"
        theme = f"--blink-settings=preferredColorScheme={scheme}"
        browse(tmp_path, page, theme, "--window-size=900,1400", f"--screenshot={picture}")
        with Image.open(picture) as image:
            corners.append(image.convert("RGB").getpixel((2, 2)))
    assert corners == [(0x14, 0x17, 0x1A), (0xFF, 0xFF, 0xFF)]

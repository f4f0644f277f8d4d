"""Write the tables of families.md from the tests' table of families and the topology's.

python docs/generate_families.py

Everything between the two markers in the page is replaced.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcsharp_sdk.models.topology import KEPT_LINEARS

PAGE = Path(__file__).with_name("families.md")
TABLE = Path(__file__).parents[1] / "tests" / "families.py"
BEGIN = "<!-- families: written by docs/generate_families.py -->"
END = "<!-- end of families -->"

COLUMNS = {
    "statistics": "statistics",
    "compress": "compress",
    "load": "load",
    "generate": "generate",
    "prune": "prune",
    "onnx_routers": "ONNX routers",
}
"""Capability -> its heading."""


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """The page with its tables made anew; ValueError if a marker is missing."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page lacks '{BEGIN}' or '{END}'")
    families = runpy.run_path(str(TABLE), run_name="families")["FAMILIES"]
    lines = [*_support(families), "", *_kept()]
    return before + "\n".join([BEGIN, "", *lines, ""]) + END + after


def _support(families: dict[str, Any]) -> Iterator[str]:
    reasons = list(dict.fromkeys(r for row in families.values() for r in row.refuses.values()))
    yield f"| family | {' | '.join(COLUMNS.values())} | its layout |"
    yield f"|---|{'---|' * len(COLUMNS)}---|"
    for name, row in families.items():
        shown = f"`{name}`" + (f" (`{row.model_type}`)" if row.model_type else "")
        cells = [
            f"no [{reasons.index(row.refuses[c]) + 1}]" if c in row.refuses else "yes"
            for c in COLUMNS
        ]
        yield f"| {shown} | {' | '.join(cells)} | {row.oddities} |"
    if reasons:
        yield ""
        yield "Refused before any work, in these words:"
        yield ""
        yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    yield from _unranked(families)


def _unranked(families: dict[str, Any]) -> Iterator[str]:
    reasons = dict.fromkeys(row.unranked for row in families.values() if row.unranked)
    yield ""
    yield "TokenProtection's metrics `attention`, the default, and `drop_insignificant` are refused"
    yield "before any work in these families; the others work in all that can be pruned:"
    yield ""
    for reason in reasons:
        names = ", ".join(f"`{name}`" for name, row in families.items() if row.unranked == reason)
        yield f"- {names}: {reason}"


def _kept() -> Iterator[str]:
    yield "| linear layer | why it keeps its precision |"
    yield "|---|---|"
    yield from (f"| `{end}` | {reason} |" for end, reason in KEPT_LINEARS.items())


if __name__ == "__main__":
    main()

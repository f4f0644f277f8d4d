"""A page as a reader or a screen reader meets it, from html.parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Element:
    """A tag, its attributes, and what is in it."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside, with single blanks."""
        return " ".join(" ".join(self._texts()).split())

    def _texts(self) -> list[str]:
        return [*self.pieces, *(text for child in self.children for text in child._texts())]

    def find(self, tag: str, **attributes: str) -> list[Element]:
        """Elements inside with this tag and these attributes, in order of the page."""
        found = []
        for child in self.children:
            matches = all(child.attributes.get(k) == v for k, v in attributes.items())
            if child.tag == tag and matches:
                found.append(child)
            found += child.find(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.here = Element("", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (
            f"an attribute stands twice: {self.get_starttag_text()}"
        )
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.pieces.append(data)


def read_page(text: str) -> Element:
    """The page; AssertionError if a tag is not closed, or not by its own."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.here is reader.root, f"<{reader.here.tag}> is not closed"
    return reader.root


def table_rows(table: Element) -> dict[str, list[str]]:
    """Heading of a row -> its cells."""
    rows = table.find("tbody")[0].find("tr")
    return {row.find("th")[0].text: [cell.text for cell in row.find("td")] for row in rows}


def table_called(page: Element, caption: str) -> Element:
    """The only table with this caption."""
    (found,) = (t for t in page.find("table") if t.find("caption")[0].text == caption)
    return found

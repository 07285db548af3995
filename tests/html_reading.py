"""Strict reading of HTML: what a person sees of it, and whether it is what it says it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "meta"}
# Where which elements may stand; what is not named may stand anywhere in the body.
PARENTS = {
    "tr": {"tbody", "thead"},
    "td": {"tr"},
    "th": {"tr"},
    "tbody": {"table"},
    "thead": {"table"},
    "dt": {"div"},
    "dd": {"div"},
    "figcaption": {"figure"},
    "h2": {"section"},
    "title": {"head"},
    "meta": {"head"},
    "style": {"head"},
    "p": {"main", "section"},
    "pre": {"section"},
}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)


class Reader(HTMLParser):
    """Reads a page, and stops at the first fault."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        assert page.startswith("<!DOCTYPE html>\n")
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self._open
        (root,) = [element for element in self.elements if element.name == "html"]
        assert root.attributes["lang"] == "en"
        assert [child.name for child in root.children] == ["head", "body"]
        assert [child.name for child in root.children[0].children[:1]] == ["meta"]
        assert root.children[0].children[0].attributes == {"charset": "utf-8"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if self._open:
            assert self._open[-1].name in PARENTS.get(tag, {self._open[-1].name}), (self._open[-1].name, tag)
            self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is no HTML")

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, name: str) -> list[Element]:
        return [element for element in self.elements if element.name == name]

    @property
    def text(self) -> str:
        """What is read in the body."""
        (body,) = self.all("body")
        return body.text

    def tables(self) -> list[list[list[str]]]:
        """The cells of every table, headings too."""
        return [
            [[cell.text for cell in row.children] for part in table.children for row in part.children]
            for table in self.all("table")
        ]

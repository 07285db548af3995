"""HTML that cannot be broken by what it shows: text is escaped unless it was made here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

_VOID: Final = frozenset({"img", "meta"})
_SVG_POINTS_PER_PIXEL: Final = 0.75

# Nothing is fetched, and nothing runs, even if a text should break out of its place.
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1a1a1a; --quiet: #5b5b5b; --line: #d9d9d9; --paper: #ffffff;
  --card: #f5f6f8; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --quiet: #a9a9a9; --line: #3c3f44; --paper: #17191c;
  --card: #212429; --mark: #6cb8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.lead { font-size: 1.1rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0 0; }
.facts div { flex: 1 1 9rem; background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.facts dt { color: var(--quiet); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: .5rem; padding: .4rem; }
figcaption { margin-top: .4rem; max-width: 46rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; }
tbody th { color: var(--ink); font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85rem; }
td code { overflow-wrap: anywhere; }
pre { background: var(--card); border-left: 3px solid var(--mark); border-radius: .3rem; padding: .6rem .8rem;
  margin: .3rem 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  tr, pre, .facts div { break-inside: avoid; } .facts div, pre { border: 1px solid var(--line); } }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | int) -> Markup:
    """Return an element; children that are no :class:`Markup`, and attributes, are escaped.

    Args:
        name: of the element.
        children: what is in it.
        attributes: of it; ``class_`` stands for ``class``.
    """
    opening = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{opening}>")
    inside = "".join(child if isinstance(child, Markup) else html.escape(child, quote=False) for child in children)
    return Markup(f"<{name}{opening}>{inside}</{name}>")


def facts(named: Sequence[tuple[str, str]]) -> Markup:
    """Return numbers that stand out, each with its name."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in named), class_="facts"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> Markup:
    """Return a table.

    Args:
        head: names of the columns; where there are none, the first cell of a row is its name.
        rows: the cells.
        numbers: which columns are of numbers, and aligned like those.
    """

    def cell(name: str, place: int, text: str) -> Markup:
        return element(name, text, class_="number") if place in numbers else element(name, text)

    body = []
    for row in rows:
        first = element("td", row[0]) if head else element("th", row[0], scope="row")
        if head and 0 in numbers:
            first = cell("td", 0, row[0])
        body.append(element("tr", first, *(cell("td", place, text) for place, text in enumerate(row[1:], start=1))))
    parts = [element("tbody", *body)]
    if head:
        names = (cell("th", place, name) for place, name in enumerate(head))
        parts.insert(0, element("thead", element("tr", *names)))
    return element("div", element("table", *parts), class_="scroll")


def picture(svg: Path, alternative: str, caption: str) -> Markup:
    """Return a figure that holds an SVG file.

    As an image, and not as elements of the page, because the ids in it are those of other pictures too.

    Args:
        svg: the file.
        alternative: what the picture shows, for those who do not see it.
        caption: the text below.
    """
    content = svg.read_bytes()
    root = ElementTree.fromstring(content)
    width, height = (float(root.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    image = element(
        "img",
        src=f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}",
        alt=alternative,
        width=round(width / _SVG_POINTS_PER_PIXEL),
        height=round(height / _SVG_POINTS_PER_PIXEL),
    )
    return element("figure", image, element("figcaption", caption))


def section(title: str, *parts: str) -> Markup:
    """Return a part of the page with a heading."""
    return element("section", element("h2", title), *parts)


def page(title: str, *parts: str) -> str:
    """Return a whole page, which needs no other file and no network."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    body = element("body", element("main", element("h1", title), *parts))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"

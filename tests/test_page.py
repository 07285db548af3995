from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from nni_cream.page import Markup, element, facts, page, picture, section, table
from nni_cream.plots.style import save_figure
from tests.html_reading import Reader

HOSTILE = "</p><script>alert(1)</script> & \"double\" 'single' <!-- --> &amp; ]]>"
# A parser may leave out control characters and lone surrogates, which nobody can see.
visible = st.text(st.characters(blacklist_categories=("Cc", "Cs")), max_size=40)


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "a < b & c", Markup("<code>d</code>")) == "<p>a &lt; b &amp; c<code>d</code></p>"
    assert isinstance(element("p"), Markup)
    assert element("td", "1", class_="number") == '<td class="number">1</td>'
    assert element("img", alt='"a" <b>') == '<img alt="&quot;a&quot; &lt;b&gt;">'


@given(visible, visible, visible)
def test_whatever_the_text_the_page_stays_what_it_is(title: str, heading: str, text: str) -> None:
    body = [
        facts([(heading, text)]),
        section(heading, element("p", text), table([text, "b"], [[text, heading]]), element("pre", "x" + text)),
    ]
    reader = Reader(page(title, *body))
    names = [found.name for found in reader.elements]
    plain = Reader(
        page(
            "t",
            facts([("h", "x")]),
            section("h", element("p", "x"), table(["x", "b"], [["x", "h"]]), element("pre", "x")),
        )
    )
    assert names == [found.name for found in plain.elements]
    assert reader.all("title")[0].text == reader.all("h1")[0].text == title
    assert reader.all("p")[0].text == text
    assert reader.tables() == [[[text, "b"], [text, heading]]]


def test_hostile_text_is_shown_as_it_is() -> None:
    reader = Reader(page(HOSTILE, section(HOSTILE, element("p", HOSTILE), element("p", "x", title=HOSTILE))))
    assert not reader.all("script")
    assert reader.all("h1")[0].text == reader.all("h2")[0].text == reader.all("p")[0].text == HOSTILE
    assert reader.all("p")[1].attributes == {"title": HOSTILE}


def test_nothing_is_fetched_and_nothing_runs() -> None:
    reader = Reader(page("t"))
    policies = [m.attributes["content"] for m in reader.all("meta") if "http-equiv" in m.attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    (style,) = reader.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert "prefers-color-scheme: dark" in style.text
    assert "@media print" in style.text


def test_rows_without_headings_are_named_by_their_first_cell() -> None:
    reader = Reader(page("t", table([], [("a", "1"), ("b", "2")])))
    assert [(cell.text, cell.attributes) for cell in reader.all("th")] == [
        ("a", {"scope": "row"}),
        ("b", {"scope": "row"}),
    ]
    assert not reader.all("thead")


def test_numbers_are_aligned_as_such() -> None:
    reader = Reader(page("t", table(["n", "word", "m"], [["1", "a", "2"]], numbers=(0, 2))))
    marked = [cell.text for cell in reader.elements if cell.attributes.get("class") == "number"]
    assert marked == ["n", "m", "1", "2"]


def test_a_picture_is_the_file_itself(tmp_path: Path) -> None:
    svg, _ = save_figure(Figure(figsize=(4, 3)), tmp_path, "p")
    reader = Reader(page("t", picture(svg, "what it shows", "the caption")))
    (image,) = reader.all("img")
    kind, _, content = image.attributes["src"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(content) == svg.read_bytes()
    assert image.attributes["alt"] == "what it shows"
    # 96 pixels an inch, so that letters have the size that they were drawn in.
    assert (int(image.attributes["width"]), int(image.attributes["height"])) == (384, 288)
    assert reader.all("figcaption")[0].text == "the caption"


@pytest.mark.parametrize(
    "broken",
    [
        "<html lang='en'></html>",
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'></head><body><p></body></html>",
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'></head><body><td></td></body></html>",
    ],
)
def test_the_reader_of_these_tests_sees_faults(broken: str) -> None:
    with pytest.raises(AssertionError):
        Reader(broken)

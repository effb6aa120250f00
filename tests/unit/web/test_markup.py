"""HTML: what is text stays text, whatever it holds."""

from __future__ import annotations

import html.parser

from hypothesis import given
from hypothesis import strategies as st

from cdc_invalidator.web.markup import Html, element, join, plot


class Parsed(html.parser.HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])), st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_no_text_becomes_a_tag_or_an_attribute(content: str, attribute: str) -> None:
    parsed = Parsed(element("p", element("b", content), title=attribute))
    assert parsed.tags == ["p", "b"]
    assert parsed.attributes == [("title", attribute)]
    assert parsed.text == content


def test_control_characters_are_shown_by_their_numbers() -> None:
    assert element("p", "\x1b[31m\x00\x9b\n") == "<p>\\x1b[31m\\x00\\x9b\n</p>"


def test_attributes_are_there_or_not() -> None:
    assert element("input", id="a", for_="b", data_title="c", hidden=True, required=False, rel=None) == (
        '<input id="a" for="b" data-title="c" hidden>'
    )
    assert join("<", None, [Html("<b>"), "&"]) == "&lt;<b>&amp;"


def test_a_plot_ends_now_and_has_no_line_where_nothing_is_known() -> None:
    drawn = plot([0.0, 5.0, None, 10.0], "Some <keys>", width=10)
    assert 'aria-label="Some &lt;keys&gt;"' in drawn
    points = [value for name, value in Parsed(drawn).attributes if name == "points"][1:]
    assert points == ["6,23.0 7,12.0", "9,1.0 9,1.0"]
    assert plot([], "nothing", width=10).count("<polyline") == 1

"""The elements that the page is made of.

Names of clients and messages of errors come from outside: every attribute and every text is escaped
here, so that a client's name can't become a script in the page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element: attributes are escaped, content is markup already.

    Args:
        name: The element's name.
        content: Its children as markup.
        attributes: Its attributes: `class_` is written `class`, and `_` within a name `-`; those
            that are `None` are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_quoted(number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def _quoted(value: str) -> str:
    # A parser of XML reads a bare line break within an attribute as a blank.
    return html.escape(value).replace("\n", "&#10;")


def text(value: object) -> str:
    """Any text as markup."""
    return html.escape(str(value))


# -------------------------------------------------------------------------------- parts of cards


def card(title: str, content: str, about: str = "", *, wide: bool = False) -> str:
    """A card with its title, and a line on what it shows."""
    parts = [tag("h2", text(title))]
    if about:
        parts.append(tag("p", text(about), class_="about"))
    return tag("section", *parts, content, class_="card wide" if wide else "card")


def cards(*parts: str) -> str:
    """Cards beside and below each other; nothing if there are none."""
    return tag("div", *parts, class_="cards") if any(parts) else ""


def legend(entries: Sequence[tuple[str, str]], more: str = "") -> str:
    """The meaning of the colours: CSS classes and their names."""
    items = [tag("li", tag("i", class_=kind), text(name)) for kind, name in entries]
    if more:
        items.append(tag("li", text(more)))
    return tag("ul", *items, class_="legend")


def table(heads: Sequence[str], lines: Sequence[Sequence[object]], class_: str = "table") -> str:
    """A table with its heads, which scrolls within its card."""
    head = tag("thead", tag("tr", *(tag("th", text(head)) for head in heads)))
    rows = [tag("tr", *(tag("td", text(cell)) for cell in line)) for line in lines]
    return scrollable(tag("table", head, tag("tbody", *rows), class_=class_))


def scrollable(content: str) -> str:
    """A part that scrolls where it doesn't fit; with the arrow keys too, once it has the focus."""
    return tag("div", content, class_="scroll", tabindex="0")


def client_line(client: str, middle: str, figure: str, **attributes: object) -> str:
    """A line of a client: its name, what is drawn of it, and a figure."""
    return tag(
        "div",
        tag("span", text(client), class_="name"),
        middle,
        tag("span", text(figure), class_="figure"),
        data_client=client,
        **attributes,
    )


def details(title: str, content: str) -> str:
    """A part that opens by a click on its title."""
    return tag("details", tag("summary", title), content)


def note(words: str) -> str:
    """Small print; nothing if there are no words."""
    return tag("p", text(words), class_="note") if words else ""


def good(words: str) -> str:
    """A sentence with good news."""
    return tag("p", text(words), class_="good")


def empty(words: str) -> str:
    """A sentence in place of a chart whose data isn't known."""
    return tag("p", text(words), class_="empty")


def number(value: object) -> str:
    """A coordinate with no more digits than can be seen; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)

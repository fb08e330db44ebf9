"""Text that becomes HTML or SVG, and numbers as people read them.

Names of clients and reasons of errors come from outside: every attribute and every text is escaped here, so that no
page can be made to run what a client calls itself.
"""

from __future__ import annotations

import html

_BYTES = ("B", "kB", "MB", "GB", "TB")


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element: attributes are escaped (`class_` is `class`, `_` is `-`), content is markup already.

    Args:
        name: The element's name.
        content: Its children as markup.
        attributes: Its attributes; those that are `None` are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_quoted(number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{''.join(content)}</{name}>"


def _quoted(value: str) -> str:
    return html.escape(value).replace("\n", "&#10;")  # XML would make a blank of a bare line break


def text(value: object) -> str:
    """Any text as markup."""
    return html.escape(str(value))


def number(value: object) -> str:
    """A coordinate with no more digits than can be seen; anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    """A share of one as per cent."""
    return f"{100 * value:.3g} %"


def plain(value: float) -> str:
    """A number with three digits that matter, and thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def size(value: float) -> str:
    """A number of bytes, in steps of a thousand."""
    step = 0
    while abs(value) >= 999.5 and step < len(_BYTES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_BYTES[step]}"


def span(seconds: float) -> str:
    """A time span given in seconds."""
    for name, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} s" if seconds >= 1 or seconds == 0 else f"{seconds * 1000:.3g} ms"


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"

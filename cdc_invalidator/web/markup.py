"""HTML that is escaped by construction, and small plots. Pure.

The rule that holds here: a text becomes part of a page only through `element`, which escapes it and shows its control
characters by their numbers. Names of tables and caches, errors and keys come from others.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
# Elements without an end. Those of SVG have one.
_VOID = frozenset({"input", "link", "meta"})
PLOT_HEIGHT = 24


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Iterable["str | Html"] | None


def escaped(text: str) -> Html:
    """Return a text as HTML shows it."""
    return text if isinstance(text, Html) else Html(html.escape(text.translate(_CONTROL)))


def element(name: str, /, *content: Content, **attributes: str | bool | None) -> Html:
    """Return an element.

    Args:
        name: its name.
        content: texts and elements, or iterables of them; ``None`` for nothing.
        attributes: with ``_`` for ``-`` and behind a word of Python's; ``True`` for one without a value, ``None`` and
            ``False`` for none.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*content)}</{name}>")


def join(*content: Content) -> Html:
    """Return texts and elements one behind the other."""
    return Html("".join(_flat(content)))


def _flat(content: Iterable[Content]) -> Iterable[str]:
    for each in content:
        if isinstance(each, str):
            yield escaped(each)
        elif each is not None:
            yield from map(escaped, each)


def plot(values: Sequence[float | None], label: str, *, width: int, most: float | None = None) -> Html:
    """Return a small line over time that ends now.

    Args:
        values: the oldest first; there is no line where there is ``None``.
        label: what it shows, for those who don't see it.
        width: how many values it has room for.
        most: the value at its top; that of the largest, unless given.
    """
    top = most or max((value for value in values if value is not None), default=0.0) or 1.0
    room = width - len(values)
    lines: list[list[str]] = [[]]
    for at, value in enumerate(values, room):
        if value is None:
            lines.append([])
        else:
            lines[-1].append(f"{at},{PLOT_HEIGHT - 1 - (PLOT_HEIGHT - 2) * min(1.0, value / top):.1f}")
    # A line of one point would not be seen.
    drawn = (points if len(points) > 1 else [*points, *points] for points in lines if points)
    return element(
        "svg",
        element("polyline", points=f"0,{PLOT_HEIGHT} {width},{PLOT_HEIGHT}", class_="axis"),
        *(element("polyline", points=" ".join(points)) for points in drawn),
        viewBox=f"0 0 {width - 1} {PLOT_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )

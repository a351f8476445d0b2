"""Makes strings from data and plugins safe to show.

A label, a reason or an example may contain terminal escapes, right-to-left overrides, markup or
megabytes of text. `clean` (of tdabench.errors) shows invisible and directional characters as
escapes; the exports then quote for their own syntax.
"""

from __future__ import annotations

from collections.abc import Iterable

from tdabench.errors import clean as clean


def shorten(text: str, width: int) -> str:
    """Shortens `text` to at most `width` characters, with an ellipsis where it is cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def number(value: float | None, digits: int = 2) -> str:
    """Formats a number: `0.38`, `-0.02`; `–` if it is missing."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def seconds(value: float | None) -> str:
    """Formats a duration in the most readable unit: `0.4 ms`, `3.2 s`, `41 min`, `2.5 h`."""
    if value is None:
        return "–"
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if value >= size * (2 if unit != "s" else 1):
            return f"{_three(value / size)} {unit}"
    return f"{_three(value * 1e3)} ms"


def milliseconds(value: float | None) -> str:
    """Formats a time per query: `0.03 ms`, `12 ms`, `1.2 s`."""
    return "–" if value is None else seconds(value / 1e3)


def count(value: float | None) -> str:
    """Formats a count: `2,000`; fractional sizes keep one decimal below ten."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _three(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.9995 else f"{value:.2g}"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def listing(words: Iterable[str], last: str = "and") -> str:
    """Joins items: `a, b and c`."""
    *head, tail = list(words) or [""]
    return f"{', '.join(head)} {last} {tail}" if head else tail

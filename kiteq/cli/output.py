"""What people and programs read."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any, Final

__all__ = ["age_text", "body_fields", "print_json", "printable", "table", "time_text"]


UNITS: Final = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def printable(body: bytes) -> str:
    """Return a body as text that does nothing to a terminal: other bytes and control codes are escaped."""
    text = body.decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def body_fields(body: bytes) -> dict[str, str]:
    """Return a body for JSON: as `text` when it is UTF-8, else as `base64`."""
    try:
        return {"text": body.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(body).decode()}


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(value, ensure_ascii=False, default=body_fields), flush=True)


def time_text(epoch_ms: int) -> str:
    """Return a stored time for people, in UTC."""
    return datetime.fromtimestamp(epoch_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def age_text(seconds: float) -> str:
    """Return an age with its two largest units, like 2h 5m."""
    left = max(0, int(seconds))
    counts: list[tuple[int, str]] = []
    for unit, size in UNITS:
        count, left = divmod(left, size)
        counts.append((count, unit))
    while len(counts) > 1 and not counts[0][0]:
        del counts[0]
    return " ".join(f"{count}{unit}" for count, unit in counts[:2] if count) or "0s"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[str] = ()) -> str:
    """Return rows under titles, in columns; whole numbers stand to the right, and the columns titled so."""
    cells = [[printable(str(value).encode()).replace("\n", " ") for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    numeric = [
        title in right or (bool(rows) and all(type(row[at]) is int for row in rows)) for at, title in enumerate(titles)
    ]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(titles), *map(line, cells)])

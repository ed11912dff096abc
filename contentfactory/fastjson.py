"""JSON for paths that every job takes: as the standard library reads and writes it, without what that does anew for each call."""

import json
from typing import Any

from pydantic_core import from_json, to_json

dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""Compact, in Unicode."""
dumps_ascii = json.JSONEncoder().encode
"""With escapes for all that is not ASCII, halves of a surrogate pair too: what any column takes."""
dumps_sorted = json.JSONEncoder(sort_keys=True).encode
"""With sorted keys and the usual spaces: what digests and seeds are made of."""


def dumps_ids(value: Any) -> str:
    """As `dumps`, for what is large and holds nothing but ids, names and finite numbers: several times as quick."""
    return to_json(value).decode()


def loads(text: str | bytes) -> Any:
    """A JSON document's value.

    Raises:
        ValueError: If it is none.
    """
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)  # halves of a surrogate pair, which the quick reader refuses


__all__ = ["dumps", "dumps_ascii", "dumps_ids", "dumps_sorted", "loads"]

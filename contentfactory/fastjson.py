"""JSON for paths that every job takes: as the standard library reads and writes it, without what that does anew for each call."""

import json
from collections.abc import Callable, Iterable
from json import encoder as _stock
from typing import Any

from pydantic_core import from_json, to_json


class _Encoder:
    # The standard encoder makes its inner one anew for each document, which takes longer than most of ours.
    def __init__(self, *, compact: bool = False, ascii_only: bool = True, sort_keys: bool = False) -> None:
        whole = json.JSONEncoder(separators=(",", ":") if compact else None, ensure_ascii=ascii_only, sort_keys=sort_keys)
        make = getattr(_stock, "c_make_encoder", None)
        if make is None:
            self._chunks: Callable[[Any, int], Iterable[str]] = lambda value, _: [whole.encode(value)]
            return
        string = _stock.encode_basestring_ascii if ascii_only else _stock.encode_basestring
        self._chunks = make(None, whole.default, string, None, whole.key_separator, whole.item_separator, sort_keys, False, True)

    def encode(self, value: Any) -> str:
        return "".join(self._chunks(value, 0))


dumps = _Encoder(compact=True, ascii_only=False).encode
"""Compact, in Unicode."""
dumps_ascii = _Encoder().encode
"""With escapes for all that is not ASCII, halves of a surrogate pair too: what any column takes."""
dumps_sorted = _Encoder(sort_keys=True).encode
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

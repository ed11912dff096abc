"""Identifiers: a prefix that names the thing and a UUIDv7, so that ids sort by the time of their making.

An id looks like ``job_0197c1d2e5f17a3c8e0b4a6d9c2f1e77``. It is made by the server and carries no authority.
"""

import hashlib
import re

import uuid_utils

PREFIXES = ("proj", "batch", "job", "art", "ds", "mv", "evt", "file", "key")
_PATTERN = re.compile(rf"^(?:{'|'.join(PREFIXES)})_[0-9a-f]{{32}}$")


def new_id(prefix: str) -> str:
    """Make an id.

    Args:
        prefix: One of ``PREFIXES``.

    Returns:
        ``<prefix>_<32 hexadecimal digits>``; later calls in one process sort after earlier ones.

    Raises:
        ValueError: If the prefix is unknown.
    """
    if prefix not in PREFIXES:
        raise ValueError(f"id prefix {prefix!r} is unknown; allowed: {', '.join(PREFIXES)}")
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def is_id(value: str, prefix: str | None = None) -> bool:
    """Whether ``value`` has the form of an id (of kind ``prefix``, where one is given)."""
    return bool(_PATTERN.match(value)) and (prefix is None or value.startswith(prefix + "_"))


def stable_seed(*parts: str) -> int:
    """A seed in ``[0, 2**31)`` that is a pure function of its parts: the same line of a manifest gets the same seed."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

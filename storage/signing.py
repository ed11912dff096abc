"""Links for a while: what they carry, how they are signed without an S3 server, what a browser may do with them."""

import hashlib
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from contentfactory.errors import ConfigError, InputError, PolicyError
from storage.keys import media_type_for, validate_key

MAX_EXPIRES_S = 7 * 24 * 3600
"""Longest life of a link; S3's own limit."""
OBJECTS_PATH = "/v1/objects/"
"""Where the API answers signed links of stores that have no server of their own."""

_INLINE_TYPES = {"application/json", "application/pdf", "text/csv", "text/markdown", "text/plain", "text/vtt"}
_INLINE_FAMILIES = ("audio/", "font/", "image/", "video/")
_MIN_SECRET = 16


@dataclass(frozen=True)
class SignedRequest:
    """What a verified link allows.

    Attributes:
        method: ``GET`` or ``PUT``.
        key: The object.
        expires_at: When it ends, in seconds since 1970.
        media_type: Media type to answer with, or that must be sent; None means the stored one.
        disposition: Value of the ``Content-Disposition`` header of the answer to a GET.
        size: Bytes that must be sent by PUT.
    """

    method: str
    key: str
    expires_at: int
    media_type: str | None = None
    disposition: str | None = None
    size: int | None = None


def check_expires(expires_s: int) -> int:
    """Refuse a life that S3 would refuse.

    Raises:
        InputError: If it is not between 1 s and 7 days.
    """
    if not 1 <= expires_s <= MAX_EXPIRES_S:
        raise InputError(f"a link lives 1 to {MAX_EXPIRES_S} s, not {expires_s}", param="expires_s")
    return expires_s


def check_media_type(media_type: str) -> str:
    """Refuse a media type that cannot stand in a header.

    Raises:
        InputError: If it is not 1 to 200 printable ASCII characters with a slash among them.
    """
    if not (
        media_type.isascii() and media_type.isprintable() and "/" in media_type and len(media_type) <= 200
    ):
        raise InputError(f"{media_type[:200]!r} is no media type such as image/png", param="media_type")
    return media_type


def disposition_and_type(
    key: str, filename: str | None, media_type: str | None, inline: bool
) -> tuple[str, str | None]:
    """``Content-Disposition`` and media type of the answer to a signed GET.

    Shown in the browser is only what cannot run scripts, by a list of what is allowed: HTML, SVG, XML and
    unknown types are always saved. To show something its type is always pinned, because the stored one was
    somebody's word.
    """
    if media_type is not None:
        check_media_type(media_type)
    if inline:
        shown = media_type or media_type_for(key)
        plain = shown.partition(";")[0].strip().lower()
        if plain in _INLINE_TYPES or (plain.startswith(_INLINE_FAMILIES) and "xml" not in plain):
            return _disposition("inline", filename), shown
    return _disposition("attachment", filename), media_type


def _disposition(kind: str, filename: str | None) -> str:
    """RFC 6266: an ASCII name for the old, the real one in UTF-8 for everybody else."""
    if not filename:
        return kind
    name = "".join(c if c.isprintable() else "_" for c in filename.replace("\\", "/").rpartition("/")[2])[
        :200
    ]
    plain = "".join(c if c.isascii() and c not in '"%;' else "_" for c in name)
    value = f'{kind}; filename="{plain}"'
    return value if plain == name else f"{value}; filename*=UTF-8''{quote(name, safe='')}"


class UrlSigner:
    """Makes and checks links to this application's own ``/v1/objects`` by HMAC-SHA256.

    Args:
        secret: At least 16 bytes that only this application knows; the same in every process.
        base_url: Where the API is reached from outside, such as ``http://127.0.0.1:8000``.
        clock: Seconds since 1970.
    """

    def __init__(
        self, secret: str | bytes | None, base_url: str | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        key = secret.encode() if isinstance(secret, str) else secret
        if key is not None and len(key) < _MIN_SECRET:
            raise ConfigError(
                f"signing_secret has {len(key)} bytes; at least {_MIN_SECRET} are needed",
                param="signing_secret",
            )
        self._secret = key
        self._base = (base_url or "").rstrip("/")
        self._clock = clock

    def get_url(
        self,
        key: str,
        *,
        expires_s: int,
        filename: str | None = None,
        media_type: str | None = None,
        inline: bool = False,
    ) -> str:
        """A link to read an object; arguments as in ``ObjectStore.presign_get``."""
        disposition, media_type = disposition_and_type(key, filename, media_type, inline)
        return self._url("GET", key, expires_s, {"disposition": disposition, "type": media_type})

    def put_url(self, key: str, *, expires_s: int, media_type: str, size: int) -> str:
        """A link to write an object; arguments as in ``ObjectStore.presign_put``."""
        if size < 0:
            raise InputError(f"size {size} is negative", param="size")
        check_media_type(media_type)
        return self._url("PUT", key, expires_s, {"type": media_type, "size": str(size)})

    def verify(self, url: str, method: str = "GET") -> SignedRequest:
        """Check a link that came in.

        Args:
            url: The whole URL, or its path and query, as it was requested. Host and scheme do not matter:
                a proxy may change them.
            method: The request's method. HEAD counts as GET.

        Raises:
            PolicyError: If it was not made here for this, was changed (code ``bad_signature``), or is over
                (``link_expired``).
        """
        refused = PolicyError("this link was not made by this server, or was changed", code="bad_signature")
        method = "GET" if method == "HEAD" else method
        parts = urlsplit(url)
        _, marker, quoted = parts.path.partition(OBJECTS_PATH)
        key = unquote(quoted)
        try:
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
            validate_key(key)
        except (ValueError, InputError):
            raise refused from None
        query = dict(pairs)
        signature = query.pop("signature", "")
        if not marker or len(pairs) != len(query) + 1 or not signature.isascii():
            raise refused
        if not hmac.compare_digest(signature, self._sign(method, key, query)):
            raise refused
        # From here on the query is ours: nobody else could have signed it.
        expires_at = int(query["expires"])
        if self._clock() >= expires_at:
            raise PolicyError("this link is over; ask for a new one", code="link_expired")
        return SignedRequest(
            method=method,
            key=key,
            expires_at=expires_at,
            media_type=query.get("type"),
            disposition=query.get("disposition"),
            size=int(query["size"]) if "size" in query else None,
        )

    def _url(self, method: str, key: str, expires_s: int, extra: dict[str, str | None]) -> str:
        validate_key(key)
        if not self._base:
            raise ConfigError(
                "links need base_url, the address under which the API is reached", param="base_url"
            )
        query = {"expires": str(math.ceil(self._clock()) + check_expires(expires_s))}
        query |= {name: value for name, value in extra.items() if value is not None}
        query["signature"] = self._sign(method, key, query)
        return f"{self._base}{OBJECTS_PATH}{quote(key)}?{urlencode(query, quote_via=quote)}"

    def _sign(self, method: str, key: str, query: dict[str, str]) -> str:
        if self._secret is None:
            raise ConfigError("links need signing_secret, at least 16 random bytes", param="signing_secret")
        # Each field is quoted, so no two different requests make the same text.
        text = "\n".join([method, quote(key), urlencode(sorted(query.items()), quote_via=quote)])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

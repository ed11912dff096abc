"""The services of one process, opened from the settings."""

from urllib.parse import urlencode

from pydantic import SecretStr

import storage
from contentfactory.settings import Settings
from storage.base import ObjectStore


def open_store(settings: Settings) -> ObjectStore:
    """The object store that the settings name.

    Raises:
        ConfigError: If the address cannot work.
    """
    url = settings.storage_url
    if url.startswith("s3://"):
        if settings.storage_prefix:
            path, _, query = url.partition("?")
            url = f"{path.rstrip('/')}/{settings.storage_prefix.strip('/')}" + (f"?{query}" if query else "")
        extra = {"endpoint": settings.storage_endpoint, "region": settings.storage_region}
        pairs = {k: v for k, v in extra.items() if v and f"{k}=" not in url}
        if pairs:
            url += ("&" if "?" in url else "?") + urlencode(pairs)
    return storage.open_store(
        url,
        access_key=_plain(settings.storage_access_key),
        secret_key=_plain(settings.storage_secret_key),
        base_url=settings.public_url,
        signing_secret=settings.signing_key,
    )


def _plain(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value is not None else None

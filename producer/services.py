"""The services of one process, opened from the settings."""

from contentfactory.errors import ConfigError
from contentfactory.settings import Settings
from storage import base


def open_store(settings: Settings) -> base.ObjectStore:
    """The object store that the settings name.

    Raises:
        ConfigError: If the address cannot work.
    """
    import storage

    def plain(value: object) -> str | None:
        return value.get_secret_value() if value is not None else None  # type: ignore[attr-defined]

    try:
        return storage.open_store(
            settings.storage_url,
            endpoint=settings.storage_endpoint,
            region=settings.storage_region,
            access_key=plain(settings.storage_access_key),
            secret_key=plain(settings.storage_secret_key),
            prefix=settings.storage_prefix,
            signing_secret=settings.signing_key,
            base_url=settings.public_url,
        )
    except ValueError as error:
        raise ConfigError(f"storage_url: {error}", param="storage_url") from None

"""Structured logs: events with ids, never prompts."""

import logging
import sys
from typing import TextIO, cast

import structlog

from contentfactory.settings import Settings


class StandardError:
    """Standard error as it is at the moment of writing: whoever replaces and closes it must not close the logs."""

    @staticmethod
    def write(text: str) -> int:
        """Write."""
        return sys.stderr.write(text)

    @staticmethod
    def flush() -> None:
        """Flush."""
        sys.stderr.flush()


def configure_logs(settings: Settings) -> None:
    """Set up structlog and the standard library's logging for this process.

    Args:
        settings: ``log_level`` and ``log_format`` (``auto``: for a person on a terminal, JSON otherwise).
    """
    level = getattr(logging, settings.log_level.upper())
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(ensure_ascii=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, StandardError())),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    # Libraries that log request addresses or message bodies at INFO would put content into our logs.
    for noisy in ("httpx", "httpcore", "botocore", "urllib3", "PIL", "faster_whisper"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Celery tells of each message that it came and that it was dealt with, the first before it passes it on: our own lines say more, and later.
    for told in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(told).setLevel(max(level, logging.WARNING))

"""Named places in the life of a micro-batch at which the fault harness (tests/chaos) strikes. Nothing happens at them otherwise."""

from collections.abc import Callable

BEFORE_CLAIM = "before_claim"
IN_MODEL = "in_model"
AFTER_PUT = "after_put"
IN_COMMIT = "in_commit"
AFTER_COMMIT = "after_commit"
BEFORE_ACK = "before_ack"

hook: Callable[[str], None] | None = None
"""Called with the name of each place that is reached; only a test's plugin sets it."""


def reached(place: str) -> None:
    """Say that a place is reached."""
    if hook is not None:
        hook(place)

"""States of jobs and batches and the steps between them (the ledger enforces them; nothing else may)."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands. ``failed`` is the caller's fault or policy; ``dead`` is poison or out of tries."""

    BLOCKED = "blocked"
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DEAD = "dead"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the state never changes again."""
        return self in TERMINAL


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD, JobState.CANCELLED})
ACTIVE = frozenset(JobState) - TERMINAL
UNWELL = (JobState.FAILED, JobState.DEAD, JobState.CANCELLED)
"""Terminal states without a result."""

# Reviving a failed parent's children is the one step out of a terminal state's neighbourhood: a child that failed only
# because its parent did was never run, so the retry makes *new linked jobs* for both and these edges stay closed.
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.BLOCKED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.DISPATCHED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.DISPATCHED: frozenset({JobState.QUEUED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, *TERMINAL}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.DEAD: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class BatchState(StrEnum):
    """Where a batch stands; ``completed`` is reached once, when each of its jobs is terminal."""

    EXPANDING = "expanding"
    RUNNING = "running"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the batch has finished."""
        return self in (BatchState.COMPLETED, BatchState.FAILED, BatchState.CANCELLED)


class Priority:
    """Bands of priority: higher leaves first. ``INTERACTIVE`` is for somebody who waits, and never waits for company."""

    BULK = 0
    NORMAL = 50
    INTERACTIVE = 100

"""The one tree of errors. A class decides what happens to the job next; its message states the value and what was allowed."""

from collections.abc import Mapping
from typing import Any


class FactoryError(Exception):
    """Base of every error the factory raises on purpose.

    Attributes:
        code: Machine-readable type, stable across releases.
        error_class: Branch that decides what happens next (``input``, ``policy``, ``transient``, ``resource``, ``crash``,
            ``released``, ``deadline``, ``bug``; ``config`` and ``service`` never belong to a job).
        retryable: Whether another attempt may succeed.
        param: The field at fault, where there is one.
    """

    code = "factory_error"
    error_class = "bug"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.detail: Mapping[str, Any] = detail

    def to_dict(self) -> dict[str, Any]:
        """The error as stored with a job and as shown to a caller."""
        out: dict[str, Any] = {"type": self.error_class, "code": self.code, "message": self.message}
        if self.param:
            out["param"] = self.param
        if self.detail:
            out["detail"] = dict(self.detail)
        return out


class InputError(FactoryError):
    """The caller's fault: bad parameters, a corrupt file. The job fails at once and is never retried."""

    code = "invalid_input"
    error_class = "input"


class PolicyError(FactoryError):
    """Refused content or a limit of the project. Never retried."""

    code = "refused"
    error_class = "policy"


class DependencyFailed(InputError):
    """A job that this one needs has failed; the message names it."""

    code = "dependency_failed"


class TransientError(FactoryError):
    """A service did not answer well; the same attempt later may succeed (backoff with jitter, a budget of its own)."""

    code = "transient"
    error_class = "transient"
    retryable = True


class ResourceError(FactoryError):
    """Out of memory: halve the micro-batch, then a larger lane, then fail."""

    code = "out_of_memory"
    error_class = "resource"
    retryable = True


class Released(FactoryError):
    """The worker gives the job back (drain, preemption): queued again without a strike."""

    code = "released"
    error_class = "released"
    retryable = True


class JobCancelled(FactoryError):
    """The job was cancelled while it ran; raised by the cooperative check."""

    code = "cancelled"
    error_class = "cancelled"


class DeadlineExceeded(FactoryError):
    """No progress within the kind's limit, or the time limit passed."""

    code = "deadline"
    error_class = "deadline"
    retryable = True


class LeaseLost(FactoryError):
    """Another attempt holds the job: this one must change nothing any more."""

    code = "lease_lost"
    error_class = "crash"


class ModelUnavailable(FactoryError):
    """A model cannot be found or loaded here; the message says what to do."""

    code = "model_unavailable"
    error_class = "input"


class ConfigError(FactoryError):
    """Settings that cannot work; raised at start, with the setting's name."""

    code = "config"
    error_class = "config"


class NotFound(FactoryError):
    """No such thing, or not this project's."""

    code = "not_found"
    error_class = "input"


class Conflict(FactoryError):
    """The same idempotency key with another request, or a step that the thing's state does not allow."""

    code = "conflict"
    error_class = "input"


class ServiceUnavailable(FactoryError):
    """The database, broker or storage is not reachable."""

    code = "service_unavailable"
    error_class = "service"
    retryable = True


class StorageError(TransientError):
    """The object store failed or answered nonsense."""

    code = "storage"


class ObjectNotFound(FactoryError):
    """No object under this key."""

    code = "object_not_found"
    error_class = "bug"


class ObjectExists(FactoryError):
    """Put-if-absent found other bytes under the key."""

    code = "object_exists"
    error_class = "bug"


class IntegrityError(StorageError):
    """Bytes read or written do not match their SHA-256 or size."""

    code = "integrity"

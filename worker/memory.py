"""Running out of memory: telling it from other faults, and leaving a clean process to the next job."""

import ctypes
import errno
import functools
import gc
import sys
import traceback
from typing import Any

_WORDS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate memory", "bad allocation", "bad_alloc",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "not enough memory",
)  # fmt: skip
"""What torch, onnxruntime, CTranslate2 and the CUDA libraries say in plain `RuntimeError`."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, says that memory ran out, on the processor or on a device."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        torch = sys.modules.get("torch")
        if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)):
            return True
        if isinstance(error, OSError):
            return error.errno == errno.ENOMEM
        # Libraries' own classes derive from either; words alone would also fit a job's own message.
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
            text = str(error)[:2000].lower()
            if any(word in text for word in _WORDS):
                return True
        error = error.__cause__
    return False


def release(error: BaseException | None = None) -> None:
    """Give memory back to the system and the device.

    Args:
        error: The exception that is at hand: its frames still hold the tensors of the failed forward pass, and are cleared.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()
    trim()


def trim() -> None:
    """Make glibc hand free pages back; without it a processor's worker keeps the size of its largest job."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another libc


def device_name(wanted: str) -> str:
    """Make and memory of a device, as limits are remembered by; never imports torch.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        For example ``NVIDIA H100 80GB HBM3 79 GB`` or ``cpu 23 GB``; at most 40 characters.
    """
    torch: Any = sys.modules.get("torch")
    if wanted != "cpu" and torch is not None and torch.cuda.is_available():
        index = int(wanted.partition(":")[2] or 0)
        found = torch.cuda.get_device_properties(index)
        size = f" {found.total_memory / 2**30:.0f} GB"
        return str(found.name)[: 40 - len(size)] + size
    return f"cpu {_memory_gb():.0f} GB"


@functools.cache
def _memory_gb() -> float:
    # Once: it is asked for with each micro-batch, also by a process that has no handle left to open /proc with.
    import psutil

    total = float(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                total = min(total, float(file.read()))
        except (OSError, ValueError):
            continue
    return total / 2**30

"""Measures micro-batches in a worker: what fits, how fast it went. Told to the ledger now and then, with a commit."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from contentfactory.errors import FactoryError, ServiceUnavailable
from contentfactory.jobs.spec import KindSpec
from db import limits
from db.limits import Measured
from db.session import Database
from worker.models import ModelCache

M = TypeVar("M", bound=Any)

FLUSH_S = 5.0
"""Least time between two tellings, seconds; running out of memory is told at once."""

TRIFLE_S = 0.05
"""Micro-batches that take less are not measured, as long as nothing limits them."""

FRESH_S = 2.0
"""A limit read this long ago is read again before a larger micro-batch is cut by it, seconds."""

_KNOWN = 4096


@dataclass
class _Known:
    most: int
    read_at: float


class GroupMeter:
    """Cuts micro-batches to what fits, and measures them.

    Args:
        database: The ledger.
        device: Gives the make of this worker's device; asked late, since it may need torch.
    """

    def __init__(self, database: Database, device: Callable[[], str]) -> None:
        self._database = database
        self._device = device
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._pending: dict[tuple[str, int], Measured] = {}
        self._urgent = False
        self._told_at = time.monotonic()

    def pieces(self, spec: KindSpec, members: Sequence[M]) -> Iterator[list[M]]:
        """A micro-batch in pieces that fit into memory, as far as that was learned: hints that were sent before are larger.

        What a piece teaches counts for the next one.
        """
        rest = list(members)
        while rest:
            most = self._most(self._share_key(spec, rest[0]), len(rest)) if len(rest) > 1 else 0
            # Even pieces: a full one and a rest of one would waste a forward pass.
            count = -(-len(rest) // most) if most else 1
            size = -(-len(rest) // count)
            yield rest[:size]
            rest = rest[size:]

    @contextmanager
    def measure(self, spec: KindSpec, members: Sequence[Any], cache: ModelCache) -> Iterator[None]:
        """Measure what runs inside; the members' errors tell afterwards how it went."""
        began, loads = time.monotonic(), cache.loads
        yield
        seconds = time.monotonic() - began
        if spec.max_group < 2:
            return
        errors: list[FactoryError | None] = [m.error for m in members]
        memory = any(e is not None and e.code == "out_of_memory" for e in errors)
        whole = not any(errors)
        key = self._share_key(spec, members[0])
        with self._lock:
            known = self._known.get(key)
            if not memory and not (whole and (seconds >= TRIFLE_S or (known and known.most))):
                return
            size, first = len(members), members[0].claimed
            timed = whole and cache.loads == loads and seconds >= TRIFLE_S
            old = self._pending.get((key, size)) or Measured(key, "", spec.name, first.model, size, spec.max_group)
            self._pending[(key, size)] = replace(
                old, full=old.full + whole, groups=old.groups + timed, out_of_memory=old.out_of_memory + memory,
                work_s=old.work_s + (sum(m.claimed.seconds for m in members) if timed else 0.0),
                seconds=old.seconds + (seconds if timed else 0.0),
            )  # fmt: skip
            if memory:
                self._urgent = True
                cut = max(1, size // 2)
                self._keep(key, min(known.most, cut) if known and known.most else cut)

    def due(self) -> tuple[Measured, ...]:
        """What to tell the ledger with the next commit; nothing most of the time."""
        with self._lock:
            if not self._pending or not (self._urgent or time.monotonic() - self._told_at >= FLUSH_S):
                return ()
            device = self._device()
            return tuple(replace(one, device=device) for one in self._pending.values())

    def flush(self) -> None:
        """Tell what is left, when the worker ends."""
        with self._lock:
            self._urgent = True
        measured = self.due()
        if measured:
            try:
                self.told(measured, self._database.run(lambda conn: limits.learn(conn, measured)))
            except ServiceUnavailable:
                pass  # only measurements

    def told(self, measured: Sequence[Measured], known: Mapping[str, int]) -> None:
        """The commit took effect.

        Args:
            measured: What was told.
            known: What the ledger knows now, see `db.limits.learn`.
        """
        if not measured:
            return
        with self._lock:
            self._told_at = time.monotonic()
            for one in measured:
                now = self._pending.get((one.share_key, one.size))
                if now is None:
                    continue
                left = replace(
                    now, full=now.full - one.full, groups=now.groups - one.groups, work_s=now.work_s - one.work_s,
                    seconds=now.seconds - one.seconds, out_of_memory=now.out_of_memory - one.out_of_memory,
                )  # fmt: skip
                if left.full or left.groups or left.out_of_memory:
                    self._pending[(one.share_key, one.size)] = left
                else:
                    del self._pending[(one.share_key, one.size)]
            self._urgent = any(one.out_of_memory for one in self._pending.values())
            for key, most in known.items():
                # What ran out of memory since is not in the ledger's number yet.
                newer = any(k == key and one.out_of_memory for (k, _), one in self._pending.items())
                local = self._known.get(key)
                self._keep(key, min(most, local.most) if newer and local and local.most else most)

    def _most(self, key: str, size: int) -> int:
        with self._lock:
            known = self._known.get(key)
            urgent = any(k == key and one.out_of_memory for (k, _), one in self._pending.items())
        if known is not None and (not known.most or known.most >= size or urgent or time.monotonic() - known.read_at < FRESH_S):
            return known.most
        try:
            with self._database.read() as conn:
                most = limits.fitting(conn, key, self._device())
        except ServiceUnavailable:
            return known.most if known else 0
        with self._lock:
            self._keep(key, most)
        return most

    def _keep(self, key: str, most: int) -> None:
        self._known[key] = _Known(most, time.monotonic())
        self._known.move_to_end(key)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    @staticmethod
    def _share_key(spec: KindSpec, member: Any) -> str:
        params = member.resolved.params if member.resolved else spec.validate(member.claimed.params)
        return spec.share_key(params, member.claimed.model)

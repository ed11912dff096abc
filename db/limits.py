"""What the factory learns of micro-batches: how many jobs fit into a device's memory, and how many are worth waiting for.

A row stands for what shares a forward pass (kind, model version, shape: the job's ``share_key``) on one make of device.
Memory: running out halves the size that is dispatched, and the size is remembered. It creeps up again by a quarter after
many full micro-batches, and stops below a size that has failed before; that one is tried again only after very many.
Speed: among measured sizes the smallest counts whose throughput is within a twentieth of the best: more company would only
hold memory and make each job wait.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any

from sqlalchemy import Connection, bindparam, select

from db import prepared
from db.models import GroupLimit, Worker
from db.session import now, upsert
from db.sql import among_given, packed

STREAK = 16
"""Full micro-batches in a row at the learned size before a larger one is tried."""

STEP = 1.25
"""Growth of one such try."""

CAREFUL = 8
"""Factor on `STREAK` before a size is tried that has run out of memory; it doubles with each time that it did."""

WITHIN = 0.05
"""Share of the best throughput that may be given up for a smaller micro-batch."""

LEAST_GROUPS, LEAST_S = 8, 10.0
"""Evidence of speed that a size needs: micro-batches, and seconds over all of them."""

LEAST_GROUP_S = 0.5
"""A micro-batch that takes less is never made smaller for speed: claim and commit would weigh too much."""

BEST_KEPT_S = 7 * 86_400.0
"""How long a choice by speed holds before larger micro-batches are measured again, seconds."""

_WINDOW = 256


@dataclass(frozen=True)
class Measured:
    """Micro-batches of one size that a worker has run since it last told.

    Args:
        share_key: What the jobs shared.
        device: Make of the device.
        kind: Kind of the jobs.
        model: Their model version.
        size: Jobs in each micro-batch.
        most: The kind's largest micro-batch.
        full: Micro-batches in which every job was computed.
        groups: Micro-batches whose time was measured (none that loaded a model).
        work_s: Estimated compute seconds of their jobs, all together.
        seconds: Seconds that they took, all together.
        out_of_memory: Micro-batches that ran out of memory.
    """

    share_key: str
    device: str
    kind: str
    model: str | None
    size: int
    most: int
    full: int = 0
    groups: int = 0
    work_s: float = 0.0
    seconds: float = 0.0
    out_of_memory: int = 0


@dataclass(frozen=True)
class Limit:
    """What is known of one ``share_key`` on one device.

    Args:
        most: Largest micro-batch to send; 0 for the kind's own.
        fits: Largest that is known to fit.
        refused: Smallest that ran out of memory; 0 for none.
        refusals: How often one ran out of memory.
        streak: Full micro-batches at ``most`` since it last changed.
        best: Smallest size whose speed is as good as the best; 0 while unknown.
        speed: Size → (micro-batches, estimated seconds of work, seconds taken).
        how: What taught the last change: ``memory``, ``growth`` or ``speed``.
    """

    most: int = 0
    fits: int = 0
    refused: int = 0
    refusals: int = 0
    streak: int = 0
    best: int = 0
    speed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    how: str = ""

    def after_memory(self, size: int) -> "Limit":
        """A micro-batch of this size ran out of memory. Telling it twice lowers nothing further."""
        fits = self.fits if self.fits < size else 0
        wanted = max(1, size // 2, fits)
        return replace(
            self, most=min(self.most or wanted, wanted), fits=fits, refused=min(self.refused or size, size),
            refusals=self.refusals + 1, streak=0, how="memory",
        )  # fmt: skip

    def after_success(self, size: int, groups: int, most: int) -> "Limit":
        """So many micro-batches of this size succeeded whole.

        Args:
            size: Jobs in each.
            groups: How many.
            most: The kind's largest micro-batch.
        """
        limit = replace(self, fits=max(self.fits, size))
        if not limit.most or size < limit.most:
            return limit
        limit = replace(limit, streak=limit.streak + groups)
        target = min(most, max(limit.most + 1, int(limit.most * STEP)))
        needed = STREAK
        if limit.refused and target >= limit.refused:
            if limit.refused - 1 > limit.most:
                target = limit.refused - 1
            else:
                needed = STREAK * CAREFUL * 2 ** min(limit.refusals, 10)
        if limit.streak < needed:
            return limit
        if limit.most >= most:
            return replace(limit, most=0, refused=0, refusals=0, streak=0, how="growth")
        return replace(limit, most=target, streak=0, how="growth")

    def after_speed(self, size: int, groups: int, work_s: float, seconds: float) -> "Limit":
        """So many micro-batches of this size took so long for so much estimated work."""
        speed = {k: list(v) for k, v in self.speed.items()}
        old = speed.get(str(size), [0.0, 0.0, 0.0])
        new = [old[0] + groups, old[1] + work_s, old[2] + seconds]
        # Old measurements fade, so that a driver's or a model's change shows.
        speed[str(size)] = [round(x / (2 if new[0] > _WINDOW else 1), 4) for x in new]
        best = best_size({int(k): v for k, v in speed.items()})
        return replace(self, speed=speed, best=best, how="speed" if best and best != self.best else self.how)


def best_size(speed: Mapping[int, Sequence[float]], within: float = WITHIN) -> int:
    """The smallest size whose throughput is within a share of the best.

    Args:
        speed: Size → (micro-batches, estimated seconds of work, seconds taken).
        within: That share.

    Returns:
        The size; 0 where fewer than two sizes have enough evidence, or the largest is the best.
    """
    rates = {
        size: work_s / seconds for size, (groups, work_s, seconds) in speed.items()
        if groups >= LEAST_GROUPS and seconds >= LEAST_S and work_s > 0
    }  # fmt: skip
    if len(rates) < 2:
        return 0
    top = max(rates.values())
    good = [size for size, rate in rates.items() if rate >= (1 - within) * top and speed[size][2] / speed[size][0] >= LEAST_GROUP_S]
    best = min(good, default=0)
    return best if best < max(rates) else 0


def learn(conn: Connection, measured: Iterable[Measured]) -> dict[str, int]:
    """Fold measurements into the rows; call it in the transaction that commits the jobs.

    Returns:
        ``share_key`` → largest micro-batch that fits this device (0: no limit known), for each that was measured.
    """
    by_row: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        by_row.setdefault((one.share_key, one.device[:40]), []).append(one)
    out: dict[str, int] = {}
    for (share_key, device), items in sorted(by_row.items()):
        found = conn.execute(_LIMIT, {"p_key": share_key, "p_device": device}).mappings().one_or_none()
        old = Limit(**found) if found else Limit()
        new = old
        # Failures last: a size that failed is not grown from by what succeeded before it.
        for one in sorted(items, key=lambda m: (m.out_of_memory > 0, m.size)):
            if one.full:
                new = new.after_success(one.size, one.full, one.most)
            if one.groups:
                new = new.after_speed(one.size, one.groups, one.work_s, one.seconds)
            if one.out_of_memory:
                new = new.after_memory(one.size)
        out[share_key] = new.most
        if found and new == old:
            continue
        # A larger size than the best was measured: the choice by speed is fresh again.
        fresh = (new.most, new.best) != (old.most, old.best) or any(m.groups and m.size > new.best for m in items)
        first = items[0]
        values = {"share_key": share_key, "device": device, "kind": first.kind, "model": first.model, **asdict(new)}
        conn.execute(_learned(conn.dialect.name, fresh), values)
    return out


@cache
def _learned(dialect: str, fresh: bool) -> Any:
    statement = upsert(dialect, GroupLimit).values(learned_at=now())
    changed = [f.name for f in fields(Limit)] + ["learned_at"] * fresh
    return statement.on_conflict_do_update(
        index_elements=[GroupLimit.share_key, GroupLimit.device], set_={name: statement.excluded[name] for name in changed}
    )


_COLUMNS = (
    GroupLimit.most, GroupLimit.fits, GroupLimit.refused, GroupLimit.refusals, GroupLimit.streak, GroupLimit.best, GroupLimit.speed,
    GroupLimit.how,
)  # fmt: skip


_LIMIT = select(*_COLUMNS).where(GroupLimit.share_key == bindparam("p_key"), GroupLimit.device == bindparam("p_device")).with_for_update()


def fitting(conn: Connection, share_key: str, device: str) -> int:
    """Largest micro-batch that is known to fit into a device's memory; 0 where no limit is known."""
    query = select(GroupLimit.most).where(GroupLimit.share_key == share_key, GroupLimit.device == device[:40])
    return int(conn.execute(query).scalar() or 0)


@cache
def _bounds(dialect: str) -> Any:
    query = select(GroupLimit.share_key, GroupLimit.device, GroupLimit.most, GroupLimit.best, GroupLimit.learned_at)
    return query.where(among_given(dialect, GroupLimit.share_key, "p_keys"), (GroupLimit.most > 0) | (GroupLimit.best > 0))


def caps(conn: Connection, queue: str, share_keys: Iterable[str], at: float, worker_seen_s: float = 60.0) -> dict[str, int]:
    """Bounds on the micro-batches that a dispatcher makes.

    A hint may reach any worker of the queue, so the smallest bound over the devices of its live workers counts; where none
    of them is known by name yet, over all devices.

    Args:
        conn: Connection in a transaction.
        queue: The queue.
        share_keys: Those of the jobs that wait.
        at: The database's time.
        worker_seen_s: How fresh a worker's report must be for it to count.

    Returns:
        ``share_key`` → most jobs, for those that have a bound.
    """
    dialect = conn.dialect.name
    rows = prepared.named(conn, _bounds(dialect), {"p_keys": packed(dialect, share_keys)})
    if not rows:
        return {}
    live = conn.execute(select(Worker.device, Worker.queues).where(Worker.seen_at > at - worker_seen_s)).all()
    devices = {row.device for row in live if queue in row.queues}
    known = [row for row in rows if row.device in devices] or list(rows)
    out: dict[str, int] = {}
    for row in known:
        bounds = [row.most, row.best if at - row.learned_at < BEST_KEPT_S else 0]
        bound = min((b for b in bounds if b), default=0)
        if bound:
            out[row.share_key] = min(bound, out.get(row.share_key, bound))
    return out

"""The invariants of the factory, checked over the ledger, the audit of every state change, and the store."""

import hashlib
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from contentfactory.jobs.spec import get_kind
from contentfactory.states import TERMINAL, TRANSITIONS, JobState
from db.session import Database

CONTENT_SAMPLE = 400
WARM_SHARE = 0.25
"""Share of the jobs after which a process is warm: libraries, fonts and caches come in with the first ones."""
MB_PER_1000, HANDLES_PER_1000 = 12.0, 4.0
"""Steepest growth of one process over 1,000 jobs of the fleet. A picture kept for each failed job would be 3,000 MB."""


def ledger(database: Database) -> dict[str, list[Any]]:
    """Everything the checks need, read once."""
    queries = {
        "jobs": "SELECT id, batch_id, kind, state, attempt, strikes, tries, error, cancel_requested, lease_owner, created_at, finished_at, micro_batch, group_size "
        "FROM jobs",
        "attempts": "SELECT job_id, attempt, worker, group_size, started_at, finished_at, outcome, error FROM ended_attempts",
        "micro_batches": "SELECT id, jobs FROM micro_batches",
        "artifacts": "SELECT job_id, attempt, role, name, object_key, sha256, size FROM artifacts WHERE job_id IS NOT NULL",
        "events": "SELECT at, type, batch_id, job_id FROM events",
        "batches": "SELECT id, state, total, finished_at FROM batches",
        "counts": "SELECT batch_id, kind, state, n FROM batch_counts UNION ALL SELECT batch_id, kind, state, n FROM batch_deltas",
        "audit": "SELECT id, at, job_id, old, new, attempt, worker, cancel FROM chaos_audit ORDER BY id",
    }
    with database.read() as conn:
        return {name: conn.execute(text(query)).mappings().all() for name, query in queries.items()}


def check_ledger(data: dict[str, list[Any]], accepted: dict[str, str], *, expect: dict[str, str] | None = None) -> list[str]:
    """Violations of I1, I3, I4, I6, I9, I11, I12 as sentences that begin with the invariant.

    Args:
        data: From `ledger`.
        accepted: Ids of the jobs that were accepted.
        expect: State in which a job must have ended, where that is certain.
    """
    out: list[str] = []
    jobs = {j["id"]: j for j in data["jobs"]}
    attempts = defaultdict(list)
    for row in data["attempts"]:
        attempts[row["job_id"]].append(row)
    sizes = {row["id"]: row["jobs"] for row in data["micro_batches"]}
    artifacts = defaultdict(list)
    for row in data["artifacts"]:
        artifacts[row["job_id"]].append(row)

    missing = set(accepted) - set(jobs)
    if missing:
        out.append(f"I1: {len(missing)} accepted jobs have no row, such as {min(missing)}")
    extra = set(jobs) - set(accepted)
    if extra:
        out.append(f"I2: {len(extra)} jobs that nobody submitted, such as {min(extra)}")
    open_ = Counter(j["state"] for j in jobs.values() if j["state"] not in TERMINAL)
    if open_:
        out.append(f"I1: jobs that never ended: {dict(open_)}")
    for job_id, state in (expect or {}).items():
        if job_id in jobs and jobs[job_id]["state"] != state:
            out.append(f"I1: job {job_id} is {jobs[job_id]['state']} and had to be {state}: {jobs[job_id]['error']}")

    for job_id, job in jobs.items():
        won = [a for a in attempts[job_id] if a["outcome"] == "succeeded"]
        outputs = [a for a in artifacts[job_id] if a["role"] == "output"]
        if job["state"] == JobState.SUCCEEDED:
            if len(won) != 1 or won[0]["attempt"] != job["attempt"]:
                out.append(f"I3: job {job_id} succeeded with attempts {[(a['attempt'], a['outcome']) for a in attempts[job_id]]}")
            elif not outputs:
                out.append(f"I3: job {job_id} succeeded without an output")
            if {a["attempt"] for a in outputs} - {job["attempt"]}:
                out.append(f"I4: job {job_id} holds outputs of attempts {sorted({a['attempt'] for a in outputs})}, its own is {job['attempt']}")
            if sizes.get(job["micro_batch"]) != job["group_size"]:
                out.append(f"I3: job {job_id} succeeded among {job['group_size']}, its micro-batch has {sizes.get(job['micro_batch'])}")
        else:
            if won:
                out.append(f"I3: job {job_id} is {job['state']} though attempt {won[0]['attempt']} succeeded")
            if outputs:
                out.append(f"I4: job {job_id} is {job['state']} and has outputs")
            if job["micro_batch"] is not None and job["state"] in TERMINAL:
                out.append(f"I3: job {job_id} is {job['state']} and names a micro-batch that succeeded")
        # A success is read off the job's own row. So an earlier one, of a job that ended twice, shows as an attempt that is missing.
        if job["state"] in TERMINAL and (numbers := sorted(a["attempt"] for a in attempts[job_id])) != list(range(1, job["attempt"] + 1)):
            out.append(f"I3: job {job_id} is at attempt {job['attempt']}, on record are {numbers}")
        if job["state"] in TERMINAL and (job["lease_owner"] or job["finished_at"] is None):
            out.append(f"I6: ended job {job_id} has a lease or no end")
        policy = get_kind(job["kind"]).retry
        # Released attempts are not counted; everything else has a budget, and a group may once be taken apart by each class.
        used = sum(1 for a in attempts[job_id] if a["outcome"] not in ("released", "succeeded", None))
        bound = policy.strikes + policy.bug + policy.transient + policy.deadline + 12
        if used > bound or job["strikes"] > policy.strikes:
            out.append(f"I9: job {job_id} was tried {used} times (bound {bound}), {job['strikes']} strikes")
        unclosed = [a["attempt"] for a in attempts[job_id] if a["finished_at"] is None]
        if unclosed and job["state"] in TERMINAL:
            out.append(f"I1: job {job_id} ended with open attempts {unclosed}")

    out += _transitions(data["audit"], jobs)

    ends = Counter(e["batch_id"] for e in data["events"] if e["type"] in ("batch.completed", "batch.cancelled", "batch.failed"))
    for batch in data["batches"]:
        counted: Counter[tuple[str, str]] = Counter()
        for row in data["counts"]:
            if row["batch_id"] == batch["id"]:
                counted[(row["kind"], row["state"])] += row["n"]
        real: Counter[tuple[str, str]] = Counter()
        for job in jobs.values():
            if job["batch_id"] == batch["id"]:
                real[(job["kind"], "total")] += 1
                if job["state"] in TERMINAL:
                    real[(job["kind"], job["state"])] += 1
        counted = Counter({k: n for k, n in counted.items() if n and k[1] != "reused"})
        if counted != real:
            out.append(f"I12: batch {batch['id']} counts {dict(counted)} and holds {dict(real)}")
        if batch["total"] != sum(n for (_, s), n in real.items() if s == "total"):
            out.append(f"I12: batch {batch['id']} says {batch['total']} jobs")
        if ends[batch["id"]] != 1:
            out.append(f"I12: batch {batch['id']} finished {ends[batch['id']]} times")
    return out


def _transitions(audit: list[Any], jobs: dict[str, Any]) -> list[str]:
    out: list[str] = []
    cancelled: set[str] = set()
    ends: Counter[str] = Counter()
    for row in audit:
        if row["old"] in TERMINAL:
            out.append(f"I6: job {row['job_id']} went from {row['old']} to {row['new']}")
        elif row["old"] == row["new"]:
            out.append(f"I4: job {row['job_id']} changed its attempt to {row['attempt']} while {row['new']}")
        elif JobState(row["new"]) not in TRANSITIONS[JobState(row["old"])]:
            out.append(f"I6: job {row['job_id']} went from {row['old']} to {row['new']}")
        if row["new"] == JobState.RUNNING and row["job_id"] in cancelled:
            out.append(f"I11: job {row['job_id']} started after its cancel")
        if row["new"] == JobState.SUCCEEDED and row["cancel"]:
            out.append(f"I11: job {row['job_id']} was cancelled and published")
        if row["cancel"]:
            cancelled.add(row["job_id"])
        if row["new"] in TERMINAL:
            ends[row["job_id"]] += 1
    out += [f"I1: job {job_id} ended {n} times" for job_id, n in ends.items() if n != 1]
    return out


def check_store(data: dict[str, list[Any]], store: Any, accepted: dict[str, str], rng: random.Random) -> list[str]:
    """Violations of I5: every row's object exists with its size, and (in a sample) its SHA-256 and the content it should have."""
    out: list[str] = []
    held = {o.key: o.size for o in store.list()}
    rows = data["artifacts"]
    for row in rows:
        if held.get(row["object_key"]) != row["size"]:
            out.append(f"I5: {row['object_key']} of job {row['job_id']} has {held.get(row['object_key'])} bytes, the row says {row['size']}")
    for row in rng.sample(rows, min(CONTENT_SAMPLE, len(rows))):
        if row["object_key"] not in held:
            continue
        body = store.get(row["object_key"])
        if hashlib.sha256(body).hexdigest() != row["sha256"]:
            out.append(f"I5: {row['object_key']} does not match its SHA-256")
        wanted = accepted.get(row["job_id"], "")
        if wanted and row["role"] == "output" and body.decode() != wanted:
            out.append(f"I3: job {row['job_id']} holds {body[:60]!r} in place of {wanted!r}")
    return out


LARGE = {
    "jobs": "SELECT count(*) FROM jobs WHERE batch_id = :b",
    "rows_named": "SELECT count(DISTINCT custom_id) FROM jobs WHERE batch_id = :b AND custom_id ~ '^r[0-9]+$' AND substr(custom_id, 2)::bigint < :n",
    "succeeded": "SELECT count(*) FROM jobs WHERE batch_id = :b AND state = 'succeeded'",
    "jobs_of_others": "SELECT count(*) FROM jobs WHERE batch_id IS DISTINCT FROM :b",
    "attempts": "SELECT count(*) FROM ended_attempts",
    "attempts_open": "SELECT count(*) FROM ended_attempts WHERE finished_at IS NULL",
    "attempts_succeeded": "SELECT count(*) FROM ended_attempts a JOIN jobs j ON j.id = a.job_id AND j.attempt = a.attempt WHERE a.outcome = 'succeeded'",
    "attempts_succeeded_in_all": "SELECT count(*) FROM ended_attempts WHERE outcome = 'succeeded'",
    "attempts_of_their_micro_batch": "SELECT count(*) FROM jobs j JOIN micro_batches m ON m.id = j.micro_batch AND m.jobs = j.group_size WHERE j.state = 'succeeded'",
    "attempts_on_record": "SELECT coalesce(sum(attempt), 0) FROM jobs",
    "jobs_tried_again": "SELECT count(*) FROM jobs WHERE attempt > 1",
    "outputs": "SELECT count(*) FROM artifacts WHERE role = 'output'",
    "outputs_of_their_job": "SELECT count(*) FROM artifacts a JOIN jobs j ON j.id = a.job_id AND j.attempt = a.attempt WHERE a.role = 'output' "
    "AND a.sha256 = encode(sha256(convert_to('row ' || substr(j.custom_id, 2), 'UTF8')), 'hex')",
    "counted_total": "SELECT coalesce(sum(n), 0) FROM (SELECT * FROM batch_counts UNION ALL SELECT batch_id, kind, state, n FROM batch_deltas) c WHERE state = 'total'",
    "counted_succeeded": "SELECT coalesce(sum(n), 0) FROM (SELECT * FROM batch_counts UNION ALL SELECT batch_id, kind, state, n FROM batch_deltas) c WHERE state = 'succeeded'",
    "counted_else": "SELECT coalesce(sum(n), 0) FROM (SELECT * FROM batch_counts UNION ALL SELECT batch_id, kind, state, n FROM batch_deltas) c WHERE state NOT IN ('total', 'succeeded')",
    "batch_total": "SELECT total FROM batches WHERE id = :b",
    "times_finished": "SELECT count(*) FROM events WHERE batch_id = :b AND type = 'batch.completed'",
}
"""What a batch of any size is judged by, each a count in the database: rows r0 to rN-1 of ``text.echo``, whose output is known."""


def check_large(database: Database, batch_id: str, n: int) -> tuple[list[str], dict[str, int]]:
    """Violations of I1, I2, I3, I12 in a large batch, and the counts."""
    with database.read() as conn:
        found = {name: int(conn.execute(text(query), {"b": batch_id, "n": n} if ":n" in query else {"b": batch_id} if ":b" in query else {}).scalar() or 0)
                 for name, query in LARGE.items()}  # fmt: skip
    wanted = dict.fromkeys(("jobs", "rows_named", "succeeded", "attempts_succeeded", "attempts_succeeded_in_all", "attempts_of_their_micro_batch",
                            "outputs", "outputs_of_their_job",
                            "counted_total", "counted_succeeded", "batch_total"), n)  # fmt: skip
    wanted |= {"attempts": found["attempts_on_record"], "jobs_of_others": 0, "attempts_open": 0, "counted_else": 0, "times_finished": 1}
    names = {"counted": "I12", "batch": "I12", "times": "I12", "attempts": "I3", "outputs": "I3"}
    return [
        f"{names.get(name.partition('_')[0], 'I1')}: {name} is {found[name]:,} and had to be {value:,}" for name, value in wanted.items() if found[name] != value
    ], found


def check_large_store(database: Database, store: Any, n: int, rng: random.Random) -> list[str]:
    """I5 for a large batch: each output's object exists with its size, and a sample holds what its row asked for."""
    out: list[str] = []
    held = {o.key: o.size for o in store.list()}
    lost, sample = 0, []
    with database.read(transaction=True) as conn:
        query = "SELECT a.object_key, a.size, j.custom_id FROM artifacts a JOIN jobs j ON j.id = a.job_id WHERE a.role = 'output'"
        rows = conn.execution_options(stream_results=True, yield_per=20_000).execute(text(query))
        for row in rows:
            lost += held.get(row.object_key) != row.size
            if rng.random() < CONTENT_SAMPLE / max(1, n):
                sample.append((row.object_key, row.custom_id))
    if lost:
        out.append(f"I5: {lost:,} outputs have no object of their size")
    for key, name in sample:
        if store.get(key).decode() != f"row {name[1:]}":
            out.append(f"I5: {key} does not hold what {name} asked for")
    return out


def check_rescues(data: dict[str, list[Any]], victims: dict[str, list[float]], *, bound_s: float) -> list[str]:
    """I7: work of a dead worker goes back in time. I8: nobody else's work is taken away.

    Args:
        data: From `ledger`.
        victims: Process number of a worker's child → times at which something was done to it.
        bound_s: Lease, reaper period and slack.
    """
    out: list[str] = []
    for row in data["attempts"]:
        if row["outcome"] != "crash":
            continue
        before = [t for t in struck(victims, row["worker"]) if t <= row["finished_at"] + 0.5]
        if not before:
            out.append(f"I8: job {row['job_id']} attempt {row['attempt']} was taken from {row['worker']}, to whom nothing had been done")
        elif row["finished_at"] - max(max(before), row["started_at"]) > bound_s:
            late = row["finished_at"] - max(max(before), row["started_at"])
            out.append(f"I7: job {row['job_id']} attempt {row['attempt']} stayed running {late:.1f} s after its worker died")
    return out


def recoveries(data: dict[str, list[Any]], victims: dict[str, list[float]]) -> list[float]:
    """Seconds from the moment a worker was struck (or else an attempt was cut short) to the start of the job's next attempt."""
    per_job: dict[str, dict[int, Any]] = defaultdict(dict)
    for row in data["attempts"]:
        per_job[row["job_id"]][row["attempt"]] = row
    out = []
    for rows in per_job.values():
        for number, row in rows.items():
            if row["outcome"] in ("crash", "released", "deadline", "transient", "resource", "bug") and number + 1 in rows:
                before = [t for t in struck(victims, row["worker"]) if t <= row["finished_at"]] if row["outcome"] == "crash" else []
                out.append(max(0.0, rows[number + 1]["started_at"] - max(before, default=row["finished_at"])))
    return out


def struck(victims: dict[str, list[float]], worker: str) -> list[float]:
    """Times at which something was done to a worker's child, known by the process number in its id."""
    return victims.get(worker.rsplit("/", 1)[-1].partition("-")[0], [])


START_S = 20.0
"""A process that is younger is not judged, seconds."""


def growth(samples: Sequence[dict[str, float]], name: str) -> tuple[float, float, int] | None:
    """How a process grew once it was warm: (per 1,000 jobs, altogether, jobs done meanwhile); None where too little was seen.

    The slope is the median over all pairs of samples (Theil and Sen), which a single step of the allocator does not move.

    Args:
        samples: ``done`` (jobs of the fleet that had ended) and values, in order of time.
        name: Which value.
    """
    if len(samples) < 8:
        return None
    first, last = samples[0]["done"], samples[-1]["done"]
    warm = [s for s in samples if s["done"] >= first + WARM_SHARE * (last - first)]
    if len(warm) < 6 or warm[-1]["done"] - warm[0]["done"] < 500:
        return None
    warm = warm[:: max(1, len(warm) // 150)]
    pairs = [(b["done"] - a["done"], b[name] - a[name]) for n, a in enumerate(warm) for b in warm[n + 1 :] if b["done"] > a["done"]]
    third = max(1, len(warm) // 3)
    whole = statistics.median(s[name] for s in warm[-third:]) - statistics.median(s[name] for s in warm[:third])
    return 1000 * statistics.median(dy / dx for dx, dy in pairs), whole, int(warm[-1]["done"] - warm[0]["done"])


def check_growth(resources: dict[tuple[str, int], list[dict[str, float]]]) -> tuple[list[str], dict[str, Any]]:
    """I20 over every process that lived through 500 jobs or more after it was warm.

    Args:
        resources: (what it is, process) → samples.

    Returns:
        Violations, and the steepest growth of each sort of process with its largest size.
    """
    out: list[str] = []
    notes: dict[str, Any] = {}
    for (what, pid), samples in resources.items():
        note = notes.setdefault(what, {"mb_max": 0})
        note["mb_max"] = max(note["mb_max"], round(max(s["rss"] for s in samples)))
        # The jobs are the whole fleet's: while a restarted process still loads its libraries, its neighbours do them.
        samples = [s for s in samples if s["at"] >= samples[0]["at"] + START_S]
        for name, unit, slope_most, whole_most in (("rss", "MB", MB_PER_1000, 16.0), ("fds", "handles", HANDLES_PER_1000, 8.0)):
            found = growth(samples, name)
            if found is None:
                continue
            slope, whole, jobs = found
            key = f"{unit}_per_1000"
            note[key] = max(note.get(key, -1e9), round(slope, 2))
            note["over_jobs"] = max(note.get("over_jobs", 0), jobs)
            if slope > slope_most and whole > whole_most:
                out.append(f"I20: {what} {pid} grew by {slope:.1f} {unit} a thousand jobs, {whole:.0f} {unit} over {jobs} jobs")
    return out, notes

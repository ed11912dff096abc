"""The invariants of the factory, checked over the ledger, the audit of every state change, and the store."""

import hashlib
import random
from collections import Counter, defaultdict
from typing import Any

from sqlalchemy import text

from contentfactory.jobs.spec import get_kind
from contentfactory.states import TERMINAL, TRANSITIONS, JobState
from db.session import Database

CONTENT_SAMPLE = 400


def ledger(database: Database) -> dict[str, list[Any]]:
    """Everything the checks need, read once."""
    queries = {
        "jobs": "SELECT id, batch_id, kind, state, attempt, strikes, tries, error, cancel_requested, lease_owner, created_at, finished_at FROM jobs",
        "attempts": "SELECT job_id, attempt, worker, group_size, started_at, finished_at, outcome, error FROM attempts",
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
        else:
            if won:
                out.append(f"I3: job {job_id} is {job['state']} though attempt {won[0]['attempt']} succeeded")
            if outputs:
                out.append(f"I4: job {job_id} is {job['state']} and has outputs")
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

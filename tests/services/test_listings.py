"""Listings and progress of a large batch: right, page by page, and by an index that leads to what is asked for."""

import re

import pytest
from sqlalchemy import event, text, update

from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from contentfactory.states import JobState
from db import batches, jobs, lifecycle
from db.models import Job
from producer.job_ids import job_id_for

COUNT = 2000
STATES = {0: "succeeded", 1: "succeeded", 2: "succeeded", 3: "failed", 4: "dead", 5: "cancelled", 6: "running", 7: "dispatched", 8: "blocked"}
"""By line of the batch; all others are queued. The oldest are done and the newest wait, as in the midst of a run."""


@pytest.fixture
def batch(database, project):
    """A batch most of which waits, beside jobs of the project's own."""
    batch_id, spec = new_id("batch"), get_kind("text.echo")
    params = spec.validate({"text": "x"})
    rows = [
        lifecycle.NewJob(
            id=job_id_for(batch_id, str(n)), project_id=project, batch_id=batch_id, custom_id=str(n), line=n, rank=n + 1, kind=spec.name,
            queue=spec.queue, params=params.model_dump(mode="json"), share_key=spec.share_key(params, None), seconds=1.0, seed=n,
        )
        for n in range(COUNT)
    ]  # fmt: skip

    def work(conn):
        batches.create(conn, batch_id, project, "large", source={}, digest=None, priority=0)
        lifecycle.insert_jobs(conn, rows, fresh=True)
        batches.advance(conn, batch_id, 0, COUNT, COUNT)
        for line, state in STATES.items():
            conn.execute(update(Job).where(Job.batch_id == batch_id, Job.line == line).values(state=state))

    database.run(work)
    if not database.sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(text("VACUUM ANALYZE jobs"))
    return batch_id


class Plans:
    """What the database would do for each query on jobs that was sent while this was listening."""

    def __init__(self, database):
        self.database, self.sent = database, []

    def __enter__(self):
        event.listen(self.database.engine, "before_cursor_execute", self.note)
        return self

    def __exit__(self, *_):
        event.remove(self.database.engine, "before_cursor_execute", self.note)

    def note(self, conn, cursor, statement, parameters, context, executemany):
        if statement.lstrip().startswith("SELECT") and "jobs" in statement:
            self.sent.append((statement, parameters))

    def text(self):
        out = []
        with self.database.read() as conn:
            for statement, parameters in self.sent:
                how = "EXPLAIN QUERY PLAN" if self.database.sqlite else "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF)"
                out += [str(row[-1]) for row in conn.exec_driver_sql(f"{how} {statement}", parameters)]
        return "\n".join(out)


def passed_over(plan):
    """Rows that PostgreSQL read and did not want; SQLite does not tell."""
    return sum(map(int, re.findall(r"Rows Removed by \w+: (\d+)", plan)))


def lines(rows):
    return [row["line"] for row in rows]


@pytest.mark.parametrize("of", ["project", "batch"])
def test_pages_of_a_state(database, project, batch, of):
    where = {"batch_id": batch} if of == "batch" else {}
    with database.read() as conn:
        for state in JobState:
            wanted = {n for n in range(COUNT) if STATES.get(n, "queued") == state}
            found, after = [], None
            while page := jobs.list_page(conn, project, state=str(state), after=after, limit=2 if len(wanted) < 10 else 300, **where):
                found += page
                after = page[-1]["id"]
            assert {row["line"] for row in found} == wanted and len(found) == len(wanted), state
            if of == "batch":
                assert lines(found) == sorted(wanted, reverse=True)
            else:
                assert [row["id"] for row in found] == sorted((row["id"] for row in found), reverse=True)


def test_pages_of_a_batch_go_on_where_the_last_one_ended(database, project, batch):
    found, after = [], None
    with database.read() as conn:
        while page := jobs.list_page(conn, project, batch_id=batch, after=after, limit=300):
            found += lines(page)
            after = page[-1]["id"]
    assert found == list(range(COUNT - 1, -1, -1))


@pytest.mark.parametrize("limit", [1, 300])
def test_pages_of_a_project_put_all_places_together(database, project, batch, make_jobs, limit):
    single = make_jobs(20)
    with database.read() as conn:
        there = sorted([*single, *(row["id"] for row in jobs.of_batch(conn, batch))], reverse=True)
        found, after = [], None
        while page := jobs.list_page(conn, project, after=after, limit=limit):
            found += [row["id"] for row in page]
            after = page[-1]["id"]
            if limit == 1 and len(found) == 40:
                break
        assert found == there[: len(found)] and len(found) == (40 if limit == 1 else COUNT + 20)
        assert jobs.list_page(conn, project, kind="text.embed") == []


@pytest.mark.parametrize("states", [(), ("failed", "queued"), ("running",), ("succeeded", "dispatched", "blocked")])
def test_jobs_of_a_batch_come_in_the_order_of_their_lines(database, project, batch, states):
    with database.read() as conn:
        found = lines(jobs.of_batch(conn, batch, [JobState(state) for state in states], chunk=7 if states else 300))
        ids = jobs.ids_where(conn, project, states or list(JobState), batch_id=batch, limit=COUNT)
    assert found == [n for n in range(COUNT) if not states or STATES.get(n, "queued") in states]
    assert len(ids) == len(found) and ids == sorted(ids)


@pytest.mark.parametrize("of", ["project", "batch"])
def test_a_page_of_everything_is_read_from_an_index_for_each_place(database, project, batch, of):
    with Plans(database) as plans, database.read() as conn:
        page = jobs.list_page(conn, project, **({"batch_id": batch} if of == "batch" else {}))
    assert len(page) == 50
    plan = plans.text()
    names = {"project": ("project_waiting", "succeeded", "unwell"), "batch": ("waiting", "batch_succeeded", "batch_unwell")}[of]
    assert all(f"ix_jobs_{name}" in plan for name in (*names, "flying")), plan
    assert passed_over(plan) <= 3, plan


@pytest.mark.parametrize("state", ["succeeded", "failed", "dead", "cancelled"])
@pytest.mark.parametrize("of", ["project", "batch"])
def test_what_has_ended_is_not_looked_for_among_what_waits(database, project, batch, of, state):
    with Plans(database) as plans, database.read() as conn:
        jobs.list_page(conn, project, state=state, **({"batch_id": batch} if of == "batch" else {}))
    name = f"ix_jobs_{'batch_' if of == 'batch' else ''}{'succeeded' if state == 'succeeded' else 'unwell'}"
    plan = plans.text()
    assert name in plan, plan
    assert passed_over(plan) <= 3, plan


def test_the_last_page_of_a_batch_is_entered_where_it_begins(database, project, batch):
    with database.read() as conn:
        after = jobs.list_page(conn, project, batch_id=batch, limit=COUNT - 20)[-1]["id"]
        with Plans(database) as plans:
            assert lines(jobs.list_page(conn, project, batch_id=batch, after=after)) == list(range(19, -1, -1))
    plan = plans.text()
    if database.sqlite:
        assert "(batch_id=? AND line<?)" in plan, plan
    assert passed_over(plan) <= 3, plan


def test_progress_counts_what_runs_by_its_own_index(database, project, batch):
    with Plans(database) as plans, database.read() as conn:
        [told] = batches.progress(conn, batch).values() or [{}]
    assert told["running"] == 1
    assert "ix_jobs_flying" in plans.text(), plans.text()

"""A worker's part: claim, run, upload, commit; what one job does never hurts its neighbours."""

import contextlib
import errno
import json
import threading
import time

import pytest
from pydantic import Field
from silent import Silent
from sqlalchemy import select, text, update

from contentfactory.errors import InputError, ServiceUnavailable, TransientError
from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import OutputRef, Params, Text, kind
from contentfactory.settings import load_settings
from db import jobs, lifecycle
from db.models import Event, Job, MicroBatch
from storage.memory import MemoryStore
from worker import runners
from worker.context import Failure, Output
from worker.execution import Executor, classify
from worker.keeper import REPORT_S, _Held, _Keeper

seen: list[list[str]] = []


@pytest.fixture(scope="module")
def trial_kind():
    """A kind whose texts say what shall happen to them."""

    @kind("trial.act", queue="text", outputs=("text/plain",), max_group=8)
    class Act(Params):
        """Do what the text says."""

        text: Text = Field(description="what to do")

    @runners.runs(Act)
    def act(params, context):
        seen.append([p.text for p in params])
        for job, p in enumerate(params):
            if p.text.startswith("input"):
                yield Failure(job, InputError("this one is bad"))
            elif p.text.startswith("nothing"):
                continue
            elif p.text.startswith("explode"):
                raise RuntimeError("a bug")
            elif p.text.startswith("write"):
                (context.scratch / p.text).write_bytes(p.text.encode())
                yield Output(job, "text.txt", "text/plain", context.scratch / p.text)
            elif p.text.startswith("memory"):
                raise MemoryError("no room")
            elif p.text.startswith("late"):
                yield Output(job, "text.txt", "text/plain", lambda: (_ for _ in ()).throw(TransientError("no storage")))
            else:
                yield Output(job, "text.txt", "text/plain", f"{p.text}:{context.seeds[job]}".encode())

    yield Act
    specs._REGISTRY.pop("trial.act")
    runners._RUNNERS.pop("trial.act")


@pytest.fixture
def executor(database, tmp_path, trial_kind):
    settings = load_settings(state_dir=tmp_path / "state", device="cpu")
    made = Executor(settings, database, MemoryStore(), Silent(), keeper=False)
    seen.clear()
    yield made
    made.finishers.shutdown()
    made.uploads.shutdown()


@pytest.fixture
def act(make_jobs, executor, database):
    """Accept jobs with these texts, run them as one micro-batch, return their states."""

    def run(*texts, **fields):
        ids = [make_jobs(1, kind="trial.act", params={"text": t}, seed=n, **fields)[0] for n, t in enumerate(texts)]
        again(*ids)
        return ids

    def again(*ids):
        executor.run("trial.act", ids)
        executor.finishers.submit(lambda: None).result()

    run.again = again
    return run


def states(database, ids):
    with database.read() as conn:
        rows = dict(conn.execute(select(Job.id, Job.state).where(Job.id.in_(ids))).all())
    return [rows[i] for i in ids]


def contents(database, executor, job_id):
    with database.read() as conn:
        return [executor.store.get(a["object_key"]).decode() for a in jobs.artifacts(conn, [job_id])[job_id]]


def test_a_group_is_run_once_and_committed(database, executor, act):
    ids = act("one", "two", "three")
    assert states(database, ids) == ["succeeded"] * 3
    assert seen == [["one", "two", "three"]]
    assert contents(database, executor, ids[1]) == ["two:1"]
    with database.read() as conn:
        [phases] = conn.execute(select(MicroBatch.phases)).scalars()
    assert {"wait_s", "inputs_s", "compute_s", "upload_s"} <= set(phases)


def test_what_computes_on_no_device_does_not_look_for_one(database, executor, act, monkeypatch):
    """Looking loads torch: seconds that the first job of a worker would wait, and hundreds of megabytes."""
    monkeypatch.setattr(executor, "_device", None)
    monkeypatch.setattr("worker.execution.pick_device", lambda wanted: pytest.fail("somebody looked"))
    assert states(database, act("one", "two")) == ["succeeded"] * 2


@pytest.fixture
def commits(monkeypatch):
    """Set as soon as the statements of a commit have gone; counts them."""
    gone, finish = threading.Event(), lifecycle.finish
    gone.count = 0

    def noted(*args):
        done = finish(*args)
        gone.count += 1
        gone.set()
        return done

    monkeypatch.setattr(lifecycle, "finish", noted)
    return gone


def _put_by(executor, monkeypatch, before):
    put = executor.store.put

    def later(*args, **options):
        before()
        return put(*args, **options)

    monkeypatch.setattr(executor.store, "put", later)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_statements_for_one_who_is_waited_for_go_beside_its_upload_and_the_commit_after_it(database, executor, act, make_jobs, commits, monkeypatch):
    monkeypatch.setattr("worker.execution.BESIDE_S", 10.0)
    ids = make_jobs(1, kind="trial.act", params={"text": "one"}, seed=0, priority=100)
    before = []
    _put_by(executor, monkeypatch, lambda: before.append((commits.wait(10), states(database, ids))))
    act.again(*ids)
    assert before == [(True, ["running"])]
    assert states(database, ids) == ["succeeded"]
    assert contents(database, executor, ids[0]) == ["one:0"]
    assert commits.count == 1


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_an_upload_that_takes_its_time_holds_no_transaction(database, executor, act, commits, monkeypatch):
    monkeypatch.setattr("worker.execution.BESIDE_S", 0.02)
    _put_by(executor, monkeypatch, lambda: time.sleep(0.3))
    assert states(database, act("one", priority=100)) == ["succeeded"]
    assert commits.count == 2  # the first was given up
    assert states(database, act("two", priority=100)) == ["succeeded"]
    assert commits.count == 3  # and is not tried again at once


def test_an_upload_that_fails_beside_its_commit_leaves_nothing(database, executor, act, commits, monkeypatch):
    def refuse():
        raise TransientError("the store is full", code="storage")

    _put_by(executor, monkeypatch, refuse)
    ids = act("one", priority=100)
    assert states(database, ids) == ["queued"]
    with database.read() as conn:
        assert jobs.artifacts(conn, ids) == {}
        assert conn.execute(select(Job.error)).scalar_one()["code"] == "storage"


def test_one_bad_job_leaves_its_neighbours_alone(database, act):
    assert states(database, act("one", "input", "three")) == ["succeeded", "failed", "succeeded"]


def test_a_job_without_output_is_a_bug_of_the_runner(database, act):
    ids = act("one", "nothing")
    assert states(database, ids) == ["succeeded", "queued"]


def test_an_exception_sends_the_group_on_singly(database, act):
    ids = act("one", "explode", "three")
    assert states(database, ids) == ["queued"] * 3
    for i in ids:
        act.again(i)
    assert states(database, ids) == ["succeeded", "queued", "succeeded"]
    with database.read() as conn:
        rows = conn.execute(select(Job.id, Job.tries, Job.error).where(Job.id.in_(ids))).all()
        found = {r.id: r for r in rows}
    assert found[ids[1]].tries == {"bug": 1}
    assert "a bug" in found[ids[1]].error["detail"]["traceback"]


def test_memory_shrinks_the_group(database, act):
    ids = act("memory", "b", "c", "d")
    assert states(database, ids) == ["queued"] * 4
    with database.read() as conn:
        assert set(conn.execute(select(Job.group_limit)).scalars()) == {2}


def test_a_failed_upload_is_tried_again(database, act):
    ids = act("one", "late")
    assert states(database, ids) == ["succeeded", "queued"]


def test_equal_jobs_of_a_group_are_computed_once(database, executor, make_jobs):
    ids = make_jobs(3, kind="trial.act", params={"text": "same"})
    with database.write() as conn:
        conn.execute(Job.__table__.update().values(seed=5))
    executor.run("trial.act", ids)
    executor.finishers.submit(lambda: None).result()
    assert seen == [["same"]]
    assert [contents(database, executor, i) for i in ids] == [["same:5"]] * 3


def test_an_equal_earlier_result_is_reused(database, executor, act):
    [first] = act("story")
    [second] = act("story")
    assert seen == [["story"]]
    assert contents(database, executor, second) == contents(database, executor, first)
    with database.read() as conn:
        assert conn.execute(select(Job.reused_from).where(Job.id == second)).scalar() == first


def test_reuse_can_be_switched_off(act):
    act("story")
    act("story", reuse=False)
    assert seen == [["story"], ["story"]]


def test_another_seed_is_another_result(act):
    act("x", "story")
    act("story")
    assert seen[1] == ["story"]


def test_text_of_a_parent_is_put_in(database, executor, act, make_jobs):
    [parent] = act("hello")
    ref = {"text": {"job": parent, "output": "text.txt"}}
    [child] = make_jobs(1, kind="trial.act", params=ref, parents=(parent,), seed=9)
    act.again(child)
    assert contents(database, executor, child) == ["hello:0:9"]
    with database.read() as conn:
        made = jobs.artifacts(conn, [parent, child])
    assert made[child][0]["parents"] == [made[parent][0]["id"]]


def test_a_reference_to_nothing_fails_with_its_place(database, act, make_jobs):
    [parent] = act("hello")
    [child] = make_jobs(1, kind="trial.act", params={"text": OutputRef(job=parent, output="other.txt")})
    act.again(child)
    assert states(database, [child]) == ["failed"]
    with database.read() as conn:
        assert "text: " in conn.execute(select(Job.error).where(Job.id == child)).scalar()["message"]


def test_another_projects_job_is_not_seen(database, act, make_jobs):
    from db import projects

    [secret] = act("secret")
    other = database.run(lambda conn: projects.ensure(conn, "other"))
    [thief] = make_jobs(1, kind="trial.act", params={"text": {"job": secret}}, project_id=other)
    act.again(thief)
    assert states(database, [thief]) == ["failed"]


def test_forged_and_doubled_hints_change_nothing(database, executor, act, make_jobs):
    [done] = act("one")
    act.again(done, done, "job_" + "0" * 32)
    [echo] = make_jobs(1, params={"text": "a job of another kind"})
    act.again(echo)
    # It waits for its own hint: in this one it might wait behind others while its lease runs.
    assert states(database, [done, echo]) == ["succeeded", "queued"]
    assert seen == [["one"]]


def test_two_workers_given_the_same_hint_share_it(database, executor, make_jobs):
    ids = make_jobs(6, kind="trial.act", params={"text": "race"})
    threads = [threading.Thread(target=executor.run, args=("trial.act", ids)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    executor.finishers.submit(lambda: None).result()
    assert states(database, ids) == ["succeeded"] * 6
    with database.read() as conn:
        assert set(conn.execute(select(Job.attempt)).scalars()) == {1}


def test_cancelled_while_running_is_not_published(database, executor, make_jobs, monkeypatch):
    [job] = make_jobs(1, kind="trial.act", params={"text": "one"})
    original = executor._upload

    def cancel_then_upload(*args, **kwargs):
        database.run(lambda conn: lifecycle.cancel_jobs(conn, [job]))
        return original(*args, **kwargs)

    monkeypatch.setattr(executor, "_upload", cancel_then_upload)
    executor.run("trial.act", [job])
    executor.finishers.submit(lambda: None).result()
    assert states(database, [job]) == ["cancelled"]
    with database.read() as conn:
        assert jobs.artifacts(conn, [job]) == {}


def test_scratch_is_empty_afterwards(executor, act):
    ids = act("write", "input")
    assert list(executor.settings.scratch.iterdir()) == []
    assert contents(executor.database, executor, ids[0]) == ["write"]


def test_there_is_no_scratch_where_nobody_wants_it(database, executor, act):
    assert states(database, act("one")) == ["succeeded"]
    assert not executor.settings.scratch.exists()


@pytest.mark.parametrize(("error", "expected"), [(MemoryError(), "resource"), (ValueError("x"), "bug"), (InputError("x"), "input")])
def test_classes_of_errors(error, expected):
    assert classify(error).error_class == expected


# --- faults of ledger, disk and process; most found by reading while the fault harness was written ---


def test_a_claim_whose_answer_was_lost_is_taken_up_again(database, executor, make_jobs, monkeypatch):
    """The COMMIT took effect, its answer did not arrive: the repeat must find its own jobs and not leave them to their lease."""
    ids = make_jobs(3, kind="trial.act", params={"text": "again"}, reuse=False)
    real, calls = lifecycle.claim, []

    def claim(*args):
        calls.append(args)
        return real(*args)

    write = database.write

    @contextlib.contextmanager
    def lost(**how):
        with write(**how) as conn:
            yield conn
        if len(calls) == 1:
            raise ServiceUnavailable("the connection to the database was lost")

    monkeypatch.setattr(lifecycle, "claim", claim)
    monkeypatch.setattr(database, "write", lost)
    executor.run("trial.act", ids)
    executor.finishers.submit(lambda: None).result()
    assert len(calls) > 1
    assert states(database, ids) == ["succeeded"] * 3
    with database.read() as conn:
        assert set(conn.execute(select(Job.attempt)).scalars()) == {1}


def test_a_doubled_hint_does_not_take_up_what_is_still_being_committed(database, executor, make_jobs):
    [job] = make_jobs(1, kind="trial.act", params={"text": "once"})
    executor._flying.add(job)
    with database.write() as conn:
        assert [c.id for c in lifecycle.claim(conn, [job], executor.worker, 30)] == [job]
        assert [c.id for c in lifecycle.claimed_by(conn, [job], executor.worker)] == [job]
        assert lifecycle.claimed_by(conn, [job], "another") == []
    executor.run("trial.act", [job])
    assert seen == []


def test_finished_work_waits_for_a_ledger_that_is_away(database, executor, act, monkeypatch):
    run, failures = database.run, [0]

    def away(work, tries=5, **how):
        if tries == 8 and failures[0] < 2:
            failures[0] += 1
            raise ServiceUnavailable("the database did not answer")
        return run(work, tries, **how)

    monkeypatch.setattr(database, "run", away)
    ids = act("one", "two")
    assert failures == [2]
    assert states(database, ids) == ["succeeded"] * 2


def test_a_ledger_that_goes_away_before_the_runner_is_not_the_jobs_fault(database, executor, act, monkeypatch):
    def away(*_):
        raise ServiceUnavailable("the database did not answer")

    monkeypatch.setattr(executor, "_reuse", away)
    ids = act("one")
    assert states(database, ids) == ["queued"]
    with database.read() as conn:
        assert conn.execute(select(Job.tries)).scalar() == {"transient": 1}


def test_a_scratch_folder_that_cannot_be_made_is_not_the_jobs_fault(database, executor, act):
    executor.settings.scratch.parent.mkdir(parents=True, exist_ok=True)
    executor.settings.scratch.write_text("in the way")
    ids = act("write one", "write two")
    assert states(database, ids) == ["queued"] * 2
    with database.read() as conn:
        assert list(conn.execute(select(Job.tries)).scalars()) == [{"transient": 1}] * 2
    executor.settings.scratch.unlink()
    assert executor._flying == set()


def test_a_job_that_is_tried_again_is_alone_in_its_process(database, executor, act, make_jobs, monkeypatch):
    [job] = act("explode")
    database.run(lambda conn: conn.execute(update(Job).values(run_after=0)))
    under_way = threading.Event()
    order = []
    finish = executor._finish

    def slow(spec, members, *rest):
        if members[0].claimed.id != job:
            under_way.wait(5)
        finish(spec, members, *rest)
        order.append(members[0].claimed.id)

    monkeypatch.setattr(executor, "_finish", slow)
    [neighbour] = make_jobs(1, kind="trial.act", params={"text": "neighbour"})
    executor.run("trial.act", [neighbour])
    threading.Timer(0.3, under_way.set).start()
    executor.run("trial.act", [job])
    # Both are committed by now: the neighbour before the other began, the other before anything else may begin.
    assert order == [neighbour, job]


def test_the_end_of_a_process_is_laid_to_the_job_that_computed(database, executor, make_jobs):
    """A single job that only waits for its upload is given back without a strike while another one computes."""
    uploading, computing = make_jobs(2)
    keys = {}
    for job in (uploading, computing):
        database.run(lambda conn, job=job: lifecycle.claim(conn, [job], "w", 30))
        keys[job] = (job, 1)
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database = database
    for job, watched in ((uploading, False), (computing, True)):
        keeper.held[len(keeper.held)] = _Held([keys[job]], 60, 60, 0, 0, watched=watched)
    keeper.end(said_bye=False)
    with database.read() as conn:
        rows = {r.id: (r.state, r.strikes) for r in conn.execute(select(Job.id, Job.state, Job.strikes))}
    assert rows == {uploading: ("queued", 0), computing: ("queued", 1)}


@pytest.mark.parametrize(
    "error", [ServiceUnavailable("away"), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EMFILE, "Too many open files")]
)
def test_faults_of_the_machine_are_transient(error):
    assert classify(error).error_class == "transient"


def test_a_hint_takes_only_jobs_of_its_kind(database, executor, make_jobs):
    # Found by simulation: jobs of another kind in a forged hint waited for their turn while their lease ran out.
    own, other = make_jobs(1, kind="trial.act", params={"text": "own"}) + make_jobs(1)
    executor.run("trial.act", [own, other])
    executor.finishers.submit(lambda: None).result()
    with database.read() as conn:
        assert dict(conn.execute(select(Job.id, Job.state)).all()) == {own: "succeeded", other: "queued"}


def test_a_runner_that_hangs_after_its_lease_was_lost_is_ended(database, executor, make_jobs, monkeypatch):
    # Found by simulation: nobody watched it any more, and the worker was blocked for ever.
    killed = []
    monkeypatch.setattr("worker.keeper.os.kill", lambda pid, signum: killed.append(pid))
    [job] = make_jobs(1)
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database, keeper.child, keeper.worker = database, 4711, "w"
    keeper.held[1] = _Held([(job, 1)], 0.0, 60, time.monotonic(), time.monotonic() - 1e6)
    keeper.beat()
    keeper.watch()
    assert killed == [4711]


def test_a_cancelled_job_does_not_wait_for_its_neighbours(database, executor, make_jobs, monkeypatch, capsys):
    # Found by simulation: it stayed running until its micro-batch was committed, half a minute later.
    gone, neighbour = make_jobs(2, kind="trial.act", params={"text": "slow"}, reuse=False)
    keys = [(gone, 1), (neighbour, 1)]
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database, keeper.worker = database, executor.worker
    midway = []

    def act(params, context):
        keeper.held[1] = _Held(keys, 60, 60, time.monotonic(), time.monotonic())
        for job in range(2):
            database.run(lambda conn: lifecycle.cancel_jobs(conn, [gone]))
            keeper.beat()
            midway.append(states(database, [gone, neighbour]))
            yield Output(job, "text.txt", "text/plain", b"made")

    monkeypatch.setitem(runners._RUNNERS, "trial.act", act)
    executor.run("trial.act", [gone, neighbour])
    executor.finishers.submit(lambda: None).result()
    # One beat for the runner to stop by itself; by the next one the job has ended, and the commit of the group leaves it alone.
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{\"lost")]
    assert json.loads(told) == {"lost": [], "cancelled": [[gone, 1]]}
    assert midway == [["running", "running"], ["cancelled", "running"]]
    assert states(database, [gone, neighbour]) == ["cancelled", "succeeded"]
    with database.read() as conn:
        assert set(jobs.artifacts(conn, [gone, neighbour])) == {neighbour}
        assert dict(conn.execute(text("SELECT job_id, outcome FROM ended_attempts")).all()) == {gone: "cancelled", neighbour: "succeeded"}
        ends = conn.execute(select(Event.type).where(Event.job_id == gone, Event.type != "job.accepted")).scalars().all()
        assert ends == ["job.cancelled"]


def test_an_idle_keeper_writes_what_is_new_and_now_and_then_that_it_lives(database, executor, monkeypatch):
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database, keeper.worker = database, "w"
    real, reports = lifecycle.report_worker, []

    def report(conn, *values):
        reports.append(values[-1])
        real(conn, *values)

    monkeypatch.setattr(lifecycle, "report_worker", report)
    for _ in range(3):
        keeper.beat()
    assert reports == [[]]
    keeper.names = ["a model"]
    keeper.beat()
    assert reports == [[], ["a model"]]
    with monkeypatch.context() as away:
        away.setattr(database, "write", lambda: (_ for _ in ()).throw(ServiceUnavailable("away")))
        keeper.names = []
        keeper.beat()
    keeper.beat()  # what could not be told is told as soon as it can
    keeper.reported_at -= REPORT_S
    keeper.beat()
    assert reports == [[], ["a model"], [], []]


def test_a_keeper_that_stood_still_does_not_blame_the_runner(database, executor, make_jobs, monkeypatch):
    # Found by simulation: a suspended machine woke up and killed a good job for its silence, twice, and the job was dead.
    killed = []
    monkeypatch.setattr("worker.keeper.os.kill", lambda pid, signum: killed.append(pid))
    [job] = make_jobs(1)
    [held] = database.run(lambda conn: lifecycle.claim(conn, [job], "w", 30))
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database, keeper.child, keeper.worker = database, 4711, "w"
    at = time.monotonic()
    keeper.held[1] = _Held([(held.id, held.attempt)], 6.0, 60.0, at - 30, at - 30, spoke=True)
    keeper.looked_at = at - 30
    keeper.watch()
    assert killed == []
    keeper.held[1].heard -= 7  # it was awake, and heard nothing
    keeper.watch()
    assert killed == [4711]


def test_jobs_whose_claim_was_not_answered_are_given_back_by_the_next_claim(database, executor, make_jobs, monkeypatch):
    # Found by simulation: they waited for their lease and earned a strike, though nobody had failed.
    lost, again, other = make_jobs(3)
    real = database.run

    def unanswered(work, *_, **__):
        real(work)
        raise ServiceUnavailable("away", code="database_unavailable")

    monkeypatch.setattr(database, "run", unanswered)
    executor.run("text.echo", [lost])
    executor.run("text.echo", [again])
    monkeypatch.setattr(database, "run", real)
    executor.run("text.echo", [again, other])
    executor.finishers.submit(lambda: None).result()
    with database.read() as conn:
        rows = {r.id: (r.state, r.attempt, r.strikes) for r in conn.execute(select(Job.id, Job.state, Job.attempt, Job.strikes))}
    assert rows == {lost: ("queued", 1, 0), again: ("succeeded", 1, 0), other: ("succeeded", 1, 0)}

"""A model is loaded before its jobs are claimed; one that does not load holds them without a strike, for a while."""

import dataclasses
import types

import pytest
from silent import Silent
from sqlalchemy import select, update

from contentfactory.errors import ModelUnavailable
from contentfactory.jobs import spec as specs
from contentfactory.jobs.spec import get_kind
from contentfactory.settings import load_settings
from db import lifecycle
from db.models import Attempt, Job
from storage.memory import MemoryStore
from worker import runners, warmup
from worker.context import Output
from worker.engines.files import ResolvedModel
from worker.execution import Executor
from worker.keeper import _Held, _Keeper
from worker.loading import LoadWatch

seen: list[str] = []
fault: list[Exception] = []


@pytest.fixture
def executor(database, tmp_path, monkeypatch):
    def get(context):
        def load(model):
            seen.append("load")
            if fault:
                raise fault[0]
            return "loaded"

        return context.load(load)

    def runner(params, context):
        get(context)
        seen.append("run")
        for job, _ in enumerate(params):
            yield Output(job, "text.txt", "text/plain", b"x")

    seen.clear()
    fault.clear()
    module = types.ModuleType("trial_warmup")
    module.get = get
    monkeypatch.setitem(__import__("sys").modules, "trial_warmup", module)
    monkeypatch.setitem(warmup.LOADERS, "text.echo", "trial_warmup:get")
    monkeypatch.setitem(runners._RUNNERS, "text.echo", runner)
    settings = load_settings(state_dir=tmp_path / "state", device="cpu")
    made = Executor(settings, database, MemoryStore(), Silent(), keeper=False)
    monkeypatch.setattr(made, "_model", lambda project, name: ResolvedModel("m", "1", "x", {}, tmp_path))
    made.warmup._resolve = made._model
    made.dispatcher.dispatch = lambda *a, **k: 0
    yield made
    made.finishers.shutdown()
    made.uploads.shutdown()


def run(database, executor, ids):
    database.run(lambda conn: conn.execute(update(Job).values(run_after=0)))
    database.run(lambda conn: lifecycle.dispatch(conn, "text", cap_s=1e6))
    executor.run("text.echo", ids)
    executor.finishers.submit(lambda: None).result()


def row(database):
    with database.read() as conn:
        return conn.execute(select(Job.state, Job.tries, Job.strikes, Job.attempt, Job.run_after > lifecycle.now())).one()


def test_the_model_is_loaded_before_the_claim_and_once(database, executor, make_jobs, monkeypatch):
    claim = lifecycle.claim
    monkeypatch.setattr(lifecycle, "claim", lambda *a: (seen.append("claim"), claim(*a))[1])
    for _ in range(2):
        run(database, executor, make_jobs(1, model="m@1", reuse=False))
    assert seen == ["load", "claim", "run", "claim", "run"]
    assert executor.cache.loads == 1


@pytest.fixture
def cacheable(monkeypatch):
    """As a kind whose equal jobs are computed once."""
    changed = dataclasses.replace(get_kind("text.echo"), cacheable=True, seeded=True)
    monkeypatch.setitem(specs._REGISTRY, "text.echo", changed)


@pytest.mark.usefixtures("cacheable")
def test_nothing_is_loaded_for_jobs_that_are_done_already(database, executor, make_jobs):
    """A manifest handed in again to a worker that has just started: no model, and so not a broken one either."""
    run(database, executor, make_jobs(2, model="m@1"))
    assert seen == ["load", "run"]
    executor.cache.clear()
    fault.append(ValueError("broken file"))
    run(database, executor, make_jobs(2, model="m@1"))
    with database.read() as conn:
        assert sorted(conn.execute(select(Job.state, Job.reused_from.is_not(None))).all()) == [("succeeded", False)] * 2 + [("succeeded", True)] * 2
    assert seen == ["load", "run"]


@pytest.mark.usefixtures("cacheable")
@pytest.mark.parametrize("fields", [{"reuse": False}, {"seed": 7}, {"params": {"text": "new"}}], ids=["no reuse", "another seed", "another text"])
def test_one_new_job_among_those_done_has_the_model_loaded(database, executor, make_jobs, fields):
    run(database, executor, make_jobs(2, model="m@1"))
    executor.cache.clear()
    run(database, executor, make_jobs(1, model="m@1") + make_jobs(1, **{"model": "m@1", **fields}))
    assert seen == ["load", "run"] * 2


def test_a_broken_model_holds_its_jobs_without_a_strike(database, executor, make_jobs):
    ids = make_jobs(1, model="m@1")
    fault.append(ValueError("broken file"))
    run(database, executor, ids)
    assert tuple(row(database)) == ("queued", {}, 0, 0, True)
    for _ in range(20):  # a storm of hints: the breaker is open, nothing is loaded
        run(database, executor, ids)
    assert seen == ["load"]
    fault.clear()
    executor.cache.breaker._states.clear()
    executor.warmup.breaker._clock = lambda: 1e12
    run(database, executor, ids)
    assert row(database).state == "succeeded"


def test_after_many_failures_the_jobs_are_told(database, executor, make_jobs):
    ids = make_jobs(1, model="m@1")
    fault.append(ValueError("broken file"))
    at = [0.0]
    executor.warmup.breaker._clock = executor.cache.breaker._clock = lambda: at[0]
    for _ in range(warmup.GIVE_UP - 1):
        run(database, executor, ids)
        assert row(database).attempt == 0
        at[0] += 1000
    run(database, executor, ids)
    assert seen == ["load"] * warmup.GIVE_UP
    state, tries, strikes, attempt, _ = row(database)
    assert (state, tries, strikes, attempt) == ("queued", {"transient": 1}, 0, 1)
    with database.read() as conn:
        assert "broken file" in conn.execute(select(Attempt.error)).scalar()["message"]


def test_a_missing_model_fails_at_once_with_its_message(database, executor, make_jobs):
    fault.append(ModelUnavailable("not installed; run `make setup`"))
    ids = make_jobs(1, model="m@1")
    run(database, executor, ids)
    assert row(database).state == "failed"


def test_a_hung_load_ends_the_child_and_gives_back_what_it_uploads(database, executor, make_jobs, monkeypatch):
    [uploading] = make_jobs(1)
    database.run(lambda conn: lifecycle.claim(conn, [uploading], "w", 30))
    killed = []
    monkeypatch.setattr("worker.keeper.os.kill", lambda pid, sig: killed.append(pid))
    keeper = _Keeper(executor.settings)
    keeper.database.close()
    keeper.database, keeper.child = database, 4711
    keeper.held[1] = _Held([(uploading, 1)], 60, 60, 0, 0, watched=False)
    keeper.take({"op": "load", "model": "m@1", "limit_s": 60.0})
    keeper.watch()
    assert killed == []
    at = [0.0]
    keeper.load = LoadWatch("m@1", 60.0, lambda: (), lambda: at[0])
    at[0] = 1e4
    keeper.watch()
    assert killed == [4711]
    state, _, strikes, _, _ = row(database)
    assert (state, strikes) == ("queued", 0)
    keeper.take({"op": "load", "model": None, "limit_s": 0})
    assert keeper.load is None

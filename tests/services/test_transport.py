"""What lies on the broker may be anything. A real worker on a real broker goes on to the next valid message (invariant I10)."""

import base64
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery
from factory_services import start_valkey
from kombu.transport import memory
from sqlalchemy import select

from contentfactory.ids import new_id
from contentfactory.jobs.spec import get_kind
from contentfactory.settings import load_settings
from db import lifecycle, migrate, projects
from db.models import Job
from db.session import Database
from producer import transport
from producer.publish import Publisher, celery_options

ROOT = Path(__file__).parents[2]
ORDINARY = "text\x06\x169"
TERMINAL = ("succeeded", "failed", "dead", "cancelled", "skipped")


def b64(value) -> str:
    return base64.b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).decode()


def hint(change=None, body=None, ids=None, **headers) -> bytes:
    """An item as our sender writes it, with members replaced; ``...`` takes a member away."""
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    message = {
        "body": b64([[ids if ids is not None else [new_id("job")]], {}, embed]) if body is None else body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py", "task": "text.echo", "id": "3b7d", "root_id": "3b7d", "parent_id": None, "group": None, "meth": None,
            "shadow": None, "eta": None, "expires": None, "retries": 0, "timelimit": [None, None], "argsrepr": "x",
            "kwargsrepr": "{}", "origin": "gen1@here", "ignore_result": True, "replaced_task_nesting": 0, "stamped_headers": None,
            "stamps": {}, "dispatched_at": 1.5,
        },
        "properties": {
            "correlation_id": "3b7d", "reply_to": "", "delivery_mode": 2, "body_encoding": "base64", "priority": 9,
            "delivery_info": {"exchange": "", "routing_key": "text"}, "delivery_tag": "the-same-for-all",
        },
    }  # fmt: skip
    message["headers"].update(headers)
    message.update(change or {})
    for part in (message, message["headers"], message["properties"]):
        if isinstance(part, dict):
            for name in [n for n, v in part.items() if v is ...]:
                del part[name]
    return json.dumps(message).encode()


def properties(**changed) -> dict:
    return {"properties": {**json.loads(hint())["properties"], **changed}}


BOMB = b64(gzip.compress(b"[" * 5_000_000))
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not_json"),
    "text": (b"not json", "not_json"),
    "a number": (b"1", "not_an_object"),
    "a list": (b"[]", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "a string": (b'"text.echo"', "not_an_object"),
    "an empty object": (b"{}", "content_type"),
    "not UTF-8": (b"\xff\xfe{}", "not_utf8"),
    "not UTF-8 inside": (hint().replace(b"gen1@here", b"\xc3\x28"), "not_utf8"),
    "cut off": (hint()[:-20], "not_json"),
    "two objects": (hint() + hint(), "not_json"),
    "pickle": (pickle.dumps({"task": "text.echo"}), "not_utf8"),
    "deeply nested": (b"[" * 200_000 + b"]" * 200_000, "not_json"),
    "deeply nested in an object": (hint()[:-1] + b', "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", "not_json"),
    "a huge number": (hint()[:-1] + b', "x": ' + b"9" * 100_000 + b"}", "not_json"),
    "too large": (hint({"padding": "x" * transport.MAX_ITEM_BYTES}), "too_large"),
    "no body": (hint({"body": ...}), "body"),
    "body null": (hint({"body": None}), "body"),
    "body is an object": (hint({"body": {}}), "body"),
    "body not base64": (hint(body="%%%"), "body"),
    "body base64 of the web": (hint(body="__--"), "body"),
    "body beyond ASCII": (hint(body="ÄÖÜ="), "body"),
    "body with bad padding": (hint(body="abc"), "body"),
    "body empty": (hint(body=""), "body"),
    "body of pickle": (hint(body=b64(pickle.dumps([["x"], {}, {}]))), "body"),
    "body gzipped": (hint(body=BOMB), "body"),
    "body deeply nested": (hint(body=b64(b"[" * 300_000 + b"]" * 300_000)), "body"),
    "body is a number": (hint(body=b64(1)), "body"),
    "body of two parts": (hint(body=b64([[["job_" + "0" * 32]], {}])), "body"),
    "body of protocol 1": (hint(body=b64({"task": "text.echo", "id": "1", "args": [], "kwargs": {}})), "body"),
    "a callback": (hint(body=b64([[["job_" + "0" * 32]], {}, {"callbacks": [{"task": "text.echo"}]}])), "body"),
    "a chord": (hint(body=b64([[["job_" + "0" * 32]], {}, {"chord": {"task": "x"}}])), "body"),
    "no args": (hint(body=b64([[], {}, {}])), "args"),
    "two args": (hint(body=b64([[["job_" + "0" * 32], 1], {}, {}])), "args"),
    "keyword args": (hint(body=b64([[["job_" + "0" * 32]], {"ids": 1}, {}])), "args"),
    "no ids": (hint(ids=[]), "args"),
    "ids is a string": (hint(ids="job_" + "0" * 32), "args"),
    "ids of another thing": (hint(ids=["art_" + "0" * 32]), "args"),
    "an id with a line break": (hint(ids=["job_" + "0" * 32 + "\n"]), "args"),
    "ids of numbers": (hint(ids=[1, 2]), "args"),
    "typed values": (hint(ids=[{"__type__": "uuid", "__value__": {"hex": 5}}]), "args"),
    "too many ids": (hint(ids=["job_" + "0" * 32] * (transport.MAX_IDS + 1)), "args"),
    "foreign content": (hint({"content-type": "application/x-python-serialize"}), "content_type"),
    "binary content": (hint({"content-type": "application/data", "content-encoding": "binary"}), "content_type"),
    "no content type": (hint({"content-type": ...}), "content_type"),
    "unknown charset": (hint({"content-encoding": "utf-7"}), "content_type"),
    "no properties": (hint({"properties": ...}), "properties"),
    "properties null": (hint({"properties": None}), "properties"),
    "properties a list": (hint({"properties": []}), "properties"),
    "no delivery tag": (hint(properties(delivery_tag=...)), "properties"),
    "delivery tag an object": (hint(properties(delivery_tag={})), "properties"),
    "no delivery info": (hint(properties(delivery_info=...)), "properties"),
    "delivery info a string": (hint(properties(delivery_info="x")), "properties"),
    "delivery info empty": (hint(properties(delivery_info={})), "properties"),
    "body encoding unknown": (hint(properties(body_encoding="rot13")), "properties"),
    "body encoding a number": (hint(properties(body_encoding=7)), "properties"),
    "priority a word": (hint(properties(priority="high")), "properties"),
    "priority true": (hint(properties(priority=True)), "properties"),
    "priority huge": (hint(properties(priority=10**30)), "properties"),
    "no headers": (hint({"headers": ...}), "headers"),
    "headers null": (hint({"headers": None}), "headers"),
    "headers a list": (hint({"headers": [1]}), "headers"),
    "headers empty": (hint({"headers": {}}), "headers"),
    "no task": (hint(task=...), "headers"),
    "no id": (hint(id=...), "headers"),
    "compressed": (hint(compression="application/x-gzip", body=BOMB), "headers"),
    "unknown task": (hint(task="os.system"), "unknown_kind"),
    "celery's own task": (hint(task="celery.backend_cleanup"), "unknown_kind"),
    "expired": (hint(expires="2001-01-01T00:00:00"), "headers"),
    "later": (hint(eta="2999-01-01T00:00:00"), "headers"),
    "with a time limit": (hint(timelimit=[0.001, 0.001]), "headers"),
    "never sent": (hint(dispatched_at=...), "headers"),
    "sent at infinity": (hint(dispatched_at=float("inf")), "headers"),
    "sent at nothing": (hint(dispatched_at=float("nan")), "headers"),
    "half a character": (hint().replace(b"gen1@here", b"\\ud800"), "not_json"),
    **{
        f"header {name} of a wrong type": (hint(**{name: {"a": [1]}}), "headers")
        for name in (
            "lang", "task", "id", "root_id", "parent_id", "group", "meth", "shadow", "eta", "expires", "retries", "timelimit",
            "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps",
            "dispatched_at", "compression",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_item_is_refused_with_its_reason(name):
    raw, reason = CASES[name]
    with pytest.raises(transport.Malformed) as caught:
        transport.read_hint(raw, "text")
    assert caught.value.reason == reason
    assert reason in transport.REASONS


def test_a_hint_is_what_celery_itself_would_send(monkeypatch):
    """Celery's own sender, caught before the broker, against ours: equal but for what says who sent it and when."""
    ids = [new_id("job"), new_id("job")]
    caught = []
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.update(celery_options())
    monkeypatch.setattr(memory.Channel, "_put", lambda self, queue, message, **_: caught.append(json.loads(json.dumps(message))))
    app.send_task("text.echo", args=[ids], queue="text", priority=9, headers={"dispatched_at": 7.5}, ignore_result=True)
    app.close()
    theirs = next(message for message in caught if message["headers"].get("task"))
    ours = json.loads(json.dumps(transport.hint_message("text.echo", ids, "text", 9, 7.5, theirs["headers"]["id"])))
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(theirs["body"]))
    unset = {"group_index", "replaced_task_nesting", "stamped_headers", "stamps"}  # defaults of Celery's that a reader assumes
    told = {"argsrepr", "origin", "meth"}  # ours names fewer ids, no sender, and what other protocols left behind
    assert {k: v for k, v in ours["headers"].items() if k not in told} == {k: v for k, v in theirs["headers"].items() if k not in unset | told}
    for properties in (ours["properties"], theirs["properties"]):
        properties.pop("delivery_tag")
        properties.pop("reply_to")  # nobody is told a result
    assert ours["properties"] == theirs["properties"]
    assert {ours[k] == theirs[k] for k in ("content-encoding", "content-type")} == {True}


def test_only_what_was_checked_goes_on():
    ids = [new_id("job") for _ in range(5)]
    one, two = (transport.read_hint(hint(ids=ids, x_unknown="evil", origin="me"), "text") for _ in range(2))
    assert json.loads(base64.b64decode(one["body"]))[:2] == [[ids], {}]
    assert "evil" not in json.dumps(one)
    assert one["headers"]["task"] == "text.echo" and one["headers"]["dispatched_at"] == 1.5
    assert one["properties"]["delivery_info"] == {"exchange": "", "routing_key": "text"}
    assert one["properties"]["delivery_tag"] != two["properties"]["delivery_tag"]
    # What a worker puts back, because it just ceased to serve the queue, is read again.
    assert transport.read_hint(json.dumps({**one, "redelivered": True}).encode(), "text")["headers"] == one["headers"]


class Rig:
    """A broker, a ledger and a worker of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service, self.url = start_valkey(folder / "broker")
        self.settings = load_settings(
            state_dir=folder / "state", broker_url=self.url, device="cpu", database_url=f"sqlite:///{folder / 'factory.db'}"
        )
        self.database = Database(self.settings.database())
        migrate.upgrade(self.database)
        self.project = self.database.run(lambda conn: projects.ensure(conn, "default"))
        self.publisher = Publisher(self.settings)
        self.redis = redis.Redis.from_url(self.url)
        self.log = folder / "worker.log"
        self.app = Celery("test", broker=self.settings.broker(), set_as_current=False)
        self.app.conf.update(celery_options())
        self.worker: subprocess.Popen | None = None

    def start_worker(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FACTORY_")}
        environment |= {**self.settings.environment(), "PYTHONWARNINGS": "ignore", "FACTORY_LOG_FORMAT": "json"}
        command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "-Q", "text", "-c", "1", "-n", "door@here", "-l", "info"]
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def hints(self, n: int, seconds: float = 0.0) -> list[lifecycle.Hint]:
        """Accept ``n`` echo jobs, each a hint of its own; nothing is sent yet."""
        kind = get_kind("text.echo")
        made = []
        for index in range(n):
            params = kind.validate({"text": f"job {index}", "seconds": seconds})
            row = lifecycle.NewJob(
                id=new_id("job"), project_id=self.project, kind=kind.name, queue="text", params=params.model_dump(mode="json"),
                share_key=kind.share_key(params, None), seconds=seconds, seed=index,
            )  # fmt: skip
            self.database.run(lambda conn, row=row: lifecycle.insert_jobs(conn, [row]))
            made += self.database.run(lambda conn: lifecycle.dispatch(conn, queue="text", cap_s=1e6))
        assert len(made) == n
        return made

    def states(self, hints) -> list[str]:
        ids = [i for one in hints for i in one.ids]
        with self.database.read() as conn:
            rows = dict(conn.execute(select(Job.id, Job.state).where(Job.id.in_(ids))).all())
        return [rows[i] for i in ids]

    def finish(self, hints, timeout: float = 30.0) -> None:
        """Wait until every one of these jobs has succeeded."""
        until = time.monotonic() + timeout
        while set(states := self.states(hints)) != {"succeeded"}:
            assert self.worker.poll() is None, self.tail()
            assert time.monotonic() < until, f"{states}\n{self.tail()}"
            time.sleep(0.05)

    def works(self, timeout: float = 30.0) -> None:
        """The next valid message is done, by the same process."""
        hints = self.hints(1)
        assert self.publisher.send(hints) == []
        self.finish(hints, timeout)
        assert self.worker.poll() is None

    def quarantine(self) -> list[dict]:
        return [json.loads(item) for item in self.redis.lrange(transport.QUARANTINE, 0, -1)]

    def until(self, condition, timeout: float = 15.0) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.tail()
            time.sleep(0.05)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.terminate()
            try:
                self.worker.wait(20)
            finally:
                self.worker.kill()
                self.worker.wait(10)
        self.publisher.close()
        self.app.close()
        self.redis.close()
        self.database.close()
        self.service.stop()


@pytest.fixture(scope="module")
def rig():
    """The module's worker. It starts on a broker whose every key is spoilt: what lies there before it comes must not stop it."""
    folder = Path(tempfile.mkdtemp(prefix="factory-transport-"))
    (folder / "broker").mkdir()
    made = Rig(folder)
    r = made.redis
    for tag, value in {"a": b"\xff", "b": b"1", "c": b"[1,2,3]", "d": b'[{}, "", "text"]', "e": b"[" * 99_999}.items():
        r.hset("unacked", tag, value)
        r.zadd("unacked_index", {tag: 0})
    r.set("text", "not a list")
    r.set("_kombu.binding.celery.pidbox", "not a set")
    r.sadd("_kombu.binding.reply.celery.pidbox", b"\xff", b"one part")
    r.set("_kombu.binding_deadlines", "not a sorted set")
    r.hset(transport.QUARANTINED, "made up", "1")
    made.start_worker()
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_spoilt_broker_does_not_keep_a_worker_from_starting(rig):
    rig.until(lambda: rig.redis.type("text") == b"none", 60)
    rig.works(60)
    assert rig.redis.get(f"{transport.QUARANTINE}:text") == b"not a list"
    assert {one["reason"] for one in rig.quarantine()} == {"key_type"}
    assert rig.redis.hlen("unacked") == 5  # nobody reads it, nobody writes it


def test_every_malformed_item_between_valid_hints(rig):
    rig.redis.delete(transport.QUARANTINE, transport.QUARANTINED)
    children = {p.pid for p in psutil.Process(rig.worker.pid).children()}
    hints = rig.hints(-(-len(CASES) // 8))
    for index, (raw, _) in enumerate(CASES.values()):
        if index % 8 == 0:
            assert rig.publisher.send([hints[index // 8]]) == []
        rig.redis.lpush(ORDINARY if index % 2 else "text", raw)
    rig.finish(hints)
    rig.until(lambda: len(rig.quarantine()) == len(CASES))
    assert rig.worker.poll() is None
    assert {p.pid for p in psutil.Process(rig.worker.pid).children()} == children
    wanted = sorted((len(raw), reason) for raw, reason in CASES.values())
    assert sorted((one["bytes"], one["reason"]) for one in rig.quarantine()) == wanted
    counted = rig.publisher.quarantined()
    assert sum(counted.values()) == len(CASES) and counted["not_an_object"] == 4
    assert max(len(item) for item in rig.redis.lrange(transport.QUARANTINE, 0, -1)) < 6 * transport.KEEP_BYTES + 1000
    log = rig.log.read_text(errors="replace")
    assert log.count('"event": "bad_message"') >= len(CASES)
    assert "Traceback" not in log and "os.system" not in log


def test_items_with_one_delivery_tag_are_still_several(rig):
    hints = rig.hints(3)
    for one in hints:
        rig.redis.lpush(ORDINARY, hint(ids=list(one.ids)))
    rig.finish(hints)


def test_what_becomes_of_a_message_is_told_though_later(rig):
    """Flower lives on these; they are sent together, a moment after the message is on its way."""
    with rig.redis.pubsub() as heard:
        heard.psubscribe("/0.celeryev/task.*")
        told: list[str] = []

        def listen() -> bool:
            while (item := heard.get_message(timeout=0.05)) is not None:
                if item["type"] == "pmessage":
                    body = json.loads(base64.b64decode(json.loads(item["data"])["body"]))
                    told.extend(event["type"] for event in (body if isinstance(body, list) else [body]))
            return {"task-received", "task-started", "task-succeeded"} <= set(told)

        rig.works()
        rig.until(listen)
    assert [told.count(what) for what in ("task-received", "task-started", "task-succeeded")] == [1, 1, 1]


def command(method="ping", headers=None, **changed) -> bytes:
    body = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None, **changed}
    return hint({"body": b64(body), "headers": headers or {"clock": 1}})


def test_bad_commands_and_events_do_no_harm(rig):
    rig.redis.delete(transport.QUARANTINE, transport.QUARANTINED)
    bad = [
        *(raw for raw, reason in CASES.values() if reason not in ("headers", "unknown_kind", "args")),
        command(headers={"clock": "soon"}), command(headers={"clock": 10**40}), command(method=7), command(method="__class__", arguments=[]),
        command(destination={"a": 1}), command(pattern="(a+)+$", matcher="pcre"), command(reply_to="nobody"), command(reply_to={}),
    ]  # fmt: skip
    # Well formed, and each would stop a stock worker or its queue.
    bad += [
        command(method, arguments=arguments)
        for method, arguments in {
            "shutdown": {}, "cancel_consumer": {"queue": "text"}, "pool_shrink": {"n": 1}, "no_such": {},
            "rate_limit": {"task_name": "text.echo", "rate_limit": "1/h"}, "time_limit": {"task_name": "text.echo", "hard": 1e-6},
        }.items()
    ]  # fmt: skip
    for raw in bad:
        assert rig.redis.publish("/0.celery.pidbox", raw) == 1
    rig.works()
    assert len(rig.quarantine()) == len(bad)
    answer = rig.app.control.ping(destination=["door@here"], timeout=5, limit=1)
    assert answer == [{"door@here": {"ok": "pong"}}]


def event(body) -> bytes:
    info = {"exchange": "celeryev", "routing_key": "task.succeeded"}
    return hint({"body": b64(body), "headers": {"hostname": "x"}, **properties(delivery_info=info)})


def test_bad_events_do_not_stop_who_listens(rig):
    good = {"type": "task-sent", "hostname": "x", "timestamp": 1.0, "clock": 1, "utcoffset": 0, "pid": 1, "uuid": "u", "own": [1]}
    bad = [
        b"1", b"\xff", event(None), event([1]), event("x"), event({}), *(event({**good, name: {}}) for name in good if name != "own"),
        event([good, {**good, "timestamp": "now"}]), event({**good, "own": "\ud800"}), event({**good, "timestamp": float("inf")}),
    ]  # fmt: skip
    before, seen = len(rig.quarantine()), []

    def shout():
        rig.until(lambda: rig.redis.pubsub_numpat() >= 2)  # the worker's commands, and this listener
        for raw in bad:
            rig.redis.publish("/0.celeryev/task.sent", raw)
        rig.redis.publish(b"/0.celeryev/\xff", event(good))
        rig.redis.publish("/0.celeryev/task.multi", event([good]))
        rig.works()

    app = rig.app
    with app.connection_for_read() as connection, ThreadPoolExecutor(1) as pool:
        shouting = pool.submit(shout)
        for _ in app.events.Receiver(connection, handlers={"*": seen.append}).itercapture(timeout=20, wakeup=False):
            if any(one["type"] == "task-succeeded" and one["hostname"] == "door@here" for one in seen):
                break
        shouting.result()
    assert sum(one.get("own") == [1] for one in seen) == 2
    # Our own sender's event, by which Flower knows the queue.
    sent = [one for one in seen if one["type"] == "task-sent" and one.get("routing_key") == "text"]
    assert [(one["queue"], one["name"]) for one in sent] == [("text", "text.echo")]
    assert {one["uuid"] for one in sent} <= {one["uuid"] for one in seen if one["type"] == "task-succeeded"}
    assert len(rig.quarantine()) - before == len(bad)


def test_64_mib_pass_without_a_trace(rig):
    main = psutil.Process(rig.worker.pid)
    rig.works()
    before = main.memory_info().rss
    for _ in range(3):
        rig.redis.lpush("text", b"x" * 2**26)
    rig.works()
    rig.until(lambda: main.memory_info().rss < before + 2**25)
    assert rig.quarantine()[0]["reason"] == "too_large" and rig.quarantine()[0]["bytes"] == 2**26


def test_64_mib_on_a_channel_do_not_stop_a_worker(rig):
    """The broker hangs up on a subscriber to whom more is published than it keeps; the subscription alone is gone then."""
    rig.works()
    for channel in ("/0.celery.pidbox", "/0.celeryev/task.sent"):
        rig.redis.publish(channel, b"x" * 2**26)
        rig.until(lambda: rig.redis.pubsub_numpat() >= 1, 30)
        time.sleep(1)
        rig.until(lambda: rig.redis.pubsub_numpat() >= 1, 30)
        rig.works()
    rig.until(lambda: rig.app.control.ping(destination=["door@here"], timeout=2, limit=1), 30)


def test_a_lost_subscription_is_made_anew(rig):
    rig.until(lambda: rig.redis.execute_command("CLIENT", "LIST", "TYPE", "pubsub"))  # the worker has subscribed
    killed = rig.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert killed >= 1
    # A hint that comes while Celery starts its consumer anew is dropped by it, and comes again by the timer, which is not here.
    rig.until(lambda: rig.redis.execute_command("CLIENT", "LIST", "TYPE", "pubsub"))
    rig.works()
    rig.until(lambda: rig.app.control.ping(destination=["door@here"], timeout=2, limit=1), 30)


def test_the_next_hint_waits_in_the_broker(rig):
    hints = rig.hints(3, seconds=1.0)
    rig.publisher.send(hints)
    rig.until(lambda: "running" in rig.states(hints))
    time.sleep(0.3)
    assert rig.states(hints) == ["running", "dispatched", "dispatched"]
    assert rig.publisher.waiting("text") == 2
    assert rig.publisher.oldest("text") == pytest.approx(hints[1].dispatched_at)
    rig.redis.rpush(ORDINARY, b"bad")
    assert rig.publisher.oldest("text") == 0.0
    rig.finish(hints)


def test_a_queue_of_the_wrong_type_is_moved_away(rig):
    rig.redis.delete(ORDINARY)
    rig.redis.set(ORDINARY, "not a list")
    rig.until(lambda: rig.redis.type(ORDINARY) == b"none")
    rig.works()
    assert rig.quarantine()[0]["reason"] == "key_type"


def test_a_broker_that_dies_with_all_its_data_is_consumed_again(rig):
    port, password = rig.service.port, rig.url.split(":")[2].split("@")[0]
    rig.service.stop()
    shutil.rmtree(rig.folder / "broker")
    (rig.folder / "broker").mkdir()
    time.sleep(1)
    rig.service, _ = start_valkey(rig.folder / "broker", port, password)
    started = time.monotonic()
    rig.works(20)
    assert time.monotonic() - started < 6


def test_a_worker_without_a_broker_obeys_a_signal(rig):
    assert rig.worker.poll() is None
    before = rig.log.read_text(errors="replace").count("Connection to broker lost")
    rig.service.stop()
    time.sleep(3)  # longer than a heartbeat's pause
    started = time.monotonic()
    rig.worker.terminate()
    assert rig.worker.wait(20) == 0
    assert time.monotonic() - started < 15
    log = rig.log.read_text(errors="replace")
    assert log.count("Connection to broker lost") == before + 1
    assert "Traceback" not in log

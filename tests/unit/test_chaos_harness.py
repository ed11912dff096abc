"""The fault harness itself: its checker sees each violation that it claims to see, and its proxies break what they say."""

import contextlib
import http.client
import http.server
import importlib.util
import random
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

CHAOS = Path(__file__).parents[1] / "chaos"


def load(name):
    spec = importlib.util.spec_from_file_location(f"chaos_{name}", CHAOS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checker, proxy = load("checker"), load("proxy")


def history(**change):
    """Two echo jobs of one batch that went well, as the checker reads them."""
    jobs = [
        {
            "id": i, "batch_id": "b", "kind": "text.echo", "state": "succeeded", "attempt": 1, "strikes": 0, "tries": {}, "error": None,
            "cancel_requested": False, "lease_owner": None, "created_at": 0.0, "finished_at": 2.0, "micro_batch": 7, "group_size": 2,
        }
        for i in ("j1", "j2")
    ]  # fmt: skip
    data = {
        "jobs": jobs,
        "attempts": [
            {"job_id": j["id"], "attempt": 1, "worker": "h/w/77-x", "group_size": 2, "started_at": 1.0, "finished_at": 2.0, "outcome": "succeeded", "error": None}
            for j in jobs
        ],
        "micro_batches": [{"id": 7, "jobs": 2}],
        "artifacts": [{"job_id": j["id"], "attempt": 1, "role": "output", "name": "t", "object_key": "k", "sha256": "", "size": 1} for j in jobs],
        "events": [{"at": 2.0, "type": "batch.completed", "batch_id": "b", "job_id": None}],
        "batches": [{"id": "b", "state": "completed", "total": 2, "finished_at": 2.0}],
        "counts": [{"batch_id": "b", "kind": "text.echo", "state": s, "n": 2} for s in ("total", "succeeded")],
        "audit": [
            {"id": n, "at": 1.0, "job_id": j["id"], "old": old, "new": new, "attempt": 1, "worker": "w", "cancel": False}
            for j in jobs
            for n, (old, new) in enumerate([("queued", "dispatched"), ("dispatched", "running"), ("running", "succeeded")])
        ],
    }
    for table, edit in change.items():
        edit(data[table])
    return data


def found(**change):
    violations = checker.check_ledger(history(**change), {"j1": "", "j2": ""})
    return {v.partition(":")[0] for v in violations}


def test_a_good_history_passes():
    assert found() == set()


@pytest.mark.parametrize(
    ("invariant", "table", "edit"),
    [
        ("I1", "jobs", lambda t: t.pop()),
        ("I1", "jobs", lambda t: t[0].update(state="running")),
        ("I1", "attempts", lambda t: t[0].update(finished_at=None)),
        ("I2", "jobs", lambda t: t.append({**t[0], "id": "j3"})),
        ("I3", "attempts", lambda t: t.append({**t[0], "attempt": 2})),
        ("I3", "attempts", lambda t: t.pop()),
        ("I3", "jobs", lambda t: t[0].update(attempt=2)),
        ("I3", "jobs", lambda t: t[0].update(micro_batch=None)),
        ("I3", "micro_batches", lambda t: t.pop()),
        ("I3", "micro_batches", lambda t: t[0].update(jobs=3)),
        ("I3", "artifacts", lambda t: t.pop()),
        ("I4", "artifacts", lambda t: t[0].update(attempt=2)),
        ("I4", "audit", lambda t: t.append({**t[0], "old": "running", "new": "running", "attempt": 2})),
        ("I6", "audit", lambda t: t.append({**t[0], "old": "succeeded", "new": "queued"})),
        ("I6", "audit", lambda t: t.append({**t[0], "old": "queued", "new": "succeeded"})),
        ("I9", "jobs", lambda t: t[0].update(strikes=4)),
        ("I11", "audit", lambda t: t[2].update(cancel=True)),
        ("I11", "audit", lambda t: [t[0].update(cancel=True)]),
        ("I12", "counts", lambda t: t[1].update(n=1)),
        ("I12", "events", lambda t: t.append(t[0])),
        ("I12", "events", lambda t: t.clear()),
    ],
)
def test_a_planted_violation_is_seen(invariant, table, edit):
    assert invariant in found(**{table: edit})


def test_a_rescue_of_a_living_worker_is_seen():
    data = history(attempts=lambda t: t[0].update(outcome="crash", finished_at=20.0))
    assert checker.check_rescues(data, {}, bound_s=9)[0].startswith("I8")
    assert checker.check_rescues(data, {"77": [15.0]}, bound_s=9) == []
    assert checker.check_rescues(data, {"77": [5.0]}, bound_s=9)[0].startswith("I7")
    assert checker.recoveries({"attempts": [*data["attempts"], {**data["attempts"][0], "attempt": 2, "started_at": 21.0}]}, {"77": [15.0]}) == [6.0]


def test_a_missing_and_a_changed_object_are_seen():
    store = SimpleNamespace(list=lambda: [SimpleNamespace(key="k", size=1)], get=lambda key: b"x")
    assert {v.partition(":")[0] for v in checker.check_store(history(), store, {}, random.Random(1))} == {"I5"}
    store.list = list
    assert len(checker.check_store(history(), store, {}, random.Random(1))) == 2


@pytest.fixture
def postgres_like():
    """A server that takes COMMIT and answers it, and remembers what it took."""
    taken = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionResetError):
                while data := connection.recv(4096):
                    taken.append(data)
                    connection.sendall(b"done")

    threading.Thread(target=serve, daemon=True).start()
    made = proxy.PostgresProxy(server.getsockname()[1])
    yield made, taken
    made.close()
    server.close()


def talk(port, data):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(data)
        try:
            return connection.recv(100)
        except ConnectionResetError:
            return b"reset"


def test_the_answer_to_a_commit_is_lost_but_not_the_commit(postgres_like):
    made, taken = postgres_like
    assert talk(made.port, proxy.COMMIT) == b"done"
    made.lose_answer = 1.0
    assert talk(made.port, b"Q select") == b"done"
    assert talk(made.port, proxy.COMMIT) == b"reset"
    assert taken == [proxy.COMMIT, b"Q select", proxy.COMMIT]
    made.lose_answer, made.lose_commit = 0.0, 1.0
    assert talk(made.port, proxy.COMMIT) == b"reset"
    assert len(taken) == 3
    assert made.counts == {"answer_lost": 1, "commit_lost": 1}


def test_a_blackhole_passes_nothing_until_it_ends(postgres_like):
    made, _ = postgres_like
    made.blackhole = True
    with socket.create_connection(("127.0.0.1", made.port), 5) as connection:
        connection.sendall(b"x")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        made.blackhole = False
        connection.settimeout(5)
        assert connection.recv(10) == b"done"


class _Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    puts: list[bytes]

    def do_PUT(self):
        self.server.puts.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"a" * 1000)

    def log_message(self, *args):
        pass


@pytest.fixture
def s3_like():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    server.handle_error = lambda *_: None  # resets are what the proxy is for
    server.puts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = proxy.S3Proxy(server.server_port)
    yield made, server.puts
    made.close()
    server.shutdown()
    server.server_close()


def request(port, method, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, "/x", body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__, b""
    finally:
        connection.close()


def test_storage_faults(s3_like):
    made, puts = s3_like
    assert request(made.port, "PUT", b"one") == (200, b"")
    assert request(made.port, "GET") == (200, b"a" * 1000)
    made.shares = {"503": 1.0}
    assert request(made.port, "PUT", b"two")[0] == 503
    assert puts == [b"one"]
    made.shares = {"reset_after": 1.0}
    assert isinstance(request(made.port, "PUT", b"three")[0], str)
    assert puts == [b"one", b"three"]
    made.shares = {"cut": 1.0}
    assert isinstance(request(made.port, "GET")[0], str)
    made.shares, made.hang_s = {"hang": 1.0}, 0.5
    begun = time.monotonic()
    assert isinstance(request(made.port, "GET")[0], str)
    assert time.monotonic() - begun >= 0.4
    made.limits = {"hang": 1}
    assert request(made.port, "GET")[0] == 200


# Growth of processes


def samples(rss, fds=lambda done: 20, jobs=4000, every=40):
    return [{"at": 2.0 * n / every, "done": float(n), "rss": float(rss(n)), "fds": float(fds(n))} for n in range(0, jobs, every)]


def test_a_leak_is_seen_and_a_warm_up_is_not():
    dice = random.Random(5)
    flat = samples(lambda n: min(250, 120 + n) + dice.uniform(-3, 3))
    step = samples(lambda n: min(250, 120 + n) + (20 if n > 2500 else 0) + dice.uniform(-3, 3))
    leak = samples(lambda n: min(250, 120 + n) + n / 50 + dice.uniform(-3, 3))
    handles = samples(lambda n: 250, lambda n: 20 + n // 100)
    violations, notes = checker.check_growth({("child", 1): flat, ("child", 2): step, ("keeper", 3): flat})
    assert violations == []
    assert notes["child"]["mb_max"] == pytest.approx(272, abs=2) and notes["child"]["over_jobs"] > 2500
    violations, _ = checker.check_growth({("child", 1): leak, ("timer", 2): handles})
    assert [v.split(" grew")[0] for v in violations] == ["I20: child 1", "I20: timer 2"]
    assert checker.growth(leak, "rss")[0] == pytest.approx(20, abs=1)


def test_a_process_that_still_loads_its_libraries_is_not_judged():
    # While it does, its neighbours do the jobs.
    young = samples(lambda n: 120 + n / 60, jobs=6000, every=600)
    assert checker.check_growth({("child", 1): young})[0] == []
    assert checker.check_growth({("child", 1): [{**s, "at": s["at"] + 100 * n} for n, s in enumerate(young)]})[0] != []


def test_too_little_says_nothing():
    assert checker.growth(samples(lambda n: n, jobs=300), "rss") is None
    assert checker.check_growth({("child", 1): samples(lambda n: n, jobs=200)})[0] == []

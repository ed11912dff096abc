"""What a worker's child tells its keeper, and how seldom."""

import json
import os
import threading
import types

import pytest

from contentfactory.settings import load_settings
from worker.keeper import FEW_BYTES, Keeper, _Keeper

KEYS = [(f"job_{n}", 1) for n in range(100)]


@pytest.fixture
def sent(monkeypatch):
    messages = []
    monkeypatch.setattr("worker.keeper._send", lambda process, message: messages.append(message))
    return messages


@pytest.fixture
def keeper(monkeypatch, sent, tmp_path):
    monkeypatch.setattr(Keeper, "_start", lambda self: None)
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    return Keeper(load_settings(state_dir=tmp_path), "w", ["text"], "cpu")


def test_a_micro_batch_is_named_once_and_then_by_its_number(keeper, sent):
    group = keeper.hold(KEYS, 60.0, 60.0)
    keeper.settle(group)
    keeper.drop(group)
    [hold, settle, drop] = sent
    assert hold["jobs"] == KEYS
    assert settle == {"op": "settle", "group": hold["group"]}
    assert drop == {"op": "drop", "group": hold["group"]}
    assert keeper._held == {}


def test_what_was_said_of_a_job_goes_with_its_micro_batch(keeper):
    groups = [keeper.hold(KEYS[:2], 60.0, 60.0), keeper.hold(KEYS[2:], 60.0, 60.0)]
    keeper.progress(KEYS[0], 0.5, "half")
    keeper.progress(KEYS[2], 0.5, "half")
    keeper._lost |= {KEYS[0], KEYS[2]}
    keeper._cancelled |= {KEYS[1], KEYS[3]}
    keeper.drop(groups[0])
    assert (set(keeper._last_beat), keeper._lost, keeper._cancelled) == ({KEYS[2]}, {KEYS[2]}, {KEYS[3]})


def test_members_that_are_done_are_one_sign_of_life(keeper, sent):
    for key in KEYS:
        keeper.progress(key, 1.0, "")
    assert len(sent) == 1
    keeper.progress(KEYS[3], 0.5, "half")
    keeper.progress(KEYS[3], 0.6, "more")
    assert [m["message"] for m in sent[1:]] == ["half"]


def test_looks_that_are_left_out_are_no_pause_of_the_keepers_own(monkeypatch, tmp_path):
    # Found by simulation: the time since the last look was taken for a stop of the machine, and a child that hung was never killed.
    clock = [100.0]
    killed = []
    keeper = _Keeper(load_settings(state_dir=tmp_path))
    monkeypatch.setattr("worker.keeper.time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(keeper, "kill", lambda held, reason: killed.append(reason))
    keeper.looked_at = clock[0]
    keeper.take({"op": "hold", "group": 1, "jobs": [["job_x", 1]], "progress_s": 5.0, "limit_s": 50.0})
    keeper.take({"op": "beat", "job": ["job_x", 1], "fraction": 0.5, "message": None})
    for _ in range(3):
        clock[0] += 0.2
        keeper.awake()
        clock[0] += 3.9
        keeper.watch()
    assert killed and killed[0].startswith("no progress for 8 s")
    keeper.database.close()


def test_the_keeper_takes_what_it_is_told(tmp_path):
    keeper = _Keeper(load_settings(state_dir=tmp_path))
    keeper.take({"op": "hold", "group": 7, "jobs": [list(key) for key in KEYS], "progress_s": 5.0, "limit_s": 50.0})
    keeper.take({"op": "hold", "group": 8, "jobs": [["job_x", 2]], "progress_s": 5.0, "limit_s": 50.0})
    keeper.take({"op": "beat", "job": ["job_5", 1], "fraction": 0.5, "message": "half"})
    keeper.take({"op": "beat", "job": ["job_x", 1], "fraction": 0.5, "message": "of an attempt that is held no more"})
    assert keeper.held[7].spoke and not keeper.held[8].spoke
    assert keeper.notes == {("job_5", 1): (0.5, "half")}
    keeper.take({"op": "settle", "group": 7})
    assert not keeper.held[7].watched and keeper.held[8].watched
    keeper.told = {("job_5", 1), ("job_x", 2)}
    keeper.take({"op": "drop", "group": 7})
    assert set(keeper.held) == {8} and keeper.notes == {} and keeper.told == {("job_x", 2)}
    for op in ("settle", "drop"):
        keeper.take({"op": op, "group": 99})  # of a keeper that was started anew: nothing to do
    keeper.database.close()


def test_messages_come_whole_however_they_arrive(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    keeper = _Keeper(load_settings(state_dir=tmp_path))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(fileno=lambda: reader))
    thread = threading.Thread(target=keeper.read)
    thread.start()
    told = [{"op": "hold", "jobs": KEYS * 30, "name": "é"}, {"op": "settle", "group": 1}, {"op": "drop", "group": 1}]
    text = b"".join(json.dumps(message, ensure_ascii=False).encode() + b"\n" for message in told) + b"no json\n" + b'{"op": "bye"}\n'
    assert len(text) > 3 * FEW_BYTES
    cut = text.index("é".encode()) + 1  # in the middle of a letter
    for part in (text[:10], text[10:cut], text[cut:-5], text[-5:]):
        os.write(writer, part)
    os.close(writer)
    thread.join(10)
    os.close(reader)
    found = [keeper.inbox.get_nowait() for _ in range(keeper.inbox.qsize())]
    assert found == [json.loads(json.dumps(message)) for message in told] + [{"op": "bye"}, None]


def test_a_burst_of_few_words_is_read_at_once(tmp_path, monkeypatch):
    """Of a short job there are three messages within milliseconds: one wakes the keeper."""
    reader, writer = os.pipe()
    keeper = _Keeper(load_settings(state_dir=tmp_path))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(fileno=lambda: reader))
    rested, reads, read = threading.Event(), [], os.read
    go = threading.Event()
    monkeypatch.setattr("worker.keeper.time.sleep", lambda seconds: (rested.set(), go.wait(10)))
    monkeypatch.setattr("worker.keeper.os.read", lambda number, most: reads.append(read(number, most)) or reads[-1])
    thread = threading.Thread(target=keeper.read)
    thread.start()
    os.write(writer, b'{"op": "hold"}\n')
    assert rested.wait(10)
    os.write(writer, b'{"op": "settle"}\n')
    os.write(writer, b'{"op": "drop"}\n')
    go.set()
    os.close(writer)
    thread.join(10)
    os.close(reader)
    assert [data.count(b"\n") for data in reads] == [1, 2, 0]

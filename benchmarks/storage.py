"""Objects in and out: our stores beside raw boto3, raw files, and obstore where it is installed."""

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench

SIZES = {"1 kB": 1_000, "100 kB": 100_000, "10 MB": 10_000_000}


def _rate(work: Callable[[int], Any], count: int) -> dict[str, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    for n in range(count):
        work(n)
    took, used = time.perf_counter() - begun, time.process_time() - cpu
    return {"value": count / took, "CPU µs": used / count * 1e6}


def run(bench: Bench) -> None:
    import boto3
    from botocore.config import Config

    from storage.keys import artifact_key
    from storage.local import LocalStore
    from storage.s3 import S3Store

    if not bench.wants("storage"):
        return
    for label, size in SIZES.items():
        count = bench.pick(2, *{1_000: (300, 1000), 100_000: (150, 500), 10_000_000: (6, 20)}[size])
        bodies = [os.urandom(16) + bytes(size - 16) for _ in range(count)]
        shas = [hashlib.sha256(b).hexdigest() for b in bodies]
        for place in ("local", "s3"):
            name = f"storage.{place}_{label.replace(' ', '').lower()}"
            if not bench.wants(name):
                continue
            with bench.case(name, f"{count} objects of {label}, one after the other, put then get", "operations/s") as case:
                turn = iter(range(1_000_000))
                if place == "local":
                    folder = bench.folder / name
                    store: Any = LocalStore(folder / "ours")
                    raw = folder / "raw"
                    raw.mkdir(parents=True)

                    def put_raw(n: int, raw: Path = raw, bodies: list[bytes] = bodies) -> None:
                        part = raw / f".{n}.part"
                        with open(part, "wb") as out:
                            out.write(bodies[n])
                            out.flush()
                            os.fsync(out.fileno())
                        os.replace(part, raw / str(n))

                    sides = {"raw file, synced": (put_raw, lambda n, raw=raw: (raw / str(n)).read_bytes())}
                else:
                    s3 = bench.s3
                    store = S3Store(s3.bucket, endpoint=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, prefix=f"{name}/")
                    client = boto3.client(
                        "s3", endpoint_url=s3.endpoint, aws_access_key_id=s3.access_key, aws_secret_access_key=s3.secret_key, region_name="us-east-1",
                        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
                    )  # fmt: skip
                    sides = {
                        "raw boto3": (
                            lambda n, c=client, b=s3.bucket, bodies=bodies: c.put_object(Bucket=b, Key=f"raw/{n}", Body=bodies[n]),
                            lambda n, c=client, b=s3.bucket: c.get_object(Bucket=b, Key=f"raw/{n}")["Body"].read(),
                        )
                    }
                    if importlib.util.find_spec("obstore") is not None:
                        import obstore

                        other = obstore.store.S3Store(
                            s3.bucket, endpoint=s3.endpoint, access_key_id=s3.access_key, secret_access_key=s3.secret_key, region="us-east-1",
                            virtual_hosted_style_request=False, client_options={"allow_http": True},
                        )  # fmt: skip
                        sides["obstore"] = (
                            lambda n, o=other, bodies=bodies: obstore.put(o, f"obstore/{n}", bodies[n], use_multipart=False),
                            lambda n, o=other: bytes(obstore.get(o, f"obstore/{n}").bytes()),
                        )
                keys: list[str] = []

                def put_ours(n: int, store: Any = store, keys: list[str] = keys, bodies: list[bytes] = bodies, shas: list[str] = shas) -> None:
                    store.put(keys[n], bodies[n], media_type="application/octet-stream", sha256=shas[n], size=len(bodies[n]))

                def get_ours(n: int, store: Any = store, keys: list[str] = keys) -> bytes:
                    with store.open(keys[n]) as stream:
                        return stream.read()

                for _ in range(bench.rounds):
                    # New keys each time: an object that is there already is not written again.
                    project = f"prj_{next(turn):032x}"
                    keys[:] = [artifact_key(project, sha, ".bin") for sha in shas]
                    for side, (put, get) in {"ours": (put_ours, get_ours), **sides}.items():
                        case.add(f"{side}, put", _rate(put, count))
                        case.add(f"{side}, get", _rate(get, count))
                first = next(iter(sides))
                for action in ("put", "get"):
                    case.ratio(f"ours, {action}", f"{first}, {action}", name=f"{action}: ours ÷ {first}")
                store.close()

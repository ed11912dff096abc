"""How long each file and address of the threat table takes to be refused, and what it takes in memory: the table of docs/hostile-inputs.md.

    python benchmarks/hostile.py [--out table.md]

The files are those of tests/services/test_hostile_inputs.py. Warm: the decoder has started and decoded before. Cold: it starts for this
file. Memory is the peak resident size of the decoder while it works, and what the asking process grew by.
"""

import argparse
import importlib.util
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpcore

ROOT = Path(__file__).parents[1]
for _folder in (ROOT / "tests" / "plugins", ROOT / "tests", ROOT):  # before this folder, whose names are others'
    sys.path.insert(0, str(_folder))
NAMES = {"image": "Pictures", "audio": "Sounds", "video": "Videos", "dataset": "Archives"}
PUBLIC = "93.184.216.34"
URLS = {
    "loopback": "http://127.0.0.1/x", "loopback, another": "http://127.9.9.9/", "nobody": "http://0.0.0.0/", "private 10/8": "http://10.0.0.1/",
    "private 172.16/12": "http://172.16.0.1/", "private 192.168/16": "http://192.168.0.1/", "link-local (metadata)": "http://169.254.169.254/latest/",
    "CGNAT 100.64/10": "http://100.64.0.1/", "multicast": "http://224.0.0.1/", "reserved": "http://240.0.0.1/", "broadcast": "http://255.255.255.255/",
    "IPv6 loopback": "http://[::1]/", "IPv6 unspecified": "http://[::]/", "IPv6 unique local": "http://[fd00::1]/", "IPv6 link-local": "http://[fe80::1]/",
    "NAT64": "http://[64:ff9b::7f00:1]/", "NAT64 of a network's own": "http://[64:ff9b:1::7f00:1]/", "6to4": "http://[2002:7f00:1::]/",
    "Teredo": "http://[2001:0:1::1]/", "IPv4-mapped": "http://[::ffff:127.0.0.1]/", "IPv4-compatible": "http://[::127.0.0.1]/",
    "decimal": "http://2130706433/", "hexadecimal": "http://0x7f000001/", "hexadecimal parts": "http://0x7f.1/", "octal": "http://0177.0.0.1/",
    "short": "http://127.1/", "five parts": "http://1.2.3.4.5/", "dot behind": "http://127.0.0.1./", "full-width digits": "http://１２７.０.０.１/",
    "user": "http://user@public.example/", "user and password": "http://user:pw@public.example/", "port of SSH": "http://public.example:22/",
    "port of Redis (allowed: above 1023), private name": "http://private.example:6379/", "port 0": "http://public.example:0/", "port too large": "http://public.example:99999/",
    "file": "file:///etc/passwd", "FTP": "ftp://public.example/", "gopher": "gopher://public.example/", "unix socket": "unix:/run/docker.sock",
    "header in a name": "http://a\r\nHost: b/", "long name": "http://" + "a" * 70_000 + "/", "name that resolves to 10.0.0.7": "http://private.example/",
    "name with one private address of two": "http://mixed.example/", "name of loopback": "http://localhost/",
    "redirect to loopback": "http://public.example/127.0.0.1/", "redirect to metadata": "http://public.example/169.254.169.254/",
    "redirect to a private name": "http://public.example/private.example/", "redirect to IPv4-mapped": "http://public.example/[::ffff:7f00:1]/",
    "redirects without end": "http://public.example/public.example/",
}  # fmt: skip
ANSWERS = {
    "public.example": [PUBLIC], "private.example": ["10.0.0.7"], "mixed.example": [PUBLIC, "10.0.0.7"], "localhost": ["127.0.0.1", "::1"],
}  # fmt: skip


def cases() -> Any:
    """The module with the files."""
    spec = importlib.util.spec_from_file_location("hostile_inputs", ROOT / "tests" / "services" / "test_hostile_inputs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(hostile: Any, folder: Path, only: str = "") -> list[str]:
    """Lines of the table of files; ``only`` takes those in whose name it stands."""
    from worker import confined

    path = folder / "input"
    lines, worst = [], {"warm": 0.0, "cold": 0.0, "mb": 0.0, "grew": 0.0}
    for modality, (found, family, work) in hostile.WORK.items():
        lines += ["", f"### {NAMES[modality]}", "", "| file | kB | outcome | warm ms | decoder MB | worker +MB | cold ms | decoder MB |", "|---|---:|---|---:|---:|---:|---:|---:|"]
        for name, (make, _) in found.items():
            if only not in name:
                continue
            path.write_bytes(make())
            figures: dict[str, tuple[float, float]] = {}
            answer, grew = "", 0.0
            for state in ("cold", "warm"):
                if state == "cold":
                    confined.close()
                else:
                    hostile.forget_peak(confined._pool().idle()[family].pid) if family in confined._pool().idle() else None
                before = hostile.resident_mb()
                hostile.forget_peak("self")
                answer, took = hostile.tried(path, modality, work)
                grew = hostile.peak_mb("self") - before
                child = confined._pool().idle().get(family)
                figures[state] = took, hostile.peak_mb(child.pid) if child else 0.0
                worst[state] = max(worst[state], took)
                worst["mb"] = max(worst["mb"], figures[state][1])
            worst["grew"] = max(worst["grew"], grew)
            words = (answer.replace(str(path), "").replace("input (", "(") or "decoded").replace("|", "/").replace("\n", " ")
            shown = [f"{1000 * figures[s][0]:.1f} | {f'{figures[s][1]:.0f}' if figures[s][1] else '–'}" for s in ("warm", "cold")]
            lines.append(f"| {name} | {path.stat().st_size / 1000:,.1f} | {words[:110]} | {shown[0]} | {max(0.0, grew):.1f} | {shown[1]} |")
    head = (
        f"Slowest: {1000 * worst['warm']:.0f} ms warm, {1000 * worst['cold']:.0f} ms cold (which includes the decoder's start); largest decoder "
        f"{worst['mb']:.0f} MB; the asking process grew by {worst['grew']:.0f} MB at most. Where no decoder is named, none was asked."
    )
    return ["## Files", "", head, *lines]


def addresses(folder: Path) -> list[str]:
    """Lines of the table of addresses. Names answer what `ANSWERS` says, public addresses answer with a redirect; nothing leaves."""
    from contentfactory import net
    from contentfactory.errors import FactoryError
    from worker.fetch import fetch_url

    connected: list[str] = []

    class Redirecting(httpcore.MockStream):
        """Answers a path with a redirect to the host in it."""

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            if not buffer.startswith(b"GET "):
                return
            target = unquote(buffer.split(b" ")[1].strip(b"/").decode())
            self._buffer = [f"HTTP/1.1 302 Found\r\nLocation: http://{target}/{target}/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode(), b""]

    def connect(self: Any, host: str, port: int, **_: Any) -> httpcore.NetworkStream:
        connected.append(host)
        return Redirecting([])

    real = socket.getaddrinfo

    def resolve(host: str, port: int, **options: Any) -> Any:
        if host not in ANSWERS:
            return real(host, port, **options, flags=socket.AI_NUMERICHOST)
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in ANSWERS[host]]

    net.socket.getaddrinfo = resolve  # type: ignore[assignment]
    httpcore.SyncBackend.connect_tcp = connect  # type: ignore[assignment,method-assign]
    lines = ["| address | | outcome | ms | connected to |", "|---|---|---|---:|---|"]
    slowest = 0.0
    for name, url in URLS.items():
        connected.clear()
        best, answer = 9.0, "TAKEN"
        for _ in range(3):
            started = time.monotonic()
            try:
                fetch_url(url, folder, max_bytes=10**6, timeout_s=5)
            except FactoryError as error:
                answer = f"{type(error).__name__}: {error.message}"
            best = min(best, time.monotonic() - started)
        slowest = max(slowest, best)
        went = ", ".join(dict.fromkeys(connected)) or "nobody"
        assert set(connected) <= {PUBLIC}, (name, connected)
        shown = url.replace("\r\n", "\\r\\n")
        shown = shown if len(shown) < 60 else shown[:20] + "…"
        lines.append(f"| {name} | `{shown}` | {answer.replace('|', '/')[:110]} | {1000 * best:.1f} | {went} |")
    return ["", "## Addresses", "", f"Slowest: {1000 * slowest:.0f} ms. Each was tried three times, the best counts.", "", *lines]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="file to write the table to as well")
    parser.add_argument("--only", default="", help="files with this in their name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [*files(cases(), Path(folder), args.only), *addresses(Path(folder))]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

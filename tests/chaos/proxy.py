"""A TCP proxy that breaks things on purpose: for any protocol, for PostgreSQL's COMMIT, and for S3's HTTP.

It runs in a thread of its own with an event loop of its own; what it does next is changed by assigning to its attributes.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"
_CHUNK = 1 << 16


class Proxy:
    """Forwards a port; breaks what passes.

    Args:
        port: Where to forward to, on loopback.
        rng: Decides; give it a seeded one.
        note: Told of each injection: (name, details).

    Attributes:
        delay_s: Wait before passing a piece of data on.
        blackhole: Take everything and pass nothing on.
        refuse: Reset new connections.
        counts: Injections so far, by name.
    """

    def __init__(self, port: int, rng: random.Random | None = None, note: Callable[..., None] | None = None) -> None:
        self.upstream = port
        self.rng = rng or random.Random(0)
        self.note = note or (lambda *_, **__: None)
        self.delay_s = 0.0
        self.blackhole = False
        self.refuse = False
        self.counts: Counter[str] = Counter()
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._guarded, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, name="proxy", daemon=True)
        self._thread.start()
        ready.wait(10)

    def struck(self, name: str, **data: object) -> None:
        """Count and note an injection."""
        self.counts[name] += 1
        self.note(name, **data)

    def reset_all(self) -> int:
        """Reset every open connection."""
        n = len(self._open) // 2
        self._loop.call_soon_threadsafe(lambda: [reset(w) for w in list(self._open)])
        self.struck("reset_all", connections=n)
        return n

    def close(self) -> None:
        """Stop."""

        async def end() -> None:
            self._server.close()
            for writer in list(self._open):
                reset(writer)
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(5)
        if not self._loop.is_running():
            self._loop.close()

    async def _guarded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            reset(writer)
            return
        upstream = None
        self._open.add(writer)
        try:
            up_reader, upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
            self._open.add(upstream)
            await self.serve(reader, writer, up_reader, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for one in (writer, upstream):
                if one is not None:
                    self._open.discard(one)
                    reset(one)

    async def serve(self, reader, writer, up_reader, upstream) -> None:
        """Forward both ways until one side ends."""
        tasks = [
            asyncio.ensure_future(self._pump(reader, upstream, self.to_server)),
            asyncio.ensure_future(self._pump(up_reader, writer, self.to_client)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, source, target, change) -> None:
        while data := await source.read(_CHUNK):
            if self.delay_s:
                await asyncio.sleep(self.delay_s * self.rng.random() * 2)
            while self.blackhole:
                await asyncio.sleep(0.05)
            data = await change(data, target)
            if data:
                target.write(data)
                await target.drain()

    async def to_server(self, data: bytes, target) -> bytes:
        """What of the client's data is passed on."""
        return data

    async def to_client(self, data: bytes, target) -> bytes:
        """What of the server's data is passed on."""
        return data




def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: the other side sees a broken connection, not an orderly end."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class PostgresProxy(Proxy):
    """Breaks COMMITs.

    Attributes:
        lose_answer: Share of COMMITs that take effect but whose answer never arrives.
        lose_commit: Share of COMMITs that never arrive.
    """

    lose_answer = 0.0
    lose_commit = 0.0

    async def serve(self, reader, writer, up_reader, upstream) -> None:
        """As `Proxy.serve`, with an eye on COMMIT."""
        doomed = asyncio.Event()

        async def up() -> None:
            while data := await reader.read(_CHUNK):
                while self.blackhole:
                    await asyncio.sleep(0.05)
                if data.endswith(COMMIT):
                    dice = self.rng.random()
                    if dice < self.lose_commit:
                        self.struck("commit_lost")
                        return
                    if dice < self.lose_commit + self.lose_answer:
                        doomed.set()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s * self.rng.random() * 2)
                upstream.write(data)
                await upstream.drain()

        async def down() -> None:
            while data := await up_reader.read(_CHUNK):
                if doomed.is_set():
                    # The server has answered, so the commit is done; nobody will hear of it.
                    self.struck("answer_lost")
                    return
                while self.blackhole:
                    await asyncio.sleep(0.05)
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class S3Proxy(Proxy):
    """Knows HTTP/1.1 well enough to break one request at a time.

    Attributes:
        shares: Name of the fault → probability for each request. ``500``, ``503``: answered without asking the server;
            ``hang``: no answer for ``hang_s``; ``cut``: half of the body, then a reset (of the answer where it has a body,
            else of the request); ``reset_after``: done by the server, but the answer is lost.
        limits: Name of the fault → most injections.
        hang_s: Length of a hang, seconds.
    """

    def __init__(self, *args, **kwargs) -> None:
        self.shares: dict[str, float] = {}
        self.limits: dict[str, int] = {}
        self.hang_s = 60.0
        super().__init__(*args, **kwargs)

    def _choose(self) -> str | None:
        dice = self.rng.random()
        for name, share in self.shares.items():
            if dice < share:
                return name if self.counts[name] < self.limits.get(name, 10**9) else None
            dice -= share
        return None

    async def serve(self, reader, writer, up_reader, upstream) -> None:
        """Request by request."""
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            fields = _fields(head)
            method = head.split(b" ", 1)[0].decode()
            if fields.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                head = b"\r\n".join(x for x in head.split(b"\r\n") if not x.lower().startswith(b"expect:"))
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            fault = self._choose()
            if fault:
                self.struck(fault, method=method)
            if fault in ("500", "503"):
                code = "InternalError" if fault == "500" else "SlowDown"
                text = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
                text = b"" if method == "HEAD" else text
                writer.write(f"HTTP/1.1 {fault} x\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
                await writer.drain()
                continue
            if fault == "hang":
                await asyncio.sleep(self.hang_s)
                return
            if fault == "cut" and method == "PUT":
                upstream.write(head + body[: len(body) // 2])
                await upstream.drain()
                return
            upstream.write(head + body)
            await upstream.drain()
            answer = await up_reader.readuntil(b"\r\n\r\n")
            status = int(answer.split(b" ", 2)[1])
            told = _fields(answer)
            if method == "HEAD" or status in (204, 304):
                content = b""
            elif told.get("transfer-encoding", "").lower() == "chunked":
                content = await _chunked(up_reader)
            else:
                content = await up_reader.readexactly(int(told.get("content-length", 0)))
            if fault == "reset_after":
                return
            if fault == "cut":
                writer.write(answer + content[: len(content) // 2])
                await writer.drain()
                return
            writer.write(answer + content)
            await writer.drain()


def _fields(head: bytes) -> dict[str, str]:
    out = {}
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            out[name.strip().lower()] = value.strip()
    return out


async def _chunked(reader: asyncio.StreamReader) -> bytes:
    raw = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        raw += line + await reader.readexactly(size + 2)
        if size == 0:
            return raw

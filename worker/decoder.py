"""The decoder: a process that reads untrusted media and can do little else. Its parent's side is `worker.confined`.

It gets open files over its socket, never a path, and answers with lines of JSON; pixels, samples and frames go into a file
that the parent opened. Before the first request it gives up everything that decoding does not need: it may open no file,
make no connection, start no process and signal nobody, and each request sets limits on memory, processor time and output.
"""

import ctypes
import json
import os
import platform
import resource
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, BinaryIO

from contentfactory.errors import InputError
from contentfactory.process import die_with_parent

MAX_LINE = 1 << 16
"""Longest line of JSON, bytes."""
IDLE_S = 600.0
"""Seconds without a request after which the process ends; the next request starts another one."""
MAX_OUTPUT = 1 << 36

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38  # EACCES, ENOSYS
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x10000

# System calls that are refused: files by name, sockets, other processes, namespaces, and ways around these. What is left
# works on memory and on the files that are open already. (audit architecture, numbers) by machine.
_X86_64 = (0xC000003E, {
    "clone": 56, "clone3": 435, "prlimit64": 302,
    "refused": (
        2, 257, 437, 85, 86, 265, 88, 266, 87, 263, 82, 264, 316, 83, 258, 84, 133, 259, 76, 90, 268, 452, 92, 94, 260, 89, 267,
        303, 304, 80, 165, 166, 155, 161, 41, 53, 42, 43, 288, 49, 50, 59, 322, 57, 58, 101, 310, 311, 62, 200, 234, 434, 424,
        438, 272, 308, 321, 425, 323, 298, 250, 248, 249, 175, 313, 176, 246, 29, 68, 64, 240,
    ),
})  # fmt: skip
_AARCH64 = (0xC00000B7, {
    "clone": 220, "clone3": 435, "prlimit64": 261,
    "refused": (
        56, 437, 37, 36, 35, 38, 276, 34, 33, 45, 53, 452, 54, 78, 264, 265, 49, 40, 39, 41, 51, 198, 199, 203, 202, 242, 200,
        201, 221, 281, 117, 270, 271, 129, 130, 131, 434, 424, 438, 97, 268, 280, 425, 282, 241, 219, 217, 218, 105, 273, 106,
        104, 194, 186, 190, 180,
    ),
})  # fmt: skip
_MACHINES: dict[str, tuple[int, dict[str, Any]]] = {"x86_64": _X86_64, "aarch64": _AARCH64}

Send = Callable[[dict[str, Any]], None]
Operation = Callable[[dict[str, Any], list[BinaryIO], "Session"], dict[str, Any]]


class Session:
    """The socket to the parent.

    Args:
        connection: A connected unix socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._last = time.monotonic()
        self._cpu_s = 0
        self._memory = _open_memory()

    def send(self, message: dict[str, Any]) -> None:
        """Send a line."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None) -> tuple[dict[str, Any], list[BinaryIO]] | None:
        """The next line and the files that came with it; None where the parent has gone or is silent for too long."""
        self._socket.settimeout(timeout_s)
        data, handles = b"", []
        try:
            while not data.endswith(b"\n"):
                part, found, _, _ = socket.recv_fds(self._socket, MAX_LINE, 4)
                handles.extend(found)
                if not part:
                    return None
                data += part
        except TimeoutError:
            return None
        return json.loads(data), [os.fdopen(handle, "r+b" if n else "rb", buffering=0 if n else -1) for n, handle in enumerate(handles)]

    def beat(self) -> None:
        """A sign of life, twice a second at most."""
        at = time.monotonic()
        if at - self._last > 0.5:
            self._last = at
            self.send({"beat": True})

    def limit(self, memory_mb: int, cpu_s: int, output_mb: int) -> None:
        """Set the limits of a request, on top of what the process uses already.

        Args:
            memory_mb: Address space, megabytes.
            cpu_s: Processor time, seconds.
            output_mb: Longest output file, megabytes.
        """
        self._cpu_s = cpu_s
        if self._memory is not None:
            pages = int(os.pread(self._memory, 64, 0).split()[0])
            _soft(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_mb * 2**20)
        _soft(resource.RLIMIT_FSIZE, output_mb * 2**20)
        self.more_time()

    def more_time(self) -> None:
        """Let the processor time of a request run anew: the next part of a stream was asked for."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        _soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + self._cpu_s + 1)


def _open_memory() -> int | None:
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # no Linux: memory stays without a limit


def _soft(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(kind, (value, hard))
    except (ValueError, OSError):
        pass  # macOS refuses some of them


def lock() -> list[str]:
    """Give up what decoding does not need; returns the layers that this system has.

    Nothing can be imported afterwards.
    """
    layers = ["limits"]
    try:
        with open("/proc/self/oom_score_adj", "w") as out:
            out.write("1000")  # where memory runs out, this process goes and not the worker
    except OSError:
        pass
    for kind, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_FSIZE, MAX_OUTPUT)):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            continue
    if sys.platform != "linux":
        return layers
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return layers
    layers.append("no_new_privs")
    program = _filter(platform.machine())
    if program is None:
        return layers

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    code = ctypes.create_string_buffer(program, len(program))
    wanted = Program(len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(wanted), 0, 0) == 0:
        layers.append("seccomp")
    return layers


def _filter(machine: str) -> bytes | None:
    """The system call filter (classic BPF over ``struct seccomp_data``) for a machine; None for one that is not known."""
    if machine not in _MACHINES or sys.byteorder != "little" or struct.calcsize("P") != 8:
        return None
    architecture, numbers = _MACHINES[machine]
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    # The second set of calls of x86-64, with 32-bit pointers, has numbers from here on.
    code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]
    for number in numbers["refused"]:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    # glibc tries clone3 first, whose flags lie in memory, out of a filter's sight; then clone: threads only.
    code += [(_EQUAL, 0, 1, numbers["clone3"]), (_RETURN, 0, 0, _UNKNOWN)]
    code += [(_EQUAL, 0, 4, numbers["clone"]), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW)]
    code += [(_RETURN, 0, 0, _REFUSE)]
    # Its own limits only, not those of other processes.
    code += [(_EQUAL, 0, 3, numbers["prlimit64"]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE)]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *one) for one in code)


# What it can do. Importing the libraries is part of it: once locked, the process cannot open their files any more.


def image_operations() -> dict[str, Operation]:
    """Pictures, and archives of pictures."""
    import encodings.ascii
    import encodings.cp437
    import encodings.latin_1
    import encodings.utf_8_sig  # noqa: F401

    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        MpoImagePlugin,
        PngImagePlugin,
        WebPImagePlugin,
    )

    from worker.media.image import FORMATS, decode_image, encode
    from worker.training import data

    plugins = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)

    def open_image(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        picture = decode_image(files[0].read(), **args)
        rows = max(1, 2**22 // max(1, picture.width * len(picture.getbands())))
        for top in range(0, picture.height, rows):
            band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
            _write(files[1], band.tobytes())
        return {"mode": picture.mode, "size": picture.size}

    def read_dataset(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        source, out, spare, notes = files
        count = 0
        lines = []
        with data.open_archive(source, spare, args["name"]) as (archive, prefix):
            for record, picture in data.read_pictures(archive, prefix, args["resolution"]):
                session.beat()
                _write(out, picture.data)
                session.more_time()
                lines.append(json.dumps(record))
                count += 1
            found = data.digest_of(archive, prefix, session.beat)
        notes_text = "\n".join(lines).encode()
        _write(notes, notes_text)
        return {"count": count, "notes": len(notes_text), "digest": found}

    # A first picture of each kind: the libraries' own late imports happen now.
    from PIL import Image

    for format_ in ("png", "jpeg", "webp"):
        decode_image(encode(Image.new("RGBA", (2, 2)), format_), "", max_pixels=9, min_side=1, mode="keep", field="")  # type: ignore[arg-type]
    if len(plugins) <= len(FORMATS):
        raise RuntimeError("a format without its plugin")
    return {"image": open_image, "dataset": read_dataset}


def av_operations() -> dict[str, Operation]:
    """Sound and video."""
    import av.logging
    import numpy as np

    from worker.media import audio, video

    av.logging.set_level(av.logging.PANIC)

    def probe_audio(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        return asdict(audio.probe(files[0], **args))

    def decode_audio(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        rate = samples = channels = 0
        for rate, piece in audio.decode_pieces(files[0], **args):  # noqa: B007 (told below)
            session.beat()
            channels, samples = piece.shape[0], samples + piece.shape[1]
            _write(files[1], np.ascontiguousarray(piece.T).data)
        return {"sample_rate": rate, "samples": samples, "channels": channels}

    def probe_video(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        return asdict(video.probe(files[0], **args))

    def frames(args: dict[str, Any], files: list[BinaryIO], session: Session) -> dict[str, Any]:
        for at, frame in video.frames(files[0], **args):
            files[1].seek(0)
            _write(files[1], np.ascontiguousarray(frame).data)
            session.send({"at": at, "shape": frame.shape})
            answer = session.receive(None)
            if answer is None:
                raise SystemExit
            if answer[0].get("stop"):
                break
            session.more_time()
        return {}

    # A first clip and sound: the libraries' own late imports happen now.
    _warm_up(audio, video)
    return {"probe_audio": probe_audio, "decode_audio": decode_audio, "probe_video": probe_video, "frames": frames}


def _warm_up(audio: Any, video: Any) -> None:
    import io
    import wave

    sound = io.BytesIO()
    with wave.open(sound, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(1600))
    list(audio.decode_pieces(sound.getvalue(), max_seconds=1, sample_rate=16_000))
    # A GIF of one grey pixel: container, decoder and colour conversion in 35 bytes.
    gif = b"GIF89a\1\0\1\0\x80\0\0\x80\x80\x80\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"
    list(video.frames(io.BytesIO(gif)))


FAMILIES: dict[str, Callable[[], dict[str, Operation]]] = {"image": image_operations, "av": av_operations}


def _write(out: BinaryIO, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[out.write(view) :]


def serve(family: str, parent: int) -> None:
    """Entry point: load a family of operations, lock, answer requests until the parent hangs up.

    Args:
        family: A key of `FAMILIES`.
        parent: Process that this one must not outlive.
    """
    die_with_parent(parent)
    warnings.simplefilter("ignore")
    session = Session(socket.socket(fileno=os.dup(0)))
    try:
        operations = FAMILIES[family]()
        layers = lock()
    except Exception as error:
        session.send({"fatal": f"{type(error).__name__}: {error}"[:1000]})
        return
    session.send({"ready": layers})
    while (request := session.receive(IDLE_S)) is not None:
        message, files = request
        try:
            session.limit(message["memory_mb"], message["cpu_s"], message["output_mb"])
            answer = {"done": operations[message["op"]](message["args"], files, session)}
        except InputError as error:
            answer = {"error": "input", "message": error.message[:2000], "code": error.code, "param": error.param}
        except MemoryError:
            answer = {"error": "memory"}
        except Exception as error:
            kind = "dataset" if type(error).__name__ == "DatasetError" else "other"
            answer = {"error": kind, "message": f"{'' if kind == 'dataset' else type(error).__name__ + ': '}{error}"[:2000]}
        finally:
            for file in files:
                file.close()
        session.send(answer)

"""Decoding of untrusted media in a confined child process: the worker's side. The child's side is `worker.decoder`.

A worker keeps one such child a family (pictures and archives; sound and video), started when the first untrusted input comes.
What the child may do, and what happens when it dies, is told in docs/decisions/0009-confined-decoding.md. Each function
here has its counterpart in ``worker.media`` or ``worker.training``, which calls it for inputs that no job of this factory made.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import structlog

from contentfactory.errors import InputError, TransientError
from worker.input_file import InputFile

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from worker.media.audio import AudioBuffer, AudioInfo
    from worker.media.video import Frame, VideoInfo

log = structlog.get_logger(__name__)

START_S = 60.0
"""Longest start of a child, seconds: a loaded machine imports slowly."""
RECYCLE = 500
"""Requests after which a child is replaced by a fresh one."""
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "FACTORY_SUPERVISED")
_MAX_ANSWER = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Args:
        memory_mb: Address space on top of the child's own, megabytes.
        quiet_s: Seconds without a sign of life, and processor seconds.
        total_s: Seconds altogether.
        output_mb: Longest result, megabytes.
    """

    memory_mb: int
    quiet_s: float
    total_s: float
    output_mb: int = 1


class DecoderDied(Exception):
    """The child ended instead of answering."""


class Decoder:
    """One child process.

    Args:
        family: Which operations it loads: ``image`` or ``av``.
        code: Python source that starts it, in place of the usual entry point; for tests.
    """

    def __init__(self, family: str, code: str | None = None) -> None:
        self.family = family
        self.requests = 0
        self._data = b""
        ours, theirs = socket.socketpair()
        entry = code or "from worker.decoder import serve"
        # -I: no PYTHON* variables, no user's site, not the working directory. The path is handed over as it is here.
        source = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {entry}; serve(sys.argv[2], int(sys.argv[3]))"
        paths = [os.path.abspath(path or ".") for path in sys.path]
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", source, json.dumps(paths), family, str(os.getpid())],
                stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tempfile.gettempdir(),
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise TransientError(f"the decoder does not start: {error}", code="decoder") from None
        finally:
            theirs.close()
        self._socket = ours
        try:
            hello = self.receive(START_S)
        except (DecoderDied, TimeoutError) as error:
            self.close()
            raise TransientError(f"the decoder does not start: {error or 'no answer'}", code="decoder") from None
        if "ready" not in hello:
            self.close()
            raise TransientError(f"the decoder does not start: {hello.get('fatal')}", code="decoder")
        self.layers: list[str] = hello["ready"]
        log.info("decoder_started", action="start", family=family, pid=self.pid, layers=",".join(self.layers))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, message: dict[str, Any], files: Sequence[BinaryIO] = ()) -> None:
        """Send a line and open files.

        Raises:
            DecoderDied: If nobody listens.
        """
        self._socket.settimeout(10.0)
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode() + b"\n"], [file.fileno() for file in files])
        except OSError:
            raise DecoderDied(self._how()) from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next line.

        Raises:
            DecoderDied: If the process ended, or sent what no decoder sends.
            TimeoutError: If none came in time.
        """
        end = time.monotonic() + timeout_s
        while b"\n" not in self._data:
            if len(self._data) > _MAX_ANSWER:
                raise DecoderDied("it sent nonsense")
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                part = b""
            if not part:
                raise DecoderDied(self._how())
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise DecoderDied("it sent nonsense")
        return message

    def _how(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


class _Pool:
    """The children of this process: one idle a family at most; as many more as streams are open at once."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._idle: dict[str, Decoder] = {}
        # The kernel kills a child once the thread that started it has ended, so one lasting thread starts them all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def take(self, family: str) -> Decoder:
        with self._lock:
            decoder = self._idle.pop(family, None)
        if decoder is not None:
            if decoder.alive:
                return decoder
            decoder.close()
        return self._starter.submit(Decoder, family).result()

    def give(self, decoder: Decoder) -> None:
        decoder.requests += 1
        with self._lock:
            if decoder.requests < RECYCLE and decoder.family not in self._idle:
                self._idle[decoder.family] = decoder
                return
        decoder.close()

    def idle(self) -> dict[str, Decoder]:
        with self._lock:
            return dict(self._idle)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = list(self._idle.values()), {}
        for decoder in idle:
            decoder.close()


_current: _Pool | None = None
_current_lock = threading.Lock()


def _pool() -> _Pool:
    global _current
    with _current_lock:
        if _current is None or _current.owner != os.getpid():  # a fork must not share its parent's sockets
            _current = _Pool()
        return _current


def close() -> None:
    """End this process's children; the next untrusted input starts new ones."""
    if _current is not None and _current.owner == os.getpid():
        _current.close()


atexit.register(close)


def _refuse(answer: dict[str, Any], field: str, name: str, limits: Limits) -> Exception:
    """The child's error as one of ours."""
    kind, message = answer.get("error"), str(answer.get("message", ""))[:2000]
    if kind == "input":
        code, param = str(answer.get("code") or "")[:40], answer.get("param")
        return InputError(message, code=code or None, param=str(param)[:200] if param else None)
    if kind == "dataset":
        from worker.training.data import DatasetError

        return DatasetError(message)
    if kind == "memory":
        return InputError(
            f"{field}: {name} needs more than the {limits.memory_mb} MB that may be used to decode it", code="too_large", param=field
        )
    return InputError(f"{field}: {name} could not be decoded: {message}", code="bad_media", param=field)


def _died(error: DecoderDied, field: str, name: str) -> InputError:
    return InputError(f"{field}: {name} could not be decoded: the decoder was {error}" if "killed" in str(error) else
                      f"{field}: {name} could not be decoded: {error}", code="bad_media", param=field)  # fmt: skip


def _senseless(field: str, name: str) -> InputError:
    """Whoever took the child over may say anything."""
    return InputError(f"{field}: {name} could not be decoded: the decoder's answer makes no sense", code="bad_media", param=field)


def _late(field: str, name: str, seconds: float) -> InputError:
    return InputError(f"{field}: {name} could not be decoded within {seconds:g} s", code="bad_media", param=field)


def _begin(
    family: str, op: str, args: dict[str, Any], files: Sequence[BinaryIO], limits: Limits
) -> tuple[Decoder, dict[str, Any]]:
    """Send a request and wait for its first answer; gives the child, which the caller hands back or closes.

    A child that dies over it may have been killed from outside, or damaged by what it decoded before: a fresh one tries
    once more.

    Raises:
        DecoderDied: If the second one died, too.
        TimeoutError: If no answer came in time.
    """
    request = {
        "op": op, "args": args, "memory_mb": limits.memory_mb, "cpu_s": int(limits.quiet_s) + 1, "output_mb": limits.output_mb,
    }  # fmt: skip
    for last in (False, True):
        decoder = _pool().take(family)
        try:
            for n, file in enumerate(files):
                # Both sides share the place in the file, and the one that died had moved it.
                os.lseek(file.fileno(), 0, os.SEEK_SET)
                if n:
                    os.ftruncate(file.fileno(), 0)
            decoder.send(request, files)
            return decoder, decoder.receive(limits.quiet_s)
        except DecoderDied as error:
            decoder.close()
            log.warning("decoder_died", action="decode", family=family, op=op, how=str(error), again=not last)
            if last:
                raise
        except BaseException:
            decoder.close()
            raise
    raise AssertionError("unreachable")


def _run(
    family: str,
    op: str,
    args: dict[str, Any],
    files: Sequence[BinaryIO],
    limits: Limits,
    *,
    field: str,
    name: str,
    beat: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """One request from beginning to end; its result."""
    end = time.monotonic() + limits.total_s
    decoder: Decoder | None = None
    try:
        decoder, answer = _begin(family, op, args, files, limits)
        while answer.get("beat"):
            if beat is not None:
                beat()
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            answer = decoder.receive(min(limits.quiet_s, left))
    except DecoderDied as error:
        raise _died(error, field, name) from None
    except TimeoutError:
        log.warning("decoder_late", action="decode", family=family, op=op)
        raise _late(field, name, limits.total_s if time.monotonic() >= end else limits.quiet_s) from None
    else:
        # What did not end in a clean answer leaves a process behind that nobody should go on with.
        if answer.get("error") in ("input", "dataset") or "done" in answer:
            _pool().give(decoder)
            decoder = None
    finally:
        if decoder is not None:
            decoder.close()
    if "done" not in answer:
        raise _refuse(answer, field, name, limits)
    if not isinstance(answer["done"], dict):
        raise _senseless(field, name)
    return answer["done"]


@contextlib.contextmanager
def _output(folder: Any = None) -> Iterator[BinaryIO]:
    """A file for a result, without a name: in memory, or in a folder where it may become large."""
    if folder is None and hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("decoded", os.MFD_CLOEXEC), "w+b", buffering=0) as out:
            yield out
    else:
        with tempfile.TemporaryFile(buffering=0, dir=folder) as out:
            yield out  # type: ignore[misc]


def _fill(out: BinaryIO, target: Any, start: int = 0) -> Any:
    """Read a result. It is not mapped: a child could shorten the file under the worker's hands."""
    view = memoryview(target).cast("B")
    out.seek(start)
    while view:
        got = out.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise InputError("the decoder's result is shorter than it said", code="bad_media")
        view = view[got:]
    return target


def _numbers(answer: dict[str, Any], **most: int) -> list[int]:
    """Fields of an answer that must be whole numbers within bounds."""
    found = []
    for name, limit in most.items():
        value = answer.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
            raise InputError(f"the decoder's answer has {name} {str(value)[:40]}; allowed: 0 to {limit}", code="bad_media")
        found.append(value)
    return found


def open_image(
    file: InputFile, *, name: str, max_pixels: int, min_side: int, mode: str, field: str
) -> "Image.Image":
    """See `worker.media.image.open_image`."""
    from PIL import Image

    pixels = min(max_pixels, 200_000_000)
    # A picture is held about six times over while its orientation, colours and transparency are put right.
    limits = Limits(256 + 24 * pixels // 10**6, 30.0, 60.0, output_mb=8 + 4 * pixels // 2**20)
    args = {"name": name, "max_pixels": max_pixels, "min_side": min_side, "mode": mode, "field": field}
    with file.open() as source, _output() as out:
        answer = _run("image", "image", args, [source, out], limits, field=field, name=name)
        size = answer.get("size")
        if not isinstance(size, list) or len(size) != 2 or answer.get("mode") not in ("RGB", "RGBA", "L"):
            raise _senseless(field, name)
        width, height = _numbers({"width": size[0], "height": size[1]}, width=max_pixels, height=max_pixels)
        if not 0 < width * height <= max_pixels:
            raise _senseless(field, name)
        got, row = str(answer["mode"]), width * len(answer["mode"])
        rows = min(height, max(1, 2**24 // row))
        bands = (
            Image.frombytes(got, (width, n), _fill(out, bytearray(n * row), top * row))
            for top in range(0, height, rows)
            if (n := min(rows, height - top))
        )
        if rows == height:
            return next(bands)
        # In bands: a large picture is held here once, not twice.
        picture = Image.new(got, (width, height))
        for index, band in enumerate(bands):
            picture.paste(band, (0, index * rows))
    return picture


def read_dataset(
    file: InputFile, resolution: int, beat: Callable[[], None] | None = None
) -> "tuple[np.ndarray[Any, Any], list[dict[str, Any]], str]":
    """See `worker.training.data.PictureDataset.load`: pictures, what the lines say, digest."""
    import numpy as np

    from worker.training.data import DatasetError, check_line

    name = file.name or file.path.name
    limits = Limits(2048, 60.0, 6 * 3600.0, output_mb=32_768)
    folder = file.path.parent
    with file.open() as source, _output(folder) as out, _output(folder) as spare, _output(folder) as notes:
        args = {"name": name, "resolution": resolution}
        answer = _run("image", "dataset", args, [source, out, spare, notes], limits, field="dataset", name=name, beat=beat)
        count, length = _numbers(answer, count=10**6, notes=2**31)
        if count * resolution * resolution * 4 > limits.output_mb * 2**20:
            raise DatasetError(f"{name}: {count} pictures of {resolution}×{resolution} are more than fit into memory")
        pictures = np.empty((count, resolution, resolution, 4), np.uint8)
        _fill(out, pictures)
        lines = bytes(_fill(notes, bytearray(length))).decode("utf-8", "replace").split("\n")
    if len(lines) != count:
        raise _senseless("dataset", name)
    return pictures, [check_line(line, name) for line in lines], str(answer.get("digest"))[:64]


_PROBE = Limits(1024, 10.0, 20.0)


def probe_audio(file: InputFile, *, name: str) -> "AudioInfo":
    """See `worker.media.audio.probe`."""
    from worker.media.audio import AudioInfo

    with file.open() as source:
        answer = _run("av", "probe_audio", {"name": name}, [source], _PROBE, field=name, name=file.name or "the file")
    try:
        return AudioInfo(**answer)
    except TypeError:
        raise _senseless(name, file.name or "the file") from None


def probe_video(file: InputFile, *, name: str) -> "VideoInfo":
    """See `worker.media.video.probe`."""
    from worker.media.video import VideoInfo

    with file.open() as source:
        answer = _run("av", "probe_video", {"name": name}, [source], _PROBE, field=name, name=file.name or "the file")
    try:
        return VideoInfo(**{**answer, "colour": tuple(answer["colour"])})
    except (TypeError, KeyError):
        raise _senseless(name, file.name or "the file") from None


def decode_audio(
    file: InputFile, *, max_seconds: float, sample_rate: int | None, mono: bool, name: str
) -> "AudioBuffer":
    """See `worker.media.audio.decode`."""
    import numpy as np

    from worker.media.audio import MAX_SAMPLE_RATE, AudioBuffer

    # Samples leave the child as they are made; 2 channels of 4 bytes at most.
    most = int((max_seconds + 1) * (sample_rate or MAX_SAMPLE_RATE))
    limits = Limits(768, 20.0, 60.0 + max_seconds / 10, output_mb=1 + most * 8 // 2**20)
    args = {"max_seconds": max_seconds, "sample_rate": sample_rate, "mono": mono, "name": name}
    # Minutes fit into memory twice; an hour or two of sound does not have to.
    folder = file.path.parent if limits.output_mb > 512 else None
    with file.open() as source, _output(folder) as out:
        answer = _run("av", "decode_audio", args, [source, out], limits, field=name, name=file.name or "the file")
        rate, samples, channels = _numbers(answer, sample_rate=MAX_SAMPLE_RATE, samples=most, channels=2)
        if not rate or not samples or not channels:
            raise InputError(f"{name} holds no sound", code="bad_media")
        data = _fill(out, np.empty((samples, channels), np.float32))
    return AudioBuffer(np.ascontiguousarray(data.T), rate)


def frames(file: InputFile, *, name: str, **options: Any) -> "Iterator[tuple[float, Frame]]":
    """See `worker.media.video.frames`."""
    import numpy as np

    from worker.media.video import MAX_FRAME_PIXELS, MAX_SIDE

    shown = file.name or "the file"
    limits = Limits(3072, 30.0, 30.0, output_mb=MAX_FRAME_PIXELS * 3 // 2**20 + 1)
    decoder: Decoder | None = None
    with file.open() as source, _output() as out:
        try:
            decoder, answer = _begin("av", "frames", {"name": name, **options}, [source, out], limits)
            while "at" in answer:
                shape = answer.get("shape")
                at = answer["at"]
                if not isinstance(shape, list) or len(shape) != 3 or not isinstance(at, float | int):
                    raise _senseless(name, shown)
                height, width = _numbers({"height": shape[0], "width": shape[1]}, height=MAX_SIDE, width=MAX_SIDE)
                frame = _fill(out, np.empty((height, width, 3), np.uint8))
                try:
                    yield float(at), frame
                except GeneratorExit:
                    decoder.send({"stop": True})
                    answer = decoder.receive(2.0)
                    raise
                decoder.send({})
                answer = decoder.receive(limits.quiet_s)
        except DecoderDied as error:
            log.warning("decoder_died", action="decode", family="av", op="frames", how=str(error), again=False)
            raise _died(error, name, shown) from None
        except TimeoutError:
            raise _late(name, shown, limits.quiet_s) from None
        finally:
            if decoder is not None:
                if "done" in answer or answer.get("error") == "input":
                    _pool().give(decoder)
                else:
                    decoder.close()
        if "done" not in answer:
            raise _refuse(answer, name, shown, limits)


__all__ = ["Decoder", "DecoderDied", "Limits", "close", "decode_audio", "frames", "open_image", "probe_audio", "probe_video", "read_dataset"]

"""The confined decoder: what it can do, what it cannot, and what becomes of those who wait for it when it dies."""

import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
import wave

import numpy as np
import psutil
import pytest
from PIL import Image

from contentfactory.errors import InputError, TransientError
from worker import confined
from worker.context import InputFile
from worker.media import audio, video
from worker.media.image import open_image
from worker.media.sniff import sniff_bytes

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what the system cannot do there is told in the decision")


def noise(mode="RGB", size=(160, 120), seed=1):
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    coarse = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    return Image.fromarray(coarse, mode if mode != "LA" else None)


@pytest.fixture
def saved(tmp_path):
    """Save a picture, or write bytes; gives them as an input of an outsider."""

    def save(content, format_="PNG", **options):
        path = tmp_path / f"input-{time.monotonic_ns()}"
        if isinstance(content, Image.Image):
            content.save(path, format_, **options)
        else:
            path.write_bytes(content)
        return InputFile(path, "application/octet-stream", "holiday")

    return save


def wav(seconds=2.0, rate=16_000, channels=2):
    out = io.BytesIO()
    samples = (np.sin(np.arange(int(seconds * rate) * channels) / 9) * 9000).astype("<i2")
    with wave.open(out, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return out.getvalue()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with video.ClipWriter(path, 64, 48, 10, sample_rate=16_000, channels=1) as out:
        for n in range(20):
            out.write(np.full((48, 64, 3), n * 12, np.uint8))
        out.write_audio(np.sin(np.arange(32_000, dtype=np.float32) / 9)[None] * np.float32(0.3))
    return path


# The same as in this process


@pytest.mark.parametrize("mode", ["keep", "RGB", "RGBA", "L"])
def test_pictures_are_the_same(saved, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        saved(noise()), saved(noise(), "JPEG", exif=exif, progressive=True), saved(noise("RGBA"), "WEBP"), saved(noise("L"), "BMP"),
        saved(noise().quantize(9), "GIF"), saved(noise("RGBA"), "PNG"), saved(noise().convert("CMYK"), "JPEG"),
        saved(Image.fromarray(np.arange(9600, dtype=np.uint16).reshape(80, 120) * 6), "PNG"), saved(noise().quantize(9), "PNG", transparency=3), saved(noise("LA"), "PNG"), saved(noise(size=(2600, 2700))),
    ]  # fmt: skip
    for file in files:
        ours, theirs = open_image(file.path, mode=mode), open_image(file, mode=mode)
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
        assert ours.tobytes() == theirs.tobytes()
        theirs.paste(0, (0, 0, 4, 4))  # it can be worked on


def test_errors_are_the_same(saved):
    for file, options in (
        (saved(noise()), {"max_pixels": 100}), (saved(noise()), {"min_side": 500}), (saved(b"\x89PNG\r\n\x1a\n rubbish"), {}),
        (saved(b""), {}), (saved(noise().tobytes()), {"field": "scenes.1.image"}),
    ):  # fmt: skip
        ours = InputFile(file.path, file.media_type, file.name, trusted=True)
        with pytest.raises(InputError) as expected:
            open_image(ours, **options)
        with pytest.raises(InputError) as found:
            open_image(file, **options)
        assert found.value.to_dict() == expected.value.to_dict()
        assert "holiday" in found.value.message


@pytest.mark.parametrize("options", [{}, {"sample_rate": 22_050, "mono": True}])
def test_sounds_are_the_same(saved, clip, options):
    for file in (saved(wav()), InputFile(clip, "video/mp4")):
        ours, theirs = audio.decode(file.path, max_seconds=5, **options), audio.decode(file, max_seconds=5, **options)
        assert (ours.sample_rate, ours.samples.shape) == (theirs.sample_rate, theirs.samples.shape)
        assert np.array_equal(ours.samples, theirs.samples)
        theirs.samples[:] = 0
        assert audio.probe(file) == audio.probe(file.path)


def test_frames_are_the_same(clip):
    file = InputFile(clip, "video/mp4")
    assert video.probe(file) == video.probe(clip)
    options = {"every": 3, "start_s": 0.5, "end_s": 1.7}
    ours, theirs = list(video.frames(clip, **options)), list(video.frames(file, **options))
    assert [at for at, _ in ours] == [at for at, _ in theirs]
    assert len(ours) == 4
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_streams_may_be_left_and_mixed(saved, clip):
    file = InputFile(clip, "video/mp4")
    first, second = video.frames(file), video.frames(file)
    next(first)
    next(second)
    open_image(saved(noise()))
    assert audio.decode(file, max_seconds=5).duration_s == pytest.approx(2, abs=0.1)
    assert next(first)[0] == next(second)[0] == pytest.approx(0.1)
    pids = {p.pid for p in psutil.Process().children()}
    first.close()
    second.close()
    assert {p.pid for p in psutil.Process().children()} < pids, "only one idle child stays"
    assert len(list(video.frames(file))) == 20


# What it cannot do

PROBING = """
import os, socket, subprocess, threading
from worker import decoder

def tried(work):
    try:
        work()
    except BaseException as error:
        return type(error).__name__
    return "done"

def serve(family, parent):
    def everything(args, files, session):
        attempts = {
            "read": lambda: open(args["name"]),
            "write": lambda: open(args["name"] + ".escaped", "w"),
            "list": lambda: os.listdir("/"),
            "connect": lambda: socket.create_connection(("127.0.0.1", args["max_pixels"]), 1),
            "unix": lambda: socket.socket(socket.AF_UNIX),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "run": lambda: subprocess.run(["true"]),
            "exec": lambda: os.execv("/bin/true", ["true"]),
            "fork": lambda: os._exit(0) if os.fork() == 0 else None,
            "kill": lambda: os.kill(parent, 0),
            "limits of others": lambda: __import__("resource").prlimit(parent, 7, (5, 5)),
            "delete": lambda: os.unlink(args["name"]),
            "import": lambda: __import__("ftplib"),
            "environment": lambda: open(f"/proc/{parent}/environ"),
            "thread": lambda: threading.Thread(target=int).start(),
        }
        raise decoder.InputError(repr([{name: tried(work) for name, work in attempts.items()}, sorted(os.environ), os.getcwd()]))

    def hang(args, files, session):
        while True:
            pass

    def grow(args, files, session):
        kept = []
        while True:
            kept.append(bytearray(2**24))

    def write(args, files, session):
        while True:
            files[1].write(bytes(2**20))

    def nonsense(args, files, session):
        session._socket.sendall(args["mode"].encode() * args["max_pixels"] + b"\\n")
        raise SystemExit

    def lie(args, files, session):
        files[1].write(bytes(64))
        return [{"mode": "RGB", "size": [10**5, 10**5]}, {"mode": "RGB", "size": [-8, -8]}, {"mode": "CMYK", "size": [4, 4]},
                {"mode": "L", "size": [64, 64]}, {"mode": "L", "size": None}, {"mode": "L", "size": [True, 2]}][args["min_side"]]

    def half(args, files, session):
        files[0].read()
        os._exit(3)

    chosen = {"everything": everything, "hang": hang, "grow": grow, "write": write, "nonsense": nonsense, "lie": lie, "half": half}
    decoder.FAMILIES[family] = lambda: {"image": lambda args, *rest: chosen[args["field"]](args, *rest)}
    decoder.serve(family, parent)
"""


@pytest.fixture
def probing(tmp_path, monkeypatch):
    """A decoder whose operation is chosen by the field's name."""
    (tmp_path / "probing_decoder.py").write_text(PROBING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FACTORY_DATABASE_URL", "postgresql://factory:secret@db/factory")
    monkeypatch.setattr(confined, "Decoder", functools.partial(confined.Decoder, code="from probing_decoder import serve"))
    confined.close()
    yield
    confined.close()


def ask(file, **changes):
    args = {"name": str(file.path), "max_pixels": 10**6, "min_side": 1, "mode": "keep", "field": "everything"}
    return confined.open_image(file, **{**args, **changes})


@LINUX
def test_it_reaches_nothing_but_its_own_files(probing, saved):
    import ast
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(InputError) as told:
        ask(saved(noise()), max_pixels=server.getsockname()[1])
    attempts, environment, folder = ast.literal_eval(told.value.message)
    assert attempts.pop("thread") == "done", "libraries may have threads"
    assert set(attempts.values()) <= {"PermissionError", "ModuleNotFoundError", "ImportError"}, attempts
    assert set(environment) <= {*confined._KEPT_ENVIRONMENT, "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX", "LC_CTYPE"}
    assert not folder.startswith(os.getcwd())
    child = psutil.Process(confined._pool().idle()["image"].pid)
    assert {"seccomp", "no_new_privs", "limits"} <= set(confined._pool().idle()["image"].layers)
    assert not any("secret" in value for value in child.environ().values())
    assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)


@LINUX
def test_memory_is_bounded(probing, saved):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"grow: .* needs more than the 280 MB"):
        ask(saved(noise()), field="grow")
    assert time.monotonic() - started < 10


def test_output_is_bounded(probing, saved):
    with pytest.raises(InputError, match="could not be decoded"):
        ask(saved(noise()), field="write")


def test_time_is_bounded(probing, saved, monkeypatch):
    whole = confined.Limits
    monkeypatch.setattr(confined, "Limits", lambda memory, *_, **rest: whole(memory, 0.3, 0.3, **rest))
    with pytest.raises(InputError, match=r"hang: .* could not be decoded within 0\.3 s") as told:
        ask(saved(noise()), field="hang")
    assert told.value.code == "bad_media"
    assert confined._pool().idle() == {}, "who hangs is not asked again"


@pytest.mark.parametrize("lie", range(6))
def test_its_answers_are_not_believed(probing, saved, lie):
    with pytest.raises(InputError, match=r"the decoder's (answer|result)"):
        ask(saved(noise()), field="lie", min_side=lie)


@pytest.mark.parametrize(("line", "times"), [("[]", 1), ("{", 1), ("x", 3_000_000), ("[", 100_000)])
def test_its_lines_are_not_believed(probing, saved, line, times):
    with pytest.raises(InputError, match="could not be decoded: it sent nonsense"):
        ask(saved(noise()), field="nonsense", mode=line, max_pixels=times)


# When it dies


def test_a_death_is_one_input_s_error(probing, saved):
    with pytest.raises(InputError, match=r"half: .* could not be decoded: it ended with status 3") as told:
        ask(saved(noise()), field="half")
    assert told.value.param == "half"
    with pytest.raises(InputError, match="read"):
        ask(saved(noise()))  # the next one is answered by a fresh child


def test_one_killed_while_idle_is_replaced(saved):
    file = saved(noise())
    open_image(file)
    first = confined._pool().idle()["image"].pid
    os.kill(first, signal.SIGKILL)
    assert open_image(file).size == (160, 120)
    assert confined._pool().idle()["image"].pid != first
    assert not psutil.pid_exists(first), "no zombie is left"


def test_one_killed_at_work_is_tried_once_more(saved, monkeypatch):
    file = saved(noise())
    open_image(file)
    child = confined._pool().idle()["image"]
    send = child.send

    def send_and_die(*args):
        os.kill(child.pid, signal.SIGSTOP)
        send(*args)
        os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(child, "send", send_and_die)
    assert open_image(file).tobytes() == open_image(file.path).tobytes()


def test_a_stream_that_dies_is_an_error(clip):
    confined.close()  # none is idle: the stream starts its own
    others = {child.pid for child in psutil.Process().children()}  # servers of other tests, say
    stream = video.frames(InputFile(clip, "video/mp4", "clip.mp4"))
    next(stream)
    for child in psutil.Process().children():
        if child.pid not in others:
            child.kill()
    with pytest.raises(InputError, match=r"clip\.mp4 could not be decoded: the decoder was killed by SIGKILL"):
        next(stream)


def test_one_that_cannot_start_is_nobody_s_fault(saved, monkeypatch):
    confined.close()
    monkeypatch.setattr(confined, "Decoder", functools.partial(confined.Decoder, code="import nothing_of_this_name"))
    with pytest.raises(TransientError, match="does not start"):
        open_image(saved(noise()))


def test_it_is_recycled(saved, monkeypatch):
    file = saved(noise())
    open_image(file)
    monkeypatch.setattr(confined, "RECYCLE", confined._pool().idle()["image"].requests + 1)
    open_image(file)
    assert "image" not in confined._pool().idle()


def test_threads_have_one_each(saved):
    file = saved(noise())
    found = []
    threads = [threading.Thread(target=lambda: found.extend(open_image(file).size for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(160, 120)] * 9
    # The thread that asked first has ended, and its child lives on.
    first = confined._pool().idle()["image"].pid
    open_image(file)
    assert confined._pool().idle()["image"].pid == first


PARENT = """
import os, signal, sys, time
from pathlib import Path
from worker import confined
from worker.context import InputFile
from worker.media.image import open_image
open_image(InputFile(Path(sys.argv[1]), ""))
print(confined._pool().idle()["image"].pid, flush=True)
time.sleep(60)
"""


def test_it_never_outlives_its_worker(saved):
    command = [sys.executable, "-c", PARENT, str(saved(noise()).path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as parent:
        child = psutil.Process(next(int(line) for line in parent.stdout if line.strip().isdigit()))
        parent.kill()
        child.wait(5)
    assert not child.is_running()


def test_it_is_no_great_detour(saved):
    """A picture through the child costs some milliseconds more than here; the figures are in the decision."""
    file = saved(noise(size=(512, 512)))

    def best(source):
        times = []
        for _ in range(9):
            started = time.perf_counter()
            open_image(source)
            times.append(time.perf_counter() - started)
        return min(times)

    best(file)
    assert best(file) - best(file.path) < 0.05


@pytest.mark.parametrize(
    ("data", "media_type"),
    [(b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff\xe0", "image/jpeg"), (b"RIFF1234WEBP", "image/webp"), (b"RIFF1234WAVE", "audio/wav"),
     (b"\0\0\0\x18ftypmp42", "video/mp4"), (b"\0\0\0\x18ftypM4A ", "audio/mp4"), (b"\0\0\0\x18ftypavif", "image/avif"),
     (b"\x1aE\xdf\xa3\0\0webm", "video/webm"), (b"OggS" + bytes(40) + b"\x80theora", "video/ogg"), (b"OggS\0\2", "audio/ogg"),
     (b"ID3\4", "audio/mpeg"), (b"\xff\xfb\x90\x44", "audio/mpeg"), (b"\xff\xf1\x50\x80", "audio/aac"), (b"fLaC", "audio/flac"),
     (b"PK\3\4", "application/zip"), (bytes(257) + b"ustar\0", "application/x-tar"), (b"<?xml version='1.0'?>\n<svg>", "image/svg+xml"),
     (b"<!-- a --><!-- b -->\n<html>", "text/html"), (b"#EXTM3U", "application/vnd.apple.mpegurl"), (b"WEBVTT\n", "text/vtt"),
     (b'[{"start": 0}]', "application/json"), ("Grüße".encode(), "text/plain"), (b"\0\1\2", "application/octet-stream"),
     (b"", "application/octet-stream"), (b"<!---->" * 580, "text/plain"), (("ü" * 3000).encode()[:4095], "text/plain")],
)  # fmt: skip
def test_what_a_file_is(data, media_type):
    assert sniff_bytes(data) == media_type

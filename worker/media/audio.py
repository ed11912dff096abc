"""Audio in and out: safe decoding, resampling, loudness, ducking, encoding.

Everything works on an `AudioBuffer`: float32 samples of shape ``(channels, n)``, nominally in ``[-1, 1]``. Decoding
believes nothing about a file: containers and codecs come from a list, nothing that refers to other files is opened, and
seconds × sample rate × channels are bounded before and while samples are made.
"""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
import numpy.typing as npt
import scipy

from contentfactory.errors import InputError
from worker.input_file import InputFile
from worker.media.mp4 import check_index

Samples = npt.NDArray[np.float32]

CONTAINERS = (
    "wav", "w64", "aiff", "flac", "mp3", "ogg", "aac", "mov", "matroska", "avi", "mpegts", "caf", "au", "amr", "asf",
)  # fmt: skip
"""Demuxers that may open a user's file. None of them follows a reference to another file."""

CODECS = (
    "pcm_", "mp3", "mp2", "flac", "opus", "libopus", "vorbis", "aac", "alac", "ac3", "eac3", "amr", "wma", "adpcm_",
)  # fmt: skip
"""Beginnings of the names of decoders that may run on a user's file."""

_GUESSED = ("aac", "mp3", "mpegts", "amr")
"""Containers whose length is only estimated from the bit rate, often wrongly; decoding itself keeps their bound."""

MAX_CHANNELS = 8
_MAX_BAD = 500
MAX_SAMPLE_RATE = 384_000
SILENCE_LUFS = -70.0
"""What `loudness` says of silence: the absolute gate of ITU-R BS.1770."""


@dataclass(frozen=True)
class AudioBuffer:
    """Decoded audio.

    Args:
        samples: float32, shape ``(channels, n)``, nominally in ``[-1, 1]``.
        sample_rate: Samples a second, Hz.
    """

    samples: Samples
    sample_rate: int

    def __post_init__(self) -> None:
        if self.samples.ndim != 2 or self.samples.dtype != np.float32:
            raise ValueError(
                f"samples are {self.samples.dtype} of shape {self.samples.shape}; wanted float32 (channels, n)"
            )
        if self.sample_rate <= 0:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be above 0")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.samples.shape[0])

    @property
    def duration_s(self) -> float:
        """Length, seconds."""
        return self.samples.shape[1] / self.sample_rate

    def mono(self) -> "AudioBuffer":
        """The mean of the channels."""
        if self.channels == 1:
            return self
        return AudioBuffer(self.samples.mean(axis=0, keepdims=True, dtype=np.float32), self.sample_rate)

    def fit(self, samples: int) -> "AudioBuffer":
        """Cut or padded with silence to exactly so many samples a channel."""
        have = self.samples.shape[1]
        if have >= samples:
            return AudioBuffer(self.samples[:, :samples], self.sample_rate)
        return AudioBuffer(np.pad(self.samples, ((0, 0), (0, samples - have))), self.sample_rate)


@dataclass(frozen=True)
class AudioInfo:
    """What a file says of itself; nothing is decoded for it.

    Args:
        container: Demuxer's name.
        codec: Decoder's name.
        sample_rate: Hz.
        channels: Number of channels.
        duration_s: Seconds, or None where the file does not say.
    """

    container: str
    codec: str
    sample_rate: int
    channels: int
    duration_s: float | None


class _Nameless(io.RawIOBase):
    """A stream without a name: libav would guess a demuxer from it, and relative references would resolve against it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def container_options(demuxers: Iterable[str]) -> dict[str, str]:
    """Options of libav for an untrusted file: which demuxers may read it, and how much of it they may read to find out.

    Args:
        demuxers: Names of the allowed ones.
    """
    return {
        "format_whitelist": ",".join(demuxers), "protocol_whitelist": "none", "max_streams": "64",
        # What is looked at to find out about the streams, in bytes and packets: the default lets a header cost seconds.
        "probesize": "5000000", "max_probe_packets": "500",
    }  # fmt: skip


class _Source:
    """An opened file and its audio stream."""

    def __init__(self, source: Path | str | BinaryIO | bytes, name: str) -> None:
        self._own: BinaryIO | None = None
        if isinstance(source, bytes):
            stream: BinaryIO = io.BytesIO(source)
        elif isinstance(source, str | Path):
            stream = self._own = open(source, "rb")  # noqa: SIM115 (closed in __exit__)
        else:
            stream = source
        self._name = name
        self._stream = stream

    def __enter__(self) -> tuple[Any, Any]:
        options = container_options(CONTAINERS)
        try:
            check_index(self._stream, self._name)
        except InputError:
            self._close()
            raise
        try:
            self._container = av.open(
                _Nameless(self._stream), mode="r", options=options, metadata_errors="replace"
            )
        except MemoryError:
            self._close()
            raise
        except (av.error.FFmpegError, ValueError, OSError) as error:
            self._close()
            raise InputError(
                f"{self._name} is not audio that can be read ({_reason(error)})", code="bad_media"
            ) from None
        audio = [s for s in self._container.streams.audio if s.codec_context is not None]
        try:
            if not audio:
                raise InputError(f"{self._name} has no audio track", code="bad_media")
            stream = audio[0]
            context = stream.codec_context
            if not context.name.startswith(CODECS):
                raise InputError(
                    f"{self._name} is {context.name} audio, which is not read here", code="bad_media"
                )
            if not 1 <= context.channels <= MAX_CHANNELS:
                raise InputError(
                    f"{self._name} has {context.channels} channels; allowed: 1 to {MAX_CHANNELS}",
                    code="too_large",
                )
            if not 1000 <= context.sample_rate <= MAX_SAMPLE_RATE:
                raise InputError(
                    f"{self._name} has a sample rate of {context.sample_rate} Hz; allowed: 1000 to {MAX_SAMPLE_RATE}",
                    code="too_large",
                )
        except InputError:
            self._container.close()
            self._close()
            raise
        return self._container, stream

    def __exit__(self, *exc: object) -> None:
        self._container.close()
        self._close()

    def _close(self) -> None:
        if self._own is not None:
            self._own.close()


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:120]


def _declared_seconds(container: Any, stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return float(container.duration) / 1_000_000
    return None


def probe(source: InputFile | Path | str | BinaryIO | bytes, *, name: str = "audio") -> AudioInfo:
    """What an audio file, or the sound of a video, says of itself.

    Args:
        source: An input, a local path of the factory's own, a binary stream, or the bytes. An input that is not trusted is
            looked at in the confined child.
        name: What messages call it.

    Raises:
        InputError: If it is not audio of a known kind.
    """
    if isinstance(source, InputFile):
        if not source.trusted:
            from worker import confined

            return confined.probe_audio(source, name=name)
        source = source.path
    with _Source(source, name) as (container, stream):
        context = stream.codec_context
        return AudioInfo(
            container.format.name,
            context.name,
            context.sample_rate,
            context.channels,
            _declared_seconds(container, stream),
        )


def decode(
    source: InputFile | Path | str | BinaryIO | bytes,
    *,
    max_seconds: float,
    sample_rate: int | None = None,
    mono: bool = False,
    name: str = "audio",
) -> AudioBuffer:
    """Decode an audio file, or the sound of a video.

    Args:
        source: An input, a local path of the factory's own, a binary stream, or the bytes. An input that is not trusted is
            decoded in the confined child.
        max_seconds: Longest length allowed, seconds; checked against what the file says and again while decoding.
        sample_rate: Resample to this many Hz; the file's own where left out.
        mono: Mix to one channel. Otherwise one channel stays one, and more than two are mixed to stereo.
        name: What messages call it (the field, for example).

    Returns:
        Float32 samples ``(channels, n)``; values that are not finite become 0.

    Raises:
        InputError: If it cannot be decoded, has no sound, or is longer than allowed.
    """
    if isinstance(source, InputFile):
        if not source.trusted:
            from worker import confined

            return confined.decode_audio(
                source, max_seconds=max_seconds, sample_rate=sample_rate, mono=mono, name=name
            )
        source = source.path
    found = list(
        decode_pieces(source, max_seconds=max_seconds, sample_rate=sample_rate, mono=mono, name=name)
    )
    samples = np.concatenate([piece for _, piece in found], axis=1)
    return AudioBuffer(np.ascontiguousarray(samples), found[0][0])


def decode_pieces(
    source: Path | str | BinaryIO | bytes,
    *,
    max_seconds: float,
    sample_rate: int | None = None,
    mono: bool = False,
    name: str = "audio",
) -> Iterator[tuple[int, Samples]]:
    """What `decode` does, piece by piece and always in this process; at least one piece.

    Args:
        source: A local path of the factory's own, a binary stream, or the bytes.
        max_seconds: See `decode`; so for the others.
        sample_rate: Hz.
        mono: One channel.
        name: What messages call it.

    Yields:
        Sample rate in Hz, and float32 samples ``(channels, n)``.

    Raises:
        InputError: See `decode`; it may come after pieces.
    """
    with _Source(source, name) as (container, stream):
        seconds = _declared_seconds(container, stream)
        if container.format.name in _GUESSED:
            seconds = None
        if seconds is not None and seconds > max_seconds + 0.5:
            raise InputError(
                f"{name} is {seconds:.1f} s long; allowed: up to {max_seconds:g} s", code="too_large"
            )
        context = stream.codec_context
        context.thread_count = 1
        rate = sample_rate or context.sample_rate
        layout = "mono" if mono or context.channels == 1 else "stereo"
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        limit = int((max_seconds + 0.5) * rate)
        total = bad = good = 0

        def take(frames: Iterable[Any]) -> Iterator[tuple[int, Samples]]:
            nonlocal total
            for frame in frames:
                for out in resampler.resample(frame):
                    part = out.to_ndarray()
                    total += part.shape[1]
                    if total > limit:
                        raise InputError(
                            f"{name} is longer than {max_seconds:g} s, the most that is allowed",
                            code="too_large",
                        )
                    part = part.astype(np.float32, copy=False)
                    if not np.isfinite(part).all():
                        part = np.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0)
                    yield rate, part

        try:
            for packet in container.demux(stream):
                try:
                    yield from take(packet.decode())
                    good += 1
                except av.error.InvalidDataError:
                    bad += 1  # a torn frame, as cut streams have at their ends; too many of them fail below
                    if bad > _MAX_BAD and bad > good // 10:
                        break  # and a file of nothing else is not gone through to its end
            yield from take([None])
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError, OSError) as error:
            # A file that is cut short still holds what came before; only one without any sound is refused.
            if not total:
                raise InputError(f"{name} cannot be decoded ({_reason(error)})", code="bad_media") from None
    if not total:
        raise InputError(f"{name} holds no sound", code="bad_media")
    if bad > max(2, good // 10):
        raise InputError(
            f"{name} is corrupt: {bad} of {bad + good} packets cannot be decoded", code="bad_media"
        )


def resample(buffer: AudioBuffer, sample_rate: int) -> AudioBuffer:
    """The same sound at another sample rate (polyphase filter)."""
    if buffer.sample_rate == sample_rate:
        return buffer
    ratio = Fraction(sample_rate, buffer.sample_rate)
    out = scipy.signal.resample_poly(buffer.samples, ratio.numerator, ratio.denominator, axis=1)
    return AudioBuffer(np.ascontiguousarray(out, dtype=np.float32), sample_rate)


def channels(buffer: AudioBuffer, count: int) -> AudioBuffer:
    """The same sound on one or two channels.

    Raises:
        ValueError: For any other count.
    """
    if count not in (1, 2):
        raise ValueError(f"channels is {count}; allowed: 1 or 2")
    if buffer.channels == count:
        return buffer
    if count == 1:
        return buffer.mono()
    return AudioBuffer(np.repeat(buffer.mono().samples, 2, axis=0), buffer.sample_rate)


def stretch(buffer: AudioBuffer, tempo: float) -> AudioBuffer:
    """Faster or slower at the same pitch (overlap-add of similar stretches).

    Args:
        buffer: What to stretch.
        tempo: 2 halves the length; allowed 0.25 to 8.

    Raises:
        ValueError: If tempo is out of range.
    """
    if not 0.25 <= tempo <= 8:
        raise ValueError(f"tempo is {tempo}; allowed: 0.25 to 8")
    if abs(tempo - 1) < 1e-6 or buffer.samples.shape[1] == 0:
        return buffer
    layout = "mono" if buffer.channels == 1 else "stereo"
    graph = av.filter.Graph()
    last: Any = graph.add_abuffer(
        sample_rate=buffer.sample_rate,
        format="fltp",
        layout=layout,
        time_base=Fraction(1, buffer.sample_rate),
    )
    for step in [0.5, tempo / 0.5] if tempo < 0.5 else [tempo]:
        node = graph.add("atempo", f"{step:.6f}")
        last.link_to(node)
        last = node
    planar = graph.add("aformat", "sample_fmts=fltp")
    last.link_to(planar)
    sink = graph.add("abuffersink")
    planar.link_to(sink)
    graph.configure()
    parts: list[Samples] = []

    def drain() -> None:
        while True:
            try:
                parts.append(graph.pull().to_ndarray())
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    for frame in _frames(buffer, layout):
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    out = AudioBuffer(
        np.ascontiguousarray(np.concatenate(parts, axis=1), dtype=np.float32), buffer.sample_rate
    )
    # The filter keeps or drops part of its last window; the length that was asked for is the one that subtitles rely on.
    return out.fit(max(1, round(buffer.samples.shape[1] / tempo)))


def loudness(buffer: AudioBuffer) -> float:
    """Integrated loudness by ITU-R BS.1770-4 with both gates, LUFS; `SILENCE_LUFS` for silence.

    Sounds shorter than the meter's block of 0.4 s are measured as if repeated. Long ones need no more memory than their
    samples: they are filtered piece by piece.
    """
    samples, rate = buffer.samples, buffer.sample_rate
    if samples.shape[1] == 0 or not np.any(samples):
        return SILENCE_LUFS
    step = max(1, round(0.1 * rate))
    if samples.shape[1] < 4 * step:
        samples = np.tile(samples, (1, math.ceil(4 * step / samples.shape[1])))
    sos = _k_weighting(rate)
    state = np.zeros((2, samples.shape[0], 2))
    energies: list[npt.NDArray[np.float64]] = []
    piece = step * 300
    for start in range(0, samples.shape[1] // step * step, piece):
        block = samples[:, start : min(start + piece, samples.shape[1] // step * step)]
        heard, state = scipy.signal.sosfilt(sos, block.astype(np.float64), axis=1, zi=state)
        energies.append((heard**2).reshape(heard.shape[0], -1, step).mean(axis=2).sum(axis=0))
    tenths = np.concatenate(energies)
    blocks = np.convolve(tenths, np.full(4, 0.25), "valid")
    levels = -0.691 + 10 * np.log10(blocks + 1e-15)
    heard_blocks = blocks[levels > SILENCE_LUFS]
    if not heard_blocks.size:
        return SILENCE_LUFS
    gate = -0.691 + 10 * math.log10(float(heard_blocks.mean())) - 10
    return max(
        SILENCE_LUFS,
        -0.691 + 10 * math.log10(float(blocks[(levels > SILENCE_LUFS) & (levels > gate)].mean())),
    )


@cache
def _k_weighting(rate: int) -> npt.NDArray[np.float64]:
    """The two filters of BS.1770 (head, low cut) for any sample rate, by their analogue prototypes."""
    k, gain, q = (
        math.tan(math.pi * 1681.974450955533 / rate),
        10 ** (3.999843853973347 / 20),
        0.7071752369554196,
    )
    part = gain**0.4996667741545416
    scale = 1 + k / q + k * k
    head = [
        (gain + part * k / q + k * k) / scale, 2 * (k * k - gain) / scale, (gain - part * k / q + k * k) / scale,
        1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale,
    ]  # fmt: skip
    k, q = math.tan(math.pi * 38.13547087602444 / rate), 0.5003270373238773
    scale = 1 + k / q + k * k
    low_cut = [1.0, -2.0, 1.0, 1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale]
    return np.array([head, low_cut])


def peak_db(buffer: AudioBuffer) -> float:
    """Highest true peak (four-fold oversampled), dBFS; -120 for silence."""
    if buffer.samples.shape[1] == 0:
        return -120.0
    highest = float(np.abs(scipy.signal.resample_poly(buffer.samples, 4, 1, axis=1)).max())
    return 20 * math.log10(highest) if highest > 1e-6 else -120.0


def limit(buffer: AudioBuffer, ceiling_db: float = -1.5, lookahead_s: float = 0.005) -> AudioBuffer:
    """Keep every sample under a ceiling, by turning down around peaks instead of clipping them.

    Args:
        buffer: What to limit.
        ceiling_db: Highest sample allowed, dBFS.
        lookahead_s: Half-width of the gain dip around a peak, seconds.
    """
    ceiling = 10 ** (ceiling_db / 20)
    level = np.abs(buffer.samples).max(axis=0) if buffer.samples.shape[1] else np.zeros(0, np.float32)
    if not level.size or float(level.max()) <= ceiling:
        return buffer
    need = np.minimum(np.float32(1), np.float32(ceiling) / np.maximum(level, np.float32(1e-9)))
    half = max(1, round(lookahead_s * buffer.sample_rate))
    # The mean of minima over a window never exceeds the need at its centre, so the ceiling holds exactly.
    low = scipy.ndimage.minimum_filter1d(need, 2 * half + 1, mode="nearest")
    window = scipy.signal.windows.hann(2 * half + 1)
    weights = (window / window.sum()).astype(np.float32)
    # Far from any peak the mean is that of ones: only around peaks it has to be computed.
    gain = np.full_like(low, scipy.ndimage.convolve1d(np.ones_like(low[:1]), weights, mode="nearest")[0])
    peaks = np.flatnonzero(low < 1)
    for run in np.split(peaks, np.flatnonzero(np.diff(peaks) > 2 * half) + 1):
        start, stop = max(0, int(run[0]) - half), int(run[-1]) + half + 1
        begin = max(0, start - half)
        mean = scipy.ndimage.convolve1d(low[begin : stop + half], weights, mode="nearest")
        gain[start:stop] = mean[start - begin :][: stop - start]
    return AudioBuffer((buffer.samples * np.minimum(gain, need)).astype(np.float32), buffer.sample_rate)


def normalize(buffer: AudioBuffer, lufs: float = -16.0, ceiling_db: float = -1.5) -> AudioBuffer:
    """Bring to a loudness, with peaks limited; silence stays silence.

    Args:
        buffer: What to normalise.
        lufs: Wanted integrated loudness, LUFS.
        ceiling_db: Highest sample allowed, dBFS.
    """
    out = buffer
    for _ in range(2):  # the limiter takes a little loudness away: the second pass gives it back
        have = loudness(out)
        if have <= SILENCE_LUFS or abs(have - lufs) < 0.1:
            break
        gain = 10 ** (min(lufs - have, 60.0) / 20)
        out = limit(
            AudioBuffer((out.samples * np.float32(gain)).astype(np.float32), out.sample_rate), ceiling_db
        )
    return limit(out, ceiling_db)


def fade(buffer: AudioBuffer, in_s: float = 0.0, out_s: float = 0.0) -> AudioBuffer:
    """Fade in and out by half a cosine; the last sample of a fade-out is 0."""
    n = buffer.samples.shape[1]
    samples = buffer.samples.copy()
    first, last = min(n, round(in_s * buffer.sample_rate)), min(n, round(out_s * buffer.sample_rate))
    if first > 0:
        samples[:, :first] *= (0.5 - 0.5 * np.cos(np.pi * np.arange(first) / first)).astype(np.float32)
    if last > 0:
        samples[:, n - last :] *= (0.5 + 0.5 * np.cos(np.pi * np.arange(1, last + 1) / last)).astype(
            np.float32
        )
    return AudioBuffer(samples, buffer.sample_rate)


def mix(*buffers: AudioBuffer) -> AudioBuffer:
    """The sum of several sounds that start together, as long as the longest.

    Channels and sample rates are brought to the first one's.

    Raises:
        ValueError: If there are none.
    """
    if not buffers:
        raise ValueError("mix needs at least one buffer")
    first = buffers[0]
    same = [channels(resample(b, first.sample_rate), first.channels) for b in buffers]
    length = max(b.samples.shape[1] for b in same)
    out = np.zeros((first.channels, length), np.float32)
    for one in same:
        out[:, : one.samples.shape[1]] += one.samples
    return AudioBuffer(out, first.sample_rate)


def duck(
    music: AudioBuffer,
    speech: AudioBuffer,
    *,
    depth_db: float = 12.0,
    attack_s: float = 0.25,
    release_s: float = 0.7,
    hold_s: float = 0.45,
) -> Samples:
    """Turn music down wherever somebody speaks, and up again in between.

    Args:
        music: What gives way; both start at the same time.
        speech: Where it is heard the music goes down.
        depth_db: By how much, dB.
        attack_s: How long before a word the music starts to go down, seconds.
        release_s: How long it takes to come up again, seconds.
        hold_s: Pauses between words shorter than about this do not let it up, seconds.

    Returns:
        The music's samples with the gain applied: float32, the same shape.
    """
    step_s = 0.01
    n = music.samples.shape[1]
    steps = max(2, math.ceil(n / music.sample_rate / step_s) + 1)
    hop = max(1, round(step_s * speech.sample_rate))
    voice = speech.mono().samples[0]
    blocks = math.ceil(voice.size / hop)
    if not n or not blocks:
        return music.samples.copy()
    power = np.pad(voice, (0, blocks * hop - voice.size)).reshape(blocks, hop).astype(np.float64) ** 2
    level = 10 * np.log10(power.mean(axis=1) + 1e-12)
    threshold = max(-55.0, float(level.max()) - 35.0)
    active = np.zeros(steps, bool)
    active[: min(blocks, steps)] = (level > threshold)[:steps]
    # Pauses inside a sentence do not count as silence; then the dip opens early and closes late.
    active = scipy.ndimage.binary_closing(
        np.pad(active, 200), structure=np.ones(max(1, round(hold_s / step_s)), bool)
    )[200:-200]
    target = np.where(active, -depth_db, 0.0)
    down, up = max(1, round(attack_s / step_s)), max(1, round(release_s / step_s))
    curve = np.empty(steps)
    value = 0.0
    for i in range(steps):
        # Look ahead by the attack, so that the music is already down when the word begins.
        goal = float(target[i : i + down + 1].min())
        value += np.clip(goal - value, -depth_db / down, depth_db / up)
        curve[i] = value
    curve = scipy.ndimage.gaussian_filter1d(curve, 5.0, mode="nearest")
    at = np.arange(n) / music.sample_rate / step_s
    gain = 10 ** (np.interp(at, np.arange(steps), curve) / 20)
    return (music.samples * gain).astype(np.float32)


_CODEC = {
    "mp3": ("mp3", "libmp3lame", "fltp"),
    "opus": ("ogg", "libopus", "flt"),
    "aac": ("adts", "aac", "fltp"),
}
_LOSSY_RATES = {
    "mp3": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    "opus": (48000,),
    "aac": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
}


def encode(buffer: AudioBuffer, format: str, *, bitrate: int | None = None) -> bytes:  # noqa: A002
    """Write samples as a file. The same samples always give the same bytes.

    Args:
        buffer: One or two channels; values outside ``[-1, 1]`` are clipped.
        format: ``wav``, ``flac`` (16 bit), ``mp3``, ``opus`` (Ogg), ``aac`` (ADTS) or ``pcm`` (bare 16-bit little endian).
        bitrate: Bits a second for the lossy ones; by default 64k a channel, 96k a channel for MP3.

    Raises:
        ValueError: If the format is unknown or there are more than two channels.
    """
    from contentfactory.jobs.audio import AUDIO_TYPES  # not above: the decoder's child does without pydantic

    if format not in AUDIO_TYPES:
        raise ValueError(f"audio format is {format!r}; allowed: {', '.join(AUDIO_TYPES)}")
    if buffer.channels > 2:
        raise ValueError(f"audio has {buffer.channels} channels; allowed: 1 or 2")
    if format in ("wav", "flac", "pcm"):
        ints = np.round(np.clip(buffer.samples, -1, 1) * 32767).astype("<i2").T
        if format == "pcm":
            return np.ascontiguousarray(ints).tobytes()
        import soundfile

        out = io.BytesIO()
        soundfile.write(out, ints, buffer.sample_rate, format=format.upper(), subtype="PCM_16")
        return out.getvalue()
    rates = _LOSSY_RATES[format]
    if buffer.sample_rate not in rates:
        buffer = resample(buffer, min((r for r in rates if r >= buffer.sample_rate), default=rates[-1]))
    clipped = AudioBuffer(np.clip(buffer.samples, -1, 1), buffer.sample_rate)
    container_format, codec, sample_format = _CODEC[format]
    layout = "mono" if clipped.channels == 1 else "stereo"
    target = io.BytesIO()
    # Bit-exact muxing leaves out versions, dates and random stream numbers.
    options = {"fflags": "+bitexact"} | ({"serial_offset": "1"} if format == "opus" else {})
    with av.open(target, "w", format=container_format, options=options) as container:
        stream: Any = container.add_stream(codec, rate=clipped.sample_rate)
        stream.codec_context.layout = layout
        stream.codec_context.format = sample_format
        stream.codec_context.bit_rate = bitrate or (96_000 if format == "mp3" else 64_000) * clipped.channels
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for frame in _frames(clipped, layout):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def _frames(buffer: AudioBuffer, layout: str, size: int = 48_000) -> Iterable[Any]:
    for start in range(0, buffer.samples.shape[1], size):
        block = np.ascontiguousarray(buffer.samples[:, start : start + size])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate = buffer.sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, buffer.sample_rate)
        yield frame


__all__ = [
    "CODECS", "CONTAINERS", "SILENCE_LUFS", "AudioBuffer", "AudioInfo", "channels", "container_options", "decode", "decode_pieces", "duck", "encode", "fade", "limit",
    "loudness", "mix", "normalize", "peak_db", "probe", "resample", "stretch",
]  # fmt: skip

"""Video in and out: safe probing and decoding frame by frame, and an encoder for clips that browsers play.

Nothing here holds more than a few frames: clips are written to a file as they are made and read as they are looked at.
Decoding believes nothing about a file: containers and codecs come from a list, nothing that refers to other files is
opened, and pixels × frames are bounded before and while frames are made.
"""

import errno
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import av.codec
import av.error
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace

from contentfactory.errors import FactoryError, InputError, TransientError
from worker.input_file import InputFile
from worker.media.audio import _Nameless, _reason, container_options
from worker.media.mp4 import check_index

Frame = npt.NDArray[np.uint8]
"""A picture of a clip: RGB, shape ``(height, width, 3)``, 0 to 255."""

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "ogg", "gif", "mpeg", "flv", "asf")
"""Demuxers that may open a user's file. None of them follows a reference to another file."""

CODECS = (
    "h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "libvpx", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "theora",
    "prores", "gif", "h263", "flv", "wmv", "msmpeg4", "ffv1", "rawvideo", "dvvideo",
)  # fmt: skip
"""Beginnings of the names of decoders that may run on a user's file."""

MAX_SIDE = 8192
MAX_FRAME_PIXELS = 36_000_000
MAX_PIXELS = 200_000_000_000
"""Most pixels that `frames` decodes of one file: width × height × frames."""

_MAX_BAD = 500

ENCODERS = ("libx264", "libopenh264")
"""H.264 encoders that ``auto`` tries, in this order. A GPU's is taken only by name: its bytes differ from one to the next."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Args:
        container: Demuxer's name.
        codec: Decoder's name.
        profile: Codec profile, ``""`` where unknown.
        level: Codec level times ten (H.264), or None.
        width: Pixels.
        height: Pixels.
        pixel_format: As FFmpeg names it.
        frame_rate: Frames a second; 0 where unknown.
        frames: Number of frames; 0 where the file does not say.
        duration_s: Length of the file, seconds; None where unknown.
        video_s: Length of the video track, seconds; None where unknown.
        audio_codec: Decoder's name of the first audio track, None without one.
        audio_s: Length of the audio track, seconds.
        sample_rate: Of the audio, Hz; 0 without one.
        channels: Of the audio; 0 without one.
        colour: Primaries, transfer, matrix and range by their ITU-T H.273 numbers (range: 1 limited, 2 full).
    """

    container: str
    codec: str
    profile: str
    level: int | None
    width: int
    height: int
    pixel_format: str
    frame_rate: float
    frames: int
    duration_s: float | None
    video_s: float | None
    audio_codec: str | None = None
    audio_s: float | None = None
    sample_rate: int = 0
    channels: int = 0
    colour: tuple[int, int, int, int] = (2, 2, 2, 0)


@contextmanager
def _open(source: Path | InputFile | BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """An untrusted file and its video stream."""
    own: BinaryIO | None = None
    if isinstance(source, InputFile):
        own = source.open()
    elif isinstance(source, Path):
        own = source.open("rb")
    options = container_options(CONTAINERS)
    try:
        check_index(own or source, name)  # type: ignore[arg-type]
        try:
            container = av.open(
                _Nameless(own or source), mode="r", options=options, metadata_errors="replace"
            )
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise InputError(
                f"{name} is not a video that can be read ({_reason(error)})", code="bad_media", param=name
            ) from None
        try:
            video = [s for s in container.streams.video if s.codec_context is not None]
            if not video:
                raise InputError(f"{name} has no video track", code="bad_media", param=name)
            stream = video[0]
            context = stream.codec_context
            if not context.name.startswith(CODECS):
                raise InputError(
                    f"{name} is {context.name} video, which is not read here", code="bad_media", param=name
                )
            _check_size(context.width, context.height, name)
            context.thread_count = 1
            yield container, stream
        finally:
            container.close()
    finally:
        if own is not None:
            own.close()


def _check_size(width: int, height: int, name: str) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE) or width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{name} has frames of {width}×{height} pixels; allowed are {MAX_SIDE} a side and {MAX_FRAME_PIXELS:,} in all",
            code="too_large", param=name,
        )  # fmt: skip


def probe(source: Path | InputFile | BinaryIO, *, name: str = "video") -> VideoInfo:
    """What a video file says of itself; no frame is decoded for it.

    Args:
        source: A local file of the factory's own, a fetched input or a binary stream. An input that is not trusted is
            looked at in the confined child.
        name: What messages call it (the field, for example).

    Raises:
        InputError: If it is not a video of a known kind, or its frames are too large.
    """
    if isinstance(source, InputFile) and not source.trusted:
        from worker import confined

        return confined.probe_video(source, name=name)
    with _open(source, name) as (container, stream):
        context = stream.codec_context
        rate = stream.average_rate or stream.guessed_rate
        audio = next((s for s in container.streams.audio if s.codec_context is not None), None)
        return VideoInfo(
            container=container.format.name,
            codec=context.name,
            profile=context.profile or "",
            level=getattr(context, "level", None),
            width=context.width,
            height=context.height,
            pixel_format=context.pix_fmt or "",
            frame_rate=float(rate) if rate else 0.0,
            frames=stream.frames,
            duration_s=container.duration / 1_000_000 if container.duration is not None else None,
            video_s=_seconds(stream),
            audio_codec=audio.codec_context.name if audio else None,
            audio_s=_seconds(audio) if audio else None,
            sample_rate=audio.codec_context.sample_rate if audio else 0,
            channels=audio.codec_context.channels if audio else 0,
            colour=tuple(
                int(getattr(context, n))
                for n in ("color_primaries", "color_trc", "colorspace", "color_range")
            ),  # type: ignore[arg-type]
        )


def _seconds(stream: Any) -> float | None:
    if stream.duration is None or stream.time_base is None:
        return None
    return float(stream.duration * stream.time_base)


def frames(
    source: Path | InputFile | BinaryIO,
    *,
    every: int = 1,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str = "video",
) -> Iterator[tuple[float, Frame]]:
    """Decode a video frame by frame.

    Args:
        source: A local file of the factory's own, a fetched input or a binary stream. An input that is not trusted is
            decoded in the confined child.
        every: Give every so manieth frame, counted from ``start_s``.
        start_s: Leave out what comes before, seconds.
        end_s: Leave out what comes from here on, seconds.
        max_frames: Stop after so many.
        max_pixels: Most pixels to decode, width × height × frames; more is an error.
        name: What messages call it.

    Yields:
        Time of the frame in seconds, and the frame.

    Raises:
        InputError: If it cannot be decoded or is larger than allowed.
        ValueError: If ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be 1 or more")
    if isinstance(source, InputFile) and not source.trusted:
        from worker import confined

        yield from confined.frames(
            source, every=every, start_s=start_s, end_s=end_s, max_frames=max_frames, max_pixels=max_pixels, name=name
        )  # fmt: skip
        return
    with _open(source, name) as (container, stream):
        context = stream.codec_context
        pixels = context.width * context.height
        if stream.frames * pixels > max_pixels and end_s is None and max_frames is None:
            raise InputError(
                f"{name} has {stream.frames} frames of {context.width}×{context.height}; allowed are {max_pixels:,} pixels in all",
                code="too_large", param=name,
            )  # fmt: skip
        decoded = seen = given = bad = 0
        rate = float(stream.average_rate or 25)
        try:
            for packet in container.demux(stream):
                try:
                    decoded_frames = packet.decode()
                except av.error.InvalidDataError:
                    bad += 1  # a torn frame; too many of them fail below
                    if bad > _MAX_BAD and bad > seen // 10:
                        break  # and a file of nothing else is not gone through to its end
                    continue
                for frame in decoded_frames:
                    _check_size(frame.width, frame.height, name)
                    decoded += frame.width * frame.height
                    if decoded > max_pixels:
                        raise InputError(
                            f"{name} has more than the {max_pixels:,} pixels that are allowed",
                            code="too_large",
                            param=name,
                        )
                    at = float(frame.time) if frame.time is not None else seen / rate
                    if at < start_s - 1e-6:
                        continue
                    if end_s is not None and at >= end_s - 1e-6:
                        return
                    seen += 1
                    if (seen - 1) % every:
                        continue
                    yield at, frame.to_ndarray(format="rgb24")
                    given += 1
                    if max_frames is not None and given >= max_frames:
                        return
        except MemoryError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            # A file that is cut short still holds what came before; only one without any frame is refused.
            if not decoded:
                raise InputError(
                    f"{name} cannot be decoded ({_reason(error)})", code="bad_media", param=name
                ) from None
        if not decoded:
            raise InputError(f"{name} holds no frame that can be decoded", code="bad_media", param=name)
        if bad > max(2, seen // 10):
            raise InputError(
                f"{name} is corrupt: {bad} packets cannot be decoded", code="bad_media", param=name
            )


def available_encoders() -> tuple[str, ...]:
    """H.264 encoders of this installation's FFmpeg, the ones that ``auto`` prefers first."""
    found = []
    for name in (*ENCODERS, "h264_nvenc"):
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            continue
        found.append(name)
    return tuple(found)


def choose_encoder(name: str = "auto") -> str:
    """The H.264 encoder to use.

    Args:
        name: An encoder, or ``auto``.

    Raises:
        InputError: If it is not installed; the message lists what is.
    """
    have = available_encoders()
    if name == "auto":
        name = next((one for one in ENCODERS if one in have), "")
    if name not in have:
        raise InputError(
            f"H.264 encoder {name or 'auto'!r} is not in this installation's FFmpeg; it has: {', '.join(have) or 'none'}",
            code="encoder_unavailable", param="encoder",
        )  # fmt: skip
    return name


class ClipWriter:
    """Writes an MP4 of H.264 and, where wanted, AAC, frame by frame.

    8 bits, 4:2:0, BT.709 in limited range and marked so, index before the data. Everything runs on one thread and no date
    or version is written: the same frames and samples give the same bytes. Use it as a context manager: leaving it by an
    exception removes the unfinished file.

    Args:
        path: File to write, in a folder of the factory's own.
        width: Pixels; even.
        height: Pixels; even.
        fps: Frames a second.
        sample_rate: Of the sound, Hz; None writes no audio track.
        channels: Of the sound: 1 or 2.
        quality: Constant rate factor, 0 to 51; lower is better.
        encoder: See `choose_encoder`.
        audio_bitrate: Bits a second.

    Raises:
        InputError: If the encoder is not installed or does not take this size.
        ValueError: If a size is odd or a rate is not positive.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: int | Fraction,
        *,
        sample_rate: int | None = None,
        channels: int = 2,
        quality: int = 20,
        encoder: str = "auto",
        audio_bitrate: int = 160_000,
    ) -> None:
        if width % 2 or height % 2 or min(width, height) < 2:
            raise ValueError(f"size is {width}×{height}; both sides must be even")
        if fps <= 0:
            raise ValueError(f"fps is {fps}; it must be above 0")
        self.path, self.width, self.height, self.fps = path, width, height, Fraction(fps)
        self.encoder = choose_encoder(encoder)
        self.frames = 0
        self.samples = 0
        self._audio: Any = None
        self._container: Any = None
        with _faults():
            self._container = av.open(
                str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
            )
            self._video = self._add_video(quality)
            if sample_rate:
                self._audio = self._container.add_stream("aac", rate=sample_rate)
                context = self._audio.codec_context
                context.layout = "mono" if channels == 1 else "stereo"
                context.format = "fltp"
                context.bit_rate = audio_bitrate
                context.time_base = Fraction(1, sample_rate)
                context.flags |= Flags.bitexact
                self._rate, self._layout = sample_rate, context.layout.name

    def _add_video(self, quality: int) -> Any:
        options = {
            "libx264": {"preset": "veryfast", "crf": str(quality), "profile": "high", "threads": "1"}
            | _same_bytes(),
            # OpenH264 has no constant rate factor: six steps of it are about half the bits.
            "libopenh264": {"profile": "high", "threads": "1", "allow_skip_frames": "0"},
            "h264_nvenc": {"preset": "p5", "rc": "vbr", "cq": str(quality), "profile": "high"},
        }[self.encoder]
        stream = self._container.add_stream(self.encoder, rate=self.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.gop_size = max(1, round(self.fps * 3))
        if self.encoder == "libopenh264":
            pixels = self.width * self.height * float(self.fps)
            context.bit_rate = max(100_000, int(pixels * 0.12 * 2 ** ((20 - quality) / 6)))
        if self.encoder != "h264_nvenc":
            context.thread_count = 1
        context.flags |= Flags.bitexact
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # limited
        return stream

    def write(self, frame: Frame) -> None:
        """Append a frame.

        Raises:
            ValueError: If it has another size or type.
        """
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"frame is {frame.dtype} {frame.shape}; wanted uint8 ({self.height}, {self.width}, 3)"
            )
        with _faults(self.encoder if not self.frames else ""):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            picture.pts = self.frames
            picture.time_base = 1 / self.fps
            self._container.mux(self._video.encode(picture))
        self.frames += 1

    def write_audio(self, samples: npt.NDArray[np.float32]) -> None:
        """Append sound; write it a little at a time, in step with the frames, so that nothing piles up.

        Args:
            samples: float32, shape ``(channels, n)``; clipped to ``[-1, 1]``.
        """
        if self._audio is None:
            raise ValueError("this clip has no audio track")
        if not samples.shape[1]:
            return
        with _faults():
            block = np.ascontiguousarray(np.clip(samples, -1, 1), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=self._layout)
            frame.sample_rate = self._rate
            frame.pts = self.samples
            frame.time_base = Fraction(1, self._rate)
            self._container.mux(self._audio.encode(frame))
        self.samples += samples.shape[1]

    def close(self) -> None:
        """Finish the file."""
        if self._container is None:
            return
        with _faults():
            self._container.mux(self._video.encode(None))
            if self._audio is not None:
                self._container.mux(self._audio.encode(None))
            container, self._container = self._container, None
            container.close()

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        container, self._container = self._container, None
        try:
            if container is not None:
                container.close()
        except (av.error.FFmpegError, OSError):
            pass  # the first error is the one to tell
        self.path.unlink(missing_ok=True)


def _same_bytes() -> dict[str, str]:
    """Options that make x264 give the same bytes in each run.

    Its AVX-512 code for the macroblock tree (build 165) reads past the end of a row where the width in macroblocks is not
    a multiple of eight: one clip encoded ten times gave up to seven results. The code for SSE 4.2, which every 64-bit
    x86 of the last fifteen years has, gave one result in all sizes, the same as AVX2's, at 5 % more time.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {"x264-params": "asm=MMX2,SSE2Fast,SSSE3,SSE4.2"}
    return {}


@contextmanager
def _faults(opening: str = "") -> Iterator[None]:
    """FFmpeg's errors while writing, as the factory's; ``opening`` names an encoder that gets its first frame."""
    try:
        yield
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        number = getattr(error, "errno", None)
        if number == errno.ENOMEM:
            raise MemoryError(str(error)) from None
        if number in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise TransientError(f"the clip cannot be written: {os.strerror(number)}") from None
        if opening == "h264_nvenc":
            raise InputError(
                f"encoder h264_nvenc does not start on this machine ({_reason(error)}); it needs an NVIDIA GPU with a video encoder",
                code="encoder_unavailable", param="encoder",
            ) from None  # fmt: skip
        raise FactoryError(f"the clip cannot be encoded: {_reason(error)}", code="encode_failed") from None


def frame_count(seconds: float, fps: int) -> int:
    """Frames of a clip of that length: within half a frame of it, and at least one."""
    return max(1, math.floor(seconds * fps + 0.5))


__all__ = [
    "CODECS", "CONTAINERS", "ENCODERS", "ClipWriter", "Frame", "VideoInfo", "available_encoders", "choose_encoder",
    "frame_count", "frames", "probe",
]  # fmt: skip

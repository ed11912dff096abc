"""Runner of ``video.compose``."""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import structlog
from PIL import Image

from contentfactory.errors import FactoryError, InputError, LeaseLost, Released
from contentfactory.jobs.video import MAX_CLIP_SECONDS, Scene, VideoCompose, check_size
from worker.context import Failure, InputFile, JobContext, Output, Yield
from worker.media import audio, subtitles
from worker.media.image import encode as encode_image
from worker.media.image import open_image, parse_colour
from worker.media.video import ClipWriter, Frame, choose_encoder, frame_count
from worker.runners import runs
from worker.runners.video.overlays import Sprite, lower_third, subtitle, subtitle_columns, title
from worker.runners.video.pictures import Shot, card, make_shot
from worker.runners.video.plan import Change, plan_changes, share_out, smooth
from worker.runners.video.soundtrack import RATE, soundtrack

log = structlog.get_logger()

MAX_MUSIC_SECONDS = 1200.0
MAX_TIMINGS_BYTES = 16 * 1024 * 1024
_TEXT_FADE_S = 0.35


@runs(VideoCompose)
def compose(params: list[VideoCompose], context: JobContext) -> Iterator[Yield]:
    """Compose each clip of the micro-batch in turn."""
    for job, one in enumerate(params):
        try:
            yield from _clip(job, one, context)
        except (LeaseLost, Released):
            raise
        except FactoryError as error:
            yield Failure(job, error)


def _clip(job: int, params: VideoCompose, context: JobContext) -> Iterator[Output]:
    context.progress(job, 0.0, "reading inputs")
    choose_encoder(params.encoder)
    narration = _narration(job, params, context)
    pictures = [context.fetch(job, s.image) if s.image is not None else None for s in params.scenes]
    total_s = _total(params, narration)
    try:
        check_size(total_s, params.width, params.height, params.fps)
    except ValueError as error:
        raise InputError(str(error), code="too_large") from None
    frames = frame_count(total_s, params.fps)
    context.check(job)
    speech, spans = _spans(job, params, context, narration, total_s)
    burnt = params.subtitles in ("burn", "both")
    limit = subtitle_columns(params.width, params.height) if burnt else subtitles.MAX_COLUMNS
    cues = (
        subtitles.make_cues(spans, total_s, limit=limit, speech=speech) if params.subtitles != "none" else []
    )
    edges = share_out(
        [s.duration_s for s in params.scenes], total_s, frames, params.fps, _breaks(spans, speech)
    )
    kinds = [s.transition or params.transition for s in params.scenes]
    changes = plan_changes(edges, kinds, params.transition_s, params.fps)
    samples = round(frames * RATE / params.fps)
    sound = _sound(job, params, context, narration, samples)
    narration = None  # the mix holds it now
    context.check(job)
    film = _Film(params, edges, changes, pictures, cues if burnt else [])
    # Titles fade in: the poster shows the first scene at its fullest.
    poster = film.frame((edges[0] + edges[1]) // 2, words=False)
    path = context.scratch / f"clip-{job}.mp4"
    with ClipWriter(
        path, params.width, params.height, params.fps,
        sample_rate=RATE if sound is not None else None, quality=params.quality, encoder=params.encoder,
    ) as writer:  # fmt: skip
        for n in range(frames):
            if n % 10 == 0:
                context.check(job)
                context.progress(job, n / frames, f"frame {n} of {frames}")
            writer.write(film.frame(n))
            if sound is not None:
                writer.write_audio(sound[:, writer.samples : (n + 1) * samples // frames])
    log.debug("clip written", action="video.compose", frames=frames, encoder=writer.encoder)
    size = {"width": params.width, "height": params.height}
    duration = round(frames / params.fps, 6)
    yield Output(
        job, "clip.mp4", "video/mp4", path,
        {
            "duration_s": duration, **size, "frame_rate": params.fps, "frames": frames, "has_audio": sound is not None,
            "codec": "h264", "encoder": writer.encoder, "scenes": len(params.scenes), "cues": len(cues),
        },
    )  # fmt: skip
    if cues and params.subtitles in ("sidecar", "both"):
        about = {"duration_s": duration, "cues": len(cues)}
        yield Output(job, "subtitles.srt", "application/x-subrip", subtitles.to_srt(cues).encode(), about)
        yield Output(job, "subtitles.vtt", "text/vtt", subtitles.to_vtt(cues).encode(), about)
    yield Output(
        job, "poster.jpg", "image/jpeg", encode_image(Image.fromarray(poster), "jpeg", quality=88), size
    )
    context.progress(job, 1.0, "done")


def _narration(job: int, params: VideoCompose, context: JobContext) -> audio.AudioBuffer | None:
    if params.narration is None:
        return None
    file = context.fetch(job, params.narration)
    longest = MAX_CLIP_SECONDS - params.lead_s - params.tail_s
    with _field("narration"):
        return audio.decode(file, max_seconds=longest, sample_rate=RATE, mono=True, name="narration")


def _total(params: VideoCompose, narration: audio.AudioBuffer | None) -> float:
    """Length of the clip, seconds."""
    given = [s.duration_s for s in params.scenes if s.duration_s is not None]
    spoken = params.lead_s + narration.duration_s + params.tail_s if narration is not None else 0.0
    if len(given) == len(params.scenes):
        total = sum(given)
        if narration is not None and params.lead_s + narration.duration_s > total + 0.5 / params.fps:
            raise InputError(
                f"the scenes last {total:.2f} s together, but the narration needs {params.lead_s + narration.duration_s:.2f} s "
                "with its lead; make them longer, or leave a duration_s out",
                param="scenes",
            )
        return total
    if narration is not None:
        return spoken
    return sum(given) + (len(params.scenes) - len(given)) * params.scene_s


def _spans(
    job: int, params: VideoCompose, context: JobContext, narration: audio.AudioBuffer | None, total_s: float
) -> tuple[subtitles.Speech | None, list[subtitles.Span]]:
    """Where speech is in the clip, and its sentences, in the clip's time."""
    if narration is None:
        words = subtitles.split_sentences(str(params.narration_text or ""))
        end = max(total_s - params.tail_s, params.lead_s)
        return None, subtitles.align(words, min(params.lead_s, end), end) if words else []
    speech = subtitles.find_speech(narration.samples[0], RATE).shifted(params.lead_s)
    if params.narration_timings is not None:
        file = context.fetch(job, params.narration_timings)
        size = file.path.stat().st_size
        if size > MAX_TIMINGS_BYTES:
            raise InputError(
                f"narration_timings has {size:,} bytes; allowed: {MAX_TIMINGS_BYTES:,}",
                param="narration_timings",
            )
        spans = subtitles.parse_timings(file.read_bytes())
        if spans and spans[-1].start_s > narration.duration_s + 1:
            raise InputError(
                f"narration_timings has a sentence at {spans[-1].start_s:.2f} s, but the narration lasts {narration.duration_s:.2f} s",
                param="narration_timings",
            )
        lead = params.lead_s
        return speech, [subtitles.Span(s.start_s + lead, s.end_s + lead, s.text) for s in spans]
    words = subtitles.split_sentences(str(params.narration_text or ""))
    return speech, subtitles.align(words, speech.start_s, speech.end_s, speech) if words else []


def _breaks(spans: Sequence[subtitles.Span], speech: subtitles.Speech | None) -> list[float]:
    """Moments at which a scene may change: between sentences, or in the longer pauses where no words are known."""
    if spans:
        return [(a.end_s + max(b.start_s, a.end_s)) / 2 for a, b in itertools.pairwise(spans)]
    if speech is not None:
        return [(start + end) / 2 for start, end in speech.pauses if end - start >= 0.25]
    return []


def _sound(
    job: int, params: VideoCompose, context: JobContext, narration: audio.AudioBuffer | None, samples: int
) -> np.ndarray | None:
    """Samples of the clip, shape ``(2, samples)``; None for a silent one."""
    music = None
    if params.music is not None:
        context.progress(job, 0.0, "reading music")
        file = context.fetch(job, params.music)
        with _field("music"):
            music = audio.decode(file, max_seconds=MAX_MUSIC_SECONDS, sample_rate=RATE, name="music")
    if narration is None and music is None:
        return None
    context.progress(job, 0.0, "mixing")
    return soundtrack(
        narration, music, samples, lead_s=params.lead_s, loudness_lufs=params.loudness_lufs, music_gain_db=params.music_gain_db,
        duck_db=params.duck_db, fade_in_s=params.fade_in_s, fade_out_s=params.fade_out_s,
    )  # fmt: skip


class _field:  # noqa: N801 (used like a function)
    """Names the field in an input's error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) and error.param is None:
            error.param = self._name


class _Film:
    """Frames of a clip. Holds the pictures of the scenes in sight and nothing else."""

    def __init__(
        self,
        params: VideoCompose,
        edges: Sequence[int],
        changes: Sequence[Change],
        pictures: Sequence[InputFile | None],
        cues: Sequence[subtitles.Cue],
    ) -> None:
        self._params, self._edges, self._changes, self._pictures = params, edges, changes, pictures
        self._cues = cues
        self._starts = [c.start_s for c in cues]
        self._shots: dict[int, Callable[[int], Frame]] = {}
        self._cue: tuple[int, Sprite | None] = (-1, None)
        self._ground = np.empty((params.height, params.width, 3), np.uint8)
        self._ground[:] = parse_colour(params.background)

    def frame(self, n: int, *, words: bool = True) -> Frame:
        """The frame of that number.

        Args:
            n: From 0.
            words: Whether to burn subtitles in and fade the clip's ends.
        """
        at = n + 0.5
        scene = min(bisect_right(self._edges, n), len(self._edges) - 1) - 1
        picture: Frame | None = None
        # At most the changes on either side of the scene can be under way.
        for index in (scene - 1, scene):
            if 0 <= index < len(self._changes):
                change = self._changes[index]
                if change.start <= at < change.end:
                    part = (at - change.start) / (change.end - change.start)
                    picture = self._blend(change.kind, index, n, part)
                    break
        if picture is None:
            for gone in [i for i in self._shots if i < scene]:
                del self._shots[gone]
            picture = self._scene(scene, n)
        if not words:
            return picture
        fps = self._params.fps
        shown = 1.0
        if self._params.fade_in_s > 0:
            shown = min(shown, smooth(at / (self._params.fade_in_s * fps)))
        if self._params.fade_out_s > 0:
            shown = min(shown, smooth((self._edges[-1] - at) / (self._params.fade_out_s * fps)))
        if shown < 1:
            picture = cv2.addWeighted(picture, shown, self._ground, 1 - shown, 0)  # type: ignore[assignment]
        sprite = self._subtitle(at / fps)
        if sprite is not None:
            sprite.draw(picture)
        return picture

    def _blend(self, kind: str, index: int, n: int, part: float) -> Frame:
        """Between scene ``index`` and the next one."""
        if kind == "fade":
            picture = self._scene(index if part < 0.5 else index + 1, n)
            shown = smooth(abs(2 * part - 1))
            return cv2.addWeighted(picture, shown, self._ground, 1 - shown, 0)  # type: ignore[return-value]
        before, after = self._scene(index, n), self._scene(index + 1, n)
        if kind == "slide":
            width, height = self._params.width, self._params.height
            shift = np.array([[1, 0, smooth(part) * width], [0, 1, 0]])
            return cv2.warpAffine(  # type: ignore[return-value]
                np.hstack((before, after)), shift, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REPLICATE,
            )  # fmt: skip
        share = smooth(part)
        return cv2.addWeighted(before, 1 - share, after, share, 0)  # type: ignore[return-value]

    def _scene(self, index: int, n: int) -> Frame:
        if index not in self._shots:
            self._shots[index] = self._prepare(index)
        return self._shots[index](n)

    def _prepare(self, index: int) -> Callable[[int], Frame]:
        """Read a scene's picture and set its words; gives a function from the frame's number to the frame."""
        params, scene = self._params, self._params.scenes[index]
        width, height = params.width, params.height
        # A scene is seen from the beginning of the change into it to the end of the change out of it.
        first = self._changes[index - 1].start if index else 0.0
        last = self._changes[index].end if index < len(self._changes) else float(self._edges[-1])
        sprites = self._words(index, scene)
        file = self._pictures[index]
        if file is None:
            still = card(width, height, params.background)
            for sprite in sprites:
                sprite.draw(still)
            return lambda n: still.copy()
        picture = open_image(file, min_side=2, field=f"scenes.{index}.image")
        shot: Shot = make_shot(
            picture, width, height, motion=scene.motion, fit=scene.fit, zoom=params.zoom, seconds=(last - first) / params.fps,
            index=index, background=params.background,
        )  # fmt: skip
        calm_from = self._changes[index - 1].end if index else 0.0
        calm_to = self._changes[index].start if index < len(self._changes) else float(self._edges[-1])
        ramp = max(1.0, _TEXT_FADE_S * params.fps)

        def render(n: int) -> Frame:
            frame = shot.render((n + 0.5 - first) / (last - first), width, height)
            if sprites:
                shown = smooth(min(n + 0.5 - calm_from, calm_to - n - 0.5) / ramp)
                for sprite in sprites:
                    sprite.draw(frame, shown)
            return frame

        return render

    def _words(self, index: int, scene: Scene) -> list[Sprite]:
        params = self._params
        if scene.text is None:
            return []
        text, subtext = str(scene.text).strip(), str(scene.subtext or "").strip()
        for name, value, most in (("text", text, 200), ("subtext", subtext, 300)):
            if len(value) > most:
                field = f"scenes.{index}.{name}"
                raise InputError(f"{field} has {len(value)} characters; allowed: up to {most}", param=field)
        if not text:
            return []
        if scene.image is None or scene.text_style == "title":
            return title(
                text, subtext, params.width, params.height, accent=params.accent, background=params.background,
                on_card=scene.image is None,
            )  # fmt: skip
        return lower_third(
            text, subtext, params.width, params.height, accent=params.accent, raised=bool(self._cues)
        )

    def _subtitle(self, seconds: float) -> Sprite | None:
        index = bisect_right(self._starts, seconds) - 1
        if index < 0 or seconds >= self._cues[index].end_s:
            return None
        if self._cue[0] != index:
            params = self._params
            self._cue = (
                index,
                subtitle(self._cues[index].lines, params.width, params.height, params.subtitle_style),
            )
        return self._cue[1]

"""Kinds of video jobs."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contentfactory.jobs.spec import AnyInput, AudioInput, ImageInput, Params, Text, kind

MAX_CLIP_SECONDS = 600.0
"""Longest clip, seconds."""

MAX_CLIP_PIXELS = 40_000_000_000
"""Most pixels of one clip: width × height × frames (ten minutes of 1920×1080 at 30 frames a second fit)."""

MAX_FRAME_PIXELS = 3840 * 2160
"""Most pixels of a frame: what players take as H.264 of level 5.2."""

Motion = Literal["auto", "zoom_in", "zoom_out", "pan_left", "pan_right", "pan_up", "pan_down", "none"]
Transition = Literal["cut", "crossfade", "slide", "fade"]
Colour = Annotated[str, Field(pattern=r"^#[0-9A-Fa-f]{6}$", description="colour as #rrggbb")]


class Scene(BaseModel):
    """One picture of a clip, or a card with words on the background colour where it has no picture."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    image: ImageInput | None = Field(
        default=None, description="the picture; without one the scene is a card with its text"
    )
    duration_s: float | None = Field(
        default=None,
        ge=0.1,
        le=MAX_CLIP_SECONDS,
        description="how long it stands, seconds; shared out where left out",
    )
    motion: Motion = Field(
        default="auto", description="camera movement over the picture; auto varies it from scene to scene"
    )
    fit: Literal["auto", "cover", "contain"] = Field(
        default="auto",
        description="cover crops the picture to the frame, contain shows all of it over a blurred copy; auto crops only a little",
    )
    text: Text | None = Field(
        default=None, description="words over the picture, or on the card; up to 200 characters"
    )
    subtext: Text | None = Field(
        default=None, description="smaller line under the text; up to 300 characters"
    )
    text_style: Literal["lower_third", "title"] = Field(
        default="lower_third",
        description="lower_third stands at the lower left, title large in the middle; a card is always a title",
    )
    transition: Transition | None = Field(
        default=None, description="how this scene begins; the clip's transition where left out"
    )

    @model_validator(mode="after")
    def _has_content(self) -> "Scene":
        if self.image is None and self.text is None:
            raise ValueError("a scene needs an image or a text")
        if self.subtext is not None and self.text is None:
            raise ValueError("subtext needs a text above it")
        return self


def _seconds(params: "VideoCompose") -> float:
    """Compute seconds of one clip on the reference CPU: encoding goes by pixels and seconds of sound, setting up by scenes."""
    length = _length(params)
    pixels = params.width * params.height * params.fps * length
    sound = 0.06 * length if params.narration is not None or params.music is not None else 0.0
    return 0.5 + 0.1 * len(params.scenes) + sound + pixels / 32_000_000


def _length(params: "VideoCompose") -> float:
    """Length of the clip as far as params tell, seconds: by its durations, else by its words, else five seconds a scene."""
    given = [s.duration_s for s in params.scenes if s.duration_s is not None]
    if len(given) == len(params.scenes):
        return sum(given)
    if params.narration is not None and isinstance(params.narration_text, str):
        # Speech runs at about 15 characters a second.
        return max(sum(given), params.lead_s + len(params.narration_text) / 15 + params.tail_s)
    return sum(given) + (len(params.scenes) - len(given)) * params.scene_s


@kind(
    "video.compose",
    queue="video",
    outputs=("video/mp4", "application/x-subrip", "text/vtt", "image/jpeg"),
    time_limit_s=3600,
    progress_s=120,
    seconds=_seconds,
)
class VideoCompose(Params):
    """Compose a clip: pictures with pan and zoom, narration, music ducked under speech, subtitles and transitions.

    Writes ``clip.mp4`` (H.264 and AAC, plays in browsers while it downloads) first, then ``subtitles.srt`` and
    ``subtitles.vtt`` where wanted and there are words, and ``poster.jpg``. The clip is as long as the narration with its
    lead and tail, to the frame, unless every scene has a duration; scenes without one share the rest, changing between
    sentences. Without narration the clip is as long as its scenes together.
    """

    scenes: Annotated[list[Scene], Field(min_length=1, max_length=200)] = Field(
        description="what is seen, in order"
    )
    narration: AudioInput | None = Field(default=None, description="speech of the clip; up to 600 seconds")
    narration_timings: AnyInput | None = Field(
        default=None,
        description="JSON with start_s, end_s and text of each sentence, as audio.speech writes in timings.json, or a transcript",
    )
    narration_text: Text | None = Field(
        default=None,
        description="words for the subtitles where there are no timings: timed by the narration's pauses, or spread over a silent clip",
    )
    music: AudioInput | None = Field(
        default=None, description="music; repeated where it is shorter than the clip, faded out at the end"
    )
    music_gain_db: float = Field(
        default=-10.0,
        ge=-60,
        le=12,
        description="level of the music against the narration while nobody speaks, dB",
    )
    duck_db: float = Field(
        default=12.0, ge=0, le=40, description="how much further the music goes down under speech, dB"
    )
    loudness_lufs: float | None = Field(
        default=-16.0,
        ge=-40,
        le=-10,
        description="loudness of the sound, LUFS; null leaves narration and music as they are",
    )
    subtitles: Literal["burn", "sidecar", "both", "none"] = Field(
        default="both", description="subtitles in the picture, as .srt and .vtt files, both or neither"
    )
    subtitle_style: Literal["outline", "box"] = Field(
        default="outline", description="what sets subtitles off from the picture"
    )
    width: int = Field(default=854, ge=128, le=3840, multiple_of=2, description="width, pixels; even")
    height: int = Field(default=480, ge=128, le=3840, multiple_of=2, description="height, pixels; even")
    fps: int = Field(default=24, ge=1, le=60, description="frames a second")
    transition: Transition = Field(
        default="crossfade",
        description="how one scene gives way to the next; fade goes through the background colour",
    )
    transition_s: float = Field(
        default=0.5,
        ge=0,
        le=5,
        description="length of a transition, seconds; at most half of the shorter scene beside it",
    )
    zoom: float = Field(
        default=0.12, ge=0, le=0.5, description="how far the camera zooms over a scene; 0.12 is 12 %"
    )
    background: Colour = Field(default="#14161c", description="colour of cards and fades, #rrggbb")
    accent: Colour = Field(
        default="#f2b632", description="colour of the bar beside titles and lower thirds, #rrggbb"
    )
    lead_s: float = Field(
        default=0.0, ge=0, le=60, description="picture before the narration begins, seconds"
    )
    tail_s: float = Field(default=0.0, ge=0, le=60, description="picture after the narration ends, seconds")
    fade_in_s: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="fade of picture and music from the background at the start, seconds",
    )
    fade_out_s: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="fade of picture and music to the background at the end, seconds",
    )
    scene_s: float = Field(
        default=5.0,
        ge=0.1,
        le=60,
        description="length of a scene without duration_s where no narration sets it, seconds",
    )
    quality: int = Field(
        default=19, ge=10, le=40, description="constant rate factor of H.264; lower is better and larger"
    )
    encoder: Literal["auto", "libx264", "libopenh264", "h264_nvenc"] = Field(
        default="auto",
        description="H.264 encoder; auto takes the first of libx264 and libopenh264 that is installed",
    )

    @model_validator(mode="after")
    def _fits(self) -> "VideoCompose":
        if self.narration_timings is not None and self.narration is None:
            raise ValueError("narration_timings needs the narration that it is about")
        given = [s.duration_s for s in self.scenes if s.duration_s is not None]
        if self.width * self.height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"the frame has {self.width}×{self.height} pixels; allowed: up to {MAX_FRAME_PIXELS:,} (3840×2160, upright or not)"
            )
        total = sum(given)
        if len(given) < len(self.scenes) and self.narration is None:
            total += (len(self.scenes) - len(given)) * self.scene_s
        check_size(total, self.width, self.height, self.fps)
        return self


def check_size(seconds: float, width: int, height: int, fps: int) -> None:
    """Refuse a clip that is too long or has too many pixels.

    Args:
        seconds: Length.
        width: Pixels.
        height: Pixels.
        fps: Frames a second.

    Raises:
        ValueError: Naming the value and the limit.
    """
    if seconds > MAX_CLIP_SECONDS + 1e-6:
        raise ValueError(f"the clip would last {seconds:.2f} s; allowed: up to {MAX_CLIP_SECONDS:g} s")
    pixels = int(seconds * fps * width * height)
    if pixels > MAX_CLIP_PIXELS:
        raise ValueError(
            f"the clip would have {pixels:,} pixels ({width}×{height}, {fps} frames a second, {seconds:.2f} s); "
            f"allowed: up to {MAX_CLIP_PIXELS:,}"
        )


__all__ = [
    "MAX_CLIP_PIXELS",
    "MAX_CLIP_SECONDS",
    "MAX_FRAME_PIXELS",
    "Colour",
    "Motion",
    "Scene",
    "Transition",
    "VideoCompose",
    "check_size",
]

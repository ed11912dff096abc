"""``video.compose``: what comes out is decoded, measured and compared with what was asked for."""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from contentfactory.errors import InputError, JobCancelled
from contentfactory.jobs.spec import get_kind, iter_inputs
from contentfactory.jobs.video import MAX_CLIP_PIXELS
from worker.context import Failure, InputFile, JobContext, Output
from worker.media import audio, subtitles
from worker.media.subtitles import Span
from worker.media.video import ClipWriter, available_encoders, frames, probe
from worker.runners import get_runner
from worker.runners.video.pictures import make_shot
from worker.runners.video.plan import plan_changes, share_out

KIND = get_kind("video.compose")
RATE = 48_000
RED, BLUE, GREEN = (200, 40, 30), (30, 60, 200), (30, 160, 60)
SMALL = {"width": 256, "height": 144, "fps": 12}


def save(folder: Path, name: str, colour: tuple[int, int, int], size: tuple[int, int] = (320, 180)) -> str:
    """A picture of one colour with a pattern that a camera movement shows."""
    picture = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(picture)
    for x in range(10, size[0], 40):
        draw.ellipse((x, size[1] // 2 - 8, x + 16, size[1] // 2 + 8), fill=tuple(255 - c for c in colour))
    picture.save(folder / name)
    return f"file:{folder / name}"


def bursts(words: list[tuple[float, float]], seconds: float) -> np.ndarray:
    """A voice as far as energy goes: bands of noise around 2 kHz in the given stretches."""
    rng = np.random.default_rng(1)
    t = np.arange(round(seconds * RATE)) / RATE
    carrier = np.sin(2 * np.pi * 2000 * t + 3 * np.sin(2 * np.pi * 140 * t)) * (
        0.7 + 0.3 * rng.random(t.size)
    )
    gate = np.zeros(t.size)
    for start, end in words:
        gate[round(start * RATE) : round(end * RATE)] = 1
    return (0.3 * carrier * gate).astype(np.float32)


def wav(folder: Path, name: str, samples: np.ndarray) -> str:
    buffer = audio.AudioBuffer(np.atleast_2d(samples).astype(np.float32), RATE)
    (folder / name).write_bytes(audio.encode(buffer, "wav"))
    return f"file:{folder / name}"


def compose(folder: Path, *specs: dict, **context: object) -> list[Output | Failure]:
    folder.mkdir(parents=True, exist_ok=True)
    params = [KIND.validate(spec) for spec in specs]
    return list(get_runner("video.compose")(params, JobContext(folder, seeds=[0] * len(params), **context)))


def one(found: list[Output | Failure], name: str) -> Output:
    failures = [f.error for f in found if isinstance(f, Failure)]
    assert not failures, failures
    return next(o for o in found if isinstance(o, Output) and o.name == name)


def level(samples: np.ndarray, start: float, end: float, hertz: float) -> float:
    """Level of one frequency in a stretch, dB."""
    part = samples[round(start * RATE) : round(end * RATE)].astype(np.float64)
    t = np.arange(part.size) / RATE
    return 20 * np.log10(
        abs(np.mean(part * np.hanning(part.size) * np.exp(-2j * np.pi * hertz * t))) * 4 + 1e-9
    )


SPOKEN = [(0.1, 1.3), (1.9, 3.0), (5.0, 5.9)]
SENTENCES = ["The first of them is red.", "The second one is blue.", "And green it ends."]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Output], dict, Path]:
    """A clip with everything in it, and its inputs' folder."""
    folder = tmp_path_factory.mktemp("inputs")
    timings = [{"start_s": a, "end_s": b, "text": t} for (a, b), t in zip(SPOKEN, SENTENCES, strict=True)]
    (folder / "timings.json").write_text(json.dumps({"duration_s": 6.13, "sentences": timings}))
    t = np.arange(RATE * 2) / RATE
    spec = {
        "scenes": [
            {"image": save(folder, "red.png", RED), "text": "Red", "subtext": "the first"},
            {"image": save(folder, "blue.png", BLUE), "motion": "pan_right"},
            {"image": save(folder, "green.png", GREEN)},
        ],
        "narration": wav(folder, "voice.wav", bursts(SPOKEN, 6.13)),
        "narration_timings": f"file:{folder / 'timings.json'}",
        "music": wav(folder, "music.wav", np.stack([0.3 * np.sin(2 * np.pi * 250 * t)] * 2)),
        **SMALL,
    }
    scratch = tmp_path_factory.mktemp("scratch")
    found = compose(scratch, spec)
    one(found, "clip.mp4")
    return found, spec, scratch


def test_outputs_and_container(clip):
    found, _, _ = clip
    assert [(o.name, o.media_type) for o in found] == [
        ("clip.mp4", "video/mp4"), ("subtitles.srt", "application/x-subrip"), ("subtitles.vtt", "text/vtt"),
        ("poster.jpg", "image/jpeg"),
    ]  # fmt: skip
    path, meta = found[0].data, found[0].meta
    info = probe(path)
    assert (info.codec, info.profile, info.pixel_format, info.colour) == (
        "h264",
        "High",
        "yuv420p",
        (1, 1, 1, 1),
    )
    assert (info.width, info.height, info.frame_rate) == (256, 144, 12)
    assert (info.audio_codec, info.sample_rate, info.channels) == ("aac", RATE, 2)
    # As long as the narration, to within a frame, in all that says so; sound and picture alike.
    assert info.frames == meta["frames"] == len(list(frames(path))) == 74
    assert abs(info.video_s - 6.13) <= 1 / 12
    assert info.duration_s == pytest.approx(meta["duration_s"], abs=0.03)
    assert info.audio_s == pytest.approx(info.video_s, abs=0.025)
    assert meta["has_audio"] is True
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat"), "a browser must find the index first"
    assert b"Lavf" not in data
    poster = np.asarray(Image.open(io.BytesIO(found[3].data)))
    assert poster.shape == (144, 256, 3)
    assert poster[30, 60, 0] > 150 > poster[30, 60, 2], "the poster shows the first scene"


def test_scenes_follow_the_sentences_with_a_crossfade(clip):
    path = clip[0][0].data
    seen = {round(t, 2): f[8:30].reshape(-1, 3).mean(axis=0) for t, f in frames(path)}
    times = np.array(sorted(seen))

    def colour(at: float) -> np.ndarray:
        return seen[times[np.abs(times - at).argmin()]]

    # Scenes change half-way between sentences: at 1.6 and at 4.0 s.
    for at, wanted in ((0.6, RED), (2.8, BLUE), (5.5, GREEN)):
        assert np.abs(colour(at) - wanted).max() < 14, (at, colour(at))
    middle = colour(1.6)
    assert np.abs(middle - (np.array(RED) + BLUE) / 2).max() < 30, middle
    assert np.abs(colour(4.0) - (np.array(BLUE) + GREEN) / 2).max() < 30
    # Nothing but the changes is abrupt, and no picture stands still.
    shots = [f.astype(int) for _, f in frames(path)]
    steps = [np.abs(b - a).mean() for a, b in itertools.pairwise(shots)]
    assert min(steps) > 0.02
    assert max(steps) < 40


def test_subtitles_are_burnt_in_while_they_are_spoken(clip, tmp_path):
    found, spec, _ = clip
    plain = compose(tmp_path, {**spec, "subtitles": "none"})
    assert [o.name for o in plain] == ["clip.mp4", "poster.jpg"]
    bare = dict(frames(one(plain, "clip.mp4").data))
    for at, frame in frames(found[0].data):
        # White letters with a dark rim, at the foot.
        changed = np.abs(frame.astype(int) - bare[at])[112:140, 40:216].max(axis=2) > 60
        if 0.2 < at < 1.2 or 2.0 < at < 2.9 or 5.1 < at < 5.8:
            assert changed.mean() > 0.04, at
        elif 3.7 < at < 4.9:
            assert changed.mean() < 0.01, at
    assert (
        found[1]
        .data.decode()
        .startswith("1\n00:00:00,100 --> 00:00:01,350\nThe first of them is red.\n\n2\n")
    )
    assert (
        found[2]
        .data.decode()
        .startswith("WEBVTT\n\n00:00:00.100 --> 00:00:01.350\nThe first of them is red.\n\n")
    )


def test_music_goes_down_under_speech(clip):
    sound = audio.decode(clip[0][0].data, max_seconds=10)
    left = sound.samples[0]
    spoken, quiet = level(left, 0.3, 1.2, 250), level(left, 3.9, 4.5, 250)
    assert quiet - spoken > 9, (spoken, quiet)
    assert quiet > -45, "between sentences the music is there"
    voice = audio.AudioBuffer(sound.samples[:, : round(1.3 * RATE)], RATE)
    assert audio.loudness(voice) == pytest.approx(-16, abs=2.5)
    assert audio.peak_db(sound) < 0
    # The narration has not moved: speech begins where it began.
    speech = subtitles.find_speech(bursts(SPOKEN, 6.13), RATE)
    strong = np.flatnonzero(np.abs(left) > 0.12)
    assert strong[0] / RATE == pytest.approx(speech.start_s, abs=0.03)


def test_same_params_same_bytes(clip, tmp_path):
    found, spec, _ = clip
    other = {"scenes": [{"text": "Alone"}], "scene_s": 0.5, **SMALL}
    again = compose(tmp_path, other, spec)
    mine = {o.name: o.data for o in again if o.job == 1}
    for out in found:
        data = [d.read_bytes() if isinstance(d, Path) else d for d in (out.data, mine[out.name])]
        assert data[0] == data[1], out.name


@pytest.mark.parametrize("size", [(848, 480), (854, 480), (270, 480)])
def test_encoder_gives_same_bytes_at_awkward_sizes(tmp_path, size):
    # x264's AVX-512 code did not: these widths are not whole multiples of eight macroblocks.
    yy, xx = np.mgrid[: size[1], : size[0]]
    found = set()
    for run in range(4):
        junk = np.full((run + 1) * 400_000, run, np.uint8)  # noqa: F841 (dirties the heap)
        with ClipWriter(tmp_path / "x.mp4", *size, 24) as writer:
            for n in range(10):
                grey = (np.sin((xx + n * 1.3) / 9) + np.cos(yy / 7)) * 40 + 128 + xx % 3
                writer.write(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2))
        found.add((tmp_path / "x.mp4").read_bytes())
    assert len(found) == 1


def test_silent_clip_with_cards_and_words(tmp_path):
    spec = {
        "scenes": [
            {"text": "Whales", "subtext": "in short", "duration_s": 1.0},
            {"image": save(tmp_path, "a.png", RED, (200, 200)), "duration_s": 1.5, "transition": "fade"},
            {"image": save(tmp_path, "b.png", BLUE), "transition": "slide"},
        ],
        "scene_s": 1.0, "narration_text": "One thing. And another thing.", "fade_out_s": 0.5, **SMALL,
    }  # fmt: skip
    found = compose(tmp_path / "s", spec)
    out = one(found, "clip.mp4")
    info = probe(out.data)
    assert (info.frames, info.audio_codec, out.meta["has_audio"]) == (42, None, False)
    shots = [f for _, f in frames(out.data)]
    title = shots[3][40:110, 60:200]
    assert (title > 200).mean() > 0.02, "white words"
    assert ((title[..., 0] > 180) & (title[..., 2] < 110)).any(), "the bar has the accent's colour"
    # A square picture is shown whole: the sides are its dimmed copy.
    middle = shots[20]
    assert middle[30, 128, 0] > 150
    assert middle[30, 10, 0] < 130
    # Just before the middle of the slide, at 2.5 s, the old picture is on the left and the new one on the right.
    slide = shots[29]
    assert slide[20, 100, 0] > slide[20, 100, 2]
    assert slide[20, 230, 2] > slide[20, 230, 0]
    assert shots[-1][:100].mean() < 45, "faded to the dark background"
    assert b"And another thing." in one(found, "subtitles.srt").data


def test_camera_moves_by_parts_of_a_pixel():
    yy, xx = np.mgrid[:400, :720]
    spot = 255 * np.exp(-((xx - 360) ** 2 + (yy - 200) ** 2) / (2 * 4**2))
    picture = Image.fromarray(np.repeat(np.rint(spot).astype(np.uint8)[..., None], 3, axis=2))
    for motion, axis in (("pan_right", 1), ("pan_down", 0)):
        shot = make_shot(
            picture, 320, 180, motion=motion, fit="cover", zoom=0.12, seconds=5, index=0, background="#000000"
        )
        at = []
        for n in range(120):
            grey = shot.render((n + 0.5) / 120, 320, 180)[..., 0].astype(float)
            at.append((grey * np.indices(grey.shape)[axis]).sum() / grey.sum())
        step = np.diff(at)
        # The camera goes right or down, the picture the other way, by less than a pixel a frame. Whole-pixel crops jump
        # by 0 or 1: their second difference is some 0.4 rms.
        assert step.max() < 0, motion
        assert step.min() > -1, motion
        assert np.sqrt(np.mean(np.diff(step) ** 2)) < 0.03, motion
        assert abs(step[0]) < abs(step[60]) > abs(step[-1]), "it starts and ends gently"


def test_zoom_shows_more_or_less():
    picture = Image.new("RGB", (320, 180), RED)
    ImageDraw.Draw(picture).rectangle((120, 60, 200, 120), fill=BLUE)
    for motion, grows in (("zoom_in", True), ("zoom_out", False)):
        shot = make_shot(
            picture, 320, 180, motion=motion, fit="cover", zoom=0.2, seconds=3, index=0, background="#000000"
        )
        blue = [(shot.render(x, 320, 180)[..., 2] > 120).mean() for x in (0, 0.5, 1)]
        assert (blue == sorted(blue)) is grows
        assert len(set(blue)) == 3
        assert max(blue) / min(blue) == pytest.approx(1.44, abs=0.05)


def test_words_without_timings_find_the_pauses():
    speech = subtitles.find_speech(bursts(SPOKEN, 6.13), RATE)
    assert (speech.start_s, speech.end_s) == (pytest.approx(0.1, abs=0.02), pytest.approx(5.9, abs=0.02))
    found = subtitles.align(SENTENCES, speech.start_s, speech.end_s, speech)
    for span, (start, end) in zip(found, SPOKEN, strict=True):
        assert (span.start_s, span.end_s) == (pytest.approx(start, abs=0.03), pytest.approx(end, abs=0.03))


def test_cues_fit_the_screen_and_the_reader():
    text = (
        "The blue whale, which can grow to a length of almost thirty metres, is the largest animal that has ever lived "
        "on our planet, and its heart alone weighs as much as a small car."
    )
    cues = subtitles.make_cues(
        [Span(0.0, 10.5, text), Span(11.0, 11.3, "Yes."), Span(11.4, 13.0, "It is true.")], 14.0
    )
    assert " ".join(c.text for c in cues) == f"{text} Yes. It is true."
    for cue in cues:
        assert len(cue.lines) <= 2
        assert max(map(len, cue.lines)) <= 42
        assert len(cue.text) / (cue.end_s - cue.start_s) <= 20
    assert cues[0].text.endswith("thirty metres,")
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(cues))
    narrow = subtitles.make_cues([Span(0.0, 10.5, text)], 14.0, limit=24)
    assert max(len(line) for c in narrow for line in c.lines) <= 24


def test_other_scripts_wrap():
    lines = subtitles.wrap("人工智能正在改变我们的生活方式，从医疗到教育，从交通到娱乐。", 42)
    assert len(lines) == 2
    assert all(subtitles.columns(line) <= 42 and line[0] not in "，。" for line in lines)
    assert subtitles.split_sentences("今日は。元気です！ Dr. Who paid 3.5 dollars. Done.") == [
        "今日は。", "元気です！", "Dr. Who paid 3.5 dollars.", "Done.",
    ]  # fmt: skip
    cues = subtitles.make_cues([Span(0, 1, "a <b> & c --> d")], 2)
    assert "a &lt;b&gt; &amp; c --&gt; d" in subtitles.to_vtt(cues)
    assert subtitles.to_srt(cues).count("-->") == 1


@pytest.mark.parametrize(
    ("words", "where"),
    [("人工智能正在改变我们的生活方式", "cjk"), ("الحوت الأزرق هو أكبر حيوان", "arabic"), ("W" * 36, "wide")],
)
def test_burnt_in_words_stay_inside_the_margins(words, where):
    from worker.runners.video.overlays import subtitle

    sprite = subtitle([words], 640, 360, "outline")
    assert sprite is not None, where
    height, width = sprite.keep.shape[:2]
    assert sprite.x >= 640 * 0.03
    assert sprite.x + width <= 640 * 0.97
    assert sprite.y > 360 * 0.75
    assert sprite.y + height <= 360 * 0.98
    frame = np.full((360, 640, 3), 255, np.uint8)
    sprite.draw(frame)
    assert frame.min() < 40, "a rim sets white letters off a white picture"


def test_plan_shares_time():
    # The two of three breaks that make three scenes most alike.
    assert share_out([None] * 3, 9.0, 90, 10, [1.0, 3.2, 6.1]) == [0, 32, 61, 90]
    # Too few sentences: evenly.
    assert share_out([None] * 3, 9.0, 90, 10, [1.0]) == [0, 30, 60, 90]
    assert share_out([2.0, None, None], 9.0, 90, 10, [1.0]) == [0, 20, 55, 90]
    changes = plan_changes([0, 4, 40], ["cut", "crossfade"], 1.0, 10)
    assert changes[0].end - changes[0].start == 2, "half of the shorter scene"
    with pytest.raises(InputError, match=r"take 8\.90 s of the clip's 9\.00 s"):
        share_out([8.9, None], 9.0, 90, 10)


def test_bad_params_are_refused():
    image = {"image": "file:a.png"}
    for spec, words in [
        ({"scenes": []}, "scenes: .*at least 1"),
        ({"scenes": [{}]}, "needs an image or a text"),
        ({"scenes": [image], "width": 855}, "width: .*multiple of 2.*855"),
        ({"scenes": [image], "width": 3842}, "width: .*3840"),
        (
            {"scenes": [image] * 7, "scene_s": 60, "narration_timings": "file:t.json"},
            "narration_timings needs the narration",
        ),
        ({"scenes": [{**image, "duration_s": 400}] * 2}, r"800\.00 s; allowed: up to 600 s"),
        (
            {"scenes": [{**image, "duration_s": 500}], "width": 3840, "height": 2160, "fps": 60},
            f"{MAX_CLIP_PIXELS:,}",
        ),
        ({"scenes": [image], "background": "red"}, "background"),
    ]:
        with pytest.raises(InputError, match=words):
            KIND.validate(spec)
    inputs = iter_inputs(
        KIND.validate(
            {"scenes": [{"text": {"job": "t"}}, {"image": {"job": "p"}}], "narration": {"job": "s"}}
        )
    )
    assert [(path, kind) for path, kind, _ in inputs] == [
        ("scenes.0.text", "text"), ("scenes.1.image", "image"), ("narration", "audio"),
    ]  # fmt: skip


def test_bad_inputs_fail_alone_with_their_field(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "timings.json").write_text('[{"start_s": 2, "end_s": 1, "text": "x"}]')
    voice = wav(tmp_path, "voice.wav", bursts([(0.1, 0.9)], 1.0))
    good = {"scenes": [{"text": "Fine"}], "scene_s": 0.5, **SMALL}
    image = save(tmp_path, "a.png", RED)
    bad = [
        ({"scenes": [{"image": f"file:{tmp_path / 'broken.png'}"}]}, "scenes.0.image"),
        ({"scenes": [{"image": image}], "narration": image}, "narration"),
        ({"scenes": [{"image": image}], "narration": voice, "narration_timings": f"file:{tmp_path / 'timings.json'}"}, "narration_timings"),
        ({"scenes": [{"image": image, "duration_s": 0.5}], "narration": voice}, "scenes"),
        ({"scenes": [{"image": image}], "music": image}, "music"),
        ({"scenes": [{"text": "x" * 201}]}, "scenes.0.text"),
    ]  # fmt: skip
    found = compose(tmp_path / "s", good, *[{**spec, "scene_s": 0.5, **SMALL} for spec, _ in bad], good)
    failed = {f.job: f.error for f in found if isinstance(f, Failure)}
    assert sorted(failed) == [1, 2, 3, 4, 5, 6]
    for job, (_, field) in enumerate(bad, 1):
        assert isinstance(failed[job], InputError)
        assert failed[job].param == field, failed[job]
    assert {o.job for o in found if isinstance(o, Output)} == {0, 7}
    assert not list((tmp_path / "s").glob("clip-[1-6].mp4")), "nothing unfinished stays"


def test_unavailable_encoder_is_named(tmp_path):
    missing = next(
        name
        for name in ("libopenh264", "h264_nvenc")
        if name not in available_encoders() or name == "h264_nvenc"
    )
    found = compose(tmp_path, {"scenes": [{"text": "x"}], "scene_s": 0.5, "encoder": missing, **SMALL})
    if isinstance(found[0], Output):
        pytest.skip(f"{missing} works here")
    assert found[0].error.param == "encoder"
    assert missing in found[0].error.message


def test_cancel_stops_and_leaves_nothing(tmp_path):
    asked = []

    def cancelled(job: int) -> bool:
        asked.append(job)
        return len(asked) > 5

    found = compose(tmp_path, {"scenes": [{"text": "Long"}], "scene_s": 60, **SMALL}, is_cancelled=cancelled)
    assert isinstance(found[0].error, JobCancelled)
    assert not list(tmp_path.glob("*.mp4"))


def test_progress_rises(tmp_path):
    params = [KIND.validate({"scenes": [{"text": "x"}], "scene_s": 5, **SMALL})]
    context = JobContext(tmp_path, seeds=[0])
    list(get_runner("video.compose")(params, context))
    told = [fraction for _, fraction, _, _ in context.reports]
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) >= 6


def test_probe_and_frames_refuse_what_is_no_video(tmp_path, clip):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    concat = tmp_path / "list.mp4"
    concat.write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    for path in (playlist, concat, empty):
        with pytest.raises(InputError, match="not a video"):
            probe(InputFile(path, "video/mp4"))
    path = clip[0][0].data
    with pytest.raises(InputError, match="has 74 frames of 256×144; allowed are 1,000 pixels"):
        list(frames(path, max_pixels=1000))
    some = list(frames(path, every=12, start_s=1.0, end_s=4.0))
    assert [round(t, 2) for t, _ in some] == [1.0, 2.0, 3.0]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(list(frames(cut))) < 74


def test_speech_job_fits(tmp_path):
    """Narration, timings and clip as a pipeline makes them, with the real voice."""
    kind = get_kind("audio.speech")
    (tmp_path / "speech").mkdir()
    context = JobContext(tmp_path / "speech", seeds=[1])
    context.models = {"model": context.resolve_model(kind.default_model)}
    text = "Honey never spoils. Jars from old tombs were still good to eat."
    for out in get_runner("audio.speech")([kind.validate({"text": text})], context):
        data = out.data() if callable(out.data) else out.data
        (tmp_path / out.name).write_bytes(data.read_bytes() if isinstance(data, Path) else data)
    spec = {
        "scenes": [{"image": save(tmp_path, "a.png", RED)}, {"image": save(tmp_path, "b.png", BLUE)}],
        "narration": f"file:{tmp_path / 'speech.wav'}",
        **SMALL,
    }
    timed = compose(tmp_path / "t", {**spec, "narration_timings": f"file:{tmp_path / 'timings.json'}"})
    guessed = compose(tmp_path / "g", {**spec, "narration_text": text})
    seconds = audio.probe(tmp_path / "speech.wav").duration_s
    assert abs(probe(one(timed, "clip.mp4").data).video_s - seconds) <= 1 / 12
    starts = [
        [
            3600 * int(h) + 60 * int(m) + float(f"{s}.{ms}")
            for h, m, s, ms in re.findall(r"(\d+):(\d+):(\d+),(\d+) -->", srt)
        ]
        for srt in (one(found, "subtitles.srt").data.decode() for found in (timed, guessed))
    ]
    assert starts[0] == pytest.approx(starts[1], abs=0.3), "pauses tell as much as the voice's own times"

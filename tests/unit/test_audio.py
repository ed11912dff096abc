"""Speech, music and transcription, with the real models; and the reading and writing of audio files."""

import io
import itertools
import json
import shutil
from pathlib import Path

import mido
import numpy as np
import pytest

from contentfactory.catalogue import load_catalogue
from contentfactory.errors import InputError, JobCancelled, ModelUnavailable
from contentfactory.jobs.audio import AUDIO_TYPES, AudioMusic, AudioSpeech, AudioTranscribe
from worker.context import Failure, InputFile, JobContext, Output
from worker.engines.files import ResolvedModel, locate
from worker.engines.speech import load_voice
from worker.engines.whisper import Segment, Word, load_recogniser
from worker.media.audio import (
    SILENCE_LUFS,
    AudioBuffer,
    decode,
    duck,
    encode,
    limit,
    loudness,
    mix,
    normalize,
    peak_db,
    probe,
    resample,
    stretch,
)
from worker.models import ModelCache
from worker.runners import get_runner
from worker.runners.audio import reading
from worker.runners.audio.accuracy import compare
from worker.runners.audio.composition import compose
from worker.runners.audio.transcribe import subtitles

RATE = 24_000
SENTENCES = [
    "It weighs 4,500 kg in 1969, about 3.5 m.",
    "The Hubble Space Telescope orbits the Earth at about 540 km, once every 95 minutes.",
    "Mount Everest is 8,849 m high; Edmund Hillary climbed it on 29 May 1953.",
    "Water boils at 100 °C (212 °F) at sea level, e.g. in Amsterdam.",
    "The Eiffel Tower was built by Gustave Eiffel between 1887 and 1889, and is 330 m tall.",
]


def tone(
    seconds: float, hz: float = 440.0, rate: int = RATE, channels: int = 1, level: float = 0.5
) -> AudioBuffer:
    wave = level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return AudioBuffer(np.repeat(wave[None, :].astype(np.float32), channels, axis=0), rate)


def pitch_of(buffer: AudioBuffer) -> float:
    wave = buffer.samples[0]
    return float(
        np.argmax(np.abs(np.fft.rfft(wave * np.hanning(wave.size)))) * buffer.sample_rate / wave.size
    )


# Files


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "opus", "aac"])
def test_a_tone_survives_every_format_and_gives_the_same_bytes_twice(form: str) -> None:
    sound = tone(1.5, channels=2)
    data = encode(sound, form)
    assert data == encode(sound, form)
    back = decode(data, max_seconds=3)
    assert back.channels == 2
    assert back.duration_s == pytest.approx(1.5, abs=0.1)
    assert pitch_of(back) == pytest.approx(440, abs=2)
    assert loudness(back) == pytest.approx(loudness(sound), abs=1.0)
    if form in ("wav", "flac"):
        assert np.abs(back.samples - sound.samples).max() < 1e-4
    info = probe(data)
    assert (info.channels, info.sample_rate) == (2, 48_000 if form == "opus" else RATE)


def test_pcm_is_bare_samples() -> None:
    assert np.frombuffer(encode(tone(0.1, level=1.0), "pcm"), "<i2").max() >= 32_700


def test_decoding_resamples_and_mixes() -> None:
    left = tone(1, 440, 44_100).samples
    sound = AudioBuffer(np.concatenate([left, np.zeros_like(left)]), 44_100)
    back = decode(encode(sound, "wav"), max_seconds=2, sample_rate=16_000, mono=True)
    assert (back.channels, back.sample_rate, back.samples.shape[1]) == (1, 16_000, 16_000)
    assert pitch_of(back) == pytest.approx(440, abs=2)
    assert 0.2 < np.abs(back.samples).max() < 0.4


@pytest.mark.parametrize(
    "data",
    [b"", b"not audio at all " * 40, b"\x89PNG\r\n\x1a\n" + b"\0" * 600, encode(tone(1), "wav")[:44]],
    ids=["empty", "text", "picture", "header only"],
)
def test_what_is_not_audio_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InputError, match="my sound"):
        decode(data, max_seconds=5, name="my sound")


def test_playlists_never_open_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(tone(1), "wav"))

    class Named(io.BytesIO):
        name = "list.m3u8"

    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    for data in (playlist, f"ffconcat version 1.0\nfile '{secret}'\n".encode()):
        with pytest.raises(InputError):
            decode(Named(data), max_seconds=5)
    with pytest.raises(InputError):
        decode(playlist, max_seconds=5)


def test_a_bomb_is_stopped_by_its_header_and_without_one() -> None:
    bomb = bytearray(encode(AudioBuffer(np.zeros((1, RATE * 400), np.float32), RATE), "flac"))
    assert len(bomb) < 100_000
    with pytest.raises(InputError, match=r"400\.0 s long; allowed: up to 30 s"):
        decode(bytes(bomb), max_seconds=30)
    bomb[21] &= 0xF0  # the header's number of samples: now unknown
    bomb[22:26] = b"\0\0\0\0"
    with pytest.raises(InputError, match="longer than 30 s"):
        decode(bytes(bomb), max_seconds=30)


def test_numbers_that_are_not_finite_become_silence() -> None:
    import soundfile

    out = io.BytesIO()
    wave = np.full(RATE, 0.25, np.float32)
    wave[100:200] = np.nan
    wave[300] = np.inf
    soundfile.write(out, wave, RATE, format="WAV", subtype="FLOAT")
    back = decode(out.getvalue(), max_seconds=2)
    assert np.isfinite(back.samples).all()
    assert back.samples[0, 150] == 0


def test_loudness_follows_the_standard() -> None:
    # BS.1770: a full-scale 997 Hz sine in one channel reads -3.01 LUFS.
    assert loudness(tone(5, 997, 48_000, level=1.0)) == pytest.approx(-3.01, abs=0.02)
    assert loudness(tone(5, 997, 48_000, channels=2, level=0.1)) == pytest.approx(-20, abs=0.05)
    assert loudness(tone(0.1, 997, 48_000, level=1.0)) == pytest.approx(-3.01, abs=0.3)
    assert loudness(AudioBuffer(np.zeros((1, RATE), np.float32), RATE)) == SILENCE_LUFS
    # Silence around a sound is gated out.
    half = AudioBuffer(
        np.concatenate([tone(4, 997, 48_000).samples, np.zeros((1, 48_000 * 6), np.float32)], axis=1), 48_000
    )
    assert loudness(half) == pytest.approx(loudness(tone(4, 997, 48_000)), abs=0.4)


def test_normalizing_reaches_the_loudness_and_keeps_the_ceiling() -> None:
    noise = np.random.default_rng(1).standard_normal((2, RATE * 3)).astype(np.float32)
    noise[:, RATE : RATE + 40] *= 30  # a click far above the rest
    done = normalize(AudioBuffer(noise * np.float32(0.01), RATE), -16, ceiling_db=-1.5)
    assert loudness(done) == pytest.approx(-16, abs=0.5)
    assert np.abs(done.samples).max() <= 10 ** (-1.5 / 20) + 1e-4
    assert np.abs(limit(tone(1, level=3.0), -6).samples).max() <= 10 ** (-6 / 20) + 1e-4
    assert peak_db(tone(1, level=0.5)) == pytest.approx(-6.02, abs=0.1)


@pytest.mark.parametrize("tempo", [0.25, 0.6, 1.7, 4.0])
def test_stretching_keeps_the_pitch(tempo: float) -> None:
    done = stretch(tone(2, channels=2), tempo)
    assert done.samples.shape == (2, round(2 * RATE / tempo))
    assert pitch_of(done) == pytest.approx(440, abs=4)


def test_music_ducks_under_speech_only() -> None:
    music = tone(8, 300, channels=2)
    speech = AudioBuffer(
        np.concatenate([np.zeros(RATE * 3), tone(2).samples[0], np.zeros(RATE * 3)])[None, :].astype(
            np.float32
        ),
        RATE,
    )
    ducked = duck(music, speech, depth_db=12)
    assert ducked.shape == music.samples.shape

    def level(start: float, end: float) -> float:
        part = slice(round(start * RATE), round(end * RATE))
        return float(
            20
            * np.log10(np.sqrt((ducked[0, part] ** 2).mean()) / np.sqrt((music.samples[0, part] ** 2).mean()))
        )

    assert level(0, 2.4) == pytest.approx(0, abs=0.2)
    assert level(3.1, 4.9) == pytest.approx(-12, abs=0.5)
    assert level(6.5, 8) == pytest.approx(0, abs=0.3)
    assert np.abs(np.diff(ducked[0])).max() < 0.05  # no click
    assert mix(AudioBuffer(ducked, RATE), speech).samples.shape == (2, 8 * RATE)


# Reading


def test_sentences_end_where_a_reader_would_stop() -> None:
    text = (
        'Dr. Smith paid $3.50 on Jan. 5th, i.e. at 9:30 a.m. on No. 5 St. Peter St. He left. "Is it?" he said. "Yes!" '
        "J. K. Rowling vs. Mr. X, e.g. at 3.5 m. Then U.S. forces came.\n\n## Heading\n- item **one**\n- item two\nthat goes on"
    )
    found = reading.sentences(text)
    assert [s.text for s in found] == [
        "Dr. Smith paid $3.50 on Jan. 5th, i.e. at 9:30 a.m. on No. 5 St. Peter St.", "He left.", '"Is it?" he said.', '"Yes!"',
        "J. K. Rowling vs. Mr. X, e.g. at 3.5 m.", "Then U.S. forces came.", "Heading", "item one", "item two that goes on",
    ]  # fmt: skip
    assert [s.paragraph for s in found] == [0] * 6 + [1] * 3


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("It weighs 4,500 kg in 1969, about 3.5 m.", "It weighs 4,500 kilograms in 1969, about 3.5 meters."),
        ("1.5 million km away at -233 °C", "1.5 million kilometers away at minus 233 degrees Celsius"),
        ("9.81 m/s², 1.4 g/cm³, 10 km², 828 km/h", "9.81 meters per second squared, 1.4 grams per cubic centimeter, 10 square kilometers, 828 kilometers per hour"),
        ("a 5-km run, 1 kg, 12 oz. of it", "a 5 kilometer run, 1 kilogram, 12 ounces of it"),
        ("10–20 kg, 1914–1918", "10 to 20 kilograms, 1914 to 1918"),
        ("$3.5m, £2bn, the 1990s, 5 in 1969", "$3.5 million, £2 billion, the 1990s, 5 in 1969"),
        ("c. 1500 BC, e.g. 3½ cups & 10⁶ cells", "around 1500 B C, for example, 3 and a half cups and 10 to the power of 6 cells"),
        ("H₂O, World War II, Saturn V", "H2O, World War Two, Saturn five"),
        ("I am 5 m tall", "I am 5 meters tall"),
        ("a cat in 2 hats", "a cat in 2 hats"),
    ],
)  # fmt: skip
def test_units_and_abbreviations_become_words(written: str, said: str) -> None:
    assert reading.spoken(written) == said


def test_long_sentences_are_cut_at_commas_and_lose_nothing() -> None:
    text = "one two three, " * 60
    parts = reading.pieces(text, 100)
    assert max(map(len, parts)) <= 100
    assert " ".join(parts).split() == text.split()
    assert "".join(reading.pieces("x" * 700, 100)) == "x" * 700


def test_word_errors_are_counted_after_bringing_numbers_to_one_form() -> None:
    same = compare(
        "It weighs 4,500 kg (about 9,900 lb) in 1969.",
        "it weighs four thousand five hundred kilograms, about 9900 pounds in nineteen sixty nine",
    )
    assert (same.errors, same.wer) == (0, 0.0)
    other = compare("one red apple and two green pears", "one red apple and green bears please")
    assert (other.errors, other.reference_words) == (3, 7)
    assert compare("hello", "").wer == 1.0


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ResolvedModel]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: locate(load_catalogue()[name], folder)
        for name in ("hibari-heart", "whisper-tiny.en", "studio-synth")
    }


@pytest.fixture(scope="module")
def cache() -> ModelCache:
    return ModelCache(limit_mb=2000)


def data_of(output: Output) -> bytes:
    data = output.data() if callable(output.data) else output.data
    return data.read_bytes() if isinstance(data, Path) else data


def run(
    kind: str,
    params: list,
    model: ResolvedModel,
    cache: ModelCache,
    tmp_path: Path,
    seeds: list[int] | None = None,
    **context,
):  # type: ignore[no-untyped-def]
    ctx = JobContext(tmp_path, seeds or [7] * len(params), {"model": model}, cache=cache, **context)
    return list(get_runner(kind)(params, ctx)), ctx


@pytest.fixture(scope="module")
def spoken(models, cache, tmp_path_factory) -> tuple[bytes, dict]:  # type: ignore[no-untyped-def]
    """All sentences read in one go."""
    out, _ = run(
        "audio.speech",
        [AudioSpeech(text=" ".join(SENTENCES))],
        models["hibari-heart"],
        cache,
        tmp_path_factory.mktemp("s"),
    )
    assert [o.name for o in out] == ["speech.wav", "timings.json"]
    return data_of(out[0]), json.loads(data_of(out[1]))


def test_timings_lie_where_the_speech_is(spoken: tuple[bytes, dict]) -> None:
    data, timings = spoken
    sound = decode(data, max_seconds=60)
    assert (sound.sample_rate, sound.channels) == (24_000, 1)
    assert timings["duration_s"] == pytest.approx(sound.duration_s, abs=1e-3)
    assert [s["text"] for s in timings["sentences"]] == SENTENCES
    assert loudness(sound) == pytest.approx(-19, abs=0.5)
    wave = sound.samples[0]
    end = 0.0
    for sentence in timings["sentences"]:
        assert sentence["start_s"] > end
        gap = wave[round(end * 24_000) : round(sentence["start_s"] * 24_000)]
        inside = wave[round(sentence["start_s"] * 24_000) : round(sentence["end_s"] * 24_000)]
        assert np.abs(gap).max() < 1e-3
        assert np.abs(inside[:3600]).max() > 0.02  # it begins at once
        assert (
            5 < len(sentence["text"]) / (sentence["end_s"] - sentence["start_s"]) < 25
        )  # characters a second
        end = sentence["end_s"]
    assert sound.duration_s - end == pytest.approx(0.08, abs=0.01)


def test_speech_says_the_text_and_the_transcript_says_where(spoken, models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    data, timings = spoken
    path = tmp_path / "speech.wav"
    path.write_bytes(data)
    text = " ".join(SENTENCES)
    out, ctx = run(
        "audio.transcribe", [AudioTranscribe(audio=f"file:{path}", reference=text, format="srt")], models["whisper-tiny.en"], cache, tmp_path
    )  # fmt: skip
    assert [(o.name, o.media_type) for o in out] == [
        ("transcript.srt", "application/x-subrip"),
        ("transcript.json", "application/json"),
    ]
    facts = json.loads(data_of(out[1]))
    print("\nword error rate of speech over numbers and names:", facts["wer"], "|", facts["text"])
    assert facts["wer"] <= 0.08
    assert out[0].meta["wer"] == facts["wer"]
    for wanted in ("meters", "kilograms", "1969", "540", "Celsius", "Everest", "Eiffel"):
        assert wanted in facts["text"]
    words = [w for s in facts["segments"] for w in s["words"]]
    hubble = next(w for w in words if "Hubble" in w["text"])
    second = timings["sentences"][1]
    assert second["start_s"] - 0.3 < hubble["start_s"] < second["start_s"] + 1.0
    assert all(0 <= w["start_s"] <= w["end_s"] <= facts["duration_s"] + 0.01 for w in words)
    lines = data_of(out[0]).decode().splitlines()
    assert lines[0] == "1"
    assert " --> " in lines[1]
    assert any(fraction and fraction > 0.5 for _, fraction, _, _ in ctx.reports)


def test_speech_is_the_same_alone_and_in_company_and_failures_stay_alone(models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    good = AudioSpeech(text="Apples are red, and pears are green.")
    params = [
        AudioSpeech(text="  "), good, AudioSpeech(text="!!! … 😀"), AudioSpeech(text="你好"), AudioSpeech(text="Hallo", language="de"),
        AudioSpeech(text="Hello", voice="nobody"), AudioSpeech(text="word " * 39_000, speed=0.25), AudioSpeech(text="Good morning."), good,
    ]  # fmt: skip
    out, _ = run(
        "audio.speech", params, models["hibari-heart"], cache, tmp_path, seeds=[1, 7, 2, 3, 4, 5, 6, 8, 9]
    )
    failures = {f.job: f.error for f in out if isinstance(f, Failure)}
    assert sorted(failures) == [0, 2, 3, 4, 5, 6]
    assert all(isinstance(error, InputError) for error in failures.values())
    assert {failures[n].param for n in (0, 2, 3, 6)} == {"text"}
    assert (failures[4].param, failures[5].param) == ("language", "voice")
    assert "heart" in failures[5].message
    made = {o.job: data_of(o) for o in out if isinstance(o, Output) and o.name == "speech.wav"}
    alone, _ = run("audio.speech", [good], models["hibari-heart"], cache, tmp_path, seeds=[7])
    assert data_of(alone[0]) == made[1]
    assert made[8] != made[1]  # another seed breathes otherwise


def test_pace_and_formats(models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = "The quick brown fox jumps over the lazy dog."
    speeds = [1.0, 0.25, 0.5, 2.0, 4.0]
    params = [AudioSpeech(text=text, speed=s) for s in speeds] + [
        AudioSpeech(text=text, format=f) for f in ("mp3", "opus", "flac", "aac", "pcm")
    ]
    out, _ = run("audio.speech", params, models["hibari-heart"], cache, tmp_path)
    main = {o.job: o for o in out if isinstance(o, Output) and o.name.startswith("speech")}
    whole = main[0].meta["duration_s"] - 0.16
    for job, speed in enumerate(speeds):
        assert main[job].meta["duration_s"] - 0.16 == pytest.approx(whole / speed, rel=0.12)
    for job, form in enumerate(("mp3", "opus", "flac", "aac", "pcm"), len(speeds)):
        assert (main[job].name, main[job].media_type) == (f"speech.{form}", AUDIO_TYPES[form])
        if form != "pcm":
            assert decode(data_of(main[job]), max_seconds=20).duration_s == pytest.approx(
                main[0].meta["duration_s"], abs=0.15
            )
    assert {o.media_type for o in out} <= set(AudioSpeech.spec.outputs)


def test_cancelled_jobs_stop_and_neighbours_go_on(models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    params = [AudioSpeech(text="One. Two."), AudioSpeech(text="Three.")]
    out, _ = run(
        "audio.speech", params, models["hibari-heart"], cache, tmp_path, is_cancelled=lambda job: job == 0
    )
    assert [type(o) for o in out] == [Failure, Output, Output]
    assert isinstance(out[0].error, JobCancelled)
    out, _ = run(
        "audio.music",
        [AudioMusic(duration_s=2), AudioMusic(duration_s=2)],
        models["studio-synth"],
        cache,
        tmp_path,
        is_cancelled=lambda job: job == 0,
    )
    assert isinstance(out[0], Failure) and isinstance(out[0].error, JobCancelled) and len(out) == 3


def test_transcribing_silence_noise_and_rubbish(models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    files = {
        "silence": encode(AudioBuffer(np.zeros((1, RATE * 2), np.float32), RATE), "wav"), "rubbish": b"\0\1\2" * 500, "music": b"",
    }  # fmt: skip

    def fetch(job: int, value: object) -> InputFile:
        name = str(value).removeprefix("file:")
        path = tmp_path / name
        path.write_bytes(files[name])
        return InputFile(path, "audio/wav", name)

    params = [
        AudioTranscribe(audio="file:rubbish"), AudioTranscribe(audio="file:silence", skip_silence=True, format="vtt"),
        AudioTranscribe(audio="file:silence", language="fr"), AudioTranscribe(audio="file:silence", skip_silence=True, reference="some words"),
    ]  # fmt: skip
    out, _ = run("audio.transcribe", params, models["whisper-tiny.en"], cache, tmp_path, fetch=fetch)
    failures = {f.job: f.error for f in out if isinstance(f, Failure)}
    assert sorted(failures) == [0, 2]
    assert (failures[0].code, failures[2].param) == ("bad_media", "language")
    main = {o.job: o for o in out if isinstance(o, Output) and not o.name.endswith("json")}
    assert data_of(main[1]).decode().startswith("WEBVTT")
    assert main[1].meta["words"] == 0
    assert main[3].meta["wer"] == 1.0


def test_subtitles_keep_two_short_lines() -> None:
    words = tuple(Word(0.3 * n, 0.3 * n + 0.25, f"word{n}") for n in range(40))
    text = subtitles([Segment(0, 12, " ".join(w.text for w in words), words)], "srt")
    cues = text.strip().split("\n\n")
    assert len(cues) >= 3
    for cue in cues:
        lines = cue.split("\n")[2:]
        assert len(lines) <= 2
        assert max(map(len, lines)) <= 50
    assert " ".join(line for cue in cues for line in cue.split("\n")[2:]).split() == [w.text for w in words]
    assert (
        subtitles([Segment(3661.5, 3662.25, "a --> b")], "vtt")
        == "WEBVTT\n\n01:01:01.500 --> 01:01:02.250\na -> b\n"
    )


# Music

MOODS = ("calm", "happy", "sad", "epic", "ambient", "upbeat")
SCALE = {
    "major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10, 11), "lydian": (0, 2, 4, 6, 7, 9, 11), "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}  # fmt: skip
NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


@pytest.fixture(scope="module")
def pieces(models, cache, tmp_path_factory) -> dict[str, tuple[Output, bytes, bytes]]:  # type: ignore[no-untyped-def]
    params = [AudioMusic(mood=m, duration_s=7.3, sample_rate=22_050) for m in MOODS]
    out, _ = run(
        "audio.music", params, models["studio-synth"], cache, tmp_path_factory.mktemp("m"), seeds=[3] * 6
    )
    assert not [o for o in out if isinstance(o, Failure)]
    return {m: (out[2 * n], data_of(out[2 * n]), data_of(out[2 * n + 1])) for n, m in enumerate(MOODS)}


@pytest.mark.parametrize("mood", MOODS)
def test_music_has_its_length_loudness_and_key(
    mood: str, pieces: dict[str, tuple[Output, bytes, bytes]]
) -> None:
    output, data, score = pieces[mood]
    sound = decode(data, max_seconds=20)
    assert (output.name, output.media_type) == ("music.wav", "audio/wav")
    assert sound.samples.shape == (2, round(7.3 * 22_050))
    assert loudness(sound) == pytest.approx(-16, abs=0.5)
    assert peak_db(sound) < -0.5
    assert np.abs(sound.samples[:, -30:]).max() < 0.01  # it ends in silence, not in a click
    assert np.abs(sound.samples[:, :4]).max() < 0.2
    assert not np.array_equal(sound.samples[0], sound.samples[1])  # stereo
    seconds = [
        float(np.sqrt((sound.samples[:, n * 22_050 : (n + 1) * 22_050] ** 2).mean())) for n in range(7)
    ]
    assert min(seconds[:6]) > 0.01  # no hole
    # Its tones belong to its key: a drum is broad and hardly counts among the peaks of the spectrum.
    tonic, mode = output.meta["key"].split()
    allowed = {(NAMES.index(tonic) + s) % 12 for s in SCALE[mode]}
    wave = sound.mono().samples[0]
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size)))
    hz = np.fft.rfftfreq(wave.size, 1 / 22_050)
    at = np.flatnonzero((hz > 180) & (hz < 1000))
    best = at[np.argsort(spectrum[at])[::-1][:60]]
    classes = np.round(69 + 12 * np.log2(hz[best] / 440)).astype(int) % 12
    assert np.mean([c in allowed for c in classes]) > 0.9
    # And so do the notes of the MIDI file, which lasts as long as the sound.
    file = mido.MidiFile(file=io.BytesIO(score))
    notes = [m.note for t in file.tracks for m in t if m.type == "note_on" and m.channel != 9]
    assert len(notes) > 12
    assert {n % 12 for n in notes} <= allowed
    assert file.length == pytest.approx(7.3, abs=0.6)
    assert {"chords", "bass"} <= {t.name.split()[0] for t in file.tracks if t.name}


def test_moods_differ_as_their_names_say(pieces: dict[str, tuple[Output, bytes, bytes]]) -> None:
    tempo = {m: pieces[m][0].meta["tempo_bpm"] for m in MOODS}
    assert max(tempo["sad"], tempo["calm"], tempo["ambient"]) < min(tempo["happy"], tempo["upbeat"])

    def onsets(mood: str) -> float:
        wave = decode(pieces[mood][1], max_seconds=20).mono().samples[0]
        power = np.log((wave[: wave.size // 512 * 512].reshape(-1, 512) ** 2).mean(axis=1) + 1e-7)
        return float(np.mean(np.diff(power) > 0.7))

    assert onsets("upbeat") > 1.5 * onsets("ambient")
    assert pieces["sad"][0].meta["key"].endswith("minor")
    assert pieces["happy"][0].meta["key"].endswith("major")
    assert "drums" in pieces["upbeat"][0].meta["instruments"]
    assert "drums" not in pieces["ambient"][0].meta["instruments"]


def test_the_same_seed_gives_the_same_piece_and_another_seed_another(models, cache, tmp_path, pieces) -> None:  # type: ignore[no-untyped-def]
    one = AudioMusic(mood="happy", duration_s=7.3, sample_rate=22_050)
    out, _ = run("audio.music", [one, one], models["studio-synth"], cache, tmp_path, seeds=[4, 3])
    assert data_of(out[2]) == pieces["happy"][1]
    assert data_of(out[3]) == pieces["happy"][2]
    assert data_of(out[0]) != pieces["happy"][1]
    assert data_of(out[1]) != pieces["happy"][2]


def test_wishes_for_tempo_key_and_instruments_are_kept() -> None:
    score = compose("calm", 30, 5, tempo_bpm=90, key="F# minor", instruments=["piano", "flute", "drums"])
    assert (score.tempo_bpm, score.key) == (90, "F# minor")
    assert {t.instrument for t in score.tracks} == {"piano", "flute", "drums"}
    every = ["piano", "guitar", "harp", "strings", "pad", "bell", "flute", "brass"]
    assert {t.instrument for t in compose("epic", 40, 5, instruments=every).tracks} == set(every)
    assert compose("happy", 20, 1, key="Bb").key == "Bb major"
    with pytest.raises(InputError, match="key"):
        AudioMusic.spec.validate({"key": "H minor"})
    with pytest.raises(InputError, match="duration_s"):
        AudioMusic.spec.validate({"duration_s": 601})


def test_a_melody_repeats_its_motif_and_moves_mostly_by_step() -> None:
    steps: list[int] = []
    for seed in range(12):
        score = compose("happy", 40, seed)
        melody = next(t for t in score.tracks if t.role == "melody").notes
        steps += [abs(b.pitch - a.pitch) for a, b in itertools.pairwise(melody)]
        bars: dict[int, tuple[float, ...]] = {}
        for note in melody:
            bars[int(note.start + 0.05) // 4] = (
                *bars.get(int(note.start + 0.05) // 4, ()),
                round(note.length, 2),
            )
        rhythms = list(bars.values())
        assert len(set(rhythms)) < len(rhythms)
    assert np.mean(np.array(steps) <= 5) > 0.8


def test_a_piece_of_two_seconds_has_exactly_two(models, cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    out, _ = run(
        "audio.music",
        [AudioMusic(duration_s=2, tempo_bpm=40, format="mp3")],
        models["studio-synth"],
        cache,
        tmp_path,
    )
    assert out[0].meta["duration_s"] == 2.0
    assert loudness(decode(data_of(out[0]), max_seconds=5)) == pytest.approx(-16, abs=1)


# A user's own models


def _own(engine: str, folder: Path, **options: object) -> ResolvedModel:
    return ResolvedModel("mine", "1", engine, {"folder": folder}, folder / "converted", options)


def test_a_folder_with_a_faster_whisper_model_serves_by_name(models, cache, tmp_path, spoken) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "my-whisper"
    shutil.copytree(models["whisper-tiny.en"].files["folder"], folder)
    first = decode(spoken[0], max_seconds=60)
    path = tmp_path / "first.flac"
    path.write_bytes(
        encode(
            AudioBuffer(
                first.samples[:, : round(spoken[1]["sentences"][0]["end_s"] * 24_000) + 2400], 24_000
            ),
            "flac",
        )
    )
    out, _ = run(
        "audio.transcribe",
        [AudioTranscribe(audio=f"file:{path}", beam_size=1)],
        _own("faster-whisper", folder),
        cache,
        tmp_path,
    )
    assert compare(SENTENCES[0], data_of(out[0]).decode()).wer == 0


@pytest.mark.parametrize(
    ("engine", "loader"),
    [("faster-whisper", load_recogniser), ("transformers-whisper", load_recogniser), ("nothing", load_recogniser),
     ("hibari", load_voice), ("transformers-tts", load_voice), ("nothing", load_voice)],
)  # fmt: skip
def test_a_folder_that_is_no_such_model_says_so(engine: str, loader: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "voice.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelUnavailable, match="mine"):
        loader(_own(engine, tmp_path))  # type: ignore[operator]


def test_a_soundfont_without_its_player_or_file_says_so(tmp_path: Path) -> None:
    from worker.engines.synth import render

    with pytest.raises(ModelUnavailable, match="mine"):
        render(_own("soundfont", tmp_path), compose("calm", 2, 1), 22_050)


def test_a_vits_folder_speaks_and_draws_only_from_its_own_seed(cache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    torch.manual_seed(0)
    folder = tmp_path / "vits"
    letters = "abcdefghijklmnopqrstuvwxyz '-,."
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({c: n for n, c in enumerate("_" + letters)}))
    VitsTokenizer(
        str(folder / "vocab.json"), pad_token="_", unk_token="_", phonemize=False, language="eng"
    ).save_pretrained(folder)
    config = VitsConfig(
        vocab_size=len(letters) + 1, hidden_size=16, num_hidden_layers=1, ffn_dim=16, flow_size=16, spectrogram_bins=9, upsample_initial_channel=16,
        upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16], prior_encoder_num_flows=1, posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_wavenet_layers=1, duration_predictor_num_flows=1, depth_separable_num_layers=1,
    )  # fmt: skip
    VitsModel(config).save_pretrained(folder)
    text = AudioSpeech(text="Seven of 12 owls sing.", loudness_lufs=None)
    out, _ = run(
        "audio.speech", [text, text], _own("transformers-tts", folder), cache, tmp_path, seeds=[1, 2]
    )
    assert [o.name for o in out] == ["speech.wav", "timings.json"] * 2
    torch.manual_seed(99)
    again, _ = run("audio.speech", [text], _own("transformers-tts", folder), cache, tmp_path, seeds=[2])
    assert data_of(again[0]) == data_of(out[2]) != data_of(out[0])
    voice = load_voice(_own("transformers-tts", folder, language="sw"))
    with pytest.raises(InputError, match="digits"):
        voice.say("12 owls", voice="default", speed=1.0, seed=1)


def test_resampling_keeps_pitch_and_length() -> None:
    done = resample(tone(1, 440, 44_100), 16_000)
    assert done.samples.shape == (1, 16_000)
    assert pitch_of(done) == pytest.approx(440, abs=2)

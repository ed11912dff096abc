"""Kinds of training jobs: long, resumable, on the ``train`` queue; each makes a version of a model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from contentfactory.jobs.spec import Media, ModelName, OutputRef, Params, RetryPolicy, kind

DatasetInput = Annotated[
    Annotated[
        str,
        Field(
            max_length=20_000,
            pattern=r"^(art_[0-9a-f]{32}$|dataset:[A-Za-z0-9][\w.-]{0,199}(@[1-9]\d*)?$|file:|https?://)",
            description="dataset:NAME or dataset:NAME@VERSION as registered, artifact id, file:PATH in a manifest, or address",
        ),
    ]
    | OutputRef,
    Media("dataset"),
]
"""A data set. A name is pinned to the version's artifact when the job is accepted."""


def _flow_seconds(p: "TrainFlow") -> float:
    # Measured on one core of the reference CPU at the default sizes; work grows with both batches and the picture's area.
    return p.steps * (0.04 + 0.0006 * p.flow_batch * p.hidden / 512 + 0.018 * p.decoder_batch * (p.resolution / 128) ** 2)


@kind(
    "train.flow",
    queue="train",
    outputs=("application/json", "image/png", "application/octet-stream"),
    time_limit_s=7 * 24 * 3600,
    progress_s=900,
    cacheable=False,
    retry=RetryPolicy(transient=20, bug=1, deadline=3, strikes=5),
    seconds=_flow_seconds,
)
class TrainFlow(Params):
    """Train a text-to-image model on captioned pictures: a latent rectified flow on sentence vectors, and its decoder.

    The job checkpoints, survives a kill at any moment, and registers what it made under ``name``: jobs that name it as
    their ``model`` use it at once. The data set is a folder or zip of pictures with ``captions.jsonl``.
    """

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$", description="name of the model to register; each finished job adds a version"
    )
    dataset: DatasetInput = Field(description="captioned pictures")
    start_from: ModelName | None = Field(default=None, description="registered model of the same sizes to start from (fine-tuning)")
    encoder: ModelName = Field(default="all-minilm-l6-v2", description="sentence encoder that conditions the pictures")
    steps: int = Field(default=30_000, ge=1, le=10_000_000, description="steps; each updates flow and decoder once")
    resolution: Literal[64, 128] = Field(default=128, description="edge of the pictures, pixels")
    latent: int = Field(default=384, ge=8, le=1024, description="principal components kept")
    encoder_resolution: int = Field(default=24, ge=8, le=64, description="edge at which they are taken, pixels")
    whitening: float = Field(default=0.5, ge=0, le=1, description="how far components are brought to equal size")
    condition: int = Field(default=256, ge=16, le=1024, multiple_of=2, description="width of the joint text and time vector")
    hidden: int = Field(default=512, ge=16, le=4096, description="width of the flow's residual stream")
    expansion: int = Field(default=880, ge=16, le=16384, description="width inside its blocks")
    blocks: int = Field(default=4, ge=1, le=32, description="its blocks")
    memory: int = Field(
        default=0, ge=0, le=1024, description="width of a memory that tells subjects apart by their captions; 0 for none, 128 is enough"
    )
    recall: int = Field(default=256, ge=16, le=4096, description="hidden width of what is looked up in it")
    memory_steps: int = Field(default=2000, ge=1, le=1_000_000, description="steps in which it is fitted, before all others")
    flow_batch: int = Field(default=256, ge=1, le=4096, description="pictures in an update of the flow")
    decoder_batch: int = Field(default=8, ge=1, le=1024, description="pictures in an update of the decoder")
    caption_dropout: float = Field(default=0.1, ge=0, lt=1, description="probability that a caption is hidden, for guidance")
    caption_blend: float = Field(default=0.5, ge=0, le=1, description="probability that a vector is blended with a second caption's")
    caption_jitter: float = Field(default=0.05, ge=0, le=1, description="largest noise on sentence vectors, standard deviation")
    time_mean: float = Field(default=-1.2, ge=-4, le=4, description="mean of the training times' logit; low ones decide the subject")
    time_spread: float = Field(default=1.4, gt=0, le=4, description="standard deviation of the training times' logit")
    latent_noise: float = Field(default=0.25, ge=0, le=2, description="largest noise on the decoder's latents, standard deviation")
    edge_weight: float = Field(default=1.0, ge=0, le=100, description="weight of edges in the decoder's loss")
    flips: bool = Field(default=False, description="learn mirror images of pictures that allow it as well")
    optimiser: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="optimiser")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate of the flow")
    decoder_rate_scale: float = Field(default=1.0, gt=0, le=100, description="the decoder's rate in proportion to it")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="weight decay")
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = Field(default="trapezoid", description="course of the rate")
    warmup: int = Field(default=200, ge=0, description="steps of linear rise")
    decay_share: float = Field(default=0.3, gt=0, le=1, description="share of the steps in which trapezoid decays")
    gradient_clip: float = Field(default=1.0, ge=0, description="largest norm of a gradient; 0 for none")
    average: float = Field(default=0.999, ge=0, lt=1, description="decay of the weights' moving average")
    checkpoint_every: int = Field(default=1000, ge=1, description="steps between checkpoints; a kill repeats at most so many")
    samples_every: int = Field(default=1000, ge=0, description="steps between sample grids; 0 for none")
    report_every: int = Field(default=20, ge=1, description="steps between points of the curves")
    concurrent: bool = Field(default=False, description="update flow and decoder in a thread each (two cores)")
    prompts: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=64, description="what the sample grids show")
    sample_steps: int = Field(default=30, ge=1, le=1000, description="sampler steps of the grids, and the model's default")
    guidance: float = Field(default=3.0, ge=0, le=30, description="guidance of the grids, and the model's default")

    @model_validator(mode="after")
    def _fits(self) -> "TrainFlow":
        if self.prompts is not None and not all(p.strip() for p in self.prompts):
            raise ValueError("prompts holds an empty text")
        if self.warmup >= self.steps and self.warmup > 200:
            raise ValueError(f"warmup is {self.warmup}; it must be below steps ({self.steps})")
        return self

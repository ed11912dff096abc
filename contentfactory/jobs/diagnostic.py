"""Kinds without a model: they prove that the factory works, and measure it."""

from typing import Literal

from pydantic import Field

from contentfactory.jobs.spec import Params, Text, kind


@kind("text.echo", queue="text", outputs=("text/plain",), max_group=512, cacheable=False, seconds=lambda p: p.seconds or 1e-4)
class TextEcho(Params):
    """Give a text back, after a pause where wanted: a check of the whole way of a job without a model."""

    text: Text = Field(default="", description="what comes back")
    seconds: float = Field(default=0.0, ge=0, le=3600, description="pause before the answer, seconds")
    transform: Literal["none", "upper", "reverse"] = Field(default="none", description="change to apply")

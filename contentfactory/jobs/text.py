"""Kinds of text jobs."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from contentfactory.catalogue.text import EMBEDDING, LANGUAGE
from contentfactory.jobs.spec import ModelName, Params, Text, kind

MAX_EMBED = 256


class Sampling(Params):
    """How a language model writes: length, choice of words, where it ends, and which of several tries is kept."""

    max_tokens: int = Field(default=128, ge=1, le=8192, description="most tokens to write; a token is about 4 characters")
    temperature: float = Field(
        default=0.7, ge=0, le=2, description="0 takes the likeliest token each time; higher is more varied"
    )
    top_p: float = Field(default=0.9, gt=0, le=1, description="share of the probability that is drawn from")
    top_k: int = Field(default=0, ge=0, le=1000, description="number of tokens that are drawn from; 0 for all")
    repetition_penalty: float = Field(
        default=1.1, ge=1, le=2, description="how much less likely tokens become that were written already; 1 for not at all"
    )
    no_repeat_ngram: int = Field(
        default=0, ge=0, le=20, description="length in tokens of sequences that must not come twice; 0 for any"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, max_length=8, description="texts at which writing ends; they are not part of the result"
    )
    max_sentences: int | None = Field(
        default=None, ge=1, le=200, description="cut after so many whole sentences; the text then never ends inside one"
    )
    strip: bool = Field(default=True, description="remove white space at both ends")
    answer_prefix: Text = Field(default="", description="how the text begins; part of the result")
    best_of: int = Field(
        default=1, ge=1, le=16, description="tries to choose from; the likeliest is kept, or the truest where facts are given"
    )
    facts: Text | None = Field(
        default=None,
        description="facts that the text must keep to, one a line: of best_of tries the one that tells most of them and least else is kept",
    )
    model: ModelName | None = Field(default=None, description="language model; the default one where left out")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError(f"best_of is {self.best_of} but temperature 0 makes all tries equal; use a temperature above 0")
        if self.facts is not None and self.best_of < 2:
            raise ValueError("facts choose among several tries; set best_of to 2 or more")
        return self


def _generate_seconds(params: Any) -> float:
    # 60 tokens a second in company on the reference CPU; texts end before their limit more often than not.
    return float(0.4 + 0.6 * params.max_tokens * params.best_of / 60)


@kind(
    "text.generate", version=2, queue="text", outputs=("text/plain",), max_group=32, wait_s=0.05, time_limit_s=3600, progress_s=120,
    default_model=LANGUAGE.name, seconds=_generate_seconds,
)  # fmt: skip
class TextGenerate(Sampling):
    """Write a text with a language model: continue a prompt, or follow an instruction."""

    prompt: Text = Field(description="instruction, or the text to continue")
    template: Literal["auto", "chat", "none"] = Field(
        default="auto",
        description="chat: put the prompt as a user's turn into the model's chat template; none: continue it as it stands; auto: chat where the model has one",
    )
    system: Text | None = Field(default=None, description="system prompt, for the chat template")

    @model_validator(mode="after")
    def _check_system(self) -> Self:
        if self.system is not None and self.template == "none":
            raise ValueError("system needs the chat template; leave template at 'auto' or 'chat'")
        return self


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    role: Literal["system", "user", "assistant"] = Field(description="who speaks")
    content: Text = Field(description="what is said")


@kind(
    "text.chat", version=2, queue="text", outputs=("text/plain",), max_group=32, wait_s=0.05, time_limit_s=3600, progress_s=120,
    default_model=LANGUAGE.name, seconds=_generate_seconds,
)  # fmt: skip
class TextChat(Sampling):
    """Answer a conversation with a language model, through its chat template."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=500, description="the conversation so far, oldest first")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


@kind(
    "text.embed", version=2, queue="text", outputs=("application/json", "application/octet-stream"), max_group=128, wait_s=0.05,
    group_by=("truncate",), time_limit_s=900, progress_s=120, default_model=EMBEDDING.name,
    seconds=lambda p: 0.012 * len(p.input),
)  # fmt: skip
class TextEmbed(Params):
    """Turn texts into vectors whose closeness follows their meaning."""

    input: Annotated[list[Text], BeforeValidator(_as_list)] = Field(
        min_length=1, max_length=MAX_EMBED, description=f"a text, or a list of up to {MAX_EMBED}"
    )
    normalise: bool = Field(default=True, description="scale each vector to length 1")
    truncate: bool = Field(default=False, description="cut texts that are too long for the model, instead of failing")
    encoding: Literal["json", "float32"] = Field(
        default="json", description="json: embedding.json; float32: embedding.f32, little-endian, one row a text"
    )
    model: ModelName | None = Field(default=None, description="embedding model; the default one where left out")

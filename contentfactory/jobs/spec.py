"""What a kind of job is: one typed declaration from which validation, routing, CLI, docs and API all follow.

A kind is a pydantic class derived from `Params` and decorated with `kind`. Its docstring is the summary, its fields carry
limits, units and help. Values that may come out of another job or out of a file are declared with `Text`, `ImageInput`,
`AudioInput`, `VideoInput` or `AnyInput`: they take a literal, an address, or an `OutputRef`.
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contentfactory.errors import InputError

QUEUES = ("text", "image", "audio", "video", "train")
"""One queue a modality; a worker serves one or several of them."""


class OutputRef(BaseModel):
    """What another job makes, named by its id or, within a batch, by its ``custom_id``."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    job: str = Field(min_length=1, max_length=200, description="custom_id of a job of the same batch, or a job's id")
    output: str | None = Field(
        default=None, max_length=200, description="name of the artifact; the job's first one where left out"
    )


@dataclass(frozen=True)
class Media:
    """Marks a field whose value is an input file of one modality.

    Args:
        modality: ``image``, ``audio``, ``video``, ``dataset``, ``model`` or ``any``.
    """

    modality: str


class TextMarker:
    """Marks a field of text that may be another job's output; the worker puts the words in before the runner runs."""


MAX_TEXT = 200_000

Text = Annotated[Annotated[str, Field(max_length=MAX_TEXT)] | OutputRef, TextMarker()]
"""Literal text or another job's text output. A runner always sees ``str``."""

_ADDRESS = Annotated[
    str,
    Field(
        max_length=20_000_000,
        pattern=r"^(art_[0-9a-f]{32}$|https?://|data:|file:)",
        description="artifact id (art_…), http(s) address, data: URI, or file:PATH in a manifest",
    ),
]
ImageInput = Annotated[_ADDRESS | OutputRef, Media("image")]
AudioInput = Annotated[_ADDRESS | OutputRef, Media("audio")]
VideoInput = Annotated[_ADDRESS | OutputRef, Media("video")]
AnyInput = Annotated[_ADDRESS | OutputRef, Media("any")]

ModelName = Annotated[
    str,
    Field(min_length=1, max_length=200, pattern=r"^[\w./:@+-]+$", description="model by name, or name@version"),
]
"""A model of the registry. The version is pinned when the job is accepted."""

LanguageTag = Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$", description="BCP 47 language tag")]


class Params(BaseModel):
    """Base of every kind's parameters: strict about unknown fields, immutable."""

    # Built when the first job of the kind is checked: most processes that load the kinds want no more than their names and limits.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    spec: ClassVar["KindSpec"]


@dataclass(frozen=True)
class RetryPolicy:
    """How often each error class is tried again before the job ends.

    Args:
        transient: Retries after storage or database faults.
        bug: Retries after an unknown exception.
        deadline: Retries after no progress.
        strikes: Crashes of the worker while the job runs alone before it is ``dead``.
        backoff_s: First wait in seconds; doubles with each retry, with jitter, up to ``backoff_max_s``.
    """

    transient: int = 8
    bug: int = 2
    deadline: int = 2
    strikes: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("transient", "bug", "deadline"):
            if getattr(self, name) < 0:
                raise ValueError(f"RetryPolicy.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.strikes < 1:
            raise ValueError(f"RetryPolicy.strikes is {self.strikes}; it must be 1 or more")


@dataclass(frozen=True)
class KindSpec:
    """A declared kind of job: its parameters' class and how the factory treats it (see `kind` for the fields)."""

    name: str
    params: type[Params]
    summary: str
    queue: str
    outputs: tuple[str, ...]
    version: int
    max_group: int
    group_by: tuple[str, ...]
    wait_s: float
    time_limit_s: float
    progress_s: float
    default_model: str | None
    task: str | None
    cacheable: bool
    seeded: bool
    retry: RetryPolicy
    seconds: Callable[[Any], float] = field(compare=False)
    group_key: Callable[[Any], str] | None = field(default=None, compare=False)

    @property
    def modality(self) -> str:
        """First half of the kind's name."""
        return self.name.partition(".")[0]

    @functools.cached_property
    def takes_model(self) -> bool:
        """Whether jobs of this kind name a model."""
        return "model" in self.params.model_fields

    @functools.cached_property
    def _check(self) -> Callable[[Any], Params]:
        # What `model_validate` comes to, which does more for a small class than the check itself.
        self.params.model_rebuild()
        check: Callable[[Any], Params] = self.params.__pydantic_validator__.validate_python
        return check

    def validate(self, data: Mapping[str, Any]) -> Params:
        """Check raw parameters.

        Args:
            data: Parameters as received (JSON types).

        Returns:
            The parameters' class.

        Raises:
            InputError: Naming the first bad field, the value received and what is allowed; ``detail['errors']`` has all.
        """
        try:
            return self._check(data)
        except ValidationError as error:
            problems = describe_errors(error)
            raise InputError(
                "; ".join(f"{p['field']}: {p['message']}" if p["field"] else p["message"] for p in problems),
                code="invalid_params",
                param=problems[0]["field"] or None,
                errors=problems,
            ) from None

    def params_json(self, params: Params) -> str:
        """Parameters as the ledger keeps them."""
        text: bytes = self._serializer.to_json(params)
        return text.decode()

    @functools.cached_property
    def _serializer(self) -> Any:
        self.params.model_rebuild()
        return self.params.__pydantic_serializer__  # `model_dump_json` itself takes longer than what it calls

    def share_key(self, params: Params, model_version: str | None) -> str:
        """What must be equal for two jobs to share a forward pass: kind, model version and the kind's own key."""
        if not self.group_key and not self.group_by:
            return _share_key(self.name, model_version)
        own = self.group_key(params) if self.group_key else ""
        return _digest([self.name, model_version, own, [_plain(getattr(params, name)) for name in self.group_by]])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=4096)
def _share_key(name: str, model_version: str | None) -> str:
    return _digest([name, model_version, "", []])


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def describe_errors(error: ValidationError) -> list[dict[str, str]]:
    """Pydantic's errors as field, message and value received, shortened for a person."""
    problems: dict[tuple[str, str], dict[str, str]] = {}
    for item in error.errors(include_url=False):
        # Union members show up in the path ("constrained-str", "OutputRef"); a caller never wrote them.
        loc = [str(p) for p in item["loc"] if not (isinstance(p, str) and _is_branch(p))]
        name, message = ".".join(loc), item["msg"]
        value = item.get("input")
        if item["type"] == "extra_forbidden":
            message = "unknown field"
        elif item["type"] == "missing":
            message = "is required"
        else:
            shown = json.dumps(value, ensure_ascii=False, default=str)
            message = f"{message} (received {shown[:80] + '…' if len(shown) > 80 else shown})"
        problems.setdefault((name, message), {"field": name, "message": message})
    return list(problems.values())


def _is_branch(part: str) -> bool:
    return part in ("OutputRef", "str", "Text") or part.startswith(("constrained-", "function-", "tagged-"))


P = TypeVar("P", bound=Params)
_REGISTRY: dict[str, KindSpec] = {}
_ALIASES: dict[str, str] = {}
ENTRY_POINT_GROUP = "contentfactory.kinds"
_BUILTIN = ("text", "image", "audio", "video", "training", "diagnostic")
_loaded = False


def kind(
    name: str,
    *,
    queue: str,
    outputs: tuple[str, ...],
    version: int = 1,
    max_group: int = 1,
    group_by: tuple[str, ...] = (),
    group_key: Callable[[Any], str] | None = None,
    wait_s: float = 0.0,
    time_limit_s: float = 600.0,
    progress_s: float = 120.0,
    default_model: str | None = None,
    task: str | None = None,
    cacheable: bool = True,
    seeded: bool = True,
    retry: RetryPolicy | None = None,
    seconds: Callable[[Any], float] = lambda params: 1.0,
    aliases: tuple[str, ...] = (),
) -> Callable[[type[P]], type[P]]:
    """Declare a kind of job.

    Args:
        name: ``modality.verb``; stored in rows, so rename it only with an alias.
        queue: One of `QUEUES`.
        outputs: Media types that a job of this kind may write, the primary one first.
        version: Raise it when the same parameters start to give other bytes: earlier results are then not reused.
        max_group: Most jobs in one micro-batch.
        group_by: Names of fields that must be equal within a micro-batch (image size, sampling mode …).
        group_key: Further key computed from the parameters.
        wait_s: Longest that a queued job waits for company before it leaves alone (never at interactive priority).
        time_limit_s: Wall clock of one job's attempt; a micro-batch gets the sum of its members'.
        progress_s: Longest silence of a runner before it counts as hung.
        default_model: Model used where params name none.
        task: What a model must be able to do to serve this kind, as in the model catalogue; the kind's name where left out.
        cacheable: Whether equal params, inputs, model version and seed give an equal result that may be reused.
        seeded: Whether the result depends on the job's seed; where not, equal params share a result whatever their seeds.
        retry: Retry policy.
        seconds: Estimated compute seconds of one job on the reference CPU, from its params (for fairness, caps and plans).
        aliases: Earlier names of the kind.

    Returns:
        A decorator that registers the class and sets its ``spec``.

    Raises:
        ValueError: If the declaration contradicts itself; the message names the kind and the option.
    """

    def declare(cls: type[P]) -> type[P]:
        modality, dot, verb = name.partition(".")
        if not (dot and modality and verb):
            raise ValueError(f"kind {name!r} must be named modality.verb")
        if queue not in QUEUES:
            raise ValueError(f"kind {name}: queue {queue!r} is unknown; allowed: {', '.join(QUEUES)}")
        if not outputs:
            raise ValueError(f"kind {name}: outputs is empty; name at least one media type")
        if max_group < 1:
            raise ValueError(f"kind {name}: max_group is {max_group}; it must be 1 or more")
        if not 0 <= wait_s <= 10:
            raise ValueError(f"kind {name}: wait_s is {wait_s}; allowed: 0 to 10 seconds")
        if time_limit_s <= 0 or progress_s <= 0:
            raise ValueError(f"kind {name}: time_limit_s and progress_s must be above 0")
        unknown = [f for f in group_by if f not in cls.model_fields]
        if unknown:
            raise ValueError(f"kind {name}: group_by names unknown fields {unknown}")
        if not (cls.__doc__ or "").strip():
            raise ValueError(f"kind {name}: the class needs a docstring; its first line is the summary")
        if name in _REGISTRY or name in _ALIASES:
            raise ValueError(f"kind {name} is declared twice")
        spec = KindSpec(
            name=name, params=cls, summary=(cls.__doc__ or "").strip().splitlines()[0].strip(), queue=queue,
            outputs=outputs, version=version, max_group=max_group, group_by=group_by, group_key=group_key,
            wait_s=wait_s, time_limit_s=time_limit_s, progress_s=progress_s, default_model=default_model,
            task=task or (name if default_model else None), cacheable=cacheable, seeded=seeded,
            retry=retry or RetryPolicy(),
            seconds=seconds,
        )  # fmt: skip
        cls.spec = spec
        _REGISTRY[name] = spec
        for alias in aliases:
            _ALIASES[alias] = name
        return cls

    return declare


def load_kinds() -> Mapping[str, KindSpec]:
    """All kinds: the built-in ones, then those of installed packages (entry-point group ``contentfactory.kinds``)."""
    global _loaded
    if not _loaded:
        for module in _BUILTIN:
            importlib.import_module(f"contentfactory.jobs.{module}")
        for point in entry_points(group=ENTRY_POINT_GROUP):
            point.load()
        _loaded = True
    return _REGISTRY


def get_kind(name: str) -> KindSpec:
    """The kind of that name (or alias).

    Raises:
        InputError: If there is none; the message lists close names.
    """
    kinds = load_kinds()
    found = kinds.get(_ALIASES.get(name, name))
    if found is None:
        import difflib

        close = difflib.get_close_matches(name, kinds, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known kinds: {', '.join(sorted(kinds))}"
        raise InputError(f"kind {name!r} does not exist; {hint}", code="unknown_kind", param="kind")
    return found


def iter_refs(value: Any, path: str = "") -> Iterator[tuple[str, OutputRef]]:
    """Every `OutputRef` inside params, with the dotted path of its field."""
    if isinstance(value, OutputRef):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from iter_refs(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from iter_refs(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from iter_refs(item, f"{path}.{index}" if path else str(index))


def iter_inputs(value: Any, path: str = "") -> Iterator[tuple[str, Literal["text"] | str, Any]]:
    """Every declared input inside params.

    Args:
        value: A params object.
        path: Prefix of the paths.

    Yields:
        Dotted path, modality (``text``, ``image``, …) and the value (``str`` or `OutputRef`); unset ones are left out.
    """
    if not isinstance(value, BaseModel):
        return
    for name, mark in _marks(type(value)):
        item, where = getattr(value, name), f"{path}.{name}" if path else name
        if item is None:
            continue
        items = enumerate(item) if isinstance(item, list | tuple) else None
        for at, one in [(where, item)] if items is None else [(f"{where}.{n}", x) for n, x in items]:
            if isinstance(one, BaseModel) and not isinstance(one, OutputRef):
                yield from iter_inputs(one, at)
            elif mark is not None:
                yield at, "text" if isinstance(mark, TextMarker) else mark.modality, one


@functools.cache
def takes_media(params: type[Params]) -> bool:
    """Whether a kind's params have a field for a file (picture, sound, video, data set), at whatever depth."""

    def inside(annotation: Any) -> bool:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation is not OutputRef and takes_media(annotation)
        return any(isinstance(m, Media) for m in getattr(annotation, "__metadata__", ())) or any(
            inside(arg) for arg in getattr(annotation, "__args__", ())
        )

    return any(
        any(isinstance(m, Media) for m in info.metadata) or inside(info.annotation) for info in params.model_fields.values()
    )


def put_at(data: Any, path: str, value: Any) -> None:
    """Put a value at a dotted path inside JSON values, as `iter_inputs` names it."""
    *way, last = path.split(".")
    for part in way:
        data = data[int(part)] if isinstance(data, list) else data[part]
    data[int(last) if isinstance(data, list) else last] = value


@functools.cache
def _marks(params: type[BaseModel]) -> tuple[tuple[str, Media | TextMarker | None], ...]:
    """Each field, and what marks it as an input."""
    found = []
    for name, info in params.model_fields.items():
        marks = [*info.metadata, *_annotation_marks(info.annotation)]
        found.append((name, next((m for m in marks if isinstance(m, Media | TextMarker)), None)))
    return tuple(found)


def _annotation_marks(annotation: Any) -> list[Any]:
    """Markers hidden inside ``X | None`` and ``list[X]``."""
    marks: list[Any] = list(getattr(annotation, "__metadata__", ()))
    for arg in getattr(annotation, "__args__", ()):
        marks.extend(_annotation_marks(arg))
    return marks


def canonical(params: Params) -> str:
    """Parameters as JSON in one fixed form, defaults written out: equal params give equal text."""
    return json.dumps(params.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


__all__ = [
    "MAX_TEXT", "QUEUES", "AnyInput", "AudioInput", "ImageInput", "KindSpec", "LanguageTag", "Media", "ModelName",
    "OutputRef", "Params", "RetryPolicy", "Text", "VideoInput", "canonical", "describe_errors",
    "get_kind", "iter_inputs", "iter_refs", "kind", "load_kinds", "put_at", "takes_media",
]  # fmt: skip

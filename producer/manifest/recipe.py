"""Recipes: a table of rows and the jobs to make of each, and how any manifest becomes drafts of jobs, row by row."""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from contentfactory.errors import InputError
from contentfactory.jobs.spec import describe_errors, get_kind
from producer.manifest import read
from producer.manifest.model import MAX_JOBS, MAX_RECIPE_BYTES, Draft, DraftError, ManifestError
from producer.manifest.template import (
    LINE,
    Template,
    TemplateError,
    compile_tree,
    escape,
    render_tree,
    slug,
    to_text,
    tree_columns,
    unknown_column,
)

MAX_VARIANTS = 10_000
"""Most jobs that the sweeps of one recipe job may make for each row."""
MAX_ONCE = 100_000
"""Most jobs that ``once`` may make: their ids are kept in memory."""
MAX_NODES = 20_000
"""Most values in a recipe, aliases counted as often as they are used."""
_JOB_FIELDS = ("seed", "priority", "depends_on")
_FALSE = frozenset({"", "0", "false", "no", "off"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecipeJob(_Strict):
    """A job to make for each row."""

    id: str = Field(min_length=1, description="template of the job's custom_id, e.g. {slug}/text")
    kind: str = Field(description="kind of job")
    params: dict[str, Any] = Field(default_factory=dict, description="parameters; strings are templates")
    depends_on: list[str] = Field(
        default_factory=list, description="templates of custom_ids that must succeed first"
    )
    when: str | dict[str, Any] | None = Field(
        default=None,
        description="a column that must not be empty, or {column: value | [values] | {not: value}}",
    )
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="values by name (a further column) or by field (params.steps, seed): one job each",
    )
    priority: int | str | None = Field(default=None, description="bulk, normal, interactive or 0 to 100")
    seed: int | str | None = Field(default=None, description="seed")
    metadata: dict[str, Any] = Field(default_factory=dict, description="the user's own notes")

    @field_validator("depends_on", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Defaults(_Strict):
    """What jobs of the recipe have unless they say otherwise."""

    priority: int | str | None = None
    seed: int | str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    params: dict[str, dict[str, Any]] = Field(default_factory=dict, description="params by kind")


class Recipe(_Strict):
    """A recipe file."""

    version: Literal[1] = Field(description="version of this format: 1")
    name: str | None = Field(
        default=None, max_length=200, description="title of the batch and of its delivery"
    )
    source: str | None = Field(default=None, description="CSV, JSONL or Parquet file, relative to the recipe")
    rows: list[dict[str, Any]] | None = Field(
        default=None, description="rows written out, in the place of a source"
    )
    vars: dict[str, Any] = Field(default_factory=dict, description="constants, used like columns")
    defaults: Defaults = Field(default_factory=Defaults)
    once: list[RecipeJob] = Field(
        default_factory=list, description="jobs made once for each distinct id, not once for each row"
    )
    jobs: list[RecipeJob] = Field(default_factory=list, description="jobs made for each row")


@dataclass(frozen=True)
class Blueprint:
    """One compiled job of a recipe, one combination of its sweeps."""

    where: str
    tree: dict[str, Any]
    columns: frozenset[str]
    condition: "Condition | None"
    extra: Mapping[str, Any]
    once: bool


Condition = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Manifest:
    """A manifest that was opened, not yet checked.

    Args:
        path: The file that the user named.
        base: Folder that ``file:`` inputs are relative to; None where local files are not allowed.
        name: Title, where the recipe gives one.
        source: File with the lines or rows; None where the recipe holds them.
        format: ``jsonl`` (job lines), or ``rows``.
        blueprints: Compiled jobs of the recipe.
        rows: Rows written in the recipe.
        constants: The recipe's ``vars``.
        columns: Columns of the source where the format fixes them.
        limit: Read only that many lines or rows; None for all.
        max_jobs: Most jobs allowed.
        errors: Mistakes of the manifest as a whole, found on opening.
        warnings: What is allowed but looks wrong.
    """

    path: Path
    base: Path | None
    name: str | None = None
    source: Path | None = None
    format: str = "jsonl"
    blueprints: tuple[Blueprint, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    limit: int | None = None
    max_jobs: int = MAX_JOBS
    errors: tuple[ManifestError, ...] = ()
    warnings: tuple[str, ...] = ()

    def drafts(self, problem: read.Problem, start_after: int = 0) -> Iterator[list[Draft]]:
        """Drafts of jobs, one list a line or row.

        Args:
            problem: Told of lines and rows that give no draft.
            start_after: Lines up to this one give none (but ``once`` jobs that they made are not made again).

        Raises:
            DraftError: If the source cannot be read.
        """
        if self.format == "jsonl":
            found = read.json_rows(self.source or self.path, problem, start_after)
            for line, raw in itertools.islice(found, self.limit):
                yield [Draft(line, raw)]
            return
        yield from _expand(self, problem, start_after)


def open_manifest(
    path: Path | str,
    *,
    kind: str | None = None,
    sets: Mapping[str, str] | None = None,
    limit: int | None = None,
    local: bool = True,
    max_jobs: int = MAX_JOBS,
) -> Manifest:
    """Open a manifest: job lines (JSONL), a recipe (YAML, JSON, TOML), or a table of rows with a kind.

    Mistakes are kept in the manifest's ``errors`` for `check` to report; nothing raises.

    Args:
        path: The file; ``.jsonl``, ``.csv`` and ``.tsv`` may be gzipped (``.gz``).
        kind: Kind of job to make of each row of a CSV, JSONL or Parquet file.
        sets: Template by field for such rows: ``id``, ``seed``, ``priority``, ``depends_on``, ``metadata.NAME``, and
            params (``prompt``, ``params.prompt``). Without any, columns named like params are those params.
        limit: Use only the first lines or rows: a trial run.
        local: Whether the manifest may name files of this machine (``file:`` inputs, a recipe's ``source``). False for
            manifests that came over the network.
        max_jobs: Most jobs allowed.
    """
    path = Path(path)
    base = path.resolve().parent if local else None
    form, _ = read.source_format(path)
    made = Manifest(path, base, limit=limit, max_jobs=max_jobs)
    try:
        if form == "recipe":
            if kind or sets:
                raise DraftError(
                    ManifestError("a recipe names its own kinds: leave --kind and --set out", code="usage")
                )
            return _with(made, **_open_recipe(path, local))
        if form == "jsonl" and kind is None and not sets:
            return _with(made, source=path)
        if not form:
            allowed = ".jsonl, .csv, .tsv (also .gz), .parquet, .yaml, .json, .toml"
            raise DraftError(
                ManifestError(f"{path.name} is of no known format; allowed: {allowed}", code="unknown_format")
            )
        if kind is None:
            raise DraftError(
                ManifestError(
                    "rows need a kind (--kind KIND --set FIELD=TEMPLATE) or a recipe",
                    code="usage",
                    field="kind",
                )
            )
        return _with(made, **_open_rows(path, form, kind, dict(sets or {})))
    except DraftError as error:
        return _with(made, errors=error.errors)


def _with(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, **changes)


# --- opening -----------------------------------------------------------------------------------------------------------


def _open_recipe(path: Path, local: bool) -> dict[str, Any]:
    data = _parse_recipe(path)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise DraftError(
            *(
                ManifestError(p["message"], field=p["field"] or None, code="invalid_recipe")
                for p in describe_errors(error)
            )
        ) from None
    if recipe.source is not None and recipe.rows is not None:
        raise DraftError(
            ManifestError("give a source or rows, not both", field="source", code="invalid_recipe")
        )
    if not recipe.jobs and not recipe.once:
        raise DraftError(
            ManifestError(
                "the recipe makes no jobs; add some under jobs", field="jobs", code="invalid_recipe"
            )
        )
    source, columns = None, None
    if recipe.source is not None:
        if not local:
            raise DraftError(
                ManifestError(
                    "a recipe sent over the network cannot name a local source",
                    field="source",
                    code="not_allowed",
                )
            )
        source = path.parent / recipe.source
        columns = _source_columns(source)
    elif recipe.rows is not None:
        columns = tuple(dict.fromkeys(key for row in recipe.rows for key in row))
    else:
        columns = ()
    return _compile(recipe, source, columns)


def _source_columns(source: Path) -> tuple[str, ...] | None:
    form, _ = read.source_format(source)
    if not source.is_file():
        raise DraftError(
            ManifestError(
                f"{str(source)!r} does not exist or is no file", field="source", code="file_not_found"
            )
        )
    if form == "csv":
        return tuple(read.csv_header(source))
    if form == "parquet":
        return tuple(read.parquet_columns(source))
    if form == "jsonl":
        return None
    raise DraftError(
        ManifestError(
            f"{source.name} is of no known format; allowed: .csv, .tsv, .jsonl (also .gz), .parquet",
            field="source", code="unknown_format",
        )
    )  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, strict about keys that stand twice, and without YAML's surprises (``no``, dates, ``1:30``)."""


_Loader.yaml_implicit_resolvers = {
    key: [
        (tag, pattern)
        for tag, pattern in entries
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool")
    ]
    for key, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            # An unquoted {column} is a YAML mapping: the commonest slip, so it gets its own words.
            raise yaml.MarkedYAMLError(
                problem=f'the key {key!r} is not a string (a template that starts with a brace needs quotes: "{{column}}")',
                problem_mark=key_node.start_mark,
            )
        if key in out:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
            )
        out[key] = loader.construct_object(value_node, deep=True)
    return out


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse_recipe(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            message = f"the recipe has {size:,} bytes; allowed: {MAX_RECIPE_BYTES:,} (keep the rows in a source file)"
            raise DraftError(ManifestError(message, code="too_large"))
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DraftError(
            ManifestError(f"{path.name} cannot be read: {error.strerror}", code="file_not_found")
        ) from None
    except UnicodeDecodeError as error:
        raise DraftError(
            ManifestError(
                f"{path.name} is not UTF-8 (byte {error.start + 1}); save it as UTF-8", code="not_utf8"
            )
        ) from None
    try:
        if path.suffix.lower() == ".json":
            data = json.loads(text)
        elif path.suffix.lower() == ".toml":
            data = tomllib.loads(text)
        else:
            data = yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else None
        raise DraftError(
            ManifestError(f"not YAML: {error.problem}", line=line, code="invalid_recipe")
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise DraftError(
            ManifestError(f"{path.name} cannot be read: {str(error)[:200]}", line=line, code="invalid_recipe")
        ) from None
    if not isinstance(data, dict):
        raise DraftError(
            ManifestError("the recipe must be a mapping with version, source and jobs", code="invalid_recipe")
        )
    _count_nodes(data)
    return data


def _count_nodes(data: Any) -> None:
    """Refuse alias bombs: ten short lines of YAML can stand for a billion values."""
    left, stack = MAX_NODES, [data]
    while stack:
        value = stack.pop()
        left -= 1
        if left < 0:
            raise DraftError(
                ManifestError(f"the recipe has more than {MAX_NODES:,} values", code="too_large")
            )
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _open_rows(path: Path, form: str, kind: str, sets: dict[str, str]) -> dict[str, Any]:
    columns = _source_columns(path)
    job: dict[str, Any] = {"kind": kind, "params": {}, "metadata": {}}
    own_params = False
    for name, value in sets.items():
        target = {"custom_id": "id"}.get(name, name)
        parsed = _literal(value)
        if target == "id" or target in _JOB_FIELDS or target.startswith("metadata."):
            _put(job, target, parsed)
        else:
            own_params = True
            _put(job, target if target.startswith("params.") else f"params.{target}", parsed)
    try:
        fields = get_kind(kind).params.model_fields
    except InputError as error:
        raise DraftError(ManifestError(error.message, field="kind", code=error.code)) from None
    if not own_params and columns is not None:
        job["params"] = {name: f"{{{name}}}" for name in columns if name in fields}
        if not job["params"]:
            shown = ", ".join(columns[:10])
            message = (
                f"no column ({shown}) is named like a field of {kind}; map one with --set FIELD={{column}}"
            )
            raise DraftError(ManifestError(message, code="usage"))
    elif not own_params:
        raise DraftError(ManifestError("JSONL rows need --set FIELD={column}", code="usage"))
    if "id" not in job:
        named = next((name for name in ("custom_id", "id") if columns and name in columns), None)
        job["id"] = f"{{{named}}}" if named else "row-{line}"
    recipe = Recipe.model_validate({"version": 1, "jobs": [job]})
    return _compile(recipe, path, columns)


def _literal(value: str) -> Any:
    """Lists and objects on a command line are JSON; everything else is a template."""
    if value.startswith(("[", '{"')):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path, making objects on the way.

    Raises:
        DraftError: If the path goes through something that holds no fields.
    """
    *way, last = path.split(".")
    spot: Any = tree
    try:
        for part in way:
            spot = spot[int(part)] if isinstance(spot, list) else spot.setdefault(part, {})
        spot[int(last) if isinstance(spot, list) else last] = value
    except (AttributeError, TypeError, ValueError, IndexError):
        message = f"{path!r} does not lead to a field that can be set"
        raise DraftError(ManifestError(message, field=path, code="usage")) from None


# --- compiling ---------------------------------------------------------------------------------------------------------


def _compile(recipe: Recipe, source: Path | None, columns: tuple[str, ...] | None) -> dict[str, Any]:
    errors: list[ManifestError] = []
    blueprints: list[Blueprint] = []
    known = None if columns is None else {*columns, *recipe.vars, LINE}
    if columns is not None and (clash := sorted({*recipe.vars} & {*columns, LINE})):
        errors.append(
            ManifestError("this name is a column already", field=f"vars.{clash[0]}", code="invalid_recipe")
        )
    used: set[str] = set()
    for once, where, job in [(True, f"once.{n}", job) for n, job in enumerate(recipe.once)] + [
        (False, f"jobs.{n}", job) for n, job in enumerate(recipe.jobs)
    ]:
        try:
            for blueprint, names in _variants(job, recipe.defaults, where, once):
                blueprints.append(blueprint)
                for path, column in names:
                    used.add(column)
                    if known is not None and column not in known and column not in blueprint.extra:
                        message = unknown_column(column, {*known, *blueprint.extra})
                        errors.append(ManifestError(message, field=f"{where}.{path}", code="unknown_column"))
        except DraftError as error:
            errors.extend(error.errors)
    unused = (
        [] if columns is None or recipe.rows is not None else [name for name in columns if name not in used]
    )
    warnings = (f"columns that nothing uses: {', '.join(unused)}",) if unused else ()
    return {
        "name": recipe.name, "source": source, "format": "rows", "blueprints": tuple(blueprints), "columns": columns,
        "rows": tuple(recipe.rows) if recipe.rows is not None else () if source else ({},), "constants": recipe.vars,
        "errors": tuple(dict.fromkeys(errors)), "warnings": warnings,
    }  # fmt: skip


def _variants(
    job: RecipeJob, defaults: Defaults, where: str, once: bool
) -> Iterator[tuple[Blueprint, list[tuple[str, str]]]]:
    """Compile a recipe job, once for each combination of its sweeps, with the columns that each uses."""
    try:
        kind = get_kind(job.kind).name
    except InputError as error:
        raise DraftError(ManifestError(error.message, field=f"{where}.kind", code=error.code)) from None
    base: dict[str, Any] = {
        "kind": escape(kind), "params": {**defaults.params.get(kind, {}), **job.params}, "depends_on": job.depends_on,
        "metadata": {**defaults.metadata, **job.metadata},
    }  # fmt: skip
    for name in ("priority", "seed"):
        value = getattr(job, name) if getattr(job, name) is not None else getattr(defaults, name)
        if value is not None:
            base[name] = value
    count = 1
    for name, values in job.sweep.items():
        count *= len(values)
        if not values or count > MAX_VARIANTS:
            why = "has no values" if not values else f"makes more than {MAX_VARIANTS:,} jobs for each row"
            raise DraftError(
                ManifestError(f"the sweep {why}", field=f"{where}.sweep.{name}", code="invalid_recipe")
            )
    names = list(job.sweep)
    try:
        in_id = {column for _, column in tree_columns(compile_tree(job.id))}
        for choice in itertools.product(*(range(len(job.sweep[name])) for name in names)):
            tree = json.loads(json.dumps(base))
            extra: dict[str, Any] = {}
            suffix = ""
            for name, at in zip(names, choice, strict=True):
                value = job.sweep[name][at]
                if "." in name or name in _JOB_FIELDS:
                    _put(tree, name, value)
                else:
                    extra[name] = value
                if name not in in_id:
                    suffix += f"-{slug(name.rpartition('.')[2])}{_label(job.sweep[name], at)}"
            tree["custom_id"] = job.id + suffix
            compiled = compile_tree(tree)
            condition, needs = _condition(job.when, f"{where}.when")
            columns = [*tree_columns(compiled), *(("when", column) for column in needs)]
            used = frozenset(column for _, column in columns)
            yield Blueprint(where, compiled, used, condition, extra, once), columns
    except TemplateError as error:
        raise DraftError(ManifestError(str(error), field=where, code="invalid_template")) from None


def _label(values: list[Any], at: int) -> str:
    """A value's piece of the id: the value itself where all are short and differ, otherwise its number."""
    labels = [slug(to_text(value).replace(".", "p")) for value in values]
    if len(set(labels)) == len(labels) and all(0 < len(label) <= 24 for label in labels):
        return ("" if labels[at][0].isdigit() else "-") + labels[at]
    return str(at + 1)


def _condition(when: str | dict[str, Any] | None, where: str) -> tuple[Condition | None, list[str]]:
    """A condition on a row's columns, and the columns that it needs."""
    if when is None:
        return None, []
    if isinstance(when, str):
        column = when.strip().removeprefix("{").removesuffix("}").strip()
        return lambda row: _cell(row, column).strip().lower() not in _FALSE, [column]
    tests: list[tuple[str, bool, frozenset[str]]] = []
    for column, rule in when.items():
        wanted, positive = rule, True
        if isinstance(rule, dict):
            if set(rule) != {"not"}:
                message = (
                    f"a rule is a value, a list of values or {{not: …}} (received {json.dumps(rule)[:80]})"
                )
                raise DraftError(ManifestError(message, field=f"{where}.{column}", code="invalid_recipe"))
            wanted, positive = rule["not"], False
        values = wanted if isinstance(wanted, list) else [wanted]
        tests.append((column, positive, frozenset(to_text(value) for value in values)))
    return lambda row: all((_cell(row, name) in values) == yes for name, yes, values in tests), list(when)


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise TemplateError(f"when: {unknown_column(column, row)}")
    return to_text(row[column])


# --- expanding ---------------------------------------------------------------------------------------------------------


def _source_rows(
    manifest: Manifest, problem: read.Problem, start: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    if manifest.source is None:
        return ((n, dict(row)) for n, row in enumerate(manifest.rows, 1) if n > start)
    form, _ = read.source_format(manifest.source)
    if form == "csv":
        return read.csv_rows(manifest.source, problem, start)
    if form == "parquet":
        used = frozenset[str]().union(*(one.columns for one in manifest.blueprints))
        return read.parquet_rows(
            manifest.source, problem, start, [n for n in manifest.columns or () if n in used]
        )
    return read.json_rows(manifest.source, problem, start)


def _expand(manifest: Manifest, problem: read.Problem, start_after: int) -> Iterator[list[Draft]]:
    once = any(one.once for one in manifest.blueprints)
    seen: dict[str, bytes] = {}
    rows = _source_rows(manifest, problem, 0 if once or manifest.limit is not None else start_after)
    for line, row in itertools.islice(rows, manifest.limit):
        before = line <= start_after
        if before and not once:
            continue
        values = {**row, **manifest.constants, LINE: line}
        drafts: list[Draft] = []
        for number, blueprint in enumerate(manifest.blueprints):
            if before and not blueprint.once:
                continue
            draft = _draft(
                blueprint, {**values, **blueprint.extra} if blueprint.extra else values, line, number
            )
            if draft is None or (blueprint.once and not (draft := _first(draft, seen))):
                continue
            drafts.append(draft)
        if drafts and not before:
            yield drafts


def _draft(blueprint: Blueprint, row: Mapping[str, Any], line: int, number: int) -> Draft | None:
    name: str | None = None
    try:
        if blueprint.condition is not None and not blueprint.condition(row):
            return None
        made = blueprint.tree["custom_id"]
        name = made.text(row) if isinstance(made, Template) else made
        raw = render_tree(blueprint.tree, row)
    except TemplateError as error:
        # The path comes first in the message; it is the error's field.
        path, _, rest = str(error).partition(": ")
        place, message = (path, rest) if rest and " " not in path else (None, str(error))
        problem = ManifestError(message, line=line, field=place, custom_id=name, code="unknown_column")
        return Draft(line, None, number, (problem,), rows=True)
    raw["custom_id"] = name
    raw["metadata"] = {key: to_text(value) for key, value in raw["metadata"].items()}
    return Draft(line, raw, number, rows=True)


def _first(draft: Draft, seen: dict[str, bytes]) -> Draft | None:
    """The draft if no row before made the same job; an error draft if one made another job of that id."""
    if draft.raw is None:
        return draft
    name = draft.raw["custom_id"]
    text = json.dumps(draft.raw, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
    known = seen.get(name)
    if known == digest:
        return None
    if known is None and len(seen) < MAX_ONCE:
        seen[name] = digest
        return draft
    if known is None:
        message = f"once makes more than {MAX_ONCE:,} different jobs; put it under jobs"
    else:
        message = (
            "this row makes another job of the same id than an earlier row; put what differs into the id"
        )
    error = ManifestError(message, line=draft.line, custom_id=name, code="once_differs")
    return Draft(draft.line, None, draft.job, (error,), rows=True)

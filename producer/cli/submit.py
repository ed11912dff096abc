"""``factory submit KIND``: one job, with the kind's own fields as options."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from contentfactory.errors import InputError
from producer.cli.common import Json, emit, factory, print_line


def _parse(kind: Any, extra: list[str]) -> dict[str, Any]:
    """Options such as ``--max-tokens 20`` as params; dots reach into objects, repeated ones make lists."""
    fields = kind.params.model_fields
    out: dict[str, Any] = {}
    index = 0
    while index < len(extra):
        word = extra[index]
        if not word.startswith("--"):
            raise InputError(f"{word!r} stands alone; params are given as --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            index += 1
            if index >= len(extra):
                raise InputError(f"--{name} has no value")
            value = extra[index]
        index += 1
        path = name.replace("-", "_").split(".")
        if path[0] not in fields:
            known = ", ".join("--" + f.replace("_", "-") for f in fields)
            raise InputError(f"{kind.name} has no field {path[0]!r}; it has {known}", param=path[0])
        parsed = _value(value, fields[path[0]].annotation)
        spot = out
        for part in path[:-1]:
            spot = spot.setdefault(part, {})
        if path[-1] in spot:
            earlier = spot[path[-1]]
            spot[path[-1]] = [*(earlier if isinstance(earlier, list) else [earlier]), parsed]
        else:
            spot[path[-1]] = parsed
    return out


def _value(text: str, annotation: Any) -> Any:
    if annotation is str:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # "--prompt 42" is a text that looks like a number; only a field that takes numbers gets one.
    return value if isinstance(value, dict | list | bool) or not _takes_text(annotation) else text


def _takes_text(annotation: Any) -> bool:
    return annotation is str or any(_takes_text(a) for a in getattr(annotation, "__args__", ()))


def _help(kind: Any) -> None:
    print_line(f"factory submit {kind.name} [--FIELD VALUE ...]\n\n{kind.summary}\n")
    for name, info in kind.params.model_fields.items():
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        print_line(f"  --{name.replace('_', '-'):<22} {info.description or ''} ({default})")
    print_line(
        "\nOptions of the job:\n  --params JSON|@FILE|-      all params at once\n  --seed N   --priority N   --key IDEMPOTENCY_KEY"
        "\n  --wait     wait for the end   --out DIR   lay the results there   --no-reuse   --json"
    )


def submit(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="Kind of job, such as text.generate.")] = "",
    params: Annotated[str | None, typer.Option(help="All params as JSON, @FILE, or - for standard input.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    priority: Annotated[int, typer.Option(help="0 to 100.")] = 50,
    key: Annotated[str | None, typer.Option(help="Idempotency key.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; implies --wait.")] = None,
    reuse: Annotated[bool, typer.Option(help="Take an equal earlier result.")] = True,
    as_json: Json = False,
) -> None:
    """Hand in one job: ``factory submit text.generate --prompt "A haiku about rain" --wait``. ``submit KIND --help`` shows its fields."""
    from contentfactory.jobs.spec import get_kind, load_kinds

    extra = list(context.args)
    if kind in ("", "-h", "--help"):
        print_line("factory submit KIND [--FIELD VALUE ...]\n\nKinds:")
        for name, spec in sorted(load_kinds().items()):
            print_line(f"  {name:<18} {spec.summary}")
        return
    with factory() as f:
        spec = get_kind(kind)
        if "--help" in extra or "-h" in extra:
            _help(spec)
            return
        body = _read_params(params) if params else {}
        body.update(_parse(spec, extra))
        body = _upload(f, spec, body)
        job_id = f.producer.submit(spec.name, body, seed=seed, priority=priority, idempotency_key=key, reuse=reuse)
        if not (wait or out):
            emit({"id": job_id, "kind": spec.name, "state": "queued"}) if as_json else print_line(job_id)
            return
        from producer.cli.jobs import show_job, wait_for

        row = wait_for(f, job_id, quiet=as_json)
        show_job(f, row, as_json=as_json, out=out)
        if row["state"] != "succeeded":
            raise typer.Exit(1)


def _read_params(text: str) -> dict[str, Any]:
    raw = sys.stdin.read() if text == "-" else Path(text[1:]).read_text() if text.startswith("@") else text
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise InputError(f"--params is not JSON: {error}", param="params") from None
    if not isinstance(value, dict):
        raise InputError("--params must be a JSON object", param="params")
    return value


def _upload(f: Any, spec: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Files of this machine (``file:PATH``) are stored first; their artifact ids take their place."""
    from contentfactory.jobs.spec import iter_inputs, put_at

    parsed = spec.validate(body)
    ready: dict[str, Any] = json.loads(json.dumps(body))
    for field, modality, value in iter_inputs(parsed):
        if modality == "text" or not isinstance(value, str) or not value.startswith("file:"):
            continue
        artifact = f.producer.upload(Path(value.removeprefix("file:")).expanduser())
        put_at(ready, field, artifact)
    return ready


__all__ = ["submit"]

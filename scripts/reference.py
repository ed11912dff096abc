"""Write ``docs/reference``: kinds, models and settings, derived from their declarations and never edited by hand.

Run by ``make docs``; with ``--check`` nothing is written, and the exit status says whether the pages are up to date.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from contentfactory.catalogue import load_catalogue
from contentfactory.jobs.spec import KindSpec, load_kinds
from contentfactory.settings import PREFIX, Settings

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Written by scripts/reference.py (`make docs`); change the declaration, not this page. -->\n"


def cell(text: Any) -> str:
    """Text that stays inside one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def code(text: Any) -> str:
    """Text as code, empty where there is none."""
    return f"`{cell(text)}`" if text not in ("", None) else ""


def limits(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Type and limits of a field in words, from its JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "another job's output" if name == "OutputRef" else limits(definitions.get(name, {}), definitions) or name
    if "anyOf" in schema:
        parts = [limits(one, definitions) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(part for part in parts if part))
    if "allOf" in schema:
        return limits(schema["allOf"][0], definitions)
    if "enum" in schema:
        return ", ".join(str(one) for one in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}.get(schema.get("type", ""), "")
    if schema.get("type") == "array":
        kind = f"list of {limits(schema.get('items', {}), definitions) or 'values'}"
        low, high, unit = schema.get("minItems"), schema.get("maxItems"), " items"
    elif schema.get("type") == "object":
        properties = schema.get("properties", {})
        return "object of " + ", ".join(properties) if properties else "object"
    elif schema.get("type") == "string":
        low, high, unit = schema.get("minLength"), schema.get("maxLength"), " characters"
        if "pattern" in schema and "description" in schema and schema["description"].startswith("artifact id"):
            return str(schema["description"])
    else:
        low, high, unit = schema.get("minimum"), schema.get("maximum"), ""
        if "exclusiveMinimum" in schema:
            kind += f" above {schema['exclusiveMinimum']:g}"
        if "exclusiveMaximum" in schema:
            kind += f" below {schema['exclusiveMaximum']:g}"
    if low is not None and high is not None:
        return f"{kind}, {low:g} to {high:g}{unit}"
    if low is not None:
        return f"{kind}, from {low:g}{unit}"
    if high is not None:
        return f"{kind}, up to {high:g}{unit}"
    return kind


def kind_section(spec: KindSpec) -> Iterator[str]:
    """One kind as a section."""
    schema = spec.params.model_json_schema()
    definitions = schema.get("$defs", {})
    body = "\n".join(line.strip() for line in (spec.params.__doc__ or "").strip().splitlines())
    yield f"## {spec.name}\n\n{body}\n"
    facts = [f"queue `{spec.queue}`", f"writes {', '.join(code(one) for one in spec.outputs)}"]
    if spec.default_model:
        facts.append(f"default model `{spec.default_model}`")
    if spec.max_group > 1:
        facts.append(f"up to {spec.max_group} jobs share a forward pass")
    facts += [f"time limit {spec.time_limit_s:g} s", f"longest silence {spec.progress_s:g} s"]
    if not spec.cacheable:
        facts.append("results are not reused")
    yield "; ".join(facts) + ".\n"
    yield "| field | values | default | meaning |\n| --- | --- | --- | --- |"
    required = set(schema.get("required", []))
    for name, entry in schema.get("properties", {}).items():
        default = "required" if name in required else code(entry.get("default"))
        description = entry.get("description", "")
        allowed = limits(entry, definitions)
        yield f"| `{name}` | {cell(allowed)} | {default} | {cell('' if description == allowed else description)} |"
    yield ""


def kinds() -> str:
    """The page of all kinds."""
    specs = sorted(load_kinds().values(), key=lambda s: s.name)
    out = ["# Kinds of job", NOTE, ", ".join(f"[{s.name}](#{s.name.replace('.', '')})" for s in specs) + "\n"]
    for spec in specs:
        out.extend(kind_section(spec))
    return "\n".join(out)


def models() -> str:
    """The page of the models that come with the factory."""
    out = [
        "# Models that come with the factory", NOTE,
        "They lie inside pip packages or in this repository; each file is checked against a pinned SHA-256 before its first use.\n",
        "| model | serves | licence | memory, MB | package | what |\n| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for model in sorted(load_catalogue().values(), key=lambda m: m.name):
        tasks = ", ".join(code(task) for task in model.tasks)
        package = code(model.distribution) or "this repository"
        out.append(f"| `{model.name}` | {tasks} | {cell(model.licence)} | {model.memory_mb} | {package} | {cell(model.summary)} |")
    return "\n".join(out) + "\n"


def settings() -> str:
    """The page of all settings."""
    out = [
        "# Settings", NOTE,
        f"Each is a variable of the environment or, in lower case and without `{PREFIX}`, a key of `factory.toml`.\n",
        "That file lies in the working directory; the environment wins over it.\n",
        "| variable | default | meaning |\n| --- | --- | --- |",
    ]  # fmt: skip
    for name, field in Settings.model_fields.items():
        default = field.default
        if default is PydanticUndefined or default is None or str(default) in ("", "**********"):
            shown = ""
        else:
            shown = code(str(default).lower() if isinstance(default, bool) else str(default).replace("'", '"'))
        out.append(f"| `{PREFIX}{name.upper()}` | {shown} | {cell(field.description or '')} |")
    return "\n".join(out) + "\n"


PAGES: dict[str, Callable[[], str]] = {"kinds.md": kinds, "models.md": models, "settings.md": settings}


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which pages are out of date")
    only_check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not only_check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"docs/reference/{name} written")
    if only_check and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`")
    return 1 if only_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

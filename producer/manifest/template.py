"""``{column}`` templates: plain substitution, a few filters, no expressions, and never a second round over what was put in."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MISSING = object()
"""What an empty cell renders to where it stands alone: the field is left out and the kind's default applies."""
LINE = "line"
"""Built-in column: number of the line or row."""


class TemplateError(ValueError):
    """A template that cannot be read, or a column or filter that is not there."""


def slug(text: str) -> str:
    """A text as a piece of a file name or id: lower case, letters and digits of any script, joined by ``-``.

    Accents of Latin letters go (``Café au lait`` → ``cafe-au-lait``); other scripts stay as they are.
    """
    plain = []
    for char in unicodedata.normalize("NFKC", text):
        base = unicodedata.normalize("NFD", char)[0]
        plain.append(base if base.isascii() and base.isalpha() else char)
    return re.sub(r"[\W_]+", "-", "".join(plain).lower()).strip("-")


FILTERS: dict[str, Callable[[str], str]] = {
    "slug": slug, "upper": str.upper, "lower": str.lower, "title": str.title, "strip": str.strip,
}  # fmt: skip

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Field:
    """A column with its filters."""

    column: str
    filters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """A compiled template.

    Args:
        source: The text as written.
        parts: Literal pieces and fields in turn.
    """

    source: str
    parts: tuple[str | Field, ...]

    @property
    def columns(self) -> set[str]:
        """Names of the columns that it uses."""
        return {part.column for part in self.parts if isinstance(part, Field)}

    def render(self, row: Mapping[str, Any]) -> Any:
        """Fill the template in.

        Args:
            row: Value by column.

        Returns:
            A string; the cell itself, type kept, where the template is one bare ``{column}``; `MISSING` where that cell
            is null or empty.

        Raises:
            TemplateError: If a column is not in the row; the message lists those that are.
        """
        if len(self.parts) == 1 and isinstance(only := self.parts[0], Field) and not only.filters:
            value = _lookup(row, only.column)
            return MISSING if value is None or value == "" else _plain(value)
        return "".join(part if isinstance(part, str) else self._text(part, row) for part in self.parts)

    def text(self, row: Mapping[str, Any]) -> str:
        """Fill the template in, always as a string (``""`` for empty cells).

        Raises:
            TemplateError: If a column is not in the row.
        """
        return "".join(part if isinstance(part, str) else self._text(part, row) for part in self.parts)

    @staticmethod
    def _text(part: Field, row: Mapping[str, Any]) -> str:
        text = to_text(_lookup(row, part.column))
        for name in part.filters:
            text = FILTERS[name](text)
        return text


def compile_template(source: str) -> Template:
    """Read a template.

    Args:
        source: Text with ``{column}``, ``{column|filter|filter}``, and ``{{`` or ``}}`` for a brace.

    Raises:
        TemplateError: Naming the place of a lone brace, an empty column name or an unknown filter.
    """
    parts: list[str | Field] = []
    literal, end = "", 0
    for match in _TOKEN.finditer(source):
        literal, end, token = literal + source[end : match.start()], match.end(), match.group()
        if token in ("{{", "}}"):
            literal += token[0]
        elif len(token) == 1:
            raise TemplateError(
                f"a lone {token!r} at character {match.start() + 1} of {_quote(source)}; write {token * 2} for a brace"
            )
        else:
            name, *filters = (piece.strip() for piece in match.group(1).split("|"))
            if not name:
                raise TemplateError(
                    f"an empty column name at character {match.start() + 1} of {_quote(source)}; write {{{{}}}} for braces"
                )
            for one in filters:
                if one not in FILTERS:
                    raise TemplateError(
                        f"filter {one!r} is unknown in {token}; allowed: {', '.join(FILTERS)}"
                    )
            if literal:
                parts.append(literal)
            literal = ""
            parts.append(Field(name, tuple(filters)))
    literal += source[end:]
    if literal or not parts:
        parts.append(literal)
    return Template(source, tuple(parts))


def escape(text: str) -> str:
    """A text that a template renders to itself."""
    return text.replace("{", "{{").replace("}", "}}")


def to_text(value: Any) -> str:
    """A cell as text: null is empty, true and false as in JSON, lists and objects as JSON, times in ISO form."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    value = _plain(value)
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _plain(value: Any) -> Any:
    """A cell as a JSON value: Parquet also has times, decimals and bytes."""
    if isinstance(value, str | int | float | list | dict):
        return value
    if isinstance(value, bytes):
        raise TemplateError(
            f"a cell holds {len(value)} raw bytes; templates take text, numbers, true/false, dates and lists"
        )
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _lookup(row: Mapping[str, Any], column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        raise TemplateError(unknown_column(column, row)) from None


def unknown_column(column: str, known: Any) -> str:
    """The message for a column that is not there."""
    names = sorted(str(name) for name in known)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"column {column!r} does not exist; columns: {shown or 'none'}"


def _quote(source: str) -> str:
    return json.dumps(source[:60] + "…" if len(source) > 60 else source, ensure_ascii=False)


Compiled = Any
"""A tree of dicts and lists whose strings are templates where they use a column, and plain strings elsewhere."""


def compile_tree(value: Any, path: str = "") -> Compiled:
    """Compile every string in a tree of JSON values.

    Raises:
        TemplateError: Naming the path of the string at fault.
    """
    if isinstance(value, str):
        try:
            template = compile_template(value)
        except TemplateError as error:
            raise TemplateError(f"{path}: {error}" if path else str(error)) from None
        return template if template.columns else template.text({})
    if isinstance(value, Mapping):
        return {
            str(key): compile_tree(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            compile_tree(item, f"{path}.{index}" if path else str(index)) for index, item in enumerate(value)
        ]
    return value


def tree_columns(compiled: Compiled, path: str = "") -> Iterator[tuple[str, str]]:
    """Each column that a compiled tree uses, with the dotted path of the string that uses it."""
    if isinstance(compiled, Template):
        for column in sorted(compiled.columns):
            yield path, column
    elif isinstance(compiled, Mapping):
        for key, item in compiled.items():
            yield from tree_columns(item, f"{path}.{key}" if path else str(key))
    elif isinstance(compiled, list):
        for index, item in enumerate(compiled):
            yield from tree_columns(item, f"{path}.{index}" if path else str(index))


def render_tree(compiled: Compiled, row: Mapping[str, Any], path: str = "") -> Any:
    """Fill in a compiled tree: empty cells that stand alone drop out of the object or list that they are in.

    Raises:
        TemplateError: Naming the path of the string at fault.
    """
    if isinstance(compiled, Template):
        try:
            return compiled.render(row)
        except TemplateError as error:
            raise TemplateError(f"{path}: {error}" if path else str(error)) from None
    if isinstance(compiled, dict):
        out = {}
        for key, item in compiled.items():
            if (value := render_tree(item, row, f"{path}.{key}" if path else key)) is not MISSING:
                out[key] = value
        return out
    if isinstance(compiled, list):
        values = (
            render_tree(item, row, f"{path}.{index}" if path else str(index))
            for index, item in enumerate(compiled)
        )
        return [value for value in values if value is not MISSING]
    return compiled

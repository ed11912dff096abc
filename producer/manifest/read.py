"""Sources line by line: JSON lines, CSV and Parquet, plain or gzipped, decoded with care and in flat memory."""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from producer.manifest.model import MAX_LINE_BYTES, MAX_SOURCE_BYTES, DraftError, ManifestError

Problem = Callable[[ManifestError], None]
"""Receives a mistake of a line; reading goes on behind it."""

DELIMITERS = ",;\t"
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def source_format(path: Path) -> tuple[str, bool]:
    """Format by file name.

    Returns:
        One of ``jsonl``, ``csv``, ``parquet``, ``recipe`` or ``""``, and whether the file is gzipped.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    gzipped = bool(suffixes) and suffixes[-1] == ".gz"
    last = (suffixes[:-1] or [""])[-1] if gzipped else (suffixes or [""])[-1]
    formats = {
        ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet",
        ".yaml": "recipe", ".yml": "recipe", ".json": "recipe", ".toml": "recipe",
    }  # fmt: skip
    return formats.get(last, ""), gzipped


def text_lines(path: Path, problem: Problem) -> Iterator[tuple[int, str]]:
    """Lines of a text file with their numbers, endings kept; a byte-order mark is skipped.

    Args:
        path: The file, gzipped where its name ends in ``.gz``.
        problem: Told of lines that are too long or not UTF-8. A line that is too long is left out; bytes that are not
            UTF-8 are replaced, so that one bad byte yields one message and not a chain of them.

    Raises:
        DraftError: If the file cannot be read at all (missing, UTF-16, broken gzip, larger than allowed).
    """
    try:
        stream: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise DraftError(
            ManifestError(f"{path.name} cannot be read: {error.strerror}", code="file_not_found")
        ) from None
    number = 0
    try:
        with stream:
            source: Any = gzip.GzipFile(fileobj=stream) if path.suffix.lower() == ".gz" else stream
            reader = io.BufferedReader(source, 1 << 18) if source is not stream else stream
            total = 0
            while raw := reader.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(raw)
                if number == 1:
                    raw = _without_bom(raw, path)
                if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    while (rest := reader.readline(1 << 20)) and not rest.endswith(b"\n"):
                        total += len(rest)
                        _check_total(total, path)
                    problem(
                        ManifestError(
                            f"the line is longer than the {MAX_LINE_BYTES:,} bytes allowed",
                            line=number,
                            code="line_too_long",
                        )
                    )
                    continue
                _check_total(total, path)
                try:
                    yield number, raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad = raw[error.start : error.start + 1].hex()
                    problem(
                        ManifestError(
                            f"byte 0x{bad} at position {error.start + 1} is not UTF-8; save the file as UTF-8",
                            line=number, code="not_utf8",
                        )
                    )  # fmt: skip
                    yield number, raw.decode("utf-8", "replace")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DraftError(
            ManifestError(f"{path.name} is not a whole gzip file: {error}", code="bad_gzip")
        ) from None


def _without_bom(raw: bytes, path: Path) -> bytes:
    for mark, name in _OTHER_BOMS.items():
        if raw.startswith(mark):
            raise DraftError(
                ManifestError(f"{path.name} is {name}; save the file as UTF-8", line=1, code="not_utf8")
            )
    return raw.removeprefix(codecs.BOM_UTF8)


def _check_total(total: int, path: Path) -> None:
    if total > MAX_SOURCE_BYTES:
        raise DraftError(
            ManifestError(
                f"{path.name} is larger than the {MAX_SOURCE_BYTES:,} bytes allowed once unpacked",
                code="too_large",
            )
        )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twin!r} stands twice in one object")
    return out


_decoder = json.JSONDecoder(object_pairs_hook=_no_twins, parse_constant=_no_constant)


def json_rows(path: Path, problem: Problem, start_after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON lines file with their line numbers; empty lines are skipped.

    Args:
        path: The file.
        problem: Told of lines that hold no JSON object.
        start_after: Lines up to this one are skipped unread.

    Raises:
        DraftError: If the file cannot be read at all.
    """
    told = -1

    def tell(error: ManifestError) -> None:
        nonlocal told
        told = error.line or -1
        if told > start_after:
            problem(error)

    for number, text in text_lines(path, tell):
        if number <= start_after or number == told or not (text := text.strip()):
            continue
        try:
            value = _decoder.decode(text)
        except json.JSONDecodeError as error:
            problem(
                ManifestError(
                    f"not JSON: {error.msg} at character {error.pos + 1}", line=number, code="invalid_json"
                )
            )
            continue
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            problem(ManifestError(f"not JSON as allowed here: {why}", line=number, code="invalid_json"))
            continue
        if not isinstance(value, dict):
            kinds = {list: "a list", str: "a string", bool: "a true/false", type(None): "null"}
            found = kinds.get(type(value), "a number")
            problem(
                ManifestError(
                    f"the line is {found}; it must be a JSON object", line=number, code="not_an_object"
                )
            )
            continue
        yield number, value


def csv_header(path: Path) -> list[str]:
    """Column names of a CSV file.

    Raises:
        DraftError: If there is no header, or it has empty or repeated names.
    """
    number, text = next(
        (pair for pair in text_lines(path, lambda error: None) if pair[1].strip("\r\n")), (0, "")
    )
    if not number:
        raise DraftError(
            ManifestError(f"{path.name} is empty; its first line must name the columns", code="empty")
        )
    names = [name.strip() for name in next(csv.reader([text], delimiter=_delimiter(text)))]
    if blank := [index + 1 for index, name in enumerate(names) if not name]:
        raise DraftError(
            ManifestError(f"column {blank[0]} of the header has no name", line=number, code="bad_header")
        )
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise DraftError(
            ManifestError(f"column {twins[0]!r} stands twice in the header", line=number, code="bad_header")
        )
    return names


def _delimiter(header: str) -> str:
    """The one of ``, ; tab`` that cuts the header into most names (csv.Sniffer guesses wrong on prose)."""
    return max(DELIMITERS, key=lambda one: (len(next(csv.reader([header], delimiter=one))), one == ","))


def csv_rows(path: Path, problem: Problem, start_after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file with the number of the line on which each begins; cells are strings, empty rows are skipped.

    Args:
        path: The file; delimiter ``,``, ``;`` or tab, UTF-8 with or without a byte-order mark, quotes doubled inside quotes.
        problem: Told of rows with too few or too many cells and of quotes that never close.
        start_after: Rows that begin up to this line are skipped.

    Raises:
        DraftError: If the file cannot be read at all.
    """
    names = csv_header(path)
    bad: set[int] = set()
    origin: list[
        int
    ] = []  # physical number of each line handed to the csv module: over-long ones are left out of it

    def tell(error: ManifestError) -> None:
        bad.add(error.line or 0)
        if (error.line or 0) > start_after:
            problem(error)

    def feed() -> Iterator[str]:
        for number, text in text_lines(path, tell):
            origin.append(number)
            yield text

    csv.field_size_limit(MAX_LINE_BYTES)
    feeder = feed()
    first = next(line for line in feeder if line.strip("\r\n"))
    origin.clear()
    reader = csv.reader(feeder, delimiter=_delimiter(first), strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            at = origin[0] if origin else None
            why = "a quote is opened here and never closed" if "unexpected end" in str(error) else str(error)
            tell(ManifestError(f"not CSV: {why}", line=at, code="invalid_csv"))
            origin.clear()
            continue
        span, line = set(origin), origin[0] if origin else 0
        origin.clear()
        if not cells or line <= start_after or span & bad or all(not cell.strip() for cell in cells):
            bad -= span
            continue
        if len(cells) != len(names):
            tell(
                ManifestError(
                    f"the row has {len(cells)} cells, the header {len(names)}; put quotes round cells that hold the delimiter",
                    line=line, code="ragged_row",
                )
            )  # fmt: skip
            continue
        yield line, dict(zip(names, cells, strict=True))


def parquet_columns(path: Path) -> list[str]:
    """Column names of a Parquet file.

    Raises:
        DraftError: If the file is no Parquet file or cannot be read.
    """
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(
    path: Path, problem: Problem, start_after: int = 0, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file with their numbers from 1, read a row group at a time.

    Args:
        path: The file.
        problem: Unused; the format has no bad rows.
        start_after: Rows up to this number are skipped, whole row groups unread.
        columns: Columns to read; all where left out.

    Raises:
        DraftError: If the file is no Parquet file or cannot be read.
    """
    import pyarrow as pa

    with _parquet(path) as file:
        row = 0
        try:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if row + size <= start_after:
                    row += size
                    continue
                # With no column asked for a batch would have no rows: one column at least carries their number.
                wanted = (
                    list(columns) if columns else file.schema_arrow.names[:1] if columns is not None else None
                )
                for batch in file.iter_batches(
                    batch_size=1024, row_groups=[group], columns=wanted, use_threads=False
                ):
                    for values in batch.to_pylist():
                        row += 1
                        if row > start_after:
                            yield row, values
        except (pa.ArrowException, OSError) as error:
            raise DraftError(
                ManifestError(
                    f"{path.name} broke off after row {row}: {error}",
                    line=row or None,
                    code="invalid_parquet",
                )
            ) from None


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DraftError(
            ManifestError(
                "reading Parquet needs pyarrow, which is not installed: pip install pyarrow",
                code="missing_library",
            )
        ) from None
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DraftError(ManifestError(f"{path.name} does not exist", code="file_not_found")) from None
    except (pa.ArrowException, OSError) as error:
        raise DraftError(
            ManifestError(f"{path.name} is not a Parquet file: {error}", code="invalid_parquet")
        ) from None

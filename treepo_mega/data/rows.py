"""Rows of one prompt file: JSON lines, a JSON array or parquet, plain or compressed; errors say where and what.

`read_file(Path("train.jsonl.gz"), 0, 1000)` yields the first thousand rows. A row knows its place (`where`, for
messages) and its number in the file (`index`, from 0, whatever the slice, so that ids stay the same). Files are read as
a stream: what stands behind the last wanted row is not looked at.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from treepo_mega.errors import TreepoError, nearest

FORMATS = (".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".zstd")

BATCH_ROWS = 2048
"""Rows of a parquet file that are in memory at once."""

MISSING: Any = object()
"""What `lookup` gives for a key that is not there."""


class PromptError(TreepoError):
    """Prompts that cannot be used; the message names the file, the line, the key and what was expected."""


@dataclass(slots=True)
class Row:
    """One record: where it is (for people), its number in the file, its values."""

    where: str
    index: int
    values: dict[str, Any]


def file_format(path: Path) -> tuple[str, str]:
    """(format, compression) by the name's endings; ("", "") when this is no prompt file.

    >>> file_format(Path("train.jsonl.gz")), file_format(Path("notes.txt"))
    (('.jsonl', '.gz'), ('', ''))
    """
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    form = path.with_suffix("").suffix if compression else path.suffix
    return (form, compression) if form in FORMATS else ("", "")


def file_stem(path: Path) -> str:
    """The name without format and compression: what the file's prompt ids begin with.

    >>> file_stem(Path("data/train.v2.jsonl.gz"))
    'train.v2'
    """
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).stem


def read_file(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows `start` to `stop` (0 <= start; None: to the end). Blank lines of a jsonl file are no rows.

    Raises PromptError for a malformed line or file.
    """
    form, _ = file_format(path)
    with _opened(path) as file:
        if form == ".parquet":
            yield from _parquet(path, file, start, stop)
        elif form == ".json" and _is_array(file):
            yield from _json_array(path, file, start, stop)
        else:
            yield from _json_lines(path, file, start, stop)


def count_rows(path: Path) -> int:
    """Rows of the file. Of JSON lines nothing is parsed."""
    form, _ = file_format(path)
    with _opened(path) as file:
        if form == ".parquet":
            return int(_parquet_file(path, file).metadata.num_rows)
        if form == ".json" and _is_array(file):
            return sum(1 for _ in _json_array(path, file, 0, None))
        return sum(not line.isspace() for line in file)


def lookup(values: dict[str, Any], key: str) -> Any:
    """`values[key]`, or the value under a dotted path such as reward_model.ground_truth; MISSING without one."""
    if key in values:
        return values[key]
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return MISSING
        found = found[part]
    return found


def describe_missing(row: Row, what: str, key: str, aliases: tuple[str, ...]) -> str:
    """The message for a row without a (non-empty) value under `key` or its aliases."""
    option = "data.input_key" if what == "prompt" else "data.label_key"
    present = _all_keys(row.values)
    if empty := [k for k in dict.fromkeys((key, *aliases)) if lookup(row.values, k) is not MISSING]:
        return f"{row.where}: no {what}: {empty[0]!r} is empty ({option} says which key holds it)"
    hint = nearest(key, (name for name in present if name != key), cutoff=0.5)
    tried = ", ".join(dict.fromkeys((key, *aliases)))
    return f"{row.where}: no {what}: tried {tried}; keys here: {', '.join(present) or 'none'}{hint} (set {option})"


def _all_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for k, v in values.items():
        keys.append(f"{prefix}{k}")
        if isinstance(v, dict):
            keys += _all_keys(v, f"{prefix}{k}.")
    return keys


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises PromptError for a file that cannot be opened or decompressed."""
    _, compression = file_format(path)
    try:
        with _open(path, compression) as file:
            yield file
    # BadGzipFile is an OSError, so this clause comes first; a file that ends too early raises EOFError.
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: cannot be decompressed as gzip: {error}; is the file complete?") from None
    except OSError as error:
        kind = f"cannot be decompressed as {compression}" if compression else "cannot be read"
        raise PromptError(f"{path}: {kind}: {error.strerror or error}") from None


def _open(path: Path, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression:
        return _open_zstd(path)
    return path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise PromptError(f"{path}: reading zstd needs the package pyarrow: pip install pyarrow") from None
    if not pyarrow.Codec.is_available("zstd"):
        raise PromptError(
            f"{path}: this pyarrow was built without zstd: pip install pyarrow from a wheel, or decompress the file"
        )
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)


def _is_array(file: BinaryIO) -> bool:
    """Whether a .json file holds one array of records, rather than a record a line."""
    # A stream of zstd cannot seek back, so the head is looked at and not read.
    head: bytes = cast(io.BufferedReader, file).peek(64)[:64]
    return head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n").startswith("[")


def _json_array(path: Path, file: BinaryIO, start: int, stop: int | None) -> Iterator[Row]:
    try:
        records = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise PromptError(f"{path}: not UTF-8: {e}") from None
    except (ValueError, RecursionError) as e:
        raise PromptError(f"{path}: not valid JSON: {e}") from None
    for index, values in islice(enumerate(records), start, stop):
        where = f"{path}, item {index + 1}"
        yield Row(where, index, _record(values, where))


def _json_lines(path: Path, file: BinaryIO, start: int, stop: int | None) -> Iterator[Row]:
    # Lines of bytes end at \n only. `str.splitlines` would also cut at U+2028, which JSON allows within a text.
    filled = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
    for index, (number, line) in islice(enumerate(filled), start, stop):
        where = f"{path}, line {number}"
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as e:
            raise PromptError(f"{where}: not UTF-8: {e}") from None
        except (ValueError, RecursionError) as e:
            shown = line.rstrip(b"\r\n")[:80].decode("utf-8", "replace")
            raise PromptError(f"{where}: not valid JSON: {e}: {shown!r}") from None
        yield Row(where, index, _record(values, where))


def _record(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise PromptError(f"{where}: expected a JSON object, got {type(values).__name__}")
    return values


def _parquet_file(path: Path, file: BinaryIO) -> Any:
    import pyarrow
    import pyarrow.parquet

    # Compressed once more around the format: parquet is read from its end, a decompressor cannot jump there.
    source = pyarrow.BufferReader(file.read()) if file_format(path)[1] else file
    try:
        return pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError) as e:
        raise PromptError(f"{path}: cannot read the parquet file: {e}") from None


def _parquet(path: Path, file: BinaryIO, start: int, stop: int | None) -> Iterator[Row]:
    import pyarrow

    table = _parquet_file(path, file)
    plain = _is_plain(table.schema_arrow)
    end = table.metadata.num_rows if stop is None else min(stop, table.metadata.num_rows)
    first = 0
    batches = table.iter_batches(batch_size=BATCH_ROWS)
    while first < end:
        try:
            batch = next(batches)
        except (pyarrow.ArrowException, OSError) as e:
            raise PromptError(f"{path}: cannot read the parquet file: {e}") from None
        wanted = slice(max(start - first, 0), min(end - first, batch.num_rows))
        if wanted.start < wanted.stop:
            records = batch.slice(wanted.start, wanted.stop - wanted.start).to_pylist()
            for index, record in enumerate(records, first + wanted.start):
                values = record if plain else {k: _plain(v) for k, v in record.items()}
                yield Row(f"{path}, row {index}", index, values)
        first += batch.num_rows


def _is_plain(schema: Any) -> bool:
    """Whether every value of the parquet file is one that JSON has, so that `_plain` has nothing to do."""
    text = str([field.type for field in schema])
    return not any(name in text for name in ("binary", "date", "time", "duration", "decimal"))


def _plain(value: Any) -> Any:
    """Parquet's richer types as JSON has them: dates and decimals become text, bytes (images) are left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if not isinstance(v, bytes)]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value

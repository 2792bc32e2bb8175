"""Rows of prompt files: jsonl and parquet, slices, dotted keys, and errors that say where and what.

`read_rows("data/train.jsonl@[0:1000]")` gives the file's stem and its rows; a row knows its place (`where`,
for messages) and its number in the file (`index`, from 0, whatever the slice, so that ids stay the same).
"""

from __future__ import annotations

import datetime
import decimal
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mega.config.source import expand_path
from treepo_mega.errors import TreepoError

SUFFIXES = (".jsonl", ".parquet")

MISSING: Any = object()
"""What `lookup` gives for a key that is not there."""

_SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


class PromptError(TreepoError):
    """Prompts that cannot be used; the message names the file, the line, the key and what was expected."""


@dataclass(slots=True)
class Row:
    """One record: where it is (for people), its number in the file, its values."""

    where: str
    index: int
    values: dict[str, Any]


def read_rows(spec: str) -> tuple[str, list[Row]]:
    """(file stem, rows) of `path` or `path@[a:b]`. Blank lines of a jsonl file are no rows.

    Raises PromptError for a missing file (with the nearest name beside it), an unknown suffix, a malformed
    slice, line or file, and a slice without rows.
    """
    path, start, stop = _split_spec(spec)
    if path.suffix not in SUFFIXES:
        raise PromptError(f"{path}: unknown kind of file; expected {' or '.join(SUFFIXES)}")
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise PromptError(f"{path}: no such file{hint}")
    rows = _jsonl(path, start, stop) if path.suffix == ".jsonl" else _parquet(path, start, stop)
    if not rows:
        raise PromptError(f"{spec}: no rows" if spec == str(path) else f"{spec}: the slice has no rows")
    return path.stem, rows


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
    near = [k for k in (difflib.get_close_matches(key, present, n=1, cutoff=0.5)) if k != key]
    hint = f"; nearest: {near[0]!r}" if near else ""
    tried = ", ".join(dict.fromkeys((key, *aliases)))
    return f"{row.where}: no {what}: tried {tried}; keys here: {', '.join(present) or 'none'}{hint} (set {option})"


def _all_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for k, v in values.items():
        keys.append(f"{prefix}{k}")
        if isinstance(v, dict):
            keys += _all_keys(v, f"{prefix}{k}.")
    return keys


def _split_spec(spec: str) -> tuple[Path, int | None, int | None]:
    m = _SLICE.fullmatch(spec)
    if m is None:
        if "@[" in spec:
            raise PromptError(
                f"{spec}: malformed slice; expected path@[a:b] with integers a and b, either may be empty"
            )
        return _expanded(spec), None, None
    start, stop = (int(m[k]) if m[k] not in ("", "-") else None for k in ("start", "stop"))
    return _expanded(m["path"]), start, stop


def _expanded(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise PromptError(f"{text}: {error}") from None


def _jsonl(path: Path, start: int | None, stop: int | None) -> list[Row]:
    numbered = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    rows = []
    for index in range(*slice(start, stop).indices(len(numbered))):
        number, line = numbered[index]
        where = f"{path}, line {number}"
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as e:
            raise PromptError(f"{where}: not UTF-8: {e}") from None
        except (ValueError, RecursionError) as e:
            raise PromptError(f"{where}: not valid JSON: {e}: {line[:80].decode('utf-8', 'replace')!r}") from None
        if not isinstance(values, dict):
            raise PromptError(f"{where}: expected a JSON object, got {type(values).__name__}")
        rows.append(Row(where, index, values))
    return rows


def _parquet(path: Path, start: int | None, stop: int | None) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise PromptError(f"{path}: cannot read the parquet file: {e}") from None
    first, end, _ = slice(start, stop).indices(table.num_rows)
    records = table.slice(first, max(0, end - first)).to_pylist()
    return [
        Row(f"{path}, row {first + i}", first + i, {k: _plain(v) for k, v in r.items()}) for i, r in enumerate(records)
    ]


def _plain(value: Any) -> Any:
    """Parquet's richer types as JSON has them: dates and decimals become text, bytes (images) are left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if not isinstance(v, bytes)]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value

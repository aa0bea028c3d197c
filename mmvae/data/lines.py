"""JSON lines, read one by one: which line is broken, where, and the rows that the others hold.

`datasets` reads blocks of a file and counts lines from a block's start, so the line that it names is not the true one; and it stops there.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow

logger = logging.getLogger(__name__)


class BadRow(ValueError):
    """A row that cannot be used; the message names the row (from 0) or the file's line (from 1), what came and what was expected."""


class NoneKept(ValueError):
    """Not one row of a data set is kept; ``bad`` tells what is wrong with those that are bad, by their numbers."""

    def __init__(self, message: str, bad: Mapping[int, str]) -> None:
        super().__init__(message)
        self.bad = bad


Kinds = dict[str, tuple[str, str | Path, int]]  # of the values of a column, and the file and line that first had one


def read_lines(path: str | Path, kinds: Kinds | None = None) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Every line of a file with its number from 1: the object that it holds, or what is wrong with it.

    A column has the kind of value that it has where it first is one; whole numbers and others are one kind, null is of every kind. Empty
    lines at the end are none. Whole numbers that int64 cannot hold are float, as `datasets` reads them.

    Arguments:
        path: the file.
        kinds: of the files before it in its split; what this one adds is put in.
    """
    kinds = {} if kinds is None else kinds
    empty = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                empty += 1
                continue
            for before in range(number - empty, number):
                yield before, "column 1: got an empty line, expected an object"
            empty = 0
            yield number, _parsed(line, path, number, kinds)


def _parsed(line: bytes, path: str | Path, number: int, kinds: Kinds) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_int=_whole)
    except UnicodeDecodeError as error:
        return f"column {error.start + 1}: got bytes that are not UTF-8"
    except json.JSONDecodeError as error:
        return f"column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return f"column 1: {error}"
    if b"\\ud" in line.lower() and (lone := re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))):
        column = line.lower().find(b"\\u%04x" % ord(lone[0])) + 1
        return f"column {column}: got a lone surrogate, expected valid Unicode text"
    if not isinstance(row, dict):
        return f"column 1: got {type(row).__name__}, expected an object"
    for name, value in row.items():
        expected, file, since = kinds.get(name, (_kind(value), path, number))
        if value is not None and (kind := _kind(value)) != expected:
            of = "" if file == path else f" of {Path(file).name}"
            return f"field {name!r}: got {kind}, expected {expected} as in line {since}{of}"
    kinds |= {name: (_kind(value), path, number) for name, value in row.items() if value is not None and name not in kinds}
    return row


def _whole(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**63 else float(digits)


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def broken_lines(paths: Iterable[str | Path], only: str = "") -> Iterator[str]:
    """What is wrong with lines of the files of a split, in order: "file: line 3, column 7: ..."; ``only`` what begins so after the line."""
    kinds: Kinds = {}
    for path in paths:
        told = ((number, row) for number, row in read_lines(path, kinds) if isinstance(row, str) and row.startswith(only))
        yield from (f"{path}: line {number}, {why}" for number, why in told)


def rows_of_lines(files: Mapping[str, Iterable[str | Path]], streaming: bool) -> dict[str, Any]:
    """The rows of JSON-lines files by split, a row of nothing but None for a broken line, so that row n is line n + 1 of a single file."""
    loaded = {}
    for split, paths in files.items():
        paths = [str(path) for path in paths]
        if streaming:
            loaded[split] = datasets.IterableDataset.from_generator(
                _rows, gen_kwargs={"paths": paths}, split=datasets.NamedSplit(str(split))
            )
            continue
        rows = list(_rows(paths))
        columns = dict.fromkeys(itertools.chain.from_iterable(rows))
        values = {column: _alike([row.get(column) for row in rows]) for column in columns}
        try:
            loaded[split] = datasets.Dataset.from_dict(values, split=datasets.NamedSplit(str(split)), on_mixed_types="use_json")
        except (pyarrow.ArrowException, OverflowError) as error:
            raise BadRow(f"{', '.join(paths)}: {error}") from error
    return loaded


def _alike(values: list[Any]) -> list[Any]:
    """A column's values, whole numbers as floats where others are: pyarrow would refuse those beyond 2^53."""
    mixed = any(isinstance(value, float) for value in values)
    return [float(value) if mixed and type(value) is int else value for value in values]


def _rows(paths: list[str]) -> Iterator[dict[str, Any]]:
    kinds: Kinds = {}
    for path in paths:
        columns = next((row for _, row in read_lines(path) if not isinstance(row, str)), {})
        broken = 0
        for number, row in read_lines(path, kinds):
            if isinstance(row, str):
                broken += 1
                if broken == 1:
                    logger.warning("%s: line %d, %s; it and other broken lines become rows without values", path, number, row)
            yield dict.fromkeys(columns) | ({} if isinstance(row, str) else row)

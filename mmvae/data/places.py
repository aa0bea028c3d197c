"""Where a bad row lies: its number, which of several local files has it, and what is wrong with its line."""

import csv
import functools
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from mmvae.data.lines import read_lines
from mmvae.data.loading import local_files
from mmvae.data.selection import called, file_row


def place(dataset: Any, name: str, row: int) -> str:
    """What an error calls a row: the data set, and the row's number before any selection, or in a stream, of which rows may be held out.

    Of local files it says the file, too, and the row's number there, where there are several, and the reason where a line is broken.
    """
    number = file_row(dataset, row)
    told, where = f"{called(dataset, name)}: row {number}", ""
    if isinstance(dataset, datasets.IterableDataset):
        return f"{told} of the stream"
    if isinstance(dataset, datasets.Dataset):
        skipped = dataset.builder_name is None  # not read by `datasets`, which stops at a broken line
        files = _files(name, str(dataset.split or "train"), dataset.data.num_rows, skipped)
        for file, count, broken in files:
            if number < count:
                lines = file.suffix.lower() == ".jsonl"
                why = f", {broken[number]}" if number in broken else ""
                where = f" ({file.name}: {f'line {number + 1}' if lines else f'row {number}'}{why})" if why or len(files) > 1 else ""
                break
            number -= count
    return told + where


@functools.lru_cache(maxsize=8)
def _files(name: str, split: str, num_rows: int, skipped: bool) -> list[tuple[Path, int, dict[int, str]]]:
    """The local files of a split, how many rows each has, and its broken lines by their row, if these were skipped.

    No files where there is no more to tell than the row's number, or where they are not those of the rows.
    """
    path, kinds, found = Path(name).expanduser(), {}, []
    try:
        files = [Path(file) for file in local_files(path).get(split, ())] if path.exists() else []
        if len(files) == 1 and not (skipped and files[0].suffix.lower() == ".jsonl"):
            return []
        for file in files:
            lines = enumerate(row for _, row in read_lines(file, kinds)) if skipped and file.suffix.lower() == ".jsonl" else ()
            broken = {number: row for number, row in lines if isinstance(row, str)}
            found.append((file, _count(file), broken))
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException):  # a name that is no data set's, or files that changed since
        return []
    return found if sum(count for _, count, _ in found) == num_rows else []


def _count(file: Path) -> int:
    """How many rows a table holds."""
    if file.suffix.lower() == ".parquet":
        return parquet.read_metadata(file).num_rows
    if file.suffix.lower() == ".jsonl":
        with file.open("rb") as stream:
            return max((number for number, line in enumerate(stream, 1) if line.strip()), default=0)
    if file.suffix.lower() not in (".csv", ".tsv", ".txt", ".text"):
        raise ValueError(f"{file}: received no table, expected one")
    table = file.suffix.lower() in (".csv", ".tsv")
    with file.open(encoding="utf-8", newline="" if table else None) as stream:
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        return sum(map(bool, csv.reader(stream, delimiter=delimiter))) - 1 if table else sum(1 for _ in stream)

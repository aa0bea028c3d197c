"""Rows that are told by their number in the file, whatever was selected since: a held-out part, rows that show their label."""

from collections.abc import Sequence
from typing import Any


def select(dataset: Any, rows: Sequence[int]) -> Any:
    """``dataset.select(rows)`` of which :func:`file_row` knows the numbers: of rows in sequence `datasets` forgets where they were."""
    if len(rows) and rows[0] and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return dataset.select([*rows, 0]).select(range(len(rows)))
    return dataset.select(rows)


def selected(dataset: Any) -> list[int] | None:
    """The numbers of the rows before a selection, None where there was none; `datasets` keeps them in a private table only."""
    indices = getattr(dataset, "_indices", None)
    return None if indices is None else indices.column(0).to_pylist()


def file_row(dataset: Any, row: int) -> int:
    """The row's number before a selection."""
    indices = getattr(dataset, "_indices", None)
    return row if indices is None else indices.column(0)[row].as_py()


def called(dataset: Any, name: str) -> str:
    """What messages call a data set: its name, and its split where that is not the training one, of which a held-out part is."""
    split = str(getattr(dataset, "split", None) or "train")
    return name if split == "train" else f"{name}, {split}"

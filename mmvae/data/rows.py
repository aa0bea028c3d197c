r"""A data set seen through columns: raw rows in, the model's inputs out.

A map-style set is prepared once: text and labels always, pictures while they fit in ``memory_limit``; larger pictures
are decoded when a batch asks for them. A stream (`datasets.IterableDataset`) is prepared batch by batch. Either way a
row is decoded in one place, `Rows.batch`.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mmvae.data.columns import Column, Ragged, check_text
from mmvae.data.loading import content_fingerprint, features_of
from mmvae.data.sprites import Sprites

logger = logging.getLogger(__name__)

_CHUNK = 1000


class BadRow(ValueError):
    """A row that cannot be used; the message names data set, row (from 0), field, what came and what was expected."""


class Rows:
    """Rows of a data set as inputs of a model.

    Arguments:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset` or `mmvae.data.Sprites`.
        columns: what to read; one column or several. Their inputs must have different names (``prefix``).
        name: what the data set is called in errors, and for a stream what its fingerprint is made of: the id or path
            it was loaded from.
        memory_limit: bytes that prepared pictures may take; 0 decodes them whenever a batch asks.

    Rows that a `TextColumn` cut are told in one warning: their number, or for a stream that there are some.

    Raises:
        BadRow: a row that was prepared now is bad.
        ValueError: no rows, or a column that does not exist.
    """

    def __init__(self, dataset: Any, columns: Column | Sequence[Column], *, name: str = "data", memory_limit: int = 2**30) -> None:
        self.columns = [columns] if isinstance(columns, Column) else list(columns)
        self.name = name
        self.streamed = isinstance(dataset, datasets.IterableDataset)
        self._dataset = _raw(dataset, self.columns, name)
        self._told: set[int] = set()
        self.num_rows: int | None = None if self.streamed else len(dataset)
        if self.num_rows == 0:
            raise ValueError(f"{name} has no rows, expected at least 1")
        self._memory = {} if self.streamed else self._prepare_all(memory_limit)
        ragged = [packed.lengths for packed in self._memory.values() if isinstance(packed, Ragged)]
        self.lengths: Tensor | None = torch.stack(ragged).sum(0) if ragged else None
        self.fingerprint = self._fingerprint()

    @property
    def in_memory(self) -> bool:
        """Whether every column is prepared, so that a batch needs no decoding."""
        return len(self._memory) == len(self.columns)

    def batch(self, rows: Tensor, keys: Tensor, values: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Tensor]:
        """Inputs of some rows.

        Arguments:
            rows: (B,) int64 row numbers.
            keys: (B,) int64 keys of the augmentation.
            values: the rows' raw values per column, where they come from a stream.

        Returns:
            The columns' inputs, batch first.

        Raises:
            BadRow: a row that cannot be used.
            ValueError: two columns give the same input.
        """
        waiting = [column for column in range(len(self.columns)) if column not in self._memory]
        if waiting and values is None:
            values = self._dataset[rows.tolist()]
        inputs: dict[str, Tensor] = {}
        for number, column in enumerate(self.columns):
            packed = self._memory[number][rows] if number in self._memory else None
            if packed is None:
                cut = getattr(column, "num_truncated", 0)
                packed = column.pack(self._prepare(column, values[column.name], rows.tolist()))
                self._tell_cut(number, cut, len(rows))
            prefix = f"{column.prefix}_" if column.prefix else ""
            for key, tensor in column.collate(packed, keys).items():
                if prefix + key in inputs:
                    raise ValueError(f"two columns give {prefix + key}, expected different prefixes")
                inputs[prefix + key] = tensor
        return inputs

    def stream(self) -> Iterator[dict[str, Any]]:
        """Raw, undecoded rows in the order of the files."""
        return iter(self._dataset)

    def text_length(self, value: Mapping[str, Any]) -> int:
        """Characters of a raw row's text, which stand in for tokens where rows are bucketed undecoded."""
        texts = (value[column.name] for column in self.columns if column.shape is None)
        return sum(len(text) for text in texts if isinstance(text, str))

    def _prepare(self, column: Column, values: Sequence[Any], rows: Sequence[int]) -> list[np.ndarray]:
        try:
            return column.prepare(values)
        except ValueError:
            for row, value in zip(rows, values, strict=True):
                self._check(column, value, row)
            raise

    def _check(self, column: Column, value: Any, row: int) -> None:
        try:
            column.prepare([value])
        except ValueError as error:
            shown = f" in {value[:60]!r}" if isinstance(value, str) else ""
            raise BadRow(f"{self.name}: row {_file_row(self._dataset, row)}, field {column.name!r}: {error}{shown}") from error

    def _tell_cut(self, number: int, before: int, rows: int) -> None:
        """Warn once of the rows that a column cut since ``before``: of all, or of a stream's first batch with such rows."""
        column = self.columns[number]
        cut = getattr(column, "num_truncated", 0) - before
        if cut and number not in self._told:
            self._told.add(number)
            more = " of the first batch with longer rows" if self.streamed else ""
            text = "%s: %d of %d rows%s are cut in field %r, to max_length=%d tokens"
            logger.warning(text, self.name, cut, rows, more, column.name, column.max_length)

    def _prepare_all(self, memory_limit: int) -> dict[int, Tensor | Ragged]:
        memory: dict[int, Tensor | Ragged] = {}
        for number, column in enumerate(self.columns):
            size = 0 if column.shape is None else self.num_rows * math.prod(column.shape) * column.dtype.itemsize
            if column.shape and size > memory_limit:
                continue
            cut = getattr(column, "num_truncated", 0)
            memory[number] = self._prepare_column(column)
            self._tell_cut(number, cut, self.num_rows)
        return memory

    def _prepare_column(self, column: Column) -> Tensor | Ragged:
        dense = None if column.shape is None else torch.empty((self.num_rows, *column.shape), dtype=column.dtype)
        ragged: list[np.ndarray] = []
        dataset = self._dataset.select_columns([column.name])
        for start in range(0, self.num_rows, _CHUNK):
            values = dataset[start : start + _CHUNK][column.name]
            prepared = self._prepare(column, values, range(start, start + len(values)))
            if dense is None:
                ragged += prepared
            else:
                dense[start : start + len(values)] = column.pack(prepared)
        return column.pack(ragged) if dense is None else dense

    def _fingerprint(self) -> str:
        """Of all that is prepared, and of the files where decoding is left to the batches."""
        digest = hashlib.sha256(repr([column.settings() for column in self.columns] + [self.num_rows]).encode())
        for packed in self._memory.values():
            for tensor in (packed.values, packed.lengths) if isinstance(packed, Ragged) else (packed,):
                digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
        if not self.in_memory:
            digest.update(content_fingerprint(self.name, None if self.streamed else self._dataset).encode())
        return digest.hexdigest()


def _file_row(dataset: Any, row: int) -> int:
    """The row's number before a selection such as a held-out part; `datasets` keeps it in a private table only."""
    indices = getattr(dataset, "_indices", None)
    return row if indices is None else indices.column(0)[row].as_py()


def texts_of(rows: Any, column: str, name: str = "data") -> Iterator[str]:
    """The texts of a column, one by one, for what comes before there are `Rows`: training a tokenizer.

    Arguments:
        rows: what `mmvae.data.load_rows` gives.
        column: the data set's column.
        name: what the data set is called in errors.

    Returns:
        The texts in the order of the rows.

    Raises:
        BadRow: a row that holds no text.
    """
    rows = rows.select_columns([column])
    for number, row in enumerate(rows):
        try:
            check_text(row[column])
        except ValueError as error:
            raise BadRow(f"{name}: row {_file_row(rows, number)}, field {column!r}: {error}") from error
        yield row[column]


def _raw(dataset: Any, columns: Sequence[Column], name: str) -> Any:
    """The columns that are read, with pictures left encoded."""
    features = features_of(dataset)
    wanted = list(dict.fromkeys(column.name for column in columns))
    for column in wanted:
        if column not in features:
            raise ValueError(f"{name} has no column {column!r}, expected one of {', '.join(features)}")
    declared = dataset.features is not None and not isinstance(dataset, Sprites)  # else pictures come as objects
    dataset = dataset.select_columns(wanted)
    for column in wanted:
        if declared and isinstance(features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset

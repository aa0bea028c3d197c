r"""A data set seen through columns: raw rows in, the model's inputs out.

A map-style set is prepared once: text and labels always, pictures while they fit in ``memory_limit``; larger pictures are decoded when a
batch asks for them. A stream (`datasets.IterableDataset`) is prepared batch by batch. Either way a row is decoded in `Rows.batch`.

In the columns that are modalities of a joint model a ``None`` is a modality that the row lacks: every batch holds every
input, with fillers where it is absent, and ``present`` (B,M) says what is there. An empty text is a text.
"""

import collections
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mmvae.data.columns import Column, ImageColumn, Ragged, TooLong
from mmvae.data.contents import content_fingerprint
from mmvae.data.lines import BadRow, NoneKept
from mmvae.data.loading import features_of
from mmvae.data.masks import MaskColumn
from mmvae.data.missing import check_drop, hide
from mmvae.data.places import place
from mmvae.data.preparation import CHUNK, in_chunks, not_null, prepare_good
from mmvae.data.selection import called, file_row, selected
from mmvae.data.sprites import Sprites
from mmvae.models.configuration import input_name

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("error", "skip_empty", "skip")


class Rows:
    """Rows of a data set as inputs of a model.

    Arguments:
        dataset: a `datasets.Dataset`, a `datasets.IterableDataset` or `mmvae.data.Sprites`.
        columns: what to read; one column or several. Their inputs must have different names (``prefix``).
        name: what the data set is called in errors, and for a stream what its fingerprint is made of: the id or path it was loaded from.
        memory_limit: bytes that prepared pictures may take; 0 decodes them whenever a batch asks.
        drop: how often a modality is hidden on purpose, by name; see `mmvae.data.missing.hide`.
        drop_seed: decides in which rows.
        on_bad_row: what is done with a row that cannot be used: "error"; "skip_empty", which leaves out rows that have no modality at all:
            of one modality, those whose cell is empty; or "skip", which leaves out every bad one and decodes all pictures once
            beforehand, of a stream in every epoch, to find them: one that is lost after that is an error.
        complete: keep only rows that have every modality, after hiding; the others are not counted as skipped.
        most_bad: share of bad rows beyond which a stream stops, unless it is one row; looked at every 1,000 rows and at its end.
        num_workers: processes that decode pictures: here, once, those that fit in memory, and others for the batches of a `Loader`.

    Attributes: ``on_bad_row``; ``bad``, what is wrong with the rows left out, by their numbers; of a stream those met so far.
    Attributes of a map-style set: ``num_rows`` that are kept, their ``numbers`` (N,) int64 in the data set, the lengths of
    their text (N,) int64 in tokens. One warning tells of rows that a `TextColumn` cut, and one of rows that are skipped.

    Raises:
        BadRow: a row that was prepared now is bad.
        ValueError: no rows, a column that does not exist, two modalities of one name, or an option outside its range.
    """

    num_copies = 0
    """How many rows, the first ones, come again later: see :class:`mmvae.data.PartlyLabelled`."""

    def __init__(
        self,
        dataset: Any,
        columns: Column | Sequence[Column],
        *,
        name: str = "data",
        memory_limit: int = 2**30,
        drop: Mapping[str, float] | None = None,
        drop_seed: int = 0,
        on_bad_row: str = "error",
        complete: bool = False,
        most_bad: float = 1.0,
        num_workers: int = 0,
    ) -> None:
        self.columns = [columns] if isinstance(columns, Column) else list(columns)
        self.modalities = tuple(column.modality for column in self.columns if column.modality)
        self.name, self._drop, self._drop_seed, self.on_bad_row, self._complete = name, dict(drop or {}), drop_seed, on_bad_row, complete
        self.num_workers, self._most_bad = num_workers, most_bad
        self._check_options()
        self.streamed = isinstance(dataset, datasets.IterableDataset)
        self._dataset, pictures = _raw(dataset, self.columns, name)
        may_open = [isinstance(column, ImageColumn | MaskColumn) and column.name in pictures for column in self.columns]
        self.columns = [replace(column, paths=True) if may else column for column, may in zip(self.columns, may_open, strict=True)]
        self._told: set[int] = set()
        self.bad: dict[int, str] = {}
        self.num_rows: int | None = None
        self.numbers = self.lengths = self._present = None
        self._memory: dict[int, Tensor | Ragged] = {}
        if not self.streamed:
            self._index(memory_limit)
        self.fingerprint = self._fingerprint()

    def _check_options(self) -> None:
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"columns: got the modalities {', '.join(self.modalities)}, expected different names")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row: got {self.on_bad_row!r}, expected one of {', '.join(ON_BAD_ROW)}")
        if self._complete and not self.modalities:
            raise ValueError("complete: got True, expected False where no column is a modality")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: got {self.num_workers}, expected at least 0")
        check_drop(self._drop, self.modalities)

    def _index(self, memory_limit: int) -> None:
        """Of a map-style set: what is present, which rows are kept, and everything that is prepared once."""
        rows = torch.arange(len(self._dataset))
        if not len(rows):
            raise ValueError(f"{self.name} has no rows, expected at least 1")
        self._present, keep = self._select(not_null(self._dataset, self._sources()), rows)
        self._memory = self._prepare_all(memory_limit)
        keep[list(self.bad)] = False
        self._tell_skipped(len(rows))
        self.numbers = rows[keep]
        if not len(self.numbers):
            why = f"; {next(iter(self.bad.values()))}" if self.bad else f", expected at least 1 that has {', '.join(self.modalities)}"
            raise NoneKept(f"{self.name} has {len(rows)} rows but none is kept{why}", self.bad)
        self.num_rows = len(self.numbers)
        for n, packed in self._memory.items():
            if lacking := self.columns[n].lacking(packed):
                logger.warning("%s: field %r: %s", called(self._dataset, self.name), self.columns[n].name, lacking)
        ragged = {self.columns[n]: packed.lengths for n, packed in self._memory.items() if isinstance(packed, Ragged)}
        for column, lengths in ragged.items():
            self._tell_empty(column, self._has(column, self._present) & (lengths == 0))
        ragged = [lengths * self._has(column, self._present) for column, lengths in ragged.items() if column.bucketed]
        self.lengths = torch.stack(ragged).sum(0)[keep] if ragged else None

    def _sources(self) -> list[str]:
        """The columns of which a row must have one: the modalities; where no column is one, those of the model's own inputs."""
        return [column.name for column in self.columns if column.modality or (column.input_names and not self.modalities)]

    def _has(self, column: Column, present: Tensor) -> Tensor:
        """(B,) bool: whether a row has the column; one that is no modality is in every row that is kept."""
        if column.modality:
            return present[:, self.modalities.index(column.modality)]
        return present.any(1) if self._sources() else torch.ones(len(present), dtype=torch.bool)

    def _select(self, found: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is present (B,M) after hiding, of some rows and of what is found in them, and which of them are kept (B,)."""
        if not (names := ", ".join(self._sources())):
            return found, torch.ones(len(rows), dtype=torch.bool)
        alone, keep = f", field {names!r}: got an empty cell, expected a value", found.any(1)
        why = f": got no modality, expected one of {names}" if self.modalities else alone
        for row in rows[~keep].tolist():
            self._refuse(row, why, ("skip", "skip_empty"))
        present = hide(found, rows, self.modalities, self._drop, self._drop_seed)
        keep = present.all(1) if self._complete else keep
        return present & keep.unsqueeze(1), keep  # what is not kept is not decoded either

    def _refuse(self, row: int, why: str, spared_by: Sequence[str], cause: Exception | None = None) -> None:
        """Tell what is wrong with a row, or, where that leaves rows out, remember it."""
        told = f"{place(self._dataset, self.name, row)}{why}"
        if self.on_bad_row not in spared_by:
            raise BadRow(f"{told} (or set on_bad_row, --on_bad_row, to skip_empty)" if "skip_empty" in spared_by else told) from cause
        self.bad.setdefault(row, told)

    def _tell_skipped(self, rows: int | None) -> None:
        if self.bad and -1 not in self._told:
            self._told.add(-1)
            shown, first = "bad rows" if rows is None else f"{len(self.bad)} of {rows} rows", next(iter(self.bad.values()))
            logger.warning("%s: skipping %s; the first: %s", called(self._dataset, self.name), shown, first)

    def num_present(self) -> dict[str, int]:
        """How many of the rows that are kept have each modality; of a stream, and of a model of one, nothing."""
        return {name: int(self._present[self.numbers, m].sum()) for m, name in enumerate(self.modalities) if self.numbers is not None}

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
            The columns' inputs, batch first, and ``present`` (B,M) bool where columns are modalities, in their order.

        Raises:
            BadRow: a row that cannot be used.
            ValueError: two columns give the same input.
        """
        waiting = [column for column in range(len(self.columns)) if column not in self._memory]
        if waiting and values is None:
            values = self._dataset[rows.tolist()]
        present = self._present[rows] if self._present is not None else self._select(self._found(values, len(rows)), rows)[0]
        inputs: dict[str, Tensor] = {"present": present} if self.modalities else {}
        for number, column in enumerate(self.columns):
            packed = self._memory[number][rows] if number in self._memory else None
            if packed is None:
                cut = getattr(column, "num_truncated", 0)
                here = self._has(column, present)
                packed = column.pack(self._prepare(column, values[column.name], rows, here, spared_by=()))  # it was good beforehand
                self._tell_cut(number, cut, len(rows))
            for key, tensor in column.collate(packed, keys).items():
                name = input_name(column.prefix, key)
                if name in inputs:
                    raise ValueError(f"two columns give {name}, expected different prefixes")
                inputs[name] = tensor
        return inputs

    def stream(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """The rows of a stream that are kept, in the order of the files.

        Returns:
            The row's number; its values, raw and undecoded; the characters of the text that is present and bucketed, which stand in
            for tokens where rows are bucketed undecoded.
        """
        self.bad, number = {}, -1
        for number, row in enumerate(self._dataset):
            rows = torch.tensor([number])
            present, keep = self._select(self._found({name: [value] for name, value in row.items()}, 1), rows)
            if self.on_bad_row == "skip":
                for column in self.columns:
                    self._prepare(column, [row[column.name]], rows, self._has(column, present))
            self._tell_skipped(None)
            if keep and number not in self.bad:
                bucketed = [column for column in self.columns if column.shape is None and column.bucketed]
                texts = (row[column.name] for column in bucketed if self._has(column, present))
                yield number, row, sum(len(text) for text in texts if isinstance(text, str))
            if number % 1000 == 999:
                self._check_share(number + 1)
        self._check_share(number + 1)

    def _check_share(self, rows: int) -> None:
        if len(self.bad) > max(1, self._most_bad * rows):
            got = f"{called(self._dataset, self.name)}: got {len(self.bad)} bad rows of the first {rows} of a stream"
            raise BadRow(f"{got}, expected at most {self._most_bad:.1%} (--most_bad_rows); the first: {next(iter(self.bad.values()))}")

    def _found(self, values: Mapping[str, Sequence[Any]] | None, size: int) -> Tensor:
        """(B,M) bool: which modalities raw values hold."""
        found = [[value is not None for value in values[name]] for name in self._sources()]
        return torch.tensor(found, dtype=torch.bool).reshape(-1, size).T

    def _prepare(
        self, column: Column, values: Sequence[Any], rows: Tensor, here: Tensor, spared_by: Sequence[str] = ("skip",)
    ) -> list[np.ndarray]:
        """A column's arrays of some rows, fillers where it is absent."""
        cut = getattr(column, "num_truncated", 0)
        try:
            return prepare_good(column, values, here)
        except ValueError:
            if cut != getattr(column, "num_truncated", 0):
                column.num_truncated = cut
            had = [(row, value) for row, value, there in zip(rows.tolist(), values, here.tolist(), strict=True) if there]
            prepared = {row: one for row, value in had if (one := self._prepare_one(column, value, row, spared_by)) is not None}
            if len(prepared) == len(had):
                raise
        return [prepared[row] if row in prepared else column.filler() for row in rows.tolist()]

    def _prepare_one(self, column: Column, value: Any, row: int, spared_by: Sequence[str]) -> np.ndarray | None:
        try:
            return column.prepare([value])[0]
        except ValueError as error:
            shown = f" in {value[:60]!r}" if isinstance(value, str) else ""
            self._refuse(row, f", field {column.name!r}: {error}{shown}", spared_by, error)
        return None

    def _tell_cut(self, number: int, before: int, rows: int) -> None:
        """Warn once of the rows that a column cut since ``before``: of all, or of a stream's first batch with such rows."""
        column = self.columns[number]
        cut = getattr(column, "num_truncated", 0) - before
        if cut and number not in self._told:
            self._told.add(number)
            more = " of the first batch with longer rows" if self.streamed else ""
            text = "%s: %d of %d rows%s are cut in field %r, to max_length=%d tokens"
            logger.warning(text, called(self._dataset, self.name), cut, rows, more, column.name, column.max_length)

    def _tell_empty(self, column: Column, empty: Tensor) -> None:
        """Name the rows of which a column kept nothing: a document without a word of the vocabulary."""
        rows = [file_row(self._dataset, row) for row in empty.nonzero().flatten().tolist()]
        if rows:
            shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            text = "%s: %d of %d rows have no word of the vocabulary in field %r, and stay: rows %s"
            logger.warning(text, called(self._dataset, self.name), len(rows), len(empty), column.name, shown)

    def _prepare_all(self, memory_limit: int) -> dict[int, Tensor | Ragged]:
        memory: dict[int, Tensor | Ragged] = {}
        for number, column in enumerate(self.columns):
            size = 0 if column.shape is None else len(self._present) * math.prod(column.shape) * column.dtype.itemsize
            if column.shape and size > memory_limit:
                if self.on_bad_row == "skip":
                    collections.deque(self._prepared(column), maxlen=0)  # decoded, not kept
                continue
            cut = getattr(column, "num_truncated", 0)
            try:
                memory[number] = self._prepare_column(column)
            except BadRow as error:
                if not isinstance(error.__cause__, TooLong):
                    raise
                raise BadRow(f"{error}; {self._num_too_long(column)} of {len(self._present)} rows are too long") from error.__cause__
            self._tell_cut(number, cut, len(self._present))
        return memory

    def _prepare_column(self, column: Column) -> Tensor | Ragged:
        if column.shape is None:
            return column.pack([one for _, prepared in self._prepared(column) for one in prepared])
        dense = torch.empty((len(self._present), *column.shape), dtype=column.dtype)
        for start, prepared in self._prepared(column):
            dense.numpy()[start : start + len(prepared)] = prepared  # by numpy: torch's threads would wait busily beside workers
        return dense

    def _num_too_long(self, column: Column) -> int:
        dataset = self._dataset.select_columns([column.name])
        return sum(column.num_too_long(dataset[start : start + CHUNK][column.name]) for start in range(0, len(dataset), CHUNK))

    def _prepared(self, column: Column) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
        """A column's arrays in chunks of rows, each with the number of its first row."""
        return in_chunks(self._dataset, column, self._has(column, self._present), self.num_workers, self._prepare)

    def _fingerprint(self) -> str:
        """Of all that is prepared, and of the files where decoding is left to the batches."""
        digest = hashlib.sha256(repr([column.settings() for column in self.columns] + [self.num_rows, *self.bad]).encode())
        if self.modalities:
            seed = self._drop_seed if self._drop else None
            digest.update(repr((self.modalities, sorted(self._drop.items()), seed, self._complete)).encode())
            digest.update(b"" if self._present is None else self._present.contiguous().numpy().tobytes())
        for packed in self._memory.values():
            for tensor in (packed.values, packed.lengths) if isinstance(packed, Ragged) else (packed,):
                digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
        if not self.in_memory:
            digest.update(repr(selected(self._dataset)).encode())
            digest.update(content_fingerprint(self.name, None if self.streamed else self._dataset).encode())
        return digest.hexdigest()


def _raw(dataset: Any, columns: Sequence[Column], name: str) -> tuple[Any, list[str]]:
    """The columns that are read, with pictures left encoded, and which of them the data set declares as pictures."""
    features = features_of(dataset)
    wanted = list(dict.fromkeys(column.name for column in columns))
    for column in wanted:
        if column not in features:
            raise ValueError(f"{name} has no column {column!r}, expected one of {', '.join(features)}")
    declared = dataset.features is not None and not isinstance(dataset, Sprites)  # else pictures come as objects
    dataset, pictures = dataset.select_columns(wanted), [name for name in wanted if declared and isinstance(features[name], datasets.Image)]
    for column in pictures:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset, pictures

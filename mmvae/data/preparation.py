r"""Raw values of a column to arrays, a chunk of rows at a time, here or in worker processes.

Shapes: ``N`` rows of a data set, ``B`` of a chunk.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mmvae.data.columns import Column
from mmvae.data.selection import selected

CHUNK = 250


def not_null(dataset: Any, columns: Sequence[str]) -> Tensor:
    """(N,M) bool: where columns are not null, without reading any value; generated rows lack nothing."""
    if not columns or not isinstance(dataset, datasets.Dataset):
        return torch.ones(len(dataset), len(columns), dtype=torch.bool)
    found = np.stack([dataset.data.column(name).is_valid().to_numpy() for name in columns], 1)
    rows = selected(dataset)
    return torch.from_numpy(found if rows is None else found[rows])


def prepare_good(column: Column, values: Sequence[Any], here: Tensor) -> list[np.ndarray]:
    """A column's arrays of rows with nothing wrong.

    Arguments:
        column: what reads.
        values: one for each row, raw.
        here: (B,) bool, whether a row has it.

    Returns:
        An array for each row, the column's filler where it has none.

    Raises:
        ValueError: a value is bad; which is not said.
    """
    prepared = iter(column.prepare([value for value, there in zip(values, here.tolist(), strict=True) if there]))
    return [next(prepared) if there else column.filler() for there in here.tolist()]


class _Chunks:
    """Chunks of a column by their first row: raw, or prepared as one array; None instead of one that holds a bad row."""

    in_worker: "_Chunks"  # what a worker process was made for

    def __init__(self, dataset: Any, column: Column, has: Tensor) -> None:
        self.dataset, self.column, self.has = dataset.select_columns([column.name]), column, has

    def raw(self, start: int) -> tuple[Sequence[Any], Tensor]:
        return self.dataset[start : start + CHUNK][self.column.name], self.has[start : start + CHUNK]

    def prepared(self, start: int) -> np.ndarray | None:
        try:
            return np.stack(prepare_good(self.column, *self.raw(start)))
        except ValueError:
            return None

    def work(self) -> None:
        torch.set_num_threads(1)  # more of them would fight over the cores, and may hang in a forked process
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _Chunks.in_worker = self


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # of a parent that was killed: nobody else would end its workers


def _prepare(start: int) -> np.ndarray | None:
    return _Chunks.in_worker.prepared(start)


def in_chunks(
    dataset: Any, column: Column, has: Tensor, num_workers: int, careful: Callable[..., list[np.ndarray]]
) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    """The arrays of a column of a map-style data set, all rows in their order.

    Arguments:
        dataset: whose pictures are left encoded.
        column: what reads.
        has: (N,) bool, whether a row has it.
        num_workers: processes that prepare what has one shape, as pictures do; text is prepared here.
        careful: (column, raw values, rows (B,), has (B,)) -> arrays of a chunk, here, that knows what to do with a bad row. Of
            chunks that workers prepare it gets those with a bad row.

    Returns:
        For every chunk the number of its first row, and an array for each of its rows.
    """
    chunks, starts = _Chunks(dataset, column, has), range(0, len(has), CHUNK)

    def here(start: int) -> list[np.ndarray]:
        values, had = chunks.raw(start)
        return careful(column, values, torch.arange(start, start + len(had)), had)

    if not num_workers or column.shape is None:
        yield from ((start, here(start)) for start in starts)
        return
    workers = ProcessPoolExecutor(min(num_workers, len(starts)), initializer=chunks.work)
    try:
        for start, prepared in zip(starts, workers.map(_prepare, starts), strict=True):
            yield start, here(start) if prepared is None else prepared
    finally:
        workers.shutdown(cancel_futures=True)

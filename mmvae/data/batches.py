r"""Batches whose content and order are a pure function of (seed, epoch).

A `Loader` cuts an epoch into global batches, one for each optimizer step over all ranks, and gives a rank its share
of each, so step N sees the same rows for any number of ranks. Text is bucketed: rows are shuffled, sorted by length
inside pools of some batches, cut, and the batches shuffled. Nothing about the order has to be saved: a run resumes
with ``batches(epoch, start)``.

Shapes: ``n`` rows of a global batch, ``B`` rows of one rank's share.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmvae.data.rows import Rows
from mmvae.data.selection import file_row
from mmvae.noise import fold

_ORDER, _BATCHES, _AUGMENTATION = (
    0x6F72646572,
    0x62617463,
    0x61756721,
)  # keep the loader's keys apart from those of the model's noise


@dataclass(frozen=True)
class _Share:
    """What one rank prepares of one global batch; ``values`` are the raw rows where they come from a stream."""

    rows: Tensor
    keys: Tensor
    weight: Tensor
    num_rows: int
    values: dict[str, list[Any]] | None = None


class _Preparation(Dataset):
    """Turns shares into batches, here or in a worker process."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, share: _Share) -> dict[str, Tensor]:
        batch = {"row": share.rows, "row_weight": share.weight, "num_rows": torch.tensor(share.num_rows)}
        return batch | self.rows.batch(share.rows, share.keys, share.values)


class Loader:
    """Batches of one rank, in an order that depends on (seed, epoch) alone.

    Arguments:
        rows: the data, with its columns.
        batch_size: rows of one optimizer step over all ranks.
        seed: decides the order and the augmentation.
        shuffle: otherwise the rows come in their own order (text sorted by length inside the pools).
        rank, world_size: this process and the number of processes.
        pool: batches in one length bucket; for a stream also the batches that are shuffled together and held
            undecoded in memory. 0 turns bucketing off (a stream then keeps the order of its files).

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        pool: int = 100,
    ) -> None:
        if batch_size < 1 or pool < 0:
            raise ValueError(f"expected batch_size >= 1, pool >= 0, got {batch_size}, {pool}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0...{world_size - 1} (world_size - 1), got {rank}")
        self.rows, self.batch_size, self.seed, self.shuffle, self.pool = rows, batch_size, seed, shuffle, pool
        self.rank, self.world_size = rank, world_size
        self.num_rows = rows.num_rows
        settings = repr((rows.fingerprint, batch_size, seed, shuffle, pool))
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def file_rows(self, rows: Iterable[int]) -> list[int]:
        """What errors call the rows of a batch, in their file: in ``row`` they are counted after any selection."""
        return [file_row(self.rows._dataset, row) for row in rows]

    def __len__(self) -> int:
        if self.num_rows is None:
            raise TypeError("a stream does not know how many batches it has")
        return math.ceil(self.num_rows / self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """This rank's share of every global batch of an epoch.

        Arguments:
            epoch: number of the epoch.
            start: global batches to leave out; they are not decoded.

        Returns:
            Batches with ``row`` (B,) int64, ``row_weight`` (B,) float32 (0 for the filler row of a rank that has
            none), ``num_rows`` () int64 of the global batch, and the columns' inputs.

        Raises:
            BadRow: a row that cannot be used.
        """
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        shares = self._streamed(epoch, start) if self.rows.streamed else self._indexed(epoch, start)
        preparation = _Preparation(self.rows)
        prepared: Iterable[dict[str, Tensor]] = (preparation[share] for share in shares)
        if self.rows.num_workers and not self.rows.in_memory:
            # its own generator: a DataLoader otherwise draws a seed from the global one, on which dropout depends
            options = {
                "batch_size": None,
                "num_workers": self.rows.num_workers,
                "collate_fn": _same,
                "generator": torch.Generator(),
            }
            prepared = DataLoader(preparation, sampler=shares, **options)
        pin = torch.cuda.is_available()
        for batch in prepared:
            yield {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch

    def _indexed(self, epoch: int, start: int) -> Iterator[_Share]:
        for batch in self._order(self.rows.numbers, self.rows.lengths, epoch)[start:]:
            mine, weight = self._share(self.rows.numbers[batch])
            yield _Share(mine, fold(self.seed, _AUGMENTATION, epoch, mine), weight, len(batch))

    def _streamed(self, epoch: int, start: int) -> Iterator[_Share]:
        """Shares of a stream, shuffled within blocks of ``pool`` batches; every rank walks the whole stream undecoded."""
        size = max(self.pool, 1)
        for block, read in enumerate(_blocks(self.rows.stream(), size * self.batch_size)):
            if (block + 1) * size <= start:
                continue
            numbers, values, lengths = zip(*read, strict=True)
            rows, lengths = torch.tensor(numbers), torch.tensor(lengths)
            for batch in self._order(rows, lengths if lengths.any() else None, epoch)[max(start - block * size, 0) :]:
                mine, weight = self._share(batch)
                raw = {name: [values[i][name] for i in mine.tolist()] for name in values[0]}
                yield _Share(rows[mine], fold(self.seed, _AUGMENTATION, epoch, rows[mine]), weight, len(batch), raw)

    def _share(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a global batch and its weights; where there is none, the first row with weight 0."""
        n = len(batch)
        mine = batch[self.rank * n // self.world_size : (self.rank + 1) * n // self.world_size]
        return (mine, torch.ones(len(mine))) if len(mine) else (batch[:1], torch.zeros(1))

    def _order(self, rows: Tensor, lengths: Tensor | None, epoch: int) -> list[Tensor]:
        """Positions in ``rows`` (N,) of each global batch."""
        shuffle = self.shuffle and (self.pool > 0 or not self.rows.streamed)
        order = fold(self.seed, _ORDER, epoch, rows).argsort(stable=True) if shuffle else torch.arange(len(rows))
        bucketed = lengths is not None and self.pool > 0
        if bucketed:
            pools = torch.arange(len(rows)) // (self.pool * self.batch_size)
            order = order[(pools * (lengths.max() + 1) + lengths[order]).argsort(stable=True)]
        batches = order.split(self.batch_size)
        if shuffle and bucketed:
            first = torch.stack([rows[batch[0]] for batch in batches])
            batches = [batches[i] for i in fold(self.seed, _BATCHES, epoch, first).argsort(stable=True).tolist()]
        return list(batches)


def _blocks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while block := list(itertools.islice(rows, size)):
        yield block


def _same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch

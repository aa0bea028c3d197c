"""Training rows of which only some tell their class: for learning from few labels, or for trying what few labels give.

A row's label is what the data set says, and is -100 in batches where it is kept back or the data set has none, unless the labels that are
told are spread to other rows.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import torch
from torch import Tensor

from mmvae.data.columns import Column
from mmvae.data.labels import LabelColumn, check_told, find_classes, read_labels, shown_labels
from mmvae.data.loading import find_column
from mmvae.data.rows import Rows
from mmvae.data.selection import select


class PartlyLabelled(Rows):
    """Rows of which ``per_class`` of every class tell their label, and come first.

    Arguments:
        dataset: a `datasets.Dataset` or `mmvae.data.Sprites`.
        columns: what to read besides the labels; one column or several.
        labels: the labels' column.
        per_class: how many rows of every class tell their label; None for all that have one.
        seed: decides which.
        repeats: how often they come in an epoch, each time as a row of its own with its own noise: where few rows of many tell their label,
            batches without one give a noisy gradient.
        spread: makes of the labels (N,) that are told, -100 elsewhere, those of the batches: :func:`mmvae.data.labels.spread_labels`.
        name, options: as for `Rows`.

    Attributes:
        num_told: rows that tell their label, repeats counted.
        num_copies: rows, the first ones, that are there again.

    Raises:
        BadRow: a label that is no class.
        ValueError: a stream, repeats below 1, or a class that lacks rows, also because bad ones are left out.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Column | Sequence[Column],
        labels: LabelColumn,
        *,
        per_class: int | None = None,
        seed: int = 0,
        repeats: int = 1,
        spread: Callable[[Tensor], Tensor] = lambda told: told,
        name: str = "data",
        **options: Any,
    ) -> None:
        if isinstance(dataset, datasets.IterableDataset):
            raise ValueError("labels_per_class, label_repeats: received a stream, expected a set whose labels can be counted")
        if repeats < 1:
            raise ValueError(f"label_repeats: received {repeats}, expected at least 1")
        known = read_labels(dataset, labels, name, on_bad_row=options.get("on_bad_row", "error"))
        told = known >= 0 if per_class is None else shown_labels(known, per_class, labels.names, seed)
        first = told.nonzero().flatten().repeat(repeats)
        self.num_told, self.num_copies = len(first), len(first) - len(first) // repeats
        order = torch.cat([first, (~told).nonzero().flatten()])
        known = known.where(told, -100)
        self._labels = spread(known)[order]
        super().__init__(select(dataset, order.tolist()), columns, name=name, **options)
        check_told(self, known[order], labels.names, per_class)
        self.num_told -= sum(row < self.num_told for row in self.bad)

    def batch(self, rows: Tensor, keys: Tensor, values: Any = None) -> dict[str, Tensor]:
        """Inputs of some rows; see `Rows.batch`."""
        return super().batch(rows, keys, values) | {"labels": self._labels[rows]}

    def _fingerprint(self) -> str:
        return hashlib.sha256(f"{super()._fingerprint()} {self._labels.tolist()}".encode()).hexdigest()


_OF_THE_MODEL = ("classifier_hidden_size", "classifier_dropout", "classifier_alpha", "least_probability")


@dataclass
class LabelArguments:
    """Options of a model with classes: which column tells them, and of how many rows."""

    label_column: str | None = field(default=None, metadata={"help": "the column of the classes: makes a model of things by class"})
    labels_per_class: int | None = field(default=None, metadata={"help": "training rows of every class that tell it; all by default"})
    label_repeats: int = field(default=1, metadata={"help": "how often the rows that tell their class come in an epoch"})
    label_seed: int | None = field(default=None, metadata={"help": "decides which rows tell their class; by default the run's seed"})
    classifier_hidden_size: int = field(default=0, metadata={"help": "width of a hidden layer in q(y|x); 0: none"})
    classifier_dropout: float = 0.0
    classifier_alpha: float = field(default=1.0, metadata={"help": "weight of log q(y|x) of a row that tells its class, in nats"})
    least_probability: float = field(default=0.0, metadata={"help": "in training, classes less probable than this are not decoded"})


def partly_labelled(
    data: Mapping[str, Any],
    columns: Mapping[str, Column],
    args: LabelArguments,
    *,
    name: str = "data",
    seed: int = 0,
    spread: Callable[[Tensor], Tensor] = lambda told: told,
    **reading: Any,
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Rows of every split with their labels, of which training shows some, and what a configuration wants to know of the classes.

    Arguments:
        data: data sets by split, "train" among them.
        columns: what to read besides the labels, by split.
        args: the options; without a ``label_column`` there are no labels.
        name: of the data set, for errors.
        seed: decides which rows tell their label, where the options have no seed for it.
        spread: as for `PartlyLabelled`.
        reading: options of `Rows`.

    Returns:
        Rows by split; and options of the model's configuration, ``num_classes`` and ``id2label`` among them, or none without labels.

    Raises:
        ValueError: as for `PartlyLabelled`, and for options that mean nothing without a column of labels.
    """
    if args.label_column is None:
        meant = [f.name for f in fields(LabelArguments) if getattr(args, f.name) != f.default]
        if meant:
            raise ValueError(f"label_column: received None with {', '.join(meant)}, expected the column of the classes")
        return {split: Rows(part, columns[split], name=name, **reading) for split, part in data.items()}, {}
    column = find_column(data["train"], "label", args.label_column)
    labels = LabelColumn(column, find_classes(data["train"], column, name), missing=True)
    options = {
        "per_class": args.labels_per_class,
        "seed": seed if args.label_seed is None else args.label_seed,
        "repeats": args.label_repeats,
        "spread": spread,
    }
    rows: dict[str, Rows] = {
        split: PartlyLabelled(part, columns[split], labels, name=name, **options, **reading)
        if split == "train"
        else Rows(part, [columns[split], labels], name=name, **reading)
        for split, part in data.items()
    }
    known = {option: getattr(args, option) for option in _OF_THE_MODEL}
    return rows, {"num_classes": len(labels.classes), "id2label": dict(enumerate(labels.names)), **known}

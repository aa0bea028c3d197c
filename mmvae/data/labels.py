r"""The column of labels, and what single rows cannot tell: the classes, whether there is something to learn, who shows a label.

Shapes: ``N`` rows, ``B`` batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mmvae.data.columns import Column
from mmvae.data.loading import features_of
from mmvae.data.places import place
from mmvae.data.rows import Rows
from mmvae.data.selection import called
from mmvae.noise import fold

_SHOWN = 0x73686F77
_MOST_CLASSES = 65_536  # a label beyond is no number of a class


def whole(value: Any) -> Any:
    """The number of a whole float, as which an empty cell lets all numbers of a csv column be read; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class LabelColumn(Column):
    """Classes: ``labels`` (B,) int64.

    Arguments:
        name: the data set's column.
        classes: in the order of their numbers, either names, where a raw value may be a name or a number, or the raw values themselves.
        prefix: put before the names of the inputs: "en" gives ``en_labels``.
        missing: whether a row may lack its label; it gets -100. Otherwise that is an error.

    Raises:
        ValueError: fewer than one class, or a name twice.
    """

    name: str
    classes: tuple[str, ...] | tuple[int, ...]
    prefix: str = ""
    missing: bool = False
    shape = ()
    dtype = torch.int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be different names, at least one, got {self.classes}")
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.classes)})

    @property
    def names(self) -> tuple[str, ...]:
        """What the classes are called."""
        return tuple(map(str, self.classes))

    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """() int64 for each label."""
        return [np.int64(self._number(whole(value))) for value in values]

    def _number(self, value: Any) -> int:
        if value is None and self.missing:
            return -100
        value, kind = (int(value) if isinstance(value, np.integer) else value), type(self.classes[0])
        if type(value) is kind and value in self._numbers:
            return self._numbers[value]
        if type(value) is int and kind is str and 0 <= value < len(self.classes):
            return value
        number = f"a number in 0...{len(self.classes) - 1} or " if kind is str else ""
        raise ValueError(f"got {value!r}, expected {number}one of {', '.join(self.names[:20])}")

    def pack(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(np.array(prepared, np.int64))

    def collate(self, packed: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """``labels`` (B,) int64."""
        return {"labels": packed}


def find_classes(rows: Any, column: str, name: str = "data") -> tuple[str, ...] | tuple[int, ...]:
    """The classes of a label column: the names that the data set declares, else its different values, sorted; not None.

    Arguments:
        rows: what `mmvae.data.load_rows` gives.
        column: name of the column. Whole floats are whole numbers, of which an empty cell of a csv file makes them.
        name: what the data set is called in errors.

    Returns:
        What :class:`LabelColumn` takes: names, whole numbers from 0 or truth values, in the order of the numbers that they get.

    Raises:
        ValueError: a stream that declares none, or values that are none of these, or of two kinds.
    """
    feature = features_of(rows)[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"column {column!r} of a stream declares no classes, expected a ClassLabel feature")
    told = {row: whole(value) for row, value in enumerate(rows[column][:]) if value is not None}
    if not told:
        raise ValueError(f"{called(rows, name)}: field {column!r}: received no value, expected names or whole numbers")
    kind = type(next(iter(told.values())))
    for row, value in told.items():
        if type(value) is not kind or kind not in (str, int, bool):
            expected = "expected names alone or whole numbers alone"
        elif kind is int and not 0 <= value < _MOST_CLASSES:
            expected = f"expected the number of a class, 0 or more and below {_MOST_CLASSES}"
        else:
            continue
        raise ValueError(f"{place(rows, name, row)}, field {column!r}: received {value!r:.80}, {expected}")
    return tuple(sorted(set(told.values())))


def read_labels(rows: Any, column: LabelColumn, name: str = "data", *, every_class: bool = True, on_bad_row: str = "error") -> Tensor:
    """The labels of all rows, checked before any work is done.

    Arguments:
        rows: what `mmvae.data.load_rows` gives; no stream.
        column: the labels.
        name: what the data set is called in errors.
        every_class: whether every class must be there, as in training rows.
        on_bad_row: with "skip" a row whose label is none lacks it.

    Returns:
        (N,) int64, -100 where a row lacks its label.

    Raises:
        BadRow: a label that is no class.
        ValueError: fewer than two classes, one that no row has, or no row with a label.
    """
    if len(column.classes) < 2:
        raise ValueError(f"{name}: field {column.name!r}: got the class {column.names[0]!r} alone, expected at least 2 classes")
    read = Rows(rows, column, name=f"{name}, labels" if on_bad_row == "skip" else name, on_bad_row=on_bad_row)
    labels = torch.full((len(rows),), -100)
    labels[read.numbers] = read.batch(read.numbers, read.numbers)["labels"]
    found = labels[labels >= 0].bincount(minlength=len(column.classes))
    if not found.any():
        raise ValueError(f"{called(rows, name)}: field {column.name!r}: got no label in {len(labels)} rows, expected at least one")
    if every_class and not found.all():
        lacking = column.names[int(found.argmin())]
        raise ValueError(
            f"{name}: field {column.name!r}: got 0 training rows of class {lacking!r} (of {len(labels)}), expected at least 1 of each"
        )
    return labels


def shown_labels(labels: Tensor, per_class: int, classes: tuple[str, ...], seed: int = 0) -> Tensor:
    """Which rows show their label where only some of each class do; those of a smaller number are among those of a larger one.

    Arguments:
        labels: (N,) int64, -100 where there is none.
        per_class: how many rows of each class, at least 1.
        classes: their names.
        seed: decides which.

    Returns:
        (N,) bool.

    Raises:
        ValueError: a class has fewer rows than that.

    Example:
        >>> shown_labels(torch.tensor([0, 1, 1, 0, 1, -100]), 2, ("no", "yes")).sum()
        tensor(4)
    """
    shown = torch.zeros(len(labels), dtype=torch.bool)
    order = fold(seed, _SHOWN, torch.arange(len(labels))).argsort(stable=True)
    for number, name in enumerate(classes):
        rows = order[labels[order] == number]
        if not 1 <= per_class <= len(rows):
            raise ValueError(f"labels_per_class: received {per_class}, expected 1 to {len(rows)}: the training rows of class {name!r}")
        shown[rows[:per_class]] = True
    return shown


def check_told(rows: Rows, told: Tensor, classes: tuple[str, ...], per_class: int | None = None) -> None:
    """Refuse rows of which some that tell their label are left out where that matters.

    Arguments:
        rows: what is trained on.
        told: (N,) int64, the labels of all its rows, -100 where none is told.
        classes: their names.
        per_class: how many rows of each class were chosen, by :func:`shown_labels`; None where all tell their label.

    Raises:
        ValueError: a chosen row is left out, or all rows of a class are.
    """
    spoilt = [row for row in rows.bad if told[row] >= 0]
    kept = told[rows.numbers]
    counts = kept[kept >= 0].bincount(minlength=len(classes))
    if spoilt and per_class:
        expected = "a good one among the rows that tell their class: leave it out of the data, or take another seed of the labels"
        raise ValueError(f"{rows.bad[spoilt[0]]}, expected {expected}")
    if spoilt and not counts.all():
        lacking = int(counts.argmin())
        first = next((rows.bad[row] for row in spoilt if told[row] == lacking), rows.bad[spoilt[0]])
        raise ValueError(f"{first}, expected a good row of class {classes[lacking]!r}, of which none is left")


def spread_labels(features: Tensor, labels: Tensor, neighbours: int = 15, least: float = 0.5) -> Tensor:
    r"""Labels of rows without one, spread over a graph of nearest neighbours: :math:`F = (1 - a) (I - a D^{-1/2} W D^{-1/2})^{-1} Y`.

    :math:`W_{ij} = \exp(-d_{ij}^2 / \bar d^2)` where one of two rows is among the nearest of the other, whichever it is, and a = 0.99.

    Arguments:
        features: (N, D), such as the mean of a VAE's posterior.
        labels: (N,) int64, -100 where there is none.
        neighbours: of every row.
        least: share of what reaches a row that one class must have.

    Returns:
        (N,) int64: those that were given, of the other rows the likeliest where it has that share, else -100.

    Raises:
        ValueError: no labels, a share that is none, or not so many neighbours.

    References:
        Zhou et al. (2004), Learning with local and global consistency, https://papers.nips.cc/paper/2506

    Example:
        >>> spread_labels(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]), torch.tensor([0, -100, -100, -100, 1, -100]), 2)
        tensor([0, 0, 0, 1, 1, 1])
    """
    from sklearn.neighbors import kneighbors_graph
    from sklearn.semi_supervised import LabelSpreading

    if not 1 <= neighbours < len(features):
        raise ValueError(f"neighbours: received {neighbours} for {len(features)} rows, expected 1 to {len(features) - 1}")
    if not 0 <= least <= 1 or not (labels >= 0).any():
        received = f"{least} and {(labels >= 0).sum()} labels"
        raise ValueError(f"least, labels: received {received}, expected a share in [0, 1], and at least 1 label")
    graph = kneighbors_graph(features.numpy(), neighbours, mode="distance")
    graph.data = np.exp(-np.square(graph.data / max(graph.data.mean(), 1e-12)))
    graph = graph.maximum(graph.T)  # scikit-learn's own kernel leaves it one-sided, and labels do not get far
    spread = LabelSpreading(kernel=lambda *_: graph, alpha=0.99, max_iter=5000).fit(features.numpy(), labels.clamp_min(-1).numpy())
    share, likeliest = torch.from_numpy(spread.label_distributions_).max(1)
    found = torch.from_numpy(spread.classes_)[likeliest].where(share >= least, -100)
    return labels.where(labels >= 0, found)

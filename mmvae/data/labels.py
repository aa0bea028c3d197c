r"""Labels of a data set as a whole, which single rows cannot tell: whether there is something to learn, and which rows show their label.

Shapes: ``N`` rows.
"""

from typing import Any

import torch
from torch import Tensor

from mmvae.data.columns import LabelColumn
from mmvae.data.rows import Rows
from mmvae.noise import fold

_SHOWN = 0x73686F77


def read_labels(rows: Any, column: LabelColumn, name: str = "data", *, every_class: bool = True) -> Tensor:
    """The labels of all rows, checked before any work is done.

    Arguments:
        rows: what `mmvae.data.load_rows` gives; no stream.
        column: the labels.
        name: what the data set is called in errors.
        every_class: whether every class must be there, as in training rows.

    Returns:
        (N,) int64, -100 where a row lacks its label.

    Raises:
        BadRow: a label that is no class.
        ValueError: fewer than two classes, or one that no row has.
    """
    if len(column.classes) < 2:
        raise ValueError(f"{name}: field {column.name!r}: got the class {column.classes[0]!r} alone, expected at least 2 classes")
    read = Rows(rows, column, name=name)
    labels = read.batch(read.numbers, read.numbers)["labels"]
    found = labels[labels >= 0].bincount(minlength=len(column.classes))
    if every_class and not found.all():
        lacking = column.classes[int(found.argmin())]
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

"""Digit words: a written word for every picture of a digit, as rows of characters. No files of its own.

The word stands somewhere on a line of eight characters whose last one stays blank,

    start ~ U{0, ..., 7 - len(word)},    "three" -> "_ three _ _" with its letters apart: "_ t h r e e _ _"

so that a tokenizer that splits at white space makes one token of every character. The line is a pure function of (seed, split, row, digit):
the seed is of the data, not of a run, so that every run sees the same pairs.

References:
    Sutter, Daunhawer, Vogt (2021), MNIST-SVHN-Text, https://arxiv.org/abs/2105.02470 (there the place is drawn anew whenever a row is read)
"""

import zlib
from collections.abc import Sequence
from typing import Any

import datasets
import torch

from mmvae.noise import fold, keyed_uniform

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 8
BLANK = "_"

_PLACES = 0x776F726473


def digit_words(labels: Sequence[int], split: str = "train", seed: int = 0) -> list[str]:
    """The line of every row.

    Arguments:
        labels: digits in 0...9, in the order of the rows.
        split: another split gives other places.
        seed: so does another seed.

    Raises:
        ValueError: a label that is no digit.

    Example:
        >>> digit_words([3, 3, 0])
        ['t h r e e _ _ _', 't h r e e _ _ _', '_ _ _ z e r o _']
    """
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < len(WORDS):
            raise ValueError(f"row {row}: label: got {label!r}, expected a digit in 0...9")
    places = keyed_uniform(fold(seed, _PLACES, zlib.crc32(split.encode()), torch.arange(len(labels)))).tolist()
    words = (WORDS[label] for label in labels)
    starts = ((word, int(place * (LENGTH - len(word)))) for word, place in zip(words, places, strict=True))
    return [" ".join((BLANK * start + word).ljust(LENGTH, BLANK)) for word, start in starts]


def add_words(rows: Any, split: str, seed: int = 0) -> datasets.Dataset:
    """Rows of digits with a further column, ``word``.

    Arguments:
        rows: a `datasets.Dataset` with a column ``label`` of digits.
        split, seed: as for `digit_words`.

    Raises:
        ValueError: a stream, or rows without such a column.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError("streaming: got True, expected False for a data set that words are added to")
    if "label" not in rows.column_names or "word" in rows.column_names:
        raise ValueError(f"columns: got {rows.column_names}, expected 'label', and no 'word'")
    return rows.add_column("word", digit_words(list(rows["label"]), split, seed))

"""Documents as counts of words: sparse where they are kept, dense in a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmvae.data.columns import Column, Ragged, check_text
from mmvae.vectorizer import TopicVAEVectorizer


@dataclass(eq=False)
class WordCountColumn(Column):
    """Documents: ``word_counts`` (B,V) float32. One without a word of the vocabulary is a row of zeros.

    Arguments:
        name: the data set's column.
        vectorizer: counts the words.
        prefix: put before the names of the inputs.
        modality: name in a joint model; see `as_modalities`.
    """

    name: str
    vectorizer: TopicVAEVectorizer
    prefix: str = ""
    modality: str = field(default="", repr=False)
    input_names = ("word_counts",)
    bucketed = False  # every row of a batch is as wide

    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """The numbers of a document's words, (T,) int32 ascending, as often as they occur."""
        for value in values:
            check_text(value)
        counts = self.vectorizer.counts(values)
        words = np.repeat(counts.indices, counts.data).astype(np.int32)
        return np.split(words, np.asarray(counts.sum(1)).ravel().cumsum()[:-1]) if values else []

    def pack(self, prepared: Sequence[np.ndarray]) -> Ragged:
        """All words in one flat array."""
        return Ragged.of(prepared)

    def collate(self, packed: Ragged, keys: Tensor) -> dict[str, Tensor]:
        """``word_counts`` (B,V) float32."""
        size = len(self.vectorizer.vocabulary)
        words, there = packed.padded(0)
        return {"word_counts": torch.zeros(len(words), size).scatter_add_(1, words, there.float())}

    def filler(self) -> np.ndarray:
        """A document without words."""
        return np.empty(0, np.int32)

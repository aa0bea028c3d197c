r"""What a model takes from one column of a data set: pictures or text; labels are in :mod:`mmvae.data.labels`.

A column works in three stages: ``prepare`` turns raw values into compact arrays (decoded and resized once, tokenized
once), ``pack`` puts the arrays of many rows into one object that is indexed with a tensor of row numbers, and
``collate`` turns an indexed pack into the model's inputs.

Shapes: ``B`` batch, ``C,H,W`` picture, ``T`` tokens of the longest row in the batch.
"""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmvae.data.augmentation import NO_AUGMENTATION, Augmentation
from mmvae.data.images import MODES, RESIZES, open_image, resize, to_pixels
from mmvae.models.configuration import prefixes


class Tokenizer(Protocol):
    """The part of a `PreTrainedTokenizerFast` that `TextColumn` uses."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array.

    Arguments:
        values: (total,) int32, all rows one after the other.
        starts: (N,) int64, where each row begins.
        lengths: (N,) int64.
    """

    values: Tensor
    starts: Tensor
    lengths: Tensor

    @staticmethod
    def of(rows: Sequence[np.ndarray]) -> "Ragged":
        """The pack of some arrays, in their order."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        values = torch.from_numpy(np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32))
        return Ragged(values, lengths.cumsum(0) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> "Ragged":
        return Ragged(self.values, self.starts[rows], self.lengths[rows])

    def padded(self, fill: int) -> tuple[Tensor, Tensor]:
        """Values (B,T) int64 filled on the right, and the mask (B,T) int64 of what was there."""
        position = torch.arange(int(self.lengths.max()))
        mask = position < self.lengths.unsqueeze(1)
        index = (self.starts.unsqueeze(1) + position).clamp_(max=len(self.values) - 1)
        return self.values[index].long().masked_fill_(~mask, fill), mask.long()


class Column(ABC):
    """How one column of a data set becomes inputs of a model."""

    name: str
    prefix: str  # of the inputs' names: a joint model's modality, or empty
    modality: str = ""  # that the column is in a joint model: there a row may lack it; a column that is none may not
    input_names: tuple[str, ...] = ()  # that ``collate`` gives
    shape: tuple[int, ...] | None = None  # of one prepared row; None where rows differ in length
    dtype: torch.dtype = torch.uint8
    bucketed: bool = True  # where rows differ in length, those of like length are batched together

    @abstractmethod
    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """Compact arrays of raw values; for a bad one a ValueError of the form "got ..., expected ..."."""

    @abstractmethod
    def pack(self, prepared: Sequence[np.ndarray]) -> Tensor | Ragged:
        """All rows in one object that a tensor of row numbers indexes."""

    @abstractmethod
    def collate(self, packed: Tensor | Ragged, keys: Tensor) -> dict[str, Tensor]:
        """Inputs of the model; ``keys`` (B,) int64 are all the randomness there is."""

    def filler(self) -> np.ndarray:
        """What stands, prepared, where a row lacks the column: finite and of a valid shape. Zeros where rows have one shape."""
        return torch.zeros(self.shape, dtype=self.dtype).numpy()

    def lacking(self, packed: Tensor | Ragged) -> str:
        """What a warning says that all rows together lack; nothing when empty."""
        return ""

    def settings(self) -> str:
        """What besides the raw data decides the model's inputs, as text for a fingerprint."""
        return repr(self)


@dataclass(frozen=True)
class ImageColumn(Column):
    """Pictures: ``pixel_values`` (B,C,H,W) uint8.

    Arguments:
        name: the data set's column.
        image_size: height and width in pixels, or one number for both.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        background: red, green, blue in 0...255, or one grey value, that transparent pictures are laid on and padding
            is filled with.
        resize: "crop", "pad", "stretch" or "refuse" (see `mmvae.data.images.resize`).
        augmentation: random changes, keyed by (seed, epoch, row).
        formats: encodings that may be decoded; "BMP", "GIF", "TIFF" are among those that can be added.
        max_pixels: the largest width x height that is decoded.
        prefix: put before the names of the inputs: "en" gives ``en_pixel_values``.
        modality: name in a joint model; see `as_modalities`.
        paths: whether paths without bytes are followed; `Rows` sets it where the data set declares an Image feature.

    Raises:
        ValueError: an argument outside its range.
    """

    name: str
    image_size: int | tuple[int, int]
    num_channels: int = 3
    background: int | tuple[int, int, int] = 255
    resize: str = "crop"
    augmentation: Augmentation = NO_AUGMENTATION
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
    max_pixels: int = 16_000_000
    prefix: str = ""
    modality: str = field(default="", repr=False)  # fingerprints are made of the repr; `Rows` adds the modalities
    paths: bool = field(default=False, repr=False)
    input_names = ("pixel_values",)

    def __post_init__(self) -> None:
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        colour = self.background if isinstance(self.background, tuple) else (self.background,) * 3
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size must be one or two numbers of at least 1, got {self.image_size}")
        if self.num_channels not in MODES:
            raise ValueError(f"num_channels must be 1, 3 or 4, got {self.num_channels}")
        if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            raise ValueError(f"background must be one or three numbers in 0...255, got {self.background}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        object.__setattr__(self, "image_size", tuple(size))
        object.__setattr__(self, "background", tuple(colour))
        object.__setattr__(self, "shape", (self.num_channels, *size))

    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """(C,H,W) uint8 for each picture."""
        return [self._pixels(value) for value in values]

    def _pixels(self, value: Any) -> np.ndarray:
        pixels = to_pixels(open_image(value, self.formats, self.max_pixels, self.paths), self.num_channels, self.background)
        return resize(pixels, self.image_size, self.resize, self.background)

    def pack(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """(N,C,H,W) uint8."""
        return torch.from_numpy(np.stack(prepared))

    def collate(self, packed: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """``pixel_values`` (B,C,H,W) uint8, augmented."""
        return {"pixel_values": self.augmentation(packed, keys)}


class TooLong(ValueError):
    """A text has more tokens than a row may have."""


@dataclass(eq=False)
class TextColumn(Column):
    """Text: ``input_ids`` and ``attention_mask`` (B,T) int64, BOS ... EOS, padded on the right; nothing is BOS EOS.

    Arguments:
        name: the data set's column.
        tokenizer: a fast tokenizer with pad, EOS and BOS tokens (CLS and SEP are taken where it has no BOS and EOS).
        max_length: the most tokens that a row may have, BOS and EOS included.
        truncate: cut longer rows, keeping EOS, and count them in ``num_truncated``; otherwise a longer row is an error.
        prefix: put before the names of the inputs: "en" gives ``en_input_ids``.
        modality: name in a joint model; see `as_modalities`.

    Raises:
        ValueError: the tokenizer lacks a token, or ``max_length`` < 2.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    max_length: int = 1024
    truncate: bool = False
    prefix: str = ""
    modality: str = field(default="", repr=False)
    num_truncated: int = field(default=0, init=False, repr=False)
    input_names = ("input_ids", "attention_mask")

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must leave room for BOS and EOS, got {self.max_length}")
        for token, other in (
            ("bos_token_id", "cls_token_id"),
            ("eos_token_id", "sep_token_id"),
            ("pad_token_id", "pad_token_id"),
        ):
            number = getattr(self.tokenizer, token)
            number = getattr(self.tokenizer, other, None) if number is None else number
            if number is None:
                raise ValueError(f"tokenizer has no {token}, expected one with BOS, EOS and padding tokens")
            setattr(self, "_" + token.removesuffix("_token_id"), number)

    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """(T,) int32 for each text, BOS and EOS included."""
        for value in values:
            check_text(value)
        if not values:
            return []
        return [self._framed(ids) for ids in self._encoded(values)]

    def num_too_long(self, values: Sequence[Any]) -> int:
        """How many of some values are texts, without a fault otherwise, of more than ``max_length`` tokens."""
        texts = [value for value in values if is_text(value)]
        return sum(len(ids) > self.max_length - 2 for ids in self._encoded(texts)) if texts else 0

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _framed(self, ids: list[int]) -> np.ndarray:
        if len(ids) > self.max_length - 2:
            if not self.truncate:
                raise TooLong(f"got {len(ids) + 2} tokens, expected at most {self.max_length} (max_length; or set truncate)")
            ids = ids[: self.max_length - 2]
            self.num_truncated += 1
        padding = {self._pad} - {getattr(self.tokenizer, "unk_token_id", None)}  # where they are one, it is any unknown word
        if not padding.union((self._bos, self._eos)).isdisjoint(ids):
            raise ValueError("got text that spells the tokenizer's BOS, EOS or PAD token, expected text without it")
        return np.array([self._bos, *ids, self._eos], np.int32)

    def pack(self, prepared: Sequence[np.ndarray]) -> Ragged:
        """All ids in one flat array."""
        return Ragged.of(prepared)

    def collate(self, packed: Ragged, keys: Tensor) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B,T) int64."""
        ids, mask = packed.padded(self._pad)
        return {"input_ids": ids, "attention_mask": mask}

    def filler(self) -> np.ndarray:
        """The shortest row there is, BOS EOS."""
        return np.array([self._bos, self._eos], np.int32)

    def settings(self) -> str:
        """The fields and a digest of the vocabulary."""
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items())).encode("utf-8", "surrogatepass")
        return f"{self!r} {hashlib.sha256(vocabulary).hexdigest()}"


def as_modalities(columns: Mapping[str, Column]) -> list[Column]:
    """The columns of a joint model: each bears its modality's name, before its inputs' names too where another one has inputs so called.

    Arguments:
        columns: by modality, in the order of the model's.

    Returns:
        Copies with ``modality`` and ``prefix`` set.

    Example:
        >>> [column.prefix for column in as_modalities({"photo": ImageColumn("image", 64), "sketch": ImageColumn("drawing", 64)})]
        ['photo', 'sketch']
    """
    before = prefixes({name: column.input_names for name, column in columns.items()})
    return [replace(column, modality=name, prefix=before[name]) for name, column in columns.items()]


def is_text(value: Any) -> bool:
    """Whether `check_text` lets a value pass."""
    with contextlib.suppress(ValueError):
        check_text(value)
        return True
    return False


def check_text(value: Any) -> None:
    """Refuse what is not text with a ValueError of the form "got ..., expected ..."."""
    if not isinstance(value, str):
        raise ValueError(f"got {'an empty cell' if value is None else type(value).__name__}, expected text")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"got a lone surrogate at character {error.start}, expected valid Unicode text") from None

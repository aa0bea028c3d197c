r"""Masks: the class of every pixel of a picture, from a column of its own or from what is opaque in the picture.

Shapes: ``B`` rows, ``H, W`` of the picture; masks are uint8, 0 is the background, ``UNLABELLED`` a pixel of which nothing is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from mmvae.data.augmentation import NO_AUGMENTATION, Augmentation
from mmvae.data.columns import Column
from mmvae.data.images import open_image
from mmvae.models.segmentation import UNLABELLED
from mmvae.noise import fold, keyed_uniform

_COLOURS = 0x636F6C6F7572


@dataclass(frozen=True)
class MaskColumn(Column):
    """Masks: ``labels`` (B,H,W) uint8.

    A mask is never resized, for between two classes there is no third: the pictures must have its size too, which
    ``ImageColumn(..., resize="refuse")`` sees to.

    Arguments:
        name: the data set's column: arrays (H,W) of whole numbers or bool, or pictures: grey, bits, or the numbers of a palette.
        image_size: height and width in pixels, or one number for both.
        values: what stands for each class, in the order of their numbers: (0, 255) for black and white masks. `Rows` warns where no mask
            has any but the first, the background.
        augmentation: that of the pictures, so that both are moved alike; what it does to colours is left out.
        paths: as of `ImageColumn`.

    Raises:
        ValueError: an argument outside its range, or an augmentation that mixes pixels.
    """

    name: str
    image_size: int | tuple[int, int]
    values: tuple[int, ...] = (0, 1)
    augmentation: Augmentation = NO_AUGMENTATION
    prefix: str = ""
    paths: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        if not 2 <= len(set(self.values)) == len(self.values) < 256 or not all(0 <= value <= 255 for value in self.values):
            raise ValueError(f"values must be at least two different numbers in 0...255, got {self.values}")
        if self.augmentation.rotation or self.augmentation.min_scale < 1:
            raise ValueError("augmentation must not rotate or scale masks: flips and shifts keep classes apart")
        classes = np.full(256, -1, np.int16)
        classes[UNLABELLED] = UNLABELLED
        classes[list(self.values)] = range(len(self.values))
        object.__setattr__(self, "augmentation", replace(self.augmentation, brightness=0.0, contrast=0.0, saturation=0.0))
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "image_size", tuple(size))
        object.__setattr__(self, "shape", tuple(size))
        object.__setattr__(self, "_classes", classes)

    def prepare(self, values: Sequence[Any]) -> list[np.ndarray]:
        """(H,W) uint8 for each mask."""
        return [self._mask(value) for value in values]

    def _mask(self, value: Any) -> np.ndarray:
        mask = numbers_of(value, self.paths)
        if mask.shape != self.image_size:
            shown, expected = (" x ".join(map(str, size)) for size in (mask.shape, self.image_size))
            raise ValueError(f"got a mask of {shown} pixels (height x width), expected {expected}, the size of the pictures")
        classes = self._classes[mask]
        if classes.min() < 0:
            wrong = int(mask[classes < 0][0])
            raise ValueError(f"got the value {wrong} in a mask, expected one of {self.values}, or {UNLABELLED} where nothing is known")
        return classes.astype(np.uint8)

    def pack(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """(N,H,W) uint8."""
        return torch.from_numpy(np.stack(prepared))

    def lacking(self, packed: Tensor) -> str:
        """A pixel that is not of the background: from masks without one a model learns to find nothing."""
        if any(((mask > 0) & (mask != UNLABELLED)).any() for mask in packed):
            return ""
        return f"got no pixel of {self.values[1:]} in {len(packed)} masks, expected some beside the background, {self.values[0]}"

    def collate(self, packed: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """``labels`` (B,H,W) uint8, moved as the pictures are."""
        return {"labels": self.augmentation(packed.unsqueeze(1), keys).squeeze(1)}


def numbers_of(value: Any, paths: bool = False) -> np.ndarray:
    """The numbers in a mask as they are stored, (H,W) uint8.

    Arguments:
        value: an array or nested lists of whole numbers or bool, a Pillow image, or what `datasets` stores of one.
        paths: whether a path without bytes is followed.

    Raises:
        ValueError: for anything else, more than two axes, or numbers outside 0...255.
    """
    if not isinstance(value, np.ndarray | list | Tensor):
        image = open_image(value, ("PNG", "WEBP", "BMP", "TIFF"), paths=paths)  # not JPEG, which changes numbers
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"got a picture of mode {image.mode}, expected one number per pixel: mode L, P or 1")
        value = np.asarray(image if image.mode != "1" else image.convert("L").point(lambda level: level // 255))
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "bui" or not array.size or array.min() < 0 or array.max() > 255:
        between = f", from {array.min()} to {array.max()}" if array.size and array.dtype.kind in "buif" else ""
        raise ValueError(f"got {array.dtype} of shape {array.shape}{between}, expected whole numbers in 0...255 of shape (H,W)")
    return array.astype(np.uint8)


def at_sizes(masks: Tensor, sizes: Sequence[tuple[int, int]] | None, mode: str) -> list[Tensor]:
    """Masks at the sizes that the pictures had before :func:`mmvae.data.images.resize`; what it cut off is background.

    Arguments:
        masks: (B, H, W).
        sizes: height and width of every picture; None: those of the masks.
        mode: "crop", "pad" or "stretch".

    Returns:
        (height, width) for each.
    """
    found = []
    for mask, size in zip(masks, sizes or [masks.shape[1:]] * len(masks), strict=True):
        fit = list(size)
        if mode != "stretch":
            scale = (max if mode == "crop" else min)(own / side for own, side in zip(mask.shape, size, strict=True))
            fit = [max(round(own / scale), 1) for own in mask.shape]
        whole = tv.resize(mask.unsqueeze(0), fit, interpolation=InterpolationMode.NEAREST)
        found.append(tv.center_crop(whole, list(size))[0])  # which fills with 0
    return found


def on_random_colours(batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
    r"""Lay transparent pictures on plain random colours: the mask is what was at least half opaque.

    .. math:: x = \alpha\,colour + (1 - \alpha)\,bg, \qquad bg \sim U[0, 1]^3, \qquad y = [\alpha \ge 1/2]

    Arguments:
        batch: with ``pixel_values`` (B,4,H,W) uint8.
        keys: (B,) int64, all the randomness there is.

    Returns:
        The batch with ``pixel_values`` (B,3,H,W) float in [0, 1] and ``labels`` (B,H,W) uint8.

    Raises:
        ValueError: pictures of another number of channels.
    """
    pixels = batch["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[1] != 4:
        raise ValueError(f"pixel_values: got shape {tuple(pixels.shape)}, expected (B, 4, H, W): red, green, blue and alpha")
    colour, alpha = (pixels.float() / 255).split([3, 1], 1)
    behind = keyed_uniform(fold(_COLOURS, keys), (3, 1, 1)).float()
    return {**batch, "pixel_values": alpha * colour + (1 - alpha) * behind, "labels": (alpha[:, 0] >= 0.5).to(torch.uint8)}

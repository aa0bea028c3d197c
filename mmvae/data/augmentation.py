r"""Random changes to a batch of pictures that are a pure function of one key per picture.

Every number comes from `mmvae.noise.keyed_uniform`, so a picture is changed in the same way on any rank, in any batch
and after a restart; the keys are ``fold(seed, epoch, row)``. The changes are made in the order of the fields of
`Augmentation`.

Shapes: ``B`` batch, ``C,H,W`` picture; pixels are uint8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmvae.noise import keyed_uniform

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training picture; the default changes nothing.

    Arguments:
        horizontal_flip: probability of a left-right flip, in [0, 1].
        vertical_flip: probability of a top-bottom flip, in [0, 1].
        shift: largest shift in pixels along each axis, edges repeated (the same as padding and a random crop).
        min_scale: smallest share of the area that a random crop keeps before it is enlarged again, in (0, 1]; 1 is off.
        rotation: largest angle in degrees, either way.
        brightness, contrast, saturation: strength s >= 0; the factor is uniform in [max(0, 1 - s), 1 + s].

    Raises:
        ValueError: a value outside its range.
    """

    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    shift: int = 0
    min_scale: float = 1.0
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        for name in ("shift", "rotation", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale is a share of the area in (0, 1], got {self.min_scale}")

    def __bool__(self) -> bool:
        return self != NO_AUGMENTATION

    def __call__(self, pixels: Tensor, keys: Tensor) -> Tensor:
        """Change each picture as its key says.

        Arguments:
            pixels: (B,C,H,W) uint8.
            keys: (B,) int64.

        Returns:
            (B,C,H,W) uint8.
        """
        if not self or not len(pixels):
            return pixels
        u = keyed_uniform(keys, (10,))
        pixels = _flip(pixels, u[:, 0] < self.horizontal_flip, -1)
        pixels = _flip(pixels, u[:, 1] < self.vertical_flip, -2)
        if self.shift:
            pixels = _shift(pixels, ((2 * self.shift + 1) * u[:, 2:4]).long() - self.shift)
        if self.min_scale < 1 or self.rotation:
            side = (self.min_scale + (1 - self.min_scale) * u[:, 4]).sqrt()
            centre = (1 - side).unsqueeze(1) * (2 * u[:, 5:7] - 1)
            pixels = _affine(pixels, side, (2 * u[:, 7] - 1) * math.radians(self.rotation), centre)
        return self._recolour(pixels, keys) if self.brightness or self.contrast or self.saturation else pixels

    def _recolour(self, pixels: Tensor, keys: Tensor) -> Tensor:
        u = keyed_uniform(keys ^ 1, (3, 1, 1, 1)).unbind(1)
        colour, alpha = pixels[:, :3].float(), pixels[:, 3:]
        if self.brightness:
            colour = (colour * _factor(u[0], self.brightness)).clamp(0, 255)
        if self.contrast:
            colour = _blend(colour, _mean(_grey(colour)), _factor(u[1], self.contrast))
        if self.saturation:
            colour = _blend(colour, _grey(colour), _factor(u[2], self.saturation))
        return torch.cat([colour.round().to(torch.uint8), alpha], 1)


NO_AUGMENTATION = Augmentation()


def _flip(pixels: Tensor, chosen: Tensor, axis: int) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), pixels.flip(axis), pixels)


def _shift(pixels: Tensor, offset: Tensor) -> Tensor:
    """Move each picture by ``offset`` (B,2) pixels down and right, repeating its edges."""
    for axis, size in ((2, pixels.shape[2]), (3, pixels.shape[3])):
        index = (torch.arange(size) - offset[:, axis - 2, None]).clamp(0, size - 1)
        index = index.view(-1, 1, size, 1) if axis == 2 else index.view(-1, 1, 1, size)
        pixels = pixels.gather(axis, index.expand(pixels.shape))
    return pixels


def _affine(pixels: Tensor, side: Tensor, angle: Tensor, centre: Tensor) -> Tensor:
    """Look at a part of relative ``side`` (B,), turned by ``angle`` (B,), around ``centre`` (B,2) in [-1, 1]."""
    height, width = pixels.shape[-2:]
    y = ((torch.arange(height) + 0.5) / height * 2 - 1).view(1, -1, 1) * height / width  # the same unit on both axes: no shear
    x = ((torch.arange(width) + 0.5) / width * 2 - 1).view(1, 1, -1)
    cos, sin = (side * angle.cos()).view(-1, 1, 1), (side * angle.sin()).view(-1, 1, 1)
    grid = torch.stack([cos * x - sin * y, (sin * x + cos * y) * width / height], -1) + centre.view(-1, 1, 1, 2)
    turned = functional.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)


def _factor(u: Tensor, strength: float) -> Tensor:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


def _grey(colour: Tensor) -> Tensor:
    if colour.shape[1] == 1:
        return colour
    return (colour * torch.tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def _mean(grey: Tensor) -> Tensor:
    """Mean over the picture in whole numbers: a float sum would depend on the number of threads."""
    return grey.round().long().sum((-1, -2), keepdim=True).float() / math.prod(grey.shape[-2:])


def _blend(colour: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * colour + (1 - factor) * other).clamp(0, 255)

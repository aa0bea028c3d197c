r"""Random changes to a batch of pictures that are a pure function of one key per picture.

The changes are torchvision's; every number comes from `mmvae.noise.keyed_uniform`, so a picture is changed in the same way on any rank, in
any batch and after a restart; the keys are ``fold(seed, epoch, row)``. The changes are made in the order of the fields of `Augmentation`.

Shapes: ``B`` batch, ``C,H,W`` picture; pixels are uint8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from mmvae.noise import keyed_uniform


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
        draws = keyed_uniform(keys, (11,)).tolist()
        return torch.stack([self._recolour(self._move(picture, u[:8]), u[8:]) for picture, u in zip(pixels, draws, strict=True)])

    def _move(self, picture: Tensor, u: list[float]) -> Tensor:
        height, width = picture.shape[-2:]
        if u[0] < self.horizontal_flip:
            picture = tv.horizontal_flip(picture)
        if u[1] < self.vertical_flip:
            picture = tv.vertical_flip(picture)
        if self.shift:
            top, left = (int((2 * self.shift + 1) * v) for v in u[2:4])
            picture = tv.crop(tv.pad(picture, [self.shift], padding_mode="edge"), top, left, height, width)
        if self.min_scale < 1:
            side = math.sqrt(self.min_scale + (1 - self.min_scale) * u[4])
            part = max(1, round(side * height)), max(1, round(side * width))
            top, left = int((height - part[0] + 1) * u[5]), int((width - part[1] + 1) * u[6])
            picture = tv.resized_crop(picture, top, left, *part, [height, width], antialias=True)
        if self.rotation:
            wide = tv.pad(picture, [width // 2, height // 2], padding_mode="edge")  # so that no empty corner turns into view
            turned = tv.rotate(wide, (2 * u[7] - 1) * self.rotation, InterpolationMode.BILINEAR)
            picture = tv.center_crop(turned, [height, width])
        return picture

    def _recolour(self, picture: Tensor, u: list[float]) -> Tensor:
        colour, alpha = picture[:3], picture[3:]
        for strength, adjust, v in (
            (self.brightness, tv.adjust_brightness, u[0]),
            (self.contrast, tv.adjust_contrast, u[1]),
            (self.saturation, tv.adjust_saturation, u[2]),
        ):
            if strength:
                low = max(0.0, 1.0 - strength)
                colour = adjust(colour, low + (1.0 + strength - low) * v)
        return torch.cat([colour, alpha])


NO_AUGMENTATION = Augmentation()

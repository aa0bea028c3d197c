r"""How well a picture's object fits a rendered shape: the intersection over union with the best template.

How much of a pixel the object covers is its distance from the background on the scale of the object's contrast,

.. math:: c = \min\big(1, \lVert x - bg \rVert / \lVert colour - bg \rVert\big),

with bg the median of the outermost pixels, which no sprite reaches; a second object counts whatever its colour. The pose is searched on
the pictures as they are, by the soft IoU of s(c) with s(rendered coverage), where :math:`s(c) = \mathrm{clip}((c - 0.3) / 0.4, 0, 1)` takes
away a smooth texture: a grid of angles at the centre of gravity, then steps around the best that halve each time. The figure itself is

.. math:: \mathrm{IoU} = |m \cap t| / |m \cup t|, \qquad m = [c \ge \tfrac12], \quad t = [\text{rendered coverage} \ge \tfrac12],

both four times as fine: a disc scores 0.84 on a square, and on 12 pixels across it would reach 0.87 by luck with its edges.

Shapes: ``B`` pictures, ``A`` poses tried at once, ``H = W`` pixels, ``W'`` pixels of the window in which templates are drawn.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmvae.data.sprites import ATTRIBUTES, COLOURS, RADII, SYMMETRY, coverage

ANGLES = 24
STEPS = 6
FINE = 4
_WINDOW = 0.625  # of a picture; a big shape reaches 0.45 across
_DROP = 0.225  # from the centre of gravity of a heart down to its centre, in radii
_CHUNK = 16  # few, so that their templates stay in the cache


def background(pixels: Tensor) -> Tensor:
    """The median colour (B,3) of the outermost pixels of pictures (B,3,H,W)."""
    rim = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], -1)
    return rim.median(-1).values


def covered_by_object(pixels: Tensor, colour: Tensor) -> Tensor:
    """How much of each pixel the object of a picture covers.

    Arguments:
        pixels: (B,3,H,W) float in [0, 1].
        colour: (B,) int64, index into ``ATTRIBUTES["colour"]``.

    Returns:
        (B,H,W) float in [0, 1].
    """
    behind = background(pixels)
    front = (torch.tensor(COLOURS, device=pixels.device) / 255)[colour]
    contrast = torch.linalg.vector_norm(front - behind, dim=1).view(-1, 1, 1)
    return (torch.linalg.vector_norm(pixels - behind[:, :, None, None], dim=1) / contrast).clamp(max=1)


def template_iou(pixels: Tensor, shape: Tensor, size: Tensor, colour: Tensor) -> Tensor:
    """IoU of pictures with the best-fitting rendered template of a shape and size.

    Arguments:
        pixels: (B,3,H,H) float in [0, 1], H a multiple of 8 and at least 16.
        shape, size, colour: (B,) int64, indices into ``ATTRIBUTES``.

    Returns:
        (B,) float32 in [0, 1]; 0 where no object is seen.

    Raises:
        ValueError: pictures that are not square, or too small.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] % 8 or pixels.shape[2] < 16:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, H, H) with H a multiple of 8 and at least 16")
    found = []
    for part, shapes, sizes, colours in zip(*(x.cpu().split(_CHUNK) for x in (pixels, shape, size, colour)), strict=True):
        covered = covered_by_object(part, colours)
        pose = _Fit(clear(covered), shapes, sizes, clear).search()
        finer = F.interpolate(covered.unsqueeze(1), scale_factor=FINE, mode="bilinear").squeeze(1)
        found.append(_Fit(_half(finer), shapes, sizes, _half).iou(pose.unsqueeze(1)).squeeze(1))
    return torch.cat(found).to(pixels.device)


def clear(covered: Tensor) -> Tensor:
    """s(c): what is nearly background is background, what is nearly object is object."""
    return ((covered - 0.3) / 0.4).clamp(0, 1)


def _half(covered: Tensor) -> Tensor:
    return (covered >= 0.5).float()


class _Fit:
    """Masks (B,H,H), a window around each, and the IoU of poses (B,A,3) = x and y in picture sides, angle in radians."""

    def __init__(self, masks: Tensor, shape: Tensor, size: Tensor, mask_of: Callable[[Tensor], Tensor]) -> None:
        side = masks.shape[-1]
        self.shape, self.radius, self.mask_of = shape, torch.tensor(RADII)[size], mask_of
        self.area = masks.flatten(1).sum(1)
        place = (torch.arange(side) + 0.5) / side
        total = self.area.clamp(min=1e-6)
        self.centre = torch.stack([(masks.sum(1) * place).sum(1) / total, (masks.sum(2) * place).sum(1) / total], 1)
        self.pixels = int(side * _WINDOW)
        corner = ((self.centre - _WINDOW / 2) * side).round().clamp(0, side - self.pixels)
        inside = torch.arange(self.pixels) + corner.long().unsqueeze(-1)  # (B,2,W')
        rows = torch.arange(len(masks)).view(-1, 1, 1)
        self.window = masks[rows, inside[:, 1].unsqueeze(-1), inside[:, 0].unsqueeze(1)].flatten(1)
        self.corner = corner / side

    def iou(self, poses: Tensor) -> Tensor:
        """(B,A,3) -> (B,A)."""
        count = poses.shape[1]
        x, y = ((poses[..., :2] - self.corner.unsqueeze(1)) / _WINDOW).flatten(0, 1).unbind(-1)
        shape, radius = (value.repeat_interleave(count) for value in (self.shape, self.radius / _WINDOW))
        template = self.mask_of(coverage(shape, radius, x, y, poses[..., 2].flatten(), self.pixels)).view(len(poses), count, -1)
        both = torch.minimum(template, self.window.unsqueeze(1)).sum(-1)
        return both / (self.area.unsqueeze(1) + template.sum(-1) - both).clamp(min=1e-6)

    def search(self) -> Tensor:
        """The best pose found, (B,3)."""
        period = 2 * math.pi / torch.tensor([SYMMETRY[name] for name in ATTRIBUTES["shape"]])[self.shape].view(-1, 1)
        angles = period * torch.arange(ANGLES) / ANGLES
        drop = _DROP * self.radius * (self.shape == ATTRIBUTES["shape"].index("heart"))
        centres = self.centre.unsqueeze(1) + drop.view(-1, 1, 1) * torch.stack([-angles.sin(), angles.cos()], -1)
        pose = self._best(torch.cat([centres, angles.unsqueeze(-1)], -1))
        sides = torch.tensor([-1.0, 0.0, 1.0])
        around = torch.cartesian_prod(sides, sides, sides)
        step = torch.cat([torch.full((len(pose), 2), 2 / 64), period / ANGLES], 1)
        for _ in range(STEPS):
            pose = self._best(pose.unsqueeze(1) + around * step.unsqueeze(1))
            step = step / 2
        return pose

    def _best(self, poses: Tensor) -> Tensor:
        return poses[torch.arange(len(poses)), self.iou(poses).argmax(1)]

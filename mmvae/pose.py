r"""A picture as content in a canonical pose that is turned and shifted over a plain background.

The pose is part of the latent, and standard normal like the rest of it: two dimensions for the shift, uniform over the picture, and two
for the angle, whose prior is then uniform on the circle, without a break at :math:`\pm\pi`,

.. math:: t = 2\,\Phi(g_{1:2}) - 1, \qquad \theta = \mathrm{atan2}(g_4, g_3).

The angle comes last because words seldom tell of it: a joint model may share the shift and leave the angle to the picture.

The angle is inferred by matching: what the content looks like in the canonical pose is turned by many angles and laid over the picture.
So there is nothing to learn about angles, and no local optimum in which a shape is drawn as the mean of its turns; the posterior's width is
learned. The shift is where the picture differs from its border. The content is read from the picture turned back by the axis of that:
a frame that turns with the picture, so that the content cannot know the angle.

Shapes: ``B`` pictures, ``C`` channels, ``H, W`` of the picture, ``h, w`` of the canonical window; places in half sides of the picture, x to
the right and y down, (0, 0) its middle; angles in radians clockwise.

References:
    Bepler et al. (2019), Explicitly disentangling image content from translation and rotation with spatial-VAE,
    https://arxiv.org/abs/1909.11663 (whose angle is a normal on the line, inferred by a network)
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSES = {"none": 0, "rotation": 2, "rotation+shift": 4}  # and their latent dimensions

_RADIUS = 1.25  # of the angle's mean: with it and a small width, the two dimensions have the moments of a standard normal
OUTSIDE = -8.0  # logit of what is opaque, beyond the canonical window
_EDGE = 0.999  # farthest inferred shift, where its latent is still finite


def grid(angle: Tensor, shift: Tensor, size: tuple[int, int], window: float) -> Tensor:
    """Where the pixels of a picture lie in the canonical window: ``R(-angle) (place - shift) / window``.

    Arguments:
        angle: (B,); shift: (B, 2).
        size: H, W.
        window: side of the canonical window, in sides of the picture.

    Returns:
        (B, H, W, 2), for ``grid_sample``.
    """
    across, down = (torch.arange(side, device=angle.device, dtype=angle.dtype) for side in reversed(size))
    right = ((2 * across + 1) / size[1] - 1).view(1, 1, -1) - shift[:, 0].view(-1, 1, 1)
    below = ((2 * down + 1) / size[0] - 1).view(1, -1, 1) - shift[:, 1].view(-1, 1, 1)
    cos, sin = angle.cos().view(-1, 1, 1) / window, angle.sin().view(-1, 1, 1) / window
    return torch.stack([cos * right + sin * below, cos * below - sin * right], -1)


def sample(pictures: Tensor, places: Tensor, padding: str = "border") -> Tensor:
    """Bilinear ``grid_sample`` of pictures (B, C, h, w) at places (B, H, W, 2), in float32."""
    return F.grid_sample(pictures.float(), places, mode="bilinear", padding_mode=padding, align_corners=False)


def weights(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a picture differs from its border: the squared distance from the border's median colour, with sum 1.

    Arguments:
        pixels: (B, C, H, W) float.

    Returns:
        weights (B, H, W), and the places of their columns (W,) and rows (H,).
    """
    rim = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], -1)
    weight = (pixels - rim.median(-1).values[:, :, None, None]).square().sum(1)
    weight = (weight - 0.1 * weight.flatten(1).amax(1).view(-1, 1, 1)).clamp_min(0) + 1e-8  # a faint texture weighs nothing
    across, down = ((2 * torch.arange(side, device=pixels.device) + 1) / side - 1 for side in (pixels.shape[3], pixels.shape[2]))
    return weight / weight.sum((1, 2), keepdim=True), across, down


def centre_of(weight: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """The centre of gravity (B, 2) of what :func:`weights` gives."""
    return torch.stack([(weight.sum(1) * across).sum(1), (weight.sum(2) * down).sum(1)], 1)


def heading_of(weight: Tensor, across: Tensor, down: Tensor, centre: Tensor) -> Tensor:
    """A direction (B,) that turns with the picture: the longer axis of :func:`weights` about a centre (B, 2), towards its heavier end.

    It is rough, and arbitrary where a shape has no longer axis. Pictures that are turned back by it differ little by their angle.
    """
    right, below = across - centre[:, :1], down - centre[:, 1:]
    right, below = right.unsqueeze(1), below.unsqueeze(2)
    weight = weight * (right.square() + below.square() < 1)  # a circle: the corners would turn into and out of the picture
    axis = torch.atan2((2 * weight * right * below).sum((1, 2)), (weight * (right.square() - below.square())).sum((1, 2))) / 2
    along = right * axis.cos().view(-1, 1, 1) + below * axis.sin().view(-1, 1, 1)
    lean = (weight * along.pow(3)).sum((1, 2))
    return torch.where(lean < 0, axis + math.pi, axis)


def jittered(pixels: Tensor, strength: float) -> Tensor:
    """Pictures (B, C, H, W), each turned, scaled, slanted and shifted by chance, by torch's generator.

    Arguments:
        pixels: in [0, 1]; what comes in from outside is 0.
        strength: at 1 up to 0.5 radians, 40 % of the size, a slant of 0.6, and an eighth of the picture each way.
    """
    most = torch.tensor([0.5, 0.4, 0.6, 0.25, 0.25], device=pixels.device).unsqueeze(1)
    turn, size, slant, right, down = strength * most * (2 * torch.rand(5, len(pixels), device=pixels.device) - 1)
    cos, sin = turn.cos() / (1 + size), turn.sin() / (1 + size)
    rows = [torch.stack([cos, slant * cos - sin, right], 1), torch.stack([sin, slant * sin + cos, down], 1)]
    places = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return sample(pixels, places, "zeros").to(pixels.dtype)


def within(drawn: Tensor, places: Tensor, outside: Tensor | float) -> Tensor:
    """What is drawn in the canonical window (B, C, h, w) at places (B, H, W, 2) of it; beyond it, ``outside``, a number or (C, 1, 1)."""
    return sample(drawn - outside, places, "zeros") + outside


def lay(front: Tensor, mask: Tensor, behind: Tensor) -> Tensor:
    """Pictures (B, C, H, W) over plain backgrounds (B, C), opaque where the logits (B, 1, H, W) of the mask are high."""
    behind = behind[:, :, None, None]
    return behind + mask.sigmoid() * (front - behind)


class Pose(nn.Module):
    """Turning and shifting, for one size of picture.

    Arguments:
        kind: a key of ``POSES`` other than "none".
        size: H, W.
        window: side of the canonical window, in sides of the picture; without a shift it is the picture.
        angles: how many are tried.
    """

    def __init__(self, kind: str, size: tuple[int, int], window: float = 1.0, angles: int = 24):
        super().__init__()
        self.shifts, self.size, self.angles = kind == "rotation+shift", size, angles
        self.window = window if self.shifts else 1.0

    @property
    def window_size(self) -> tuple[int, int]:
        """(h, w), even numbers of pixels."""
        return tuple(2 * max(1, round(side * self.window / 2)) for side in self.size)

    def split(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Angle (B,) in (-pi, pi] and shift (B, 2) of the pose's latent (B, 2 or 4)."""
        g = g.float()
        shift = torch.erf(g[:, :2] / math.sqrt(2)) if self.shifts else torch.zeros_like(g)
        return torch.atan2(g[:, -1], g[:, -2]), shift

    def latent(self, angle: Tensor, shift: Tensor) -> Tensor:
        """The latent (B, 2 or 4) of an angle (B,) and a shift (B, 2): the inverse of :meth:`split`."""
        direction = _RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
        return torch.cat([math.sqrt(2) * torch.erfinv(shift.clamp(-_EDGE, _EDGE)), direction], 1) if self.shifts else direction

    def locate(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The shift (B, 2) of pictures (B, C, H, W), zero where the pose has none, and their heading (B,)."""
        mass = weights(pixels)
        shift = centre_of(*mass) if self.shifts else pixels.new_zeros(len(pixels), 2)
        return shift, heading_of(*mass, shift)

    def upright(self, pixels: Tensor) -> Tensor:
        """The object of pictures (B, C, H, W) in a frame that turns and moves with it, as the content is inferred from it."""
        return self.cut(pixels.float(), *self.locate(pixels.float()))

    def cut(self, pixels: Tensor, shift: Tensor, angle: Tensor) -> Tensor:
        """The canonical windows (B, C, h, w) of pictures (B, C, H, W) that have this pose."""
        places = grid(-angle, torch.zeros_like(shift), self.window_size, 1 / self.window) + shift.view(-1, 1, 1, 2)
        return sample(pixels, places)

    def match(self, seen: Tensor, drawn: Tensor) -> Tensor:
        """The angle (B,) by which what is drawn in the canonical pose must be turned to look like what is seen.

        Arguments:
            seen: (B, C, h, w), windows at angle 0.
            drawn: (B, C, h, w), without gradient.
        """
        seen, drawn = F.avg_pool2d(seen, 2), F.avg_pool2d(drawn, 2)
        step = 2 * math.pi / self.angles
        tried = step * torch.arange(self.angles, device=seen.device, dtype=seen.dtype)
        places = grid(tried, tried.new_zeros(self.angles, 2), tuple(seen.shape[2:]), 1.0)
        # one picture of all rows' channels, turned by every angle
        turned = sample(drawn.flatten(0, 1).expand(self.angles, -1, -1, -1), places).unflatten(1, drawn.shape[:2])
        wrong = (turned - seen).square().sum((2, 3, 4)).t()
        best = wrong.argmin(1, keepdim=True)
        before, here, after = (wrong.gather(1, (best + by) % self.angles).squeeze(1) for by in (-1, 0, 1))
        bend = (before - 2 * here + after).clamp_min(1e-12)  # the lowest point of the parabola through the three
        return step * (best.squeeze(1) + (0.5 * (before - after) / bend).clamp(-0.5, 0.5))

    def place(self, front: Tensor, mask: Tensor, behind: Tensor, g: Tensor) -> Tensor:
        """Turn and shift what is drawn in the canonical pose, over a plain background.

        Arguments:
            front: (B, C, h, w); mask: (B, 1, h, w), logits of what is opaque; behind: (B, C).
            g: (B, 2 or 4), the pose's latent.

        Returns:
            (B, C, H, W).
        """
        places = self.places(g)
        return lay(sample(front, places), within(mask, places, OUTSIDE), behind)  # logits: a mask that is turned stays sharp

    def places(self, g: Tensor) -> Tensor:
        """Where the pixels of a picture with this pose, latent (B, 2 or 4), lie in the canonical window: (B, H, W, 2)."""
        return grid(*self.split(g), self.size, self.window)

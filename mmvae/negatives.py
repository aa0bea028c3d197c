r"""Sprites that a judge must accept although they are not perfect, and pictures that it must refuse although they look like sprites.

A picture is :math:`bg + \alpha\,(colour - bg) + \text{texture} + \text{noise}` where :math:`\alpha` starts as the coverage of a shape
(:func:`mmvae.data.sprites.coverage`). A *mild* sprite has a slightly soft edge, a slightly shifted colour, a little noise. Each kind of
*negative* damages one thing more than any mild sprite does; between the two is a gap of which nothing is said. Lengths below are in
radii of the shape, so that they mean the same for small and big ones.

| kind       | what is wrong                                                                                        |
|------------|------------------------------------------------------------------------------------------------------|
| blurred    | standard deviation of the blur 0.35...0.9; of a mild sprite at most 0.15                              |
| rounded    | a square or heart, blurred by 0.45...0.8 and made sharp again: corners, tip and notch are gone        |
| odd        | rectangle, disc, wide disc, rounded triangle: sharp, but none of the shapes                           |
| morph      | half-way between two shapes, sharp                                                                    |
| ghost      | two shapes laid over each other, each half transparent                                                |
| several    | a second object in another quadrant, perhaps half transparent                                         |
| empty      | nothing, or next to nothing                                                                           |
| faint      | the object is 20...55 % opaque                                                                        |
| incomplete | cut along a line near the centre                                                                      |
| mixed      | a colour half-way between two, or one half of the object in each                                      |
| between    | a size between small and big                                                                          |
| grey       | a background between light and dark                                                                   |

Every row is a pure function of (seed, split, row number). Shapes: ``B`` rows, ``H = W = 64``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmvae.data.sprites import ATTRIBUTES, BACKGROUNDS, COLOURS, RADII, coverage
from mmvae.noise import fold, keyed_normal, keyed_uniform

KINDS = (
    "blurred", "rounded", "odd", "morph", "ghost", "several", "empty", "faint", "incomplete", "mixed", "between", "grey",
)  # fmt: skip
SIZE = 64

_ROWS = {"train": 0x6A756467, "test": 0x74657374}
_REACH = 1.45  # the farthest point of any shape from its centre, in radii


@dataclass
class Examples:
    """Pictures with what they show.

    Arguments:
        pixels: (B,3,H,W) uint8.
        labels: per attribute, (B,) int64 indices into ``ATTRIBUTES``; without meaning where the picture is a negative.
        kinds: (B,) int64 indices into ``KINDS``; -1 for a mild sprite.
    """

    pixels: Tensor
    labels: dict[str, Tensor]
    kinds: Tensor


def blur(picture: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur, a standard deviation per row; at the border the kernel is cut and normalised.

    Arguments:
        picture: (B,H,H) float.
        deviation: (B,) float, pixels; 0 changes nothing.
    """
    place = torch.arange(picture.shape[-1], device=picture.device).float()
    logits = -0.5 * ((place - place.unsqueeze(1)) / deviation.clamp(min=1e-2).view(-1, 1, 1)).square()
    kernel = logits.softmax(-1)
    return kernel @ picture @ kernel.mT


def _sharp(alpha: Tensor) -> Tensor:
    """The region where alpha is above a half, with an edge about one pixel wide."""
    right, down = F.pad(alpha, (1, 1, 1, 1), mode="replicate")[:, 1:-1, 2:], F.pad(alpha, (1, 1, 1, 1), mode="replicate")[:, 2:, 1:-1]
    slope = torch.hypot(right - alpha, down - alpha).flatten(1).amax(1).clamp(min=1e-3).view(-1, 1, 1)
    return (0.5 + (alpha - 0.5) / slope).clamp(0, 1)


def _coordinates(pose: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pixel centres in radii, relative to the centre of the object and turned with it, (B,H,W) each."""
    place = (torch.arange(SIZE) + 0.5) / SIZE
    right, down = place - pose["x"].view(-1, 1, 1), place.view(-1, 1) - pose["y"].view(-1, 1, 1)
    cos, sin, radius = (value.view(-1, 1, 1) for value in (pose["angle"].cos(), pose["angle"].sin(), pose["radius"]))
    return (cos * right + sin * down) / radius, (cos * down - sin * right) / radius


def _odd(pose: dict[str, Tensor], which: Tensor, amount: Tensor) -> Tensor:
    """Coverage (B,H,W) of a rectangle, a disc stretched by at most a quarter, or a rounded triangle, by ``which`` in [0, 1)."""
    u, v = _coordinates(pose)
    which, amount = which.view(-1, 1, 1), amount.view(-1, 1, 1)
    wide = torch.maximum(u.abs() - (1.2 + 0.3 * amount), v.abs() - (0.8 - 0.15 * amount))
    disc = torch.hypot(u / (1 + 0.12 * amount), v * (1 + 0.12 * amount)) - 1.08
    lobes = torch.hypot(u, v) - 1.05 - (0.1 + 0.2 * amount) * torch.cos(3 * torch.atan2(v, u))
    distance = torch.where(which < 0.3, wide, torch.where(which < 0.65, disc, lobes))
    return (0.5 - distance * pose["radius"].view(-1, 1, 1) * SIZE).clamp(0, 1)


def _covered(shape: Tensor, pose: dict[str, Tensor]) -> Tensor:
    return coverage(shape, pose["radius"], pose["x"], pose["y"], pose["angle"], SIZE)


def _other(index: Tensor, u: Tensor, count: int) -> Tensor:
    """A value other than ``index``, chosen by u in (0, 1)."""
    return (index + 1 + (u * (count - 1)).long()) % count


def _place(quadrant: Tensor, radius: Tensor, u: Tensor, clearance: float = 0.0) -> dict[str, Tensor]:
    """Centres inside a quadrant, the whole object inside the picture; u is (B,2)."""
    nearest = (radius * _REACH + 0.01).unsqueeze(1)
    inside = nearest + (0.5 - clearance - nearest) * u
    side = torch.stack([quadrant % 2, quadrant // 2], 1)
    place = torch.where(side == 1, 1 - inside, inside)
    return {"x": place[:, 0], "y": place[:, 1]}


def _morph(alpha: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    """Half a shape and half another: laid over each other, and made one sharp shape."""
    return _sharp(blur(_ghost(alpha, shape, pose, u), 0.3 * pose["radius"] * SIZE))


def _ghost(alpha: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    second = _covered(_other(shape, u[:, 0], 3), pose | {"angle": 2 * math.pi * u[:, 1]})
    return torch.lerp(alpha, second, (0.4 + 0.2 * u[:, 2]).view(-1, 1, 1))


def _rounded(alpha: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    return _sharp(blur(_covered(shape // 2 * 2, pose), (0.45 + 0.35 * u[:, 4]) * pose["radius"] * SIZE))  # an ellipse would stay one


def _incomplete(alpha: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    along, _ = _coordinates(pose | {"angle": 2 * math.pi * u[:, 1]})
    return alpha * (0.5 + (0.8 * u[:, 3].view(-1, 1, 1) - 0.4 - along) * (pose["radius"] * SIZE).view(-1, 1, 1)).clamp(0, 1)


def _opaque(least: float, most: float) -> Callable[..., Tensor]:
    return lambda alpha, shape, pose, u: alpha * (least + (most - least) * u[:, 2]).view(-1, 1, 1)


_CHANGES: dict[str, Callable[[Tensor, Tensor, dict[str, Tensor], Tensor], Tensor]] = {
    "blurred": lambda alpha, shape, pose, u: blur(alpha, (0.35 + 0.55 * u[:, 4]) * pose["radius"] * SIZE),
    "rounded": _rounded,
    "odd": lambda alpha, shape, pose, u: _odd(pose, u[:, 0], u[:, 4]),
    "morph": _morph,
    "ghost": _ghost,
    "empty": _opaque(0.0, 0.1),
    "faint": _opaque(0.2, 0.55),
    "incomplete": _incomplete,
}


def _alpha(kinds: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    """How opaque the object is at every pixel, (B,H,W); u is (B,6), what a kind needs by chance."""
    alpha = _covered(shape, pose)
    for name, change in _CHANGES.items():
        chosen = kinds == KINDS.index(name)
        if chosen.any():
            alpha[chosen] = change(alpha[chosen], shape[chosen], {key: value[chosen] for key, value in pose.items()}, u[chosen])
    return alpha


def _paint(kinds: Tensor, labels: dict[str, Tensor], pose: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """Colours of the object (B,3,H,W) and of the background (B,3,1,1), in units of 1/255; u is (B,10)."""
    colours, behind = torch.tensor(COLOURS).float(), torch.tensor(BACKGROUNDS).float()
    front = colours[labels["colour"]].view(-1, 3, 1, 1).repeat(1, 1, SIZE, SIZE)
    mixed = kinds == KINDS.index("mixed")
    halves = (_coordinates({name: value[mixed] for name, value in pose.items()})[0] > 0).unsqueeze(1).float()
    share = torch.where((u[mixed, 1] < 0.3).view(-1, 1, 1, 1), halves, (0.35 + 0.3 * u[mixed, 0]).view(-1, 1, 1, 1))
    two = colours[_other(labels["colour"], u[:, 2], len(COLOURS))[mixed]]
    front[mixed] = torch.lerp(front[mixed], two.view(-1, 3, 1, 1), share)
    other = (0.3 + 0.4 * u[:, 3:4]) * (kinds == KINDS.index("grey")).unsqueeze(1)
    back = torch.lerp(behind[labels["background"]], behind[1 - labels["background"]], other)
    front = front + (20 * u[:, 4:7] - 10).view(-1, 3, 1, 1)
    return front, (back + 16 * u[:, 7:10] - 8).view(-1, 3, 1, 1)


def _texture(keys: Tensor) -> Tensor:
    """Smooth noise (B,1,H,W) in units of 1/255."""
    return 7.0 * F.interpolate(keyed_normal(keys ^ 1, (1, 9, 9)), size=(SIZE, SIZE), mode="bilinear", align_corners=True)


def _noise(keys: Tensor) -> Tensor:
    """Standard normal (B,3,H,W), drawn for a few rows at a time: three times faster, for what stays in the cache."""
    return torch.cat([keyed_normal(part ^ 2, (SIZE, SIZE, 3)) for part in keys.split(8)]).movedim(-1, 1)


def examples(rows: Tensor, seed: int = 0, split: str = "train", negatives: float = 0.5) -> Examples:
    """Mild sprites and negatives.

    Arguments:
        rows: (B,) int64, row numbers.
        seed: another seed gives other rows.
        split: "train" or "test"; they share no row.
        negatives: share of negatives, in [0, 1], all kinds alike.

    Raises:
        ValueError: an argument outside its range.
    """
    if split not in _ROWS or not 0 <= negatives <= 1:
        raise ValueError(f"expected split in {sorted(_ROWS)} and negatives in [0, 1], got {split!r} and {negatives}")
    keys = fold(seed, _ROWS[split], rows)
    u = keyed_uniform(keys, (40,))
    labels = {name: (u[:, i] * len(values)).long() for i, (name, values) in enumerate(ATTRIBUTES.items())}
    kinds = torch.where(u[:, 5] < negatives, (u[:, 6] * len(KINDS)).long(), -1)
    between = kinds == KINDS.index("between")
    radius = torch.where(between, 0.106 + 0.022 * u[:, 7], torch.tensor(RADII)[labels["size"]] * (0.97 + 0.06 * u[:, 7]))
    pose = {"radius": radius, "angle": 2 * math.pi * u[:, 8]} | _place(labels["position"], radius, u[:, 9:11])
    alpha = _alpha(kinds, labels["shape"], pose, u[:, 11:17])
    front, back = _paint(kinds, labels, pose, u[:, 17:27])
    rough = u[:, 27] >= 0.3  # the others are untouched, but for the shifts of colour
    alpha[rough] = blur(alpha[rough], 0.15 * u[rough, 28] * radius[rough] * SIZE) * (1 - 0.1 * u[rough, 29].view(-1, 1, 1))
    pixels = back + alpha.unsqueeze(1) * (front - back)
    several, textured = kinds == KINDS.index("several"), u[:, 37] >= 0.5
    pixels[several] = _second(pixels[several], labels["position"][several], u[several, 30:37])
    pixels[textured] += _texture(keys[textured])
    pixels[rough] += (5 * u[rough, 38]).view(-1, 1, 1, 1) * _noise(keys[rough])
    return Examples(pixels.round().clamp(0, 255).byte(), labels, kinds)


def _second(pixels: Tensor, position: Tensor, u: Tensor) -> Tensor:
    """The pictures (B,3,H,W) with another object in another quadrant; u is (B,7)."""
    radius = torch.tensor(RADII)[(2 * u[:, 0]).long()]
    place = _place(_other(position, u[:, 1], 4), radius, u[:, 2:4], clearance=0.06)
    alpha = _covered((3 * u[:, 4]).long(), place | {"radius": radius, "angle": 2 * math.pi * u[:, 5]})
    front = torch.tensor(COLOURS).float()[(u[:, 3] * 997 % 1 * len(COLOURS)).long()].view(-1, 3, 1, 1)
    return pixels + (alpha * (0.4 + 0.6 * u[:, 6]).view(-1, 1, 1)).unsqueeze(1) * (front - pixels)

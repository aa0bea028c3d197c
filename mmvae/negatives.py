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


def _alpha(kinds: Tensor, shape: Tensor, pose: dict[str, Tensor], u: Tensor) -> Tensor:
    """How opaque the object is at every pixel, (B,H,W); u is (B,6), what a kind needs by chance."""
    covered = _covered(shape, pose)
    pixels = pose["radius"] * SIZE
    second = _covered(_other(shape, u[:, 0], 3), pose | {"angle": 2 * math.pi * u[:, 1]})
    share = (0.4 + 0.2 * u[:, 2]).view(-1, 1, 1)
    opaque = torch.lerp(torch.tensor([0.0, 0.2]), torch.tensor([0.1, 0.55]), u[:, 2:3])
    along, _ = _coordinates(pose | {"angle": 2 * math.pi * u[:, 1]})
    kept = (0.5 + (0.8 * u[:, 3].view(-1, 1, 1) - 0.4 - along) * pixels.view(-1, 1, 1)).clamp(0, 1)
    rounded = _sharp(blur(_covered(shape // 2 * 2, pose), (0.45 + 0.35 * u[:, 4]) * pixels))  # an ellipse would stay one
    changed = {
        "blurred": blur(covered, (0.35 + 0.55 * u[:, 4]) * pixels),
        "rounded": rounded,
        "odd": _odd(pose, u[:, 0], u[:, 4]),
        "morph": _sharp(blur(torch.lerp(covered, second, share), 0.3 * pixels)),
        "ghost": torch.lerp(covered, second, share),
        "empty": covered * opaque[:, 0].view(-1, 1, 1),
        "faint": covered * opaque[:, 1].view(-1, 1, 1),
        "incomplete": covered * kept,
    }
    for name, alpha in changed.items():
        covered = torch.where((kinds == KINDS.index(name)).view(-1, 1, 1), alpha, covered)
    return covered


def _paint(kinds: Tensor, labels: dict[str, Tensor], pose: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """Colours of the object (B,H,W,3) and of the background (B,1,1,3), in units of 1/255; u is (B,10)."""
    colours, behind = torch.tensor(COLOURS).float(), torch.tensor(BACKGROUNDS).float()
    share = (0.35 + 0.3 * u[:, 0]).view(-1, 1, 1, 1)
    halves = (_coordinates(pose)[0] > 0).unsqueeze(-1).float()
    share = torch.where((u[:, 1] < 0.3).view(-1, 1, 1, 1), halves, share)
    share = share * (kinds == KINDS.index("mixed")).view(-1, 1, 1, 1)
    one, two = colours[labels["colour"]], colours[_other(labels["colour"], u[:, 2], len(COLOURS))]
    front = torch.lerp(one.view(-1, 1, 1, 3), two.view(-1, 1, 1, 3), share)
    other = (0.3 + 0.4 * u[:, 3:4]) * (kinds == KINDS.index("grey")).unsqueeze(1)
    back = torch.lerp(behind[labels["background"]], behind[1 - labels["background"]], other)
    front = front + (20 * u[:, 4:7] - 10).view(-1, 1, 1, 3)
    return front, (back + 16 * u[:, 7:10] - 8).view(-1, 1, 1, 3)


def _texture(keys: Tensor, strength: Tensor) -> Tensor:
    """Smooth noise (B,H,W,1) of a strength (B,) in units of 1/255."""
    grid = keyed_normal(keys, (1, 9, 9))
    smooth = F.interpolate(grid, size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    return (smooth * strength.view(-1, 1, 1, 1)).movedim(1, -1)


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
    clean = u[:, 27] < 0.3  # untouched, but for the shifts of colour
    soft = torch.where(clean, 0.0, u[:, 28])
    alpha = blur(alpha, 0.15 * soft * radius * SIZE) * (1 - 0.1 * u[:, 29].view(-1, 1, 1) * ~clean.view(-1, 1, 1))
    pixels = back + alpha.unsqueeze(-1) * (front - back)
    pixels = _second(pixels, kinds, labels, u[:, 30:37])
    pixels = pixels + _texture(keys ^ 1, torch.where(u[:, 37] < 0.5, 0.0, 7.0))
    noise = torch.where(clean, 0.0, 5 * u[:, 38])
    pixels = pixels + noise.view(-1, 1, 1, 1) * keyed_normal(keys ^ 2, (SIZE, SIZE, 3))
    return Examples(pixels.round().clamp(0, 255).byte().movedim(-1, 1), labels, kinds)


def _second(pixels: Tensor, kinds: Tensor, labels: dict[str, Tensor], u: Tensor) -> Tensor:
    """The pictures with another object in another quadrant where the kind is "several"; u is (B,7)."""
    radius = torch.tensor(RADII)[(2 * u[:, 0]).long()]
    place = _place(_other(labels["position"], u[:, 1], 4), radius, u[:, 2:4], clearance=0.06)
    alpha = _covered((3 * u[:, 4]).long(), place | {"radius": radius, "angle": 2 * math.pi * u[:, 5]})
    alpha = alpha * ((0.4 + 0.6 * u[:, 6]) * (kinds == KINDS.index("several"))).view(-1, 1, 1)
    front = torch.tensor(COLOURS).float()[(u[:, 3] * 997 % 1 * len(COLOURS)).long()].view(-1, 1, 1, 3)
    return pixels + alpha.unsqueeze(-1) * (front - pixels)

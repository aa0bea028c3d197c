r"""Captioned sprites: generated pictures of a shape with a caption, labels, an angle and a mask. No files.

| level | caption                              | varies besides what the caption says                                              |
|-------|--------------------------------------|-----------------------------------------------------------------------------------|
| 1     | heart                                | size, colour, place anywhere, angle                                               |
| 2     | big heart                            | colour, place anywhere, angle                                                     |
| 3     | big red heart                        | place anywhere, angle                                                             |
| 4     | big red heart at top left            | place inside the quadrant, clear of the middle lines; angle; texture              |
| 5     | big red heart at top left on dark    | the same; below this level the background is always dark                          |

Shapes are drawn from signed distances d, so edges are anti-aliased at any size:
:math:`x = bg + \mathrm{clip}(1/2 - d/\text{pixel}, 0, 1)\,(colour - bg)`.
A row is a pure function of (seed, level, split, row number): it does not depend on how many rows are asked for, and
no two splits share a row.

Shapes: ``B`` rows, ``H = W`` = image_size; places are in units of the picture's side, x to the right and y down,
angles in radians clockwise.

References:
    Sejnova, Vavrecka, Stepanova (2022), Benchmarking Multimodal Variational Autoencoders: CdSprites+ Dataset and
    Toolkit, https://arxiv.org/abs/2209.03048 (the design of the levels; code and pictures here are new) Quilez, 2D
    distance functions, https://iquilezles.org/articles/distfunctions2d/
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mmvae.noise import fold, keyed_normal, keyed_uniform

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("square", "ellipse", "heart"),
    "size": ("small", "big"),
    "colour": ("red", "yellow", "green", "blue", "pink"),
    "position": ("top left", "top right", "bottom left", "bottom right"),
    "background": ("light", "dark"),
}
SYMMETRY = {"square": 4, "ellipse": 2, "heart": 1}  # a turn by 2 pi / symmetry changes nothing, so angles stay below it
COLOURS = ((220, 40, 40), (240, 210, 40), (50, 180, 70), (50, 90, 220), (250, 130, 190))
BACKGROUNDS = ((228, 226, 220), (30, 30, 36))
RADII = (0.085, 0.155)  # half the side of a small and a big square
SPLITS = ("train", "validation", "test")

_REACH = 1.45  # the farthest point of any shape from its centre, in radii
_CLEARANCE = 0.06  # of a centre from the middle lines where the caption names the quadrant
_TEXTURE = 9  # grid points of the texture along a side
_CHUNK = 256
_ROWS = 0x737072697465


def caption(row: Mapping[str, str], level: int = 5) -> str:
    """The sentence that names the first ``level`` attributes.

    Example:
        >>> caption({"shape": "heart", "size": "big", "colour": "red", "position": "top left", "background": "dark"})
        'big red heart at top left on dark'
    """
    words = [row["size"]] * (level > 1) + [row["colour"]] * (level > 2) + [row["shape"]]
    return " ".join(words + [f"at {row['position']}"] * (level > 3) + [f"on {row['background']}"] * (level > 4))


_GRAMMAR = re.compile(
    (
        r"(?:(?P<size>{size}) (?:(?P<colour>{colour}) )?)?(?P<shape>{shape})"
        r"(?: at (?P<position>{position})(?: on (?P<background>{background}))?)?"
    ).format(**{name: "|".join(values) for name, values in ATTRIBUTES.items()})
)


def parse_caption(text: str) -> dict[str, str]:
    """The attributes that a caption of any level names; the opposite of `caption`.

    Raises:
        ValueError: the text is not a caption, word for word.

    Example:
        >>> parse_caption("small pink square")
        {'shape': 'square', 'size': 'small', 'colour': 'pink'}
    """
    match = _GRAMMAR.fullmatch(text)
    named = {name: match[name] for name in ATTRIBUTES if match[name]} if match else {}
    if not match or list(named) != list(ATTRIBUTES)[: len(named)]:
        raise ValueError(f"got {text!r}, expected a caption such as 'big red heart at top left on dark'")
    return named


def coverage(shape: Tensor, radius: Tensor, x: Tensor, y: Tensor, angle: Tensor, image_size: int = 64) -> Tensor:
    """How much of each pixel a shape covers.

    Arguments:
        shape: (B,) int64, index into ``ATTRIBUTES["shape"]``.
        radius: (B,) float, half the side of a square of that size, in picture sides.
        x, y: (B,) float in [0, 1], centre.
        angle: (B,) float, radians clockwise.
        image_size: pixels along a side.

    Returns:
        (B,H,W) float32 in [0, 1].
    """
    place = (torch.arange(image_size) + 0.5) / image_size
    right, down = place - x.view(-1, 1, 1), place.view(-1, 1) - y.view(-1, 1, 1)
    cos, sin, radius = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1), radius.view(-1, 1, 1)
    u, v = (cos * right + sin * down) / radius, (cos * down - sin * right) / radius
    distance = torch.empty_like(u)
    for number, distance_to in enumerate((_square, _ellipse, _heart)):
        chosen = shape == number
        distance[chosen] = distance_to(u[chosen], v[chosen])
    return (0.5 - distance * radius * image_size).clamp_(0, 1)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 1


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    """First-order distance to an ellipse with half axes 1.4 and 0.75."""
    a, b = 1.4, 0.75
    level = torch.hypot(u / a, v / b)
    return level * (level - 1) / torch.hypot(u / a**2, v / b**2).clamp(min=1e-6)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """Exact distance to a heart, tip down (Quilez), about as large as the square."""
    scale = 2.1
    u, v = u.abs() / scale, 0.55 - v / scale
    lobe = torch.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    fold_line = (u + v).clamp(min=0) / 2
    flank = torch.minimum(torch.hypot(u, v - 1), torch.hypot(u - fold_line, v - fold_line)) * torch.sign(u - v)
    return torch.where(u + v > 1, lobe, flank) * scale


def render(
    shape: Tensor,
    size: Tensor,
    colour: Tensor,
    background: Tensor,
    x: Tensor,
    y: Tensor,
    angle: Tensor,
    image_size: int = 64,
    texture: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures and masks of explicit attributes.

    Arguments:
        shape, size, colour, background: (B,) int64, indices into ``ATTRIBUTES``.
        x, y: (B,) float in [0, 1], centre.
        angle: (B,) float, radians clockwise.
        image_size: pixels along a side.
        texture: (B,H,W) float added to every channel, in units of 1/255.

    Returns:
        Pictures (B,H,W,3) uint8, and masks (B,H,W) uint8 that are 1 where the shape covers at least half of a pixel.
    """
    covered = coverage(shape, torch.tensor(RADII)[size], x, y, angle, image_size)
    behind = torch.tensor(BACKGROUNDS).float()[background].view(-1, 1, 1, 3)
    front = torch.tensor(COLOURS).float()[colour].view(-1, 1, 1, 3)
    pixels = behind + covered.unsqueeze(-1) * (front - behind)
    if texture is not None:
        pixels += texture.unsqueeze(-1)
    return pixels.round_().clamp_(0, 255).to(torch.uint8), (covered >= 0.5).to(torch.uint8)


def _texture(keys: Tensor, image_size: int, strength: float = 7.0) -> Tensor:
    """Smooth noise (B,H,W): normal values on a coarse grid, interpolated."""
    # by lerp, not as a matrix product, whose bits depend on how many rows are drawn together
    grid = strength * keyed_normal(keys ^ 1, (_TEXTURE, _TEXTURE))
    place = torch.arange(image_size) * ((_TEXTURE - 1) / image_size)
    low, share = place.long(), place - place.long()
    rows = torch.lerp(grid[:, low], grid[:, low + 1], share.view(1, -1, 1))
    return torch.lerp(rows[..., low], rows[..., low + 1], share)


def _draw(keys: Tensor, level: int, centred: str | None = None) -> dict[str, Tensor]:
    """All that decides rows: one index per attribute, the centre and the angle."""
    u = keyed_uniform(keys, (8,)).unbind(1)
    drawn = {name: (u[i] * len(values)).long() for i, (name, values) in enumerate(ATTRIBUTES.items())}
    for name, value in parse_caption(centred).items() if centred else ():
        drawn[name] = torch.full_like(drawn[name], ATTRIBUTES[name].index(value))
    if level < 5:
        drawn["background"] = torch.ones_like(drawn["background"])
    nearest = torch.tensor(RADII)[drawn["size"]] * _REACH + 0.01
    farthest = 0.5 - (_CLEARANCE if level > 3 else 0.0)
    for axis, side, i in (("x", drawn["position"] % 2, 5), ("y", drawn["position"] // 2, 6)):
        inside = nearest + (farthest - nearest) * u[i]
        drawn[axis] = torch.full_like(inside, 0.5) if centred else torch.where(side == 1, 1 - inside, inside)
    drawn["angle"] = u[7] * 2 * math.pi / torch.tensor([SYMMETRY[name] for name in ATTRIBUTES["shape"]])[drawn["shape"]]
    return drawn


class Sprites:
    """Rows of captioned sprites, drawn when they are read; it is indexed like a `datasets.Dataset`.

    Columns: ``image`` (H,W,3) uint8, ``caption``, ``shape``, ``size``, ``colour``, ``position``, ``background``
        (indices into `ATTRIBUTES`),
    ``angle`` (radians, in [0, 2 pi / SYMMETRY)), ``mask`` (H,W) uint8.
    """

    def __init__(self, level: int, keys: Tensor, image_size: int, columns: Sequence[str] | None = None, centred: str | None = None) -> None:
        self.level, self.image_size, self.centred, self._keys = level, image_size, centred, keys
        labels = {name: datasets.ClassLabel(names=list(values)) for name, values in ATTRIBUTES.items()}
        mask = datasets.Array2D((image_size, image_size), "uint8")
        known = {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            **labels,
            "angle": datasets.Value("float32"),
            "mask": mask,
        }
        self.features = datasets.Features({name: known[name] for name in (columns or known)})
        self.column_names = list(self.features)

    def __len__(self) -> int:
        return len(self._keys)

    def select(self, rows: Sequence[int]) -> "Sprites":
        """Some of the rows."""
        return Sprites(self.level, self._keys[torch.as_tensor(rows)], self.image_size, self.column_names, self.centred)

    def select_columns(self, columns: Sequence[str]) -> "Sprites":
        """Some of the columns; what is left out is not drawn."""
        return Sprites(self.level, self._keys, self.image_size, columns, self.centred)

    def __getitem__(self, index: int | slice | Sequence[int] | str) -> Any:
        if isinstance(index, str):
            return self.select_columns([index])[:][index]
        if isinstance(index, int):
            return {name: values[0] for name, values in self[[range(len(self))[index]]].items()}
        keys = self._keys[index] if isinstance(index, slice) else self._keys[torch.as_tensor(index, dtype=torch.int64)]
        parts = [self._rows(part) for part in keys.split(_CHUNK)]
        return {name: _joined([part[name] for part in parts]) for name in self.column_names}

    def _rows(self, keys: Tensor) -> dict[str, Any]:
        drawn = _draw(keys, self.level, self.centred)
        rows: dict[str, Any] = {name: drawn[name].tolist() for name in (*ATTRIBUTES, "angle")}
        if "image" in self.features or "mask" in self.features:
            texture = _texture(keys, self.image_size) if self.level > 3 else None
            places = {name: value for name, value in drawn.items() if name != "position"}
            image, mask = render(**places, image_size=self.image_size, texture=texture)
            rows |= {"image": image.numpy(), "mask": mask.numpy()}
        if "caption" in self.features:
            numbers = zip(*(rows[name] for name in ATTRIBUTES), strict=True)
            words = ({name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)} for row in numbers)
            rows["caption"] = [caption(row, self.level) for row in words]
        return rows


def _joined(parts: list[Any]) -> Any:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [value for part in parts for value in part]


def sprites(
    level: int = 3, split: str = "train", num_rows: int = 10_000, seed: int = 0, image_size: int = 64, centred: str | None = None
) -> Sprites:
    """Captioned sprites of a level.

    Arguments:
        level: 1...5, how many attributes the caption names.
        split: "train", "validation" or "test".
        num_rows: how many; the first rows of a larger set are the same.
        seed: another seed gives other rows.
        image_size: pixels along a side, at least 16.
        centred: "heart", "big heart", or any caption up to level 3: all rows show that, in the middle of the picture, and ``position``
            means nothing.

    Returns:
        The rows.

    Raises:
        ValueError: an argument outside its range.
    """
    if not 1 <= level <= 5:
        raise ValueError(f"level must be in 1...5, got {level}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if num_rows < 1 or image_size < 16:
        raise ValueError(f"expected num_rows >= 1 and image_size >= 16, got {num_rows} and {image_size}")
    if centred and ("position" in parse_caption(centred) or level > 3):
        raise ValueError(f"centred must be a caption without a place, at levels 1...3, got {centred!r} at level {level}")
    return Sprites(level, fold(seed, _ROWS, level, SPLITS.index(split), torch.arange(num_rows)), image_size, centred=centred)

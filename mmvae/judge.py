r"""Judging captioned sprites: does a picture show what a caption says, clearly enough that nobody would dispute it?

A picture is right when three things hold:

1. the oracle, a network that also saw pictures that are *not* sprites (:mod:`mmvae.negatives`), does not refuse it;
2. its object fits the rendered template of the shape and size that the oracle sees, IoU >= 0.85, on level 5 >= 0.8
   (:mod:`mmvae.templates`): a disc scores 0.84 on a square, and a network alone calls it one;
3. every attribute that the caption of that level names is what the oracle sees. What the caption does not name may vary freely.

A caption is judged by parsing, word for word. ``recipes/sprites_judge.py`` trains the oracle and measures it; a folder holds
``model.safetensors``, ``config.json`` and ``metrics.json``.

Shapes: ``B`` pictures of 64 x 64 pixels, ``R`` = 24 circles around the object, ``A`` = 64 angles.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmvae.data.sprites import ATTRIBUTES, COLOURS, RADII
from mmvae.data.sprites import parse_caption as parse_any_caption
from mmvae.negatives import SIZE
from mmvae.templates import background, clear, template_iou

_VALUES = {name: list(values) for name, values in ATTRIBUTES.items()}  # as JSON gives them back
_CHUNK = 250
_CIRCLES = 24
_ANGLES = 64
_REACH = 1.9  # of the circles, in units of the object's scale; no sprite reaches 1.6
_NEAR = 0.3  # half the side of the window in which an object lies whole, in picture sides
_FAINTEST = 0.1  # what contrasts less with its background is looked at as if it contrasted so much
_SCALES = 14  # marks along the logarithm of the scale
_FIGURES = 3 + 2 + 1 + (1 + _SCALES) + (3 + len(COLOURS)) + 3 + (SIZE // 4) ** 2


def smallest_iou(level: int) -> float:
    """The IoU with the best template that a picture of a level needs: 0.85, on level 5 0.8."""
    if not 1 <= level <= len(ATTRIBUTES):
        raise ValueError(f"level must be in 1...{len(ATTRIBUTES)}, got {level}")
    return 0.8 if level == 5 else 0.85


def parse_caption(text: str, level: int) -> dict[str, str] | None:
    """The attributes that a caption of this level names; None where the text is no caption, or one of another level.

    Example:
        >>> parse_caption("small pink square", 3)
        {'shape': 'square', 'size': 'small', 'colour': 'pink'}
        >>> parse_caption("small pink square", 2), parse_caption("small small square", 3)
        (None, None)
    """
    smallest_iou(level)  # level in its range
    try:
        named = parse_any_caption(text)
    except ValueError:
        return None
    return named if len(named) == level else None


@dataclass(frozen=True)
class Verdict:
    """What a judge sees.

    Arguments:
        seen: per attribute, (B,) int64 indices into ``ATTRIBUTES``.
        refusal: (B,) float32, the probability that the picture is no clear sprite.
        iou: (B,) float32 in [0, 1], with the best-fitting template of the shape and size seen.
    """

    seen: dict[str, Tensor]
    refusal: Tensor
    iou: Tensor

    @property
    def refused(self) -> Tensor:
        """(B,) bool: more likely no sprite than one."""
        return self.refusal > 0.5


@dataclass(frozen=True)
class Strictness:
    """How rows were judged.

    Arguments:
        right: (B,) bool, strictly right.
        attributes: per attribute that the level names, (B,) bool: seen as the caption says, whether or not the picture was refused.
        refused: (B,) bool, by the oracle.
        fits: (B,) bool, the IoU is large enough.
        malformed: (B,) bool, the caption names nothing; such a row is wrong in every attribute.
    """

    right: Tensor
    attributes: dict[str, Tensor]
    refused: Tensor
    fits: Tensor
    malformed: Tensor

    def figures(self) -> dict[str, float]:
        """Means over the rows: ``strict``, one per attribute, ``refused``, ``misfit`` and ``malformed``, each in [0, 1]."""
        rows = {"strict": self.right, **self.attributes, "refused": self.refused, "misfit": ~self.fits, "malformed": self.malformed}
        return {name: values.double().mean().item() for name, values in rows.items()}


def strict_captions(texts: Sequence[str], truths: Sequence[str], level: int) -> dict[str, Tensor]:
    """Captions against the true ones: ``strict`` and one entry per attribute, (B,) bool each.

    Arguments:
        texts: generated captions.
        truths: the captions of the data.
        level: of the data set.

    Raises:
        ValueError: not as many texts as truths, or a truth that is no caption of that level.
    """
    expected = [parse_caption(text, level) for text in truths]
    if len(texts) != len(truths) or None in expected:
        raise ValueError(
            f"expected as many texts as truths, got {len(texts)} and {len(truths)}, and truths that are captions of level {level}"
        )
    said = [parse_caption(text, level) or {} for text in texts]
    names = list(ATTRIBUTES)[:level]
    right = {name: torch.tensor([one.get(name) == other[name] for one, other in zip(said, expected, strict=True)]) for name in names}
    return {"strict": torch.stack(list(right.values())).all(0)} | right


def locate(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The centre of gravity and the scale of the object of a picture; of several objects, of the one that fills most of a window.

    Arguments:
        mask: (B,64,64) float in [0, 1], how clearly each pixel belongs to an object.

    Returns:
        Centres (B,2), x and y in picture sides, and scales (B,), half the side of the square of the same area.
    """
    coarse = F.avg_pool2d(F.avg_pool2d(mask.unsqueeze(1), 4), 5, 1, 2).flatten(1)
    peak, side = coarse.argmax(1), SIZE // 4
    x, y = (((index + 0.5) / side).view(-1, 1) for index in (peak % side, peak // side))
    place = (torch.arange(SIZE, device=mask.device) + 0.5) / SIZE
    own = mask * ((place - x).abs() < _NEAR).unsqueeze(1) * ((place - y).abs() < _NEAR).unsqueeze(2)
    area = own.sum((1, 2)).clamp(min=4)
    centre = torch.stack([(own.sum(1) * place).sum(1), (own.sum(2) * place).sum(1)], 1) / area.unsqueeze(1)
    return centre, area.sqrt() / 2 / SIZE


@torch.no_grad()
def look(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A picture as seen from its object: nothing here is learned, and nothing but the start of a circle depends on the object's angle.

    Arguments:
        pixels: (B,3,64,64) float in [0, 1].

    Returns:
        circles: (B,4R,A), colour - 1/2 and contrast with the background on circles around the object, as wide as it is large.
        whole: (B,288), figures of colour, place and scale, of what lies beyond the circles, and a thumbnail of 16 x 16.
    """
    behind = background(pixels)
    distance = torch.linalg.vector_norm(pixels - behind[:, :, None, None], dim=1)
    contrast = F.avg_pool2d(distance, 3, 1).flatten(1).amax(1).clamp(min=_FAINTEST).view(-1, 1, 1)
    share = distance / contrast
    mask = clear(share)
    centre, scale = locate(mask)
    strength = 2 * contrast.flatten(1)  # this factor and the others bring the figures to about one
    whole = [behind - 0.5, 10 * (centre - 0.5), strength, _of_scale(scale), _of_colour(pixels, share)]
    whole += [_beyond(share, mask, centre, scale, strength), F.avg_pool2d(share.unsqueeze(1), 4).flatten(1)]
    return _circles(torch.cat([pixels - 0.5, share.unsqueeze(1)], 1), centre, scale), torch.cat(whole, 1)


def _circles(maps: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """Maps (B,C,64,64) on R circles at A angles, (B,CR,A)."""
    radius = (_REACH / _CIRCLES * (torch.arange(_CIRCLES, device=maps.device) + 0.5)).unsqueeze(1)
    angle = 2 * math.pi / _ANGLES * torch.arange(_ANGLES, device=maps.device)
    places = centre.view(-1, 1, 1, 2) + scale.view(-1, 1, 1, 1) * torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return F.grid_sample(maps, 2 * places - 1, padding_mode="border", align_corners=False).flatten(1, 2)


def _of_scale(scale: Tensor) -> Tensor:
    """The logarithm of the scale (B,15): as it is, and as bumps along it, so that "between small and big" is easily told."""
    relative = (scale.log() - 0.5 * math.log(math.prod(RADII))).unsqueeze(1)
    marks = torch.linspace(-0.5, 0.5, _SCALES, device=scale.device)
    return torch.cat([12 * relative, (-((relative - marks) / 0.07).square()).exp()], 1)


def _of_colour(pixels: Tensor, share: Tensor) -> Tensor:
    """The mean colour where the contrast is strong, and its distance from every colour of sprites, (B,8)."""
    strong = (share > 0.7).unsqueeze(1)
    mean = (pixels * strong).sum((2, 3)) / strong.sum((2, 3)).clamp(min=1)
    known = torch.tensor(COLOURS, device=pixels.device) / 255
    return torch.cat([mean, 4 * torch.linalg.vector_norm(mean.unsqueeze(1) - known, dim=2)], 1)


def _beyond(share: Tensor, mask: Tensor, centre: Tensor, scale: Tensor, strength: Tensor) -> Tensor:
    """How strong and how large is what lies beyond the circles, (B,3): where there is a second object."""
    place = (torch.arange(SIZE, device=share.device) + 0.5) / SIZE
    away = torch.hypot(place - centre[:, :1, None], place.unsqueeze(1) - centre[:, 1:, None]) > _REACH * scale.view(-1, 1, 1)
    blob = F.avg_pool2d((share * away).unsqueeze(1), 5, 2, 2).amax((2, 3))
    size = (mask * away).sum((1, 2)) / (2 * SIZE * scale).square()
    return torch.cat([4 * blob, 4 * blob * strength, 4 * size.unsqueeze(1)], 1)


class Judge(nn.Module):
    """The oracle: it looks from the object (`look`), and has one head per attribute and one that refuses.

    Convolutions along the angle and a maximum and a mean over it see the same whichever way the object is turned.

    Arguments:
        width: channels of the first convolutions, at least 8.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 8:
            raise ValueError(f"width must be at least 8, got {width}")
        self.width = width
        layers: list[nn.Module] = []
        for before, after, kernel, stride in ((4 * _CIRCLES, width, 5, 1), (width, width, 5, 2), (width, 2 * width, 3, 1)):
            convolution = nn.Conv1d(before, after, kernel, stride, kernel // 2, bias=False, padding_mode="circular")
            layers += [convolution, nn.BatchNorm1d(after), nn.ReLU()]
        self.around = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(4 * width + _FIGURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})
        self.refuse = nn.Linear(128, 1)

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits per attribute (B,V) and of refusal (B,), from pixels (B,3,64,64) float in [0, 1]."""
        circles, whole = look(pixels)
        h = self.around(circles)
        hidden = self.hidden(torch.cat([h.amax(2), h.mean(2), whole], 1))
        return {name: head(hidden) for name, head in self.heads.items()}, self.refuse(hidden).squeeze(1)

    @torch.no_grad()
    def judge(self, pixels: Tensor) -> Verdict:
        """What pictures show, in evaluation mode, rounded to 8 bits first as a file would be.

        Arguments:
            pixels: (B,3,64,64), uint8 or float in [0, 1].

        Raises:
            ValueError: another shape, or values outside the range.
        """
        if pixels.dim() != 4 or pixels.shape[1:] != (3, SIZE, SIZE) or not len(pixels):
            raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, 3, {SIZE}, {SIZE}) with B at least 1")
        if pixels.dtype != torch.uint8:
            if not (pixels.is_floating_point() and pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError(f"pixels: got {pixels.dtype} in [{pixels.min()}, {pixels.max()}], expected uint8, or float in [0, 1]")
            pixels = (255 * pixels.float()).round()
        training = self.training
        self.eval()
        pixels = pixels.to(self.refuse.weight.device).float() / 255
        parts = [self(part) for part in pixels.split(_CHUNK)]
        self.train(training)
        seen = {name: torch.cat([logits[name] for logits, _ in parts]).argmax(1) for name in ATTRIBUTES}
        refusal = torch.cat([refusal for _, refusal in parts]).sigmoid()
        return Verdict(seen, refusal, template_iou(pixels, seen["shape"], seen["size"], seen["colour"]))

    def strict(self, pixels: Tensor, captions: Sequence[str], level: int) -> Strictness:
        """Do pictures show what captions say? For text to image the given captions, for joint samples the generated ones.

        Arguments:
            pixels: (B,3,64,64), uint8 or float in [0, 1].
            captions: B texts.
            level: 1...5, how many attributes a caption names.

        Raises:
            ValueError: not as many captions as pictures, or an argument outside its range.
        """
        if len(captions) != len(pixels):
            raise ValueError(f"captions: got {len(captions)} for {len(pixels)} pictures, expected as many")
        said = [parse_caption(text, level) for text in captions]
        verdict = self.judge(pixels)
        malformed = torch.tensor([named is None for named in said], device=verdict.iou.device)
        attributes = {}
        for name in list(ATTRIBUTES)[:level]:
            wanted = [-1 if named is None else ATTRIBUTES[name].index(named[name]) for named in said]
            attributes[name] = verdict.seen[name] == torch.tensor(wanted, device=verdict.iou.device)
        fits = verdict.iou >= smallest_iou(level)
        right = torch.stack(list(attributes.values())).all(0) & fits & ~verdict.refused
        return Strictness(right, attributes, verdict.refused, fits, malformed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        config = {"model_type": "sprites_judge", "width": self.width, "image_size": SIZE, "attributes": _VALUES}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Judge":
        """A trained judge, in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder is of another model, or of other attributes than this version draws.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: not found, expected a folder that recipes/sprites_judge.py wrote")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name, expected in (("model_type", "sprites_judge"), ("image_size", SIZE), ("attributes", _VALUES)):
            if config.get(name) != expected:
                raise ValueError(f"{folder / 'config.json'}: {name}: got {config.get(name)!r}, expected {expected!r}")
        judge = cls(config["width"])
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        return judge.eval()

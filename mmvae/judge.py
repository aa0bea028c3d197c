r"""Judging captioned sprites: does a picture show what a caption says, clearly enough that nobody would dispute it?

A picture is right when three things hold:

1. the oracle, a convolutional network that also saw pictures that are *not* sprites (:mod:`mmvae.negatives`), does not refuse it;
2. its object fits the rendered template of the shape and size that the oracle sees, IoU >= 0.85, on level 5 >= 0.8
   (:mod:`mmvae.templates`): a disc scores 0.84 on a square, and a network alone calls it one;
3. every attribute that the caption of that level names is what the oracle sees. What the caption does not name may vary freely.

A caption is judged by parsing, word for word. ``recipes/sprites_judge.py`` trains the oracle and measures it; a folder holds
``model.safetensors``, ``config.json`` and ``metrics.json``.

Shapes: ``B`` pictures of 64 x 64 pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmvae.data.sprites import ATTRIBUTES
from mmvae.data.sprites import parse_caption as parse_any_caption
from mmvae.negatives import SIZE
from mmvae.templates import template_iou

_VALUES = {name: list(values) for name, values in ATTRIBUTES.items()}  # as JSON gives them back
_CHUNK = 250


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

    def names(self) -> list[dict[str, str]]:
        """The attributes of each picture in words."""
        columns = {name: [ATTRIBUTES[name][i] for i in index.tolist()] for name, index in self.seen.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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


class Judge(nn.Module):
    """The oracle: a convolutional network with one head per attribute and one that refuses.

    Global maxima and means tell shape and colour wherever the object is; a small map that is kept whole tells where.

    Arguments:
        width: channels of the first convolutions, at least 8.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        if width < 8:
            raise ValueError(f"width must be at least 8, got {width}")
        self.width = width
        plan = [(12, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        plan += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1), (4 * width, 4 * width, 2)]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for before, after, stride in plan:
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.where = nn.Conv2d(4 * width, 16, 1)
        self.hidden = nn.Sequential(nn.Linear(8 * width + 16 * (SIZE // 16) ** 2, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})
        self.refuse = nn.Linear(128, 1)

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits per attribute (B,V) and of refusal (B,), from pixels (B,3,64,64) float in [0, 1]."""
        h = self.trunk(pixels - 0.5)
        hidden = self.hidden(torch.cat([h.amax((2, 3)), h.mean((2, 3)), self.where(h).flatten(1)], 1))
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

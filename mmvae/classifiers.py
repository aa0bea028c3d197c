"""Who tells the class of what a joint model makes of labelled data: a small network for pictures, a list for texts.

Both learn from the real training rows alone. A network names some class for whatever it is shown, a blot too, so its share of right classes
among real pictures that it never saw stands beside the coherence, which is worth no more than that.

Shapes: ``B`` rows, ``C`` classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from mmvae.coherence import class_coherence, without_densities
from mmvae.data import ImageColumn, LabelColumn, Loader, Rows, TextColumn, find_classes
from mmvae.joint_processing import MMVAEProcessor
from mmvae.models.mmvae import MMVAE

_BATCH = 128
_RATE = 5e-3


class PictureClassifier(nn.Module):
    """Class logits (B,C) of pictures, by four convolutions of which the maxima and the means of the four quarters are read.

    Arguments:
        channels: of a picture.
        classes: how many there are.
        width: channels of the first convolution.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, 2 if layers else 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(4 * width, 4 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(20 * width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B,C) from pixels (B,channels,H,W), uint8 or float in [0, 1]."""
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        h = self.trunk(pixels - 0.5)
        return self.head(torch.cat([h.amax((2, 3)), F.adaptive_avg_pool2d(h, 2).flatten(1)], 1))

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """The most likely class of every picture, (B,) int64."""
        return self(pixels.to(self.head.weight.device)).argmax(1)


def picture_classifier(
    data: Any, column: ImageColumn, label: str, *, num_epochs: int = 2, seed: int = 0, device: torch.device | str = "cpu"
) -> PictureClassifier:
    """A classifier trained by one cycle of AdamW, the same for the same data, seed and number of threads; in evaluation mode.

    Arguments:
        data: training rows, as `mmvae.data.load_rows` gives them.
        column: the pictures; those that a row lacks are left out.
        label: the column of classes.
        num_epochs: at least 1.
    """
    classes = find_classes(data, label)
    loader = Loader(_labelled(data, column, label, classes), _BATCH, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PictureClassifier(column.num_channels, len(classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, max(2, num_epochs * len(loader)))
    generator = torch.Generator().manual_seed(seed)
    for batch in (batch for epoch in range(num_epochs) for batch in loader.batches(epoch)):
        loss = F.cross_entropy(model(_softened(batch["pixel_values"].to(device), generator)), batch["labels"].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _softened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B,C,H,W) uint8 as float, blurred by a deviation of up to a pixel and up to 40 % fainter, alike within a batch.

    What a VAE makes is softer than any photograph: networks that saw sharp pictures alone were right about 99.1 % of the real digits, and
    differed by five points in what they said of the same reconstructions.
    """
    deviation, brightness = torch.rand(2, generator=generator).tolist()
    sigma = max(deviation, 0.1)  # torchvision takes no zero; a tenth of a pixel changes nothing
    return gaussian_blur(pixels.float() / 255, [5, 5], [sigma, sigma]) * (1 - 0.4 * brightness)


def picture_accuracy(model: PictureClassifier, data: Any, column: ImageColumn, label: str, classes: Sequence[str]) -> float:
    """Share of real pictures whose class is told right, in [0, 1]; ``classes`` in the order of their numbers, the rest as above."""
    batches = Loader(_labelled(data, column, label, classes), 500, shuffle=False).batches(0)
    return torch.cat([model.classify(batch["pixel_values"]).cpu() == batch["labels"] for batch in batches]).double().mean().item()


def _labelled(data: Any, column: ImageColumn, label: str, classes: Sequence[str]) -> Rows:
    """Pictures with their classes; of a joint model's column, the rows that have one."""
    column = replace(column, prefix="", modality=column.modality or "image")
    return Rows(data, [column, LabelColumn(label, tuple(classes))], name="labelled rows", on_bad_row="skip")


def text_classifier(texts: Sequence[str | None], labels: Sequence[int]) -> Callable[[Sequence[str]], Tensor]:
    """Tells the class of a text by looking for it, word for word, among known ones: -1 where it is none of them, or one of two classes.

    For texts of which there are few, such as written digits; a free caption is seldom found.

    Arguments:
        texts: known ones; None is passed over.
        labels: their classes.

    Returns:
        B texts -> (B,) int64.

    Example:
        >>> text_classifier(["a one", "one a", "a two", "a"], [1, 1, 2, 2])(["one a", "a two", "a tow"]).tolist()
        [1, 2, -1]
    """
    known: dict[str, int] = {}
    for text, label in zip(texts, labels, strict=True):
        if text is not None:
            words = " ".join(text.split())
            known[words] = label if known.get(words, label) == label else -1
    return lambda made: torch.tensor([known.get(" ".join(text.split()), -1) for text in made], dtype=torch.int64)


def labelled_coherence(
    accelerator: Accelerator,
    model: MMVAE,
    processor: MMVAEProcessor,
    rows: Rows,
    data: Any,
    known: Any,
    label: str,
    *,
    num_generated: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Cross and joint coherence of labelled data by classifiers trained here: once more without fitted densities.

    Arguments:
        accelerator, model, rows, num_generated, seed: as for :func:`mmvae.coherence.class_coherence`.
        processor: the model's.
        data: what ``rows`` are of.
        known: the training rows; every rank learns the same from them.
        label: the column of classes, of both; a class that no training row has is never told.

    Returns:
        The figures of :func:`mmvae.coherence.class_coherence`; ``<modality>/classifier_accuracy``, of pictures among the real ``rows``.
    """
    classes = find_classes(known, label, rows.name)
    classes += tuple(name for name in find_classes(data, label, rows.name) if name not in classes)
    told = LabelColumn(label, classes)
    labels, known_labels = ([int(number) for number in told.prepare(list(part[label]))] for part in (data, known))
    classifiers: dict[str, Callable[[Any], Tensor]] = {}
    figures: dict[str, float] = {}
    for column in rows.columns:
        name = column.modality
        if isinstance(column, ImageColumn):
            network = picture_classifier(known, column, label, seed=seed, device=accelerator.device)
            figures[f"{name}/classifier_accuracy"] = picture_accuracy(network, data, column, label, classes)
            classifiers[name] = network.classify
        elif isinstance(column, TextColumn):
            classifiers[name] = partial(_read, processor, name, text_classifier(list(known[column.name]), known_labels))
    options = {"num_rows": num_generated, "num_generated": num_generated, "seed": seed}
    figures |= class_coherence(accelerator, model, rows, classifiers, labels, **options)
    if len(model.densities):
        with without_densities(model):
            plain = class_coherence(accelerator, model, rows, classifiers, labels, **options)
        figures |= {f"without_densities/{name}": value for name, value in plain.items()}
    return figures


def _read(processor: MMVAEProcessor, name: str, classify: Callable[[Sequence[str]], Tensor], ids: Tensor) -> Tensor:
    return classify(processor.batch_decode(ids.cpu(), name))

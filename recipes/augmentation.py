"""Does a classifier that learns from few labels gain by generated rows? A VAE with classes draws them.

    accelerate launch recipes/augmentation.py                                        # shapes of the built-in sprites
    accelerate launch recipes/augmentation.py --config recipes/configs/augmentation_mnist.yaml --dataset path/to/mnist
    accelerate launch recipes/augmentation.py --config recipes/configs/augmentation_trec.yaml --dataset path/to/trec

For every number of labels per class and every draw of which rows have them: a generator, a VAE with classes, learns from these rows alone
(with --unlabelled from all others too, without their labels), and draws equally many rows of each class. Then two classifiers that are
alike in everything, first weights, steps, batch size and random changes to pictures included, learn from the real rows, or from real and
generated ones, and are measured on all test rows; with --trainings several times, from other first weights. metrics.json holds every draw,
the means, and p of the two-sided paired t-test over the draws. One process; started again after a stop, it goes on where it was. Results:
see the configs.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mmvae import ImageVAE
from mmvae.charts import against
from mmvae.data import Column, Loader, PartlyLabelled, Rows
from mmvae.data.selection import select
from mmvae.evaluation import binarization, model_inputs, predict
from mmvae.experiment import check_alone, parse, start
from mmvae.hub import write_metrics
from mmvae.loop import to_device
from mmvae.modalities import augmented, overridden
from mmvae.models.classes import ClassVAE
from mmvae.models.heads import classifier_of
from mmvae.noise import fold
from mmvae.options import mapping
from mmvae.pictures import grid, table
from mmvae.processing import decode_text
from mmvae.study import (
    CLASSIFIERS,
    LabelledData,
    StudyRun,
    accuracy,
    mean_and_deviation,
    one_modality,
    paired_p,
    train_classifier,
    train_once,
)

ARMS = ("real", "augmented")
PLACES = ("dataset", "output_dir", "resume", "hub_token")


@dataclass
class AugmentationRun(StudyRun):
    """Options of the study; those of training are the classifiers'."""

    output_dir: str = "outputs/augmentation"
    counts: list[int] = field(default_factory=lambda: [10, 50, 200], metadata={"help": "labels per class"})
    draws: int = field(default=5, metadata={"help": "of which rows have labels, and of all else that is random"})
    unlabelled: bool = field(default=False, metadata={"help": "show the generator the other training rows too, without their labels"})
    label_repeats: int = field(default=1, metadata={"help": "with --unlabelled: how often the rows with labels come in an epoch"})
    generated: int = field(default=200, metadata={"help": "generated rows of each class"})
    latents: str = field(default="around", metadata={"help": "of generated rows: around real rows of the class, or from the prior"})
    candidates: int = field(default=5, metadata={"help": "rows of the class of which the nearest one tells a direction"})
    reach: float = field(default=1.0, metadata={"help": "how far to go towards it or away, at most, in distances between the two rows"})
    trainings: int = field(default=1, metadata={"help": "of each classifier, from other first weights; their accuracies are averaged"})
    kept: float = field(
        default=1.0, metadata={"help": "share of the generated rows that is kept: what the classifier of real rows is surest of"}
    )
    generator: str = field(default="{}", metadata={"help": "fields of the generator's configuration alone"})
    generator_run: str = field(default="{}", metadata={"help": "options of training that the generator has otherwise"})
    batch_size: int = 64
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("generator", "generator_run"):
            setattr(self, option, mapping(option, getattr(self, option)))
        for name in ("counts", "draws", "generated", "candidates", "trainings"):
            received = getattr(self, name)
            if min(received if name == "counts" else [received]) < 1:
                raise ValueError(f"{name}: received {received}, expected at least 1")
        if not 0 < self.kept <= 1 or self.reach < 0:
            raise ValueError(f"kept, reach: received {self.kept}, {self.reach}, expected a share in (0, 1], and at least 0")
        if self.latents not in ("around", "prior"):
            raise ValueError(f"latents: received {self.latents!r}, expected 'around' or 'prior'")


def around(model: ClassVAE, rows: Rows, labels: Tensor, seed: int, candidates: int, reach: float) -> Tensor:
    """Latents (N, D) around rows of the class that each label (N,) names, as random changes to pictures make them.

    Each lies on the line through the posterior means of a row and of the nearest of some others, up to ``reach`` of the distance between
    them on either side of the first: lines to far rows pass through latents of no class, and points beyond are more of a change than points
    between (DeVries, Taylor, 2017, Dataset augmentation in feature space, https://arxiv.org/abs/1702.05538).
    """
    generator, loader, seen = torch.Generator().manual_seed(seed), Loader(rows, 500, seed=seed), []
    with torch.no_grad():
        for batch in (batch for epoch in range(-(-2 * len(labels) // rows.num_rows)) for batch in loader.batches(epoch)):
            seen.append(
                (batch["labels"], batch["row"], model.posterior(**model_inputs(model, to_device(model.device, batch))).mixture.mean.cpu())
            )
    told, number, z = (torch.cat(each) for each in zip(*seen, strict=True))
    of_class = {label: (told == label).nonzero().flatten() for label in labels.unique().tolist()}
    rows_of = [of_class[label] for label in labels.tolist()]
    picked = torch.stack([each[torch.randint(len(each), (1 + candidates,), generator=generator)] for each in rows_of])
    first, others = picked[:, :1], picked[:, 1:]
    same = number[others] == number[first]  # another row is taken, where there is one
    distance = (z[others] - z[first]).square().sum(-1).masked_fill(same, math.inf)
    nearest = others.gather(1, distance.argmin(1, keepdim=True))
    where = reach * (2 * torch.rand(len(labels), 1, generator=generator) - 1)
    return torch.lerp(z[first[:, 0]], z[nearest[:, 0]], where).to(model.device)


def drawn(model: ClassVAE, processor: Any, labels: Tensor, latents: Tensor | None, seed: int) -> list[Any]:
    """Pictures or sentences of the classes (N,), as a data set holds them; from the prior where there are no latents."""
    generator, things = torch.Generator().manual_seed(seed), []
    for n in range(0, len(labels), 500):
        part = {"class_labels": labels[n : n + 500], "latents": None if latents is None else latents[n : n + 500], "generator": generator}
        if isinstance(model, ImageVAE):
            things += [tv.to_pil_image((255 * picture).round().byte()) for picture in model.generate(**part).cpu()]
        else:
            things += decode_text(processor, model.generate(**part, do_sample=True, top_k=0, max_new_tokens=60))
    return things


@dataclass(frozen=True)
class Sample:
    """Labelled rows of a data set, and what reads them."""

    data: LabelledData
    column: Column
    rows: list[int]

    def with_generated(self, made: list[Any], classes: Tensor, num_rows: int) -> datasets.Dataset:
        """Generated rows after the real ones, which are repeated to be at least as many, and ``num_rows`` with the generated ones."""
        real, names = select(self.data.train, self.rows), (self.column.name, self.data.told.name)
        features = datasets.Features({name: real.features[name] for name in names})
        if not isinstance(real, datasets.Dataset):  # the built-in sprites
            real = datasets.Dataset.from_dict({name: list(real[name]) for name in names}, features=features)
        repeats = -(-max(len(made), num_rows - len(made)) // len(real))
        told = {int(self.data.labels[row]): real[i][names[1]] for i, row in enumerate(self.rows)}  # a class as the data set tells it
        added = dict(zip(names, (made, [told[number] for number in classes.tolist()]), strict=True))
        return datasets.concatenate_datasets([*[real.select_columns([*names])] * repeats, datasets.Dataset.from_dict(added, features)])


def draw_once(accelerator: Accelerator, args: AugmentationRun, data: LabelledData, count: int, draw: int) -> dict[str, float]:
    """Accuracy of both classifiers, and seconds of training, of one draw of ``count`` labels per class."""
    seed, folder = args.seed + draw, Path(args.output_dir) / "runs" / f"{count}_{draw}"
    shown = data.shown(count, seed)
    seen = data.train if args.unlabelled else select(data.train, shown)
    options = {"kind": args.tokenizer, "vocab_size": args.vocab_size}
    config, processor, column = one_modality(seen, args, args.modality, args.vaes, **options)
    (changed,) = augmented([column], args.augmentation)
    classifier_class = classifier_of(config, CLASSIFIERS)

    torch.manual_seed(seed)
    fields = {"num_classes": len(data.told.classes)} | args.generator
    generator = classifier_class.vae_class(overridden(config, {}, {}, **data.names, **fields))
    repeats = args.label_repeats if args.unlabelled else -(-args.batch_size // len(shown))
    known = PartlyLabelled(seen, changed, data.told, per_class=count, seed=seed, repeats=repeats, name=args.dataset)
    transform = binarization(getattr(generator.config, "binarize", "none"))
    options = {"transform": transform, "seed": seed} | args.generator_run
    seconds = train_once(accelerator, args, generator, known, folder / "generator", **options).seconds
    classes = torch.arange(len(data.told.classes)).repeat_interleave(args.generated)
    latents = None
    if args.latents == "around":
        latents = around(generator, data.rows(select(data.train, shown), changed), classes, seed, args.candidates, args.reach)
    made = drawn(generator, processor, classes, latents, seed)

    sample, test, figures, num_rows = Sample(data, column, shown), data.rows(data.test, column), {}, 2 * len(made)
    for arm in ARMS:
        added = (made, classes) if arm == "augmented" else ([], classes[:0])
        rows = data.rows(sample.with_generated(*added, num_rows), changed)
        build = partial(classifier_class, overridden(config, {}, {}, **data.names, **args.classifier))
        figures[arm], model, took = classified(accelerator, args, build, rows, test, folder / arm, seed)
        seconds += took
        if arm == "real" and args.kept < 1:
            chosen = surest(accelerator, model, data.rows(sample.with_generated(made, classes, 0), column), classes, args.kept)
            made, classes = [made[i] for i in chosen.tolist()], classes[chosen]
    look(folder / "generated", made, classes)
    return figures | {"seconds": seconds}


def classified(
    accelerator: Accelerator, args: AugmentationRun, build: Callable[[], Any], rows: Rows, test: Rows, folder: Path, seed: int
) -> tuple[float, Any, float]:
    """Mean test accuracy of as many classifiers as are asked for, the last of them, and seconds of training."""
    right, seconds = [], 0.0
    for training in range(args.trainings):
        key = fold(seed, training)
        torch.manual_seed(key)
        model = build()
        seconds += train_classifier(accelerator, args, model, rows, folder / str(training), seed=key).seconds
        right.append(accuracy(accelerator, model, test))
    return statistics.mean(right), model, seconds


def surest(accelerator: Accelerator, model: Any, rows: Rows, classes: Tensor, share: float) -> Tensor:
    """Numbers of the generated rows, the last ones of ``rows``, that a classifier is surest of: a share of each class."""
    logits, _ = predict(accelerator, model, Loader(rows, 500, shuffle=False))
    sure = logits[-len(classes) :].log_softmax(1).gather(1, classes.unsqueeze(1))[:, 0]
    found = [(classes == number).nonzero().flatten() for number in classes.unique()]
    return torch.cat([each[sure[each].topk(max(1, round(share * len(each)))).indices] for each in found])


def look(path: Path, made: list[Any], classes: Tensor) -> None:
    """Ten generated rows of every class, as a picture or a table."""
    first = torch.cat([(classes == number).nonzero().flatten()[:10] for number in classes.unique()]).tolist()
    if isinstance(made[0], str):
        text = table({"class": [int(classes[i]) for i in first], "generated": [made[i] for i in first]})
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    else:
        pixels = torch.stack([tv.pil_to_tensor(made[i]) for i in first])
        grid(pixels.unflatten(0, (len(classes.unique()), -1)), path.with_suffix(".png"))


def summary(found: dict[tuple[int, int], dict[str, float]], counts: list[int], draws: int) -> tuple[dict[str, float], str]:
    """Figures by name, and a table."""
    figures, columns = {}, {name: [] for name in ("labels per class", *ARMS, "gain, points", "p, paired t-test")}
    for count in counts:
        each = {arm: [found[count, draw][arm] for draw in range(draws)] for arm in ARMS}
        figures |= {f"{count}/{arm}/draw_{draw}": value for arm in ARMS for draw, value in enumerate(each[arm])}
        columns["labels per class"].append(count)
        for arm in ARMS:
            mean, deviation = mean_and_deviation(each[arm])
            figures |= {f"{count}/{arm}/accuracy": mean, f"{count}/{arm}/deviation": deviation}
            columns[arm].append(f"{100 * mean:.2f} ± {100 * deviation:.2f} %")
        gain, p = figures[f"{count}/augmented/accuracy"] - figures[f"{count}/real/accuracy"], paired_p(each["real"], each["augmented"])
        figures |= {f"{count}/gain": gain, f"{count}/p": p}
        columns["gain, points"].append(f"{100 * gain:.2f}")
        columns["p, paired t-test"].append(f"{p:.3g}")
    return figures, table(columns)


def main() -> None:
    """Load, train and measure every draw, write what came of it."""
    (args,) = parse(AugmentationRun)
    accelerator = start(args)
    check_alone(accelerator)
    data, found = LabelledData.read(args.dataset, args.label, args.counts), {}
    for count in args.counts:
        for draw in range(args.draws):
            found[count, draw] = draw_once(accelerator, args, data, count, draw)
            print(f"{count} labels per class, draw {draw}:", json.dumps({name: round(x, 4) for name, x in found[count, draw].items()}))
    figures, shown = summary(found, args.counts, args.draws)
    folder = Path(args.output_dir)
    options = {"classes": data.told.names} | {name: value for name, value in vars(args).items() if name not in PLACES}
    seconds = sum(each["seconds"] for each in found.values())
    write_metrics(folder, figures, seconds=seconds, dataset=args.dataset, hyperparameters=options)
    accuracies = {arm: {count: [found[count, draw][arm] for draw in range(args.draws)] for count in args.counts} for arm in ARMS}
    against(accuracies, folder / "figures" / "accuracy.png", "labels per class", "accuracy")
    print(shown)


if __name__ == "__main__":
    main()

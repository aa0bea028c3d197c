"""What a VAE brings a classifier: beside the same encoder without one, and logistic regression.

    accelerate launch recipes/compare.py                                              # shapes of the built-in sprites
    accelerate launch recipes/compare.py --config recipes/configs/compare_eurosat.yaml --dataset path/to/eurosat
    accelerate launch recipes/compare.py --config recipes/configs/compare_trec.yaml --dataset path/to/trec

    fine-tuned   a VAE of all training rows, without their labels (trained first, or --vae), and a head, both trained on rows with labels
    joint        the same, trained further by -ELBO + alpha cross-entropy on all training rows
    plain        the encoder of that VAE and a linear layer, from scratch: no latent, no decoder; a CNN or a GRU
    logistic     logistic regression on pixels, or on TF-IDF of words

For every number of labels per class and every seed, which draws the labels too; the networks make equally many steps. Accuracy is of the
test rows, seconds are of training (those of the VAE apart), the rate is of telling all test rows, read and tokenized before. metrics.json
holds every seed. One process; started again after a stop, it goes on where it was. Results: see the configs.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoProcessor

from mmvae.charts import against
from mmvae.data import Column, ImageColumn, Loader, PartlyLabelled
from mmvae.data.selection import select
from mmvae.evaluation import binarization, predict
from mmvae.experiment import check_alone, parse, start
from mmvae.hub import write_metrics
from mmvae.modalities import augmented, overridden, read_columns
from mmvae.models.heads import ClassifierOutput, LatentClassifier, classifier_of
from mmvae.options import mapping
from mmvae.pictures import table
from mmvae.study import CLASSIFIERS, LabelledData, StudyRun, mean_and_deviation, one_modality, train_classifier, train_once

METHODS = ("fine-tuned", "joint", "plain", "logistic")
PLACES = ("dataset", "output_dir", "resume", "vae", "hub_token")


@dataclass
class CompareRun(StudyRun):
    """Options of the study; those of training are the classifiers'."""

    output_dir: str = "outputs/compare"
    methods: list[str] = field(default_factory=lambda: ["fine-tuned", "plain", "logistic"], metadata={"help": ", ".join(METHODS)})
    vae: str | None = field(default=None, metadata={"help": "folder or Hub id of a trained VAE; trained here when None"})
    vae_run: str = field(default="{}", metadata={"help": "options of training that this VAE has otherwise"})
    labels_per_class: list[int] = field(default_factory=lambda: [10, 0], metadata={"help": "training labels of each class; 0: all"})
    seeds: int = 3
    alpha: float = field(default=100.0, metadata={"help": "jointly: weight of the cross-entropy"})
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vae_run = mapping("vae_run", self.vae_run)
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods: received {method!r}, expected some of {', '.join(METHODS)}")
        if self.seeds < 1 or min(self.labels_per_class) < 0:
            raise ValueError(f"seeds, labels_per_class: received {self.seeds}, {self.labels_per_class}, expected at least 1, and 0 or more")


def plain(kind: type[LatentClassifier]) -> type[LatentClassifier]:
    """A classifier whose head, one linear layer, reads the encoder's features instead of the latent."""

    class Plain(kind):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            moments = self.base_model.to_moments
            moments = moments[0] if isinstance(moments, nn.Sequential) else moments  # with mean_scale, before its normalisation
            width = moments.in_features if isinstance(moments, nn.Linear) else moments.in_channels * math.prod(config.bottom_size)
            self.head = nn.Sequential(nn.Dropout(config.classifier_dropout), nn.Linear(width, config.num_labels))

        def bound(self, inputs: dict[str, Any], labels: Tensor | None = None, **_: Any) -> ClassifierOutput:
            logits = self.head(self.base_model.features(**inputs).flatten(1)).float()
            if labels is None:
                return ClassifierOutput(logits=logits)
            loss_rows = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            return ClassifierOutput(loss=loss_rows.mean(), logits=logits, loss_rows=loss_rows, cross_entropy=loss_rows)

    return Plain


def trained_vae(accelerator: Accelerator, args: CompareRun, data: LabelledData) -> tuple[str, Any, Column, float]:
    """Folder of a VAE of all training rows, its configuration, the column that it reads, and seconds."""
    if args.vae:
        config, processor = AutoConfig.from_pretrained(args.vae), AutoProcessor.from_pretrained(args.vae)
        model = classifier_of(config, CLASSIFIERS).vae_class.from_pretrained(args.vae, config=config, dtype="float32")
        reading = {"max_length": args.max_length, "truncate": args.truncate}
        (column,) = read_columns(model, processor, data.train, args.modality, **reading)
        return args.vae, config, column, float("nan")
    text = {"kind": args.tokenizer, "vocab_size": args.vocab_size}
    config, processor, column = one_modality(data.train, args, args.modality, args.vaes, **text)
    folder = Path(args.output_dir) / "vae"
    if not {"fine-tuned", "joint"} & set(args.methods):
        return str(folder), config, column, 0.0
    torch.manual_seed(args.seed)
    model = classifier_of(config, CLASSIFIERS).vae_class(config)
    transform = binarization(getattr(config, "binarize", "none"))
    rows = data.rows(data.train, augmented([column], args.augmentation)[0])
    result = train_once(accelerator, args, model, rows, folder, transform=transform, **args.vae_run)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder), config, column, result.seconds


def measured(tell: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracy and rows told in a second, of what gives the classes told and the true ones."""
    began = time.perf_counter()
    told, truth = tell()
    rate = len(truth) / (time.perf_counter() - began)
    return {"accuracy": (told == truth)[truth >= 0].double().mean().item(), "rows_per_second": rate}


def network(
    accelerator: Accelerator, args: CompareRun, data: LabelledData, method: str, vae: tuple, count: int, seed: int
) -> dict[str, float]:
    """Figures of a classifier that is a network."""
    folder, config, column, _ = vae
    kind, joint = classifier_of(config, CLASSIFIERS), method == "joint"
    fields = data.names | {"classifier_alpha": args.alpha if joint else None} | args.classifier
    config = overridden(config, {}, {}, **fields)
    torch.manual_seed(seed)
    model = plain(kind)(config) if method == "plain" else kind.from_pretrained(folder, config=config, dtype="float32")
    place, options = Path(args.output_dir) / "runs" / f"{method}_{count}_{seed}", {"seed": seed}
    binarize = binarization(getattr(config, "binarize", "none")) if joint else None
    (changed,) = augmented([column], args.augmentation)
    if joint:
        rows = PartlyLabelled(data.train, changed, data.told, per_class=count or None, seed=seed, name=data.name)
        result = train_once(accelerator, args, model, rows, place, transform=binarize, **options)
    else:
        rows = data.rows(select(data.train, data.shown(count, seed)), changed)
        result = train_classifier(accelerator, args, model, rows, place, **options)
    loader = Loader(data.rows(data.test, column), 500, shuffle=False)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def tell() -> tuple[Tensor, Tensor]:
        logits, labels = predict(accelerator, model, loader, transform=binarize)
        return logits.argmax(1), labels

    return measured(tell) | {"seconds": result.seconds, "parameters": parameters}


def logistic(data: LabelledData, column: Column, count: int, seed: int) -> dict[str, float]:
    """Figures of logistic regression, with scikit-learn's options."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def read(part: Any) -> Any:
        if not isinstance(column, ImageColumn):
            return part[column.name][:]
        batches = Loader(data.rows(part, column), 500, shuffle=False).batches(0)
        return torch.cat([batch["pixel_values"] for batch in batches]).flatten(1).float().numpy() / 255

    shown, truth = data.shown(count, seed), data.truth
    x, test, began = read(select(data.train, shown)), read(data.test), time.perf_counter()
    first = [] if isinstance(column, ImageColumn) else [TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")]
    model = make_pipeline(*first, LogisticRegression(max_iter=1000)).fit(x, data.labels[shown].numpy())
    seconds, parameters = time.perf_counter() - began, model[-1].coef_.size + model[-1].intercept_.size
    return measured(lambda: (torch.from_numpy(model.predict(test)), truth)) | {"seconds": seconds, "parameters": parameters}


def summary(found: dict[tuple[str, int], list[dict[str, float]]]) -> tuple[dict[str, float], str]:
    """Figures by name, and a table."""
    figures: dict[str, float] = {}
    columns = {name: [] for name in ("labels per class", "method", "accuracy", "training, s", "parameters", "rows/s")}
    for (method, count), runs in sorted(found.items(), key=lambda item: item[0][1] or float("inf")):
        name, means = f"{count or 'all'}/{method}", {key: mean_and_deviation([run[key] for run in runs]) for key in runs[0]}
        figures |= {f"{name}/accuracy/seed_{i}": run["accuracy"] for i, run in enumerate(runs)}
        figures |= {f"{name}/{key}": mean for key, (mean, _) in means.items()} | {f"{name}/deviation": means["accuracy"][1]}
        cells = [count or "all", method, "{:.2f} ± {:.2f} %".format(*(100 * value for value in means["accuracy"]))]
        cells += [f"{means['seconds'][0]:.1f}", f"{means['parameters'][0]:,.0f}", f"{means['rows_per_second'][0]:,.0f}"]
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return figures, table(columns)


def main() -> None:
    """Load, train and measure everything, write what came of it."""
    (args,) = parse(CompareRun)
    accelerator = start(args)
    check_alone(accelerator)
    data = LabelledData.read(args.dataset, args.label, args.labels_per_class)
    vae = trained_vae(accelerator, args, data)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for count in args.labels_per_class:
        for method in args.methods:
            for seed in range(args.seed, args.seed + args.seeds):
                if method == "logistic":
                    each = logistic(data, vae[2], count, seed)
                else:
                    each = network(accelerator, args, data, method, vae, count, seed)
                found.setdefault((method, count), []).append(each)
                print(f"{method}, {count or 'all'} labels per class, seed {seed}:", json.dumps({k: round(v, 4) for k, v in each.items()}))
    figures, shown = summary(found)
    options = {"classes": data.told.names} | {name: value for name, value in vars(args).items() if name not in PLACES}
    own = {} if args.vae else {"vae/seconds": vae[3]}
    seconds = sum(own.values()) + sum(each["seconds"] for runs in found.values() for each in runs)
    folder = Path(args.output_dir)
    write_metrics(folder, figures | own, seconds=seconds, dataset=args.dataset, hyperparameters=options)
    if vae[3] > 0:  # not one that was given
        shown += f"\nThe VAE of all rows took {vae[3]:.1f} s before.\n"
    (folder / "README.md").write_text(f"# {Path(data.name).name}\n\n{shown}\n![accuracy](figures/accuracy.png)\n", encoding="utf-8")
    accuracies = {
        method: {count or "all": [each["accuracy"] for each in found[method, count]] for count in args.labels_per_class}
        for method in args.methods
    }
    against(accuracies, folder / "figures" / "accuracy.png", "labels per class", "accuracy")
    print(shown)


if __name__ == "__main__":
    main()

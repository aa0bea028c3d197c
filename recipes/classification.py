"""Train a classifier on the latent of a VAE, of pictures, texts, topics, or several modalities of which rows may lack some.

    accelerate launch recipes/classification.py                                         # shapes of the built-in sprites
    accelerate launch recipes/classification.py --config recipes/configs/classification_trec.yaml --dataset path/to/trec
    accelerate launch recipes/classification.py --vae outputs/image_vae_mnist --head_only true --dataset path/to/mnist
    accelerate launch recipes/classification.py --config recipes/configs/classification_emoji.yaml --dataset path/to/emoji

With --vae it starts from a trained one, otherwise from scratch. The loss is the classes' cross-entropy, with --head_only of the head alone,
with --joint beside -ELBO, in which rows without a label count too. --labels_per_class shows that many labels of each class; the other rows
are left out, or with --joint stay as rows without a label. The epoch of the least validation error is kept. Results: see the configs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from mmvae.charts import confusions
from mmvae.data import LabelColumn, Rows, find_classes, find_column, read_labels, shown_labels, splits
from mmvae.data.labels import check_told
from mmvae.data.selection import select
from mmvae.evaluation import binarization, evaluate_elbo, model_inputs, predict
from mmvae.experiment import RunArguments, finish, make_loaders, parse, start, train
from mmvae.metrics import classification, confusion, per_class
from mmvae.modalities import augmented, from_scratch, overridden, read_columns
from mmvae.models.heads import LatentClassifier, classifier_of
from mmvae.optimization import freeze_unreached, unwrap
from mmvae.options import mapping, suited_label
from mmvae.pictures import table


@dataclass
class ClassifierArguments:
    """Options of the model and what it reads."""

    modalities: str | None = field(default=None, metadata={"help": "name:kind[:column], separated by commas; guessed when there is one"})
    vaes: str = field(default="{}", metadata={"help": "fields of each modality's configuration, by its name or kind; win over --vae's"})
    mmvae: str = field(default="{}", metadata={"help": "of several modalities: fields of MMVAEConfig; the objective is --objective"})
    tokenizer: str = field(default="whitespace", metadata={"help": "from scratch: whitespace, bpe, or the id or path of a pretrained one"})
    vocab_size: int = field(default=10_000, metadata={"help": "most tokens of a trained tokenizer, special ones included"})
    augmentation: str = field(default="{}", metadata={"help": 'random changes to training pictures: {"shift": 2, "horizontal_flip": 0.5}'})
    features: str = field(default="mean", metadata={"help": "what the head reads of the posterior: mean, moments or sample"})
    head_size: int = field(default=0, metadata={"help": "width of the head's hidden layer; 0: the head is linear"})
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        for option in ("vaes", "mmvae", "augmentation"):
            setattr(self, option, mapping(option, getattr(self, option)))

    def head(self, classes: tuple[str, ...], alpha: float | None) -> dict[str, Any]:
        """Fields of the model's configuration."""
        names = {"id2label": dict(enumerate(classes)), "classifier_alpha": alpha}
        shape = {"features": self.features, "hidden_size": self.head_size, "dropout": self.head_dropout}
        return names | {f"classifier_{name}": value for name, value in shape.items()}


_OF_THE_BOUND = ("alpha", "objective", "objective_options", "num_samples", "kl_schedule", "kl_options", "phases")


@dataclass
class ClassifierRun(RunArguments):
    """Defaults that suit the shapes of the built-in sprites."""

    dataset: str = "sprites:3:4000"
    output_dir: str = "outputs/classification"
    vae: str | None = field(default=None, metadata={"help": "folder or Hub id of a VAE, or of a classifier of the same classes"})
    label: str | None = field(default=None, metadata={"help": "column of the classes; guessed; of the built-in sprites their shape"})
    head_only: bool = field(default=False, metadata={"help": "leave the VAE as it is: a probe"})
    joint: bool = field(default=False, metadata={"help": "-ELBO + alpha times the cross-entropy; labels may be missing"})
    alpha: float = 100.0
    labels_per_class: int | None = field(default=None, metadata={"help": "training labels that are shown of each class, by the seed"})
    batch_size: int = 64
    num_epochs: int | None = 6
    learning_rate: float = 2e-3
    adam_beta2: float = 0.95
    lr_schedule: str = "cosine_with_min_lr"
    lr_options: str = '{"min_lr_rate": 0.02}'
    max_grad_norm: float | None = None
    monitor: str = "error"

    monitors: ClassVar[tuple[str, ...]] = ("error", "cross_entropy_nats", "last")
    refused: ClassVar[dict[str, str]] = {
        "streaming": "the classes of all rows are looked at before the first step",
        "compile": "a classifier's encoder is not compiled",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_only and (self.joint or not self.vae):
            raise ValueError(f"head_only: received True with joint={self.joint}, vae={self.vae}, expected a trained VAE, and not jointly")
        default = RunArguments(max_steps=1)
        for name in _OF_THE_BOUND if not self.joint else ():
            expected = 100.0 if name == "alpha" else getattr(default, name)
            if getattr(self, name) != expected:
                raise ValueError(f"{name}: received {getattr(self, name)!r} without joint, where there is no ELBO, expected {expected!r}")
        self.label = suited_label(self.label, self.dataset)


def build(args: ClassifierRun, made: ClassifierArguments, data: Any, classes: tuple[str, ...]) -> tuple[LatentClassifier, Any, list]:
    """The model, what reads for it, and a column for every modality."""
    reading, head = {"max_length": args.max_length, "truncate": args.truncate}, made.head(classes, args.alpha if args.joint else None)
    if args.vae:
        config, processor = AutoConfig.from_pretrained(args.vae), AutoProcessor.from_pretrained(args.vae)
        if "Classification" in (config.architectures or [""])[0] and config.id2label != head["id2label"]:
            raise ValueError(f"{args.vae}: id2label: has {list(config.id2label.values())}, expected those of the data, {list(classes)}")
        config = overridden(config, made.vaes, made.mmvae, **head)
    else:
        options = {"reading": reading, "text": {"kind": made.tokenizer, "vocab_size": made.vocab_size}, "name": args.dataset}
        options["on_bad_row"] = args.on_bad_row
        config, processor, columns = from_scratch(data, made.modalities, made.vaes, made.mmvae, **options)
        config = overridden(config, {}, {}, **head)
    kind = classifier_of(config)
    torch.manual_seed(args.seed)
    if not args.vae:
        return kind(config), processor, columns
    model = kind.from_pretrained(args.vae, config=config, dtype="float32")
    return model, processor, read_columns(model, processor, data, made.modalities, **reading)


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, made = parse(ClassifierRun, ClassifierArguments)
    accelerator = start(args)
    data = splits(args.dataset, on_bad_row=args.on_bad_row)
    label = find_column(data["train"], "label", args.label)
    told = LabelColumn(label, find_classes(data["train"], label, args.dataset), missing=args.joint)
    labels = {
        split: read_labels(part, told, args.dataset, every_class=split == "train", on_bad_row=args.on_bad_row)
        for split, part in data.items()
    }
    known = labels["train"]
    if args.labels_per_class:
        shown = shown_labels(known, args.labels_per_class, told.names, args.seed)
        known = known.where(shown, -100)
        if not args.joint:
            data["train"], known = select(data["train"], shown.nonzero().flatten().tolist()), known[shown]
    model, processor, columns = build(args, made, data["train"], told.names)
    changed = augmented(columns, made.augmentation)
    read = {split: [*(changed if split == "train" else columns), told] for split in data}
    rows = {split: Rows(part, read[split], **args.rows) for split, part in data.items()}
    check_told(rows["train"], known, told.names, args.labels_per_class)
    loaders = make_loaders(accelerator, args, rows)
    model.freeze(args.head_only).train()
    if not args.joint:
        batch = next(loaders["validation"].batches(0))
        freeze_unreached(model, model.eval()(**model_inputs(model, batch) | {"labels": None}).logits.sum())
    binarize = binarization(getattr(model.config, "binarize", "none")) if args.joint else None

    def transform(batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        hidden = (known < 0).to(batch["row"].device)[batch["row"]]
        return (binarize(batch, keys) if binarize else batch) | {"labels": batch["labels"].masked_fill(hidden, -100)}

    seen: dict[str, Tensor] = {}

    def measure(accelerator: Accelerator, model: Any, loader: Any, *, seed: int, **_: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = predict(accelerator, model, loader, seed=seed, transform=binarize)
        elbo = evaluate_elbo(accelerator, unwrap(model).base_model, loader, seed=seed, transform=binarize) if args.joint else {}
        return classification(seen["logits"], seen["labels"]) | elbo

    def draw(model: LatentClassifier, figures: Path) -> dict[str, str]:
        counts = confusion(seen["logits"].argmax(1), seen["labels"], len(told.names))
        confusions(counts, told.names, figures / "confusions.png")
        return {"Classes": table({"class": told.names} | per_class(counts))}

    result = train(accelerator, args, model, loaders, transform=transform, measure=measure)
    finish(accelerator, args, model, processor, result, loaders, draw=draw, measure=measure)


if __name__ == "__main__":
    main()

"""Studies: many small runs in one process, each in a folder of its own, so that a study that was stopped goes on where it was.

Shapes: ``n`` repetitions, such as draws of the labels; ``N`` rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from mmvae.data import Column, LabelColumn, Loader, Rows, find_classes, find_column, read_labels, shown_labels, splits
from mmvae.evaluation import Transform, model_inputs, predict
from mmvae.experiment import make_loaders, train
from mmvae.modalities import from_scratch
from mmvae.models.configuration import VAEConfig
from mmvae.models.heads import ImageVAEForImageClassification, TextVAEForSequenceClassification
from mmvae.optimization import freeze_unreached
from mmvae.options import RunArguments, mapping, suited_label
from mmvae.training import Result

CLASSIFIERS = (ImageVAEForImageClassification, TextVAEForSequenceClassification)
"""Those that a study may train."""


@dataclass
class StudyRun(RunArguments):
    """Options of every study; the defaults suit the shapes of the built-in sprites."""

    dataset: str = "sprites:3:2000"
    modality: str | None = field(default=None, metadata={"help": "name:kind[:column]; guessed"})
    label: str | None = field(default=None, metadata={"help": "column of the classes; guessed; of the built-in sprites their shape"})
    vaes: str = field(default="{}", metadata={"help": "fields of the configuration of VAE and classifiers, by kind"})
    classifier: str = field(default="{}", metadata={"help": "fields of the classifiers' configuration alone"})
    tokenizer: str = field(default="whitespace", metadata={"help": "whitespace, bpe, or the id or path of a pretrained one"})
    vocab_size: int = field(default=10_000, metadata={"help": "most tokens of a trained tokenizer, special ones included"})
    augmentation: str = field(default="{}", metadata={"help": 'random changes to training pictures: {"shift": 2, "rotation": 15}'})
    max_steps: int | None = 400
    lr_schedule: str = "cosine_with_min_lr"
    lr_options: str = '{"min_lr_rate": 0.02}'
    warmup_steps: int = 40
    max_grad_norm: float | None = None
    kl_options: str = '{"steps": 100}'
    log_every: int = 200

    refused: ClassVar[Mapping[str, str]] = {
        "num_epochs": "the runs of a study have as many steps each, max_steps",
        "streaming": "a study draws rows by their numbers",
        "on_bad_row": "a study draws rows by their numbers; recipes/check_data.py lists bad ones",
        "push_to_hub": "a study has figures, and many models",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("vaes", "classifier", "augmentation"):
            setattr(self, option, mapping(option, getattr(self, option)))
        self.label = suited_label(self.label, self.dataset)


@dataclass(frozen=True)
class LabelledData:
    """Training and test rows with their classes.

    Attributes:
        name: of the data set.
        train, test: its rows; of a set without test rows those of validation.
        told: the labels' column.
        labels: (N,) int64 of the training rows, -100 where one lacks its label.
        truth: the same of the test rows.
    """

    name: str
    train: Any
    test: Any
    told: LabelColumn
    labels: Tensor
    truth: Tensor

    @classmethod
    def read(cls, name: str, label: str | None, counts: Sequence[int] = ()) -> Self:
        """Load a data set; its label column is guessed where it is None.

        Arguments:
            counts: of labels per class, which the study will ask for.

        Raises:
            ValueError, BadRow: as for :func:`mmvae.data.read_labels`, and for a count of which there are not so many.
        """
        data = splits(name)
        label = find_column(data["train"], "label", label)
        told = LabelColumn(label, find_classes(data["train"], label, name), missing=True)
        test = data.get("test", data["validation"])
        labels, truth = read_labels(data["train"], told, name), read_labels(test, told, name, every_class=False)
        found = cls(name, data["train"], test, told, labels, truth)
        for count in counts:
            found.shown(count, 0)
        return found

    @property
    def names(self) -> dict[str, dict]:
        """The classes' names, as a configuration wants them."""
        return {"id2label": dict(enumerate(self.told.names))}

    def shown(self, per_class: int, seed: int) -> list[int]:
        """Numbers of the training rows that show their label: so many of each class; of 0, all that have one."""
        shown = shown_labels(self.labels, per_class, self.told.names, seed) if per_class else self.labels >= 0
        return shown.nonzero().flatten().tolist()

    def rows(self, data: Any, column: Column) -> Rows:
        """Rows with their labels."""
        return Rows(data, [column, self.told], name=self.name)


def one_modality(data: Any, args: RunArguments, modality: str | None, fields: dict[str, Any], **text: Any) -> tuple[VAEConfig, Any, Column]:
    """What a new model of one modality is made of.

    Arguments:
        data: training rows.
        args: how texts are read.
        modality: ``name:kind[:column]``; guessed when None.
        fields: of the configuration, by name or kind.
        text: ``kind`` and ``vocab_size`` of :func:`mmvae.experiment.make_tokenizer`.

    Raises:
        ValueError: for several modalities.
    """
    if modality and "," in modality:
        raise ValueError(f"modality: received {modality!r}, expected one modality")
    reading = {"max_length": args.max_length, "truncate": args.truncate}
    config, processor, (column,) = from_scratch(data, modality, fields, {}, reading=reading, text=text, name=args.dataset)
    return config, processor, column


def train_once(
    accelerator: Accelerator,
    args: RunArguments,
    model: PreTrainedModel,
    rows: Rows,
    folder: str | Path,
    *,
    transform: Transform | None = None,
    **options: Any,
) -> Result:
    """Train one model of a study, which then has its last weights and is in evaluation mode; a run that was finished before is read.

    Arguments:
        accelerator: it forgets the model afterwards.
        args: options of the study; ``max_steps`` is told.
        model: not yet prepared.
        rows: training rows.
        folder: checkpoints are kept in it.
        transform: as for :func:`mmvae.experiment.train`.
        options: of :class:`RunArguments` that differ from ``args``.

    Returns:
        What :func:`mmvae.training.fit` does.
    """
    plain = {f.name: getattr(args, f.name) for f in fields(RunArguments)}  # a study with more draws is no other run
    for of, taken in (("lr_schedule", "lr_options"), ("kl_schedule", "kl_options"), ("objective", "objective_options")):
        if options.get(of, getattr(args, of)) != getattr(args, of):  # what the study's own takes says nothing of another
            plain |= {taken: {}} | ({"warmup_steps": 0} if options[of] == "constant" and of == "lr_schedule" else {})
    plain |= options
    args = RunArguments(**plain | {"output_dir": str(folder), "monitor": "last", "eval_every": plain["max_steps"]})
    loaders = make_loaders(accelerator, args, {"train": rows})
    result = train(accelerator, args, model, loaders | {"validation": None}, transform=transform, measure=lambda *_, **__: {})
    accelerator.free_memory()
    return result


def train_classifier(
    accelerator: Accelerator, args: RunArguments, model: PreTrainedModel, rows: Rows, folder: str | Path, **options: Any
) -> Result:
    """The same of a classifier whose loss is the cross-entropy: what its logits do not depend on stays as it is."""
    batch = next(Loader(rows, 2, shuffle=False).batches(0))
    freeze_unreached(model, model.eval()(**model_inputs(model, batch) | {"labels": None}).logits.sum())
    return train_once(accelerator, args, model, rows, folder, **options)


def accuracy(accelerator: Accelerator, model: PreTrainedModel, rows: Rows) -> float:
    """Share of the rows with a label that a classifier tells rightly."""
    logits, labels = predict(accelerator, model, Loader(rows, 500, shuffle=False))
    return (logits.argmax(1) == labels)[labels >= 0].double().mean().item()


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, over n - 1; 0 of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_p(first: Sequence[float], second: Sequence[float]) -> float:
    """p of the two-sided paired t-test that two sequences of n values have the same mean; NaN where the differences are all alike.

    Example:
        >>> round(paired_p([0.80, 0.82, 0.79], [0.85, 0.86, 0.86]), 3)
        0.026
    """
    from scipy.stats import ttest_rel

    difference = np.subtract(first, second)
    return float("nan") if len(difference) < 2 or np.ptp(difference) < 1e-12 else float(ttest_rel(first, second).pvalue)

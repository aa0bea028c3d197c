"""Train classes on the latent of a trained VAE of one modality, from few labels (M1 + M2).

    accelerate launch recipes/image_vae.py --config recipes/configs/image_features_mnist.yaml --dataset path/to/mnist
    accelerate launch recipes/stacked_vae.py --config recipes/configs/stacked_mnist.yaml --dataset path/to/mnist --label_seed 0

With --spread_neighbours the labels first spread to rows that lie near in the VAE's latent. The folder holds both models: it tells the
classes of pictures or texts, and draws them by class. Results: see the configs.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from mmvae import ImageVAE, StackedVAE, TextVAE
from mmvae.baselines import posterior_means
from mmvae.data import ImageColumn, Rows, find_column, splits
from mmvae.data.labels import spread_labels
from mmvae.data.partly_labelled import LabelArguments, partly_labelled
from mmvae.evaluation import binarization
from mmvae.experiment import RunArguments, finish, make_loaders, parse, start, train
from mmvae.modalities import augmented, read_columns
from mmvae.options import mapping, suited_label
from mmvae.pictures import grid, table
from mmvae.processing import decode_text


@dataclass
class StackedArguments(LabelArguments):
    """Options of M2."""

    label_column: str | None = field(default=None, metadata={"help": "column of the classes; guessed; of the built-in sprites their shape"})
    spread_neighbours: int = field(default=0, metadata={"help": "labels spread over so many nearest neighbours by the VAE; 0: not"})
    spread_least: float = field(default=0.5, metadata={"help": "share of what reaches a row that its class must have"})
    modality: str | None = field(default=None, metadata={"help": "name:kind[:column]; the column is guessed"})
    augmentation: str = field(default="{}", metadata={"help": 'random changes to training pictures: {"shift": 2}'})
    latent_dim: int = 32
    hidden_size: int = 500
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.augmentation = mapping("augmentation", self.augmentation)


@dataclass
class StackedRun(RunArguments):
    """Defaults for a few hundred labels."""

    dataset: str = "sprites:3"
    output_dir: str = "outputs/stacked_vae"
    vae: str = field(default="outputs/image_vae", metadata={"help": "folder or Hub id of M1"})
    num_epochs: int | None = 5
    importance_samples: int = 0
    kl_schedule: str = "constant"
    kl_options: str = "{}"

    refused: ClassVar[dict[str, str]] = {
        "streaming": "labels are drawn and spread over rows by their numbers",
        "on_bad_row": "labels are drawn and spread over rows by their numbers; recipes/check_data.py lists bad ones",
    }


DATA = ("modality", "augmentation", "spread_neighbours", "spread_least", "label_column", "labels_per_class", "label_repeats", "label_seed")


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, made = parse(StackedRun, StackedArguments)
    accelerator, data = start(args), splits(args.dataset)
    below, processor = AutoModel.from_pretrained(args.vae, dtype="float32"), AutoProcessor.from_pretrained(args.vae)
    if not isinstance(below, ImageVAE | TextVAE):
        raise ValueError(f"vae: received {args.vae!r}, a {type(below).__name__}, expected an ImageVAE or a TextVAE")
    options = {"max_length": args.max_length, "truncate": args.truncate}
    (column,) = read_columns(below, processor, data["train"], made.modality, **options)
    columns = dict.fromkeys(data, column)
    made.label_column = find_column(data["train"], "label", suited_label(made.label_column, args.dataset))
    (columns["train"],) = augmented([column], made.augmentation)

    def spread(told: Tensor) -> Tensor:
        if not made.spread_neighbours:
            return told
        seen = Rows(data["train"], column, **args.rows)
        ((numbers, latents),) = posterior_means(accelerator, below.to(accelerator.device).eval(), seen).values()
        return told.index_copy(0, numbers, spread_labels(latents, told[numbers], made.spread_neighbours, made.spread_least))

    rows, classes = partly_labelled(data, columns, made, seed=args.seed, spread=spread, **args.rows)
    loaders = make_loaders(accelerator, args, rows)
    options = {f.name: getattr(made, f.name) for f in fields(StackedArguments) if f.name not in DATA}
    torch.manual_seed(args.seed)
    model = StackedVAE.over(below, **options | classes)
    transform = binarization(model.config.binarize)

    def draw(model: StackedVAE, figures: Path) -> dict[str, str]:
        every = torch.arange(model.config.num_classes).repeat_interleave(10)
        generator = torch.Generator().manual_seed(args.seed)
        if isinstance(column, ImageColumn):
            grid(model.generate(every, generator=generator), figures / "classes.png", 10)
            return {}
        sentences = decode_text(processor, model.generate(every[::4], generator=generator, num_beams=4, max_new_tokens=40))
        return {"Sentences by class": table({"class": [classes["id2label"][n] for n in every[::4].tolist()], "sentence": sentences})}

    result = train(accelerator, args, model, loaders, transform=transform)
    finish(accelerator, args, model, processor, result, loaders, transform=transform, draw=draw)


if __name__ == "__main__":
    main()

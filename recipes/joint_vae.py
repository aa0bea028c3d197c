"""Train a joint VAE over any set of modalities, any of which may be missing in any row.

    accelerate launch recipes/joint_vae.py                                                 # built-in captioned sprites, minutes
    accelerate launch recipes/joint_vae.py --config recipes/configs/emoji.yaml --dataset path/to/emoji
    accelerate launch recipes/joint_vae.py --config recipes/configs/multi30k.yaml --dataset path/to/multi30k

The options' defaults suit the built-in sprites: one object that is turned and shifted on a plain background. Its place is a part of the
shared latent, since captions may tell it, its angle is the picture's own; of other pictures "pose": "auto" is none. With --sources a text
that is made of another one is written by attention to that one's states, as a translation or a summary is. Start the same command again
after a stop and it goes on where it was. Results: see RESULTS.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmvae import MMVAE, MMVAEProcessor
from mmvae.data import Augmentation, Column, Loader, Rows, splits
from mmvae.density_fitting import latents_from, unfitted
from mmvae.evaluation import refuse_grey
from mmvae.experiment import RunArguments, finish, make_loaders, parse, start, train
from mmvae.modalities import KINDS, joined, new_modalities, weights_by_size
from mmvae.options import by_name, mapping, parse_modalities, suited_pose, with_columns
from mmvae.pictures import side_by_side, table
from mmvae.processing import decode_text

BY_NAME = ("vaes", "private_dims", "likelihood_weights", "modality_dropout", "augmentation", "drop_modality")
DATA = ("image_column", "text_column", "tokenizer", "vocab_size", "augmentation", "drop_modality", "complete_only")
NOT_THE_MODELS = ("modalities", "kinds", "vaes", "private_dims", "densities", "weighs_by_size", *DATA)
IMAGE = {"hidden_channels": [32, 64, 64], "likelihood": "gaussian", "scale_mode": "optimal", "pose": "auto"}
TEXT = {"hidden_size": 96, "embedding_size": 32}
FLOWS = {"shared": {"kind": "mixture", "num_components": 100}, "private": {"kind": "flow"}, "shared_given": {"kind": "flow"}}


@dataclass
class JointArguments:
    """Options of the model and its data."""

    modalities: str = field(default="image:image,text:text", metadata={"help": "name:kind[:column], separated by commas"})
    image_column: str | None = field(default=None, metadata={"help": "column of the only image modality"})
    text_column: str | None = field(default=None, metadata={"help": "column of the only text modality"})
    vaes: str = field(
        default=json.dumps({"image": IMAGE, "text": TEXT}),
        metadata={"help": "configuration of each modality, by its name or kind, as all that follows by name; replaces the default of all"},
    )
    private_dims: str = field(default='{"image": 2}', metadata={"help": "size of the latents that a modality keeps to itself, by its name"})
    tokenizer: str = field(default="whitespace", metadata={"help": "whitespace, bpe, or the id or path of a pretrained one"})
    vocab_size: int = field(default=10_000, metadata={"help": "most tokens of a trained tokenizer, special ones included"})
    latent_dim: int = field(default=12, metadata={"help": "of the latent that all modalities share"})
    aggregation: str = "poe"
    aggregation_options: str = "{}"
    inference_aggregation: str | None = field(default=None, metadata={"help": "in evaluation; the same by default"})
    prior: str = "standard_normal"
    prior_components: int = 50
    likelihood_weights: str = field(
        default='{"text": 30}',
        metadata={"help": "weight of a modality's likelihood in the loss, by its name; auto: how often its size goes into the largest"},
    )
    modality_dropout: str = field(default='{"text": 0.5}', metadata={"help": "share of the rows that are encoded without it, by name"})
    sources: str = field(default="{}", metadata={"help": 'of texts, another text to which their decoder attends: {"de": "en"}'})
    draw: str = field(default="auto", metadata={"help": "components decoded in a step: all, one per row, or auto"})
    densities: str = field(default=json.dumps(FLOWS), metadata={"help": "fitted to the latents after training"})
    augmentation: str = field(default="{}", metadata={"help": "random changes to the training pictures of a modality, by its name"})
    drop_modality: str = field(default="{}", metadata={"help": "share of the training rows in which a modality is hidden, by its name"})
    complete_only: bool = field(default=False, metadata={"help": "train on the rows that have everything, after hiding"})

    def __post_init__(self) -> None:
        self.kinds = with_columns(parse_modalities(self.modalities, KINDS), {"image": self.image_column, "text": self.text_column})
        self.weighs_by_size = self.likelihood_weights == "auto"
        self.likelihood_weights = {} if self.weighs_by_size else self.likelihood_weights
        for option in BY_NAME:
            setattr(self, option, by_name(option, getattr(self, option), {name: kind for name, (kind, _) in self.kinds.items()}, KINDS))
        for name in (name for name in self.augmentation if self.kinds[name][0] != "image"):
            raise ValueError(f"augmentation: received {self.augmentation[name]!r} for {name!r}, expected pictures' modalities only")
        self.augmentation = {name: Augmentation(**changes) for name, changes in self.augmentation.items()}
        self.sources = mapping("sources", self.sources)
        for name in (name for name in self.sources if not self.modality_dropout.get(name)):
            raise ValueError(
                f"modality_dropout: received none of {name!r}, expected some: only where its text is hidden it attends to its source"
            )
        self.aggregation_options = mapping("aggregation_options", self.aggregation_options)
        of = {"private": [f"private_{name}" for name in self.private_dims], "shared_given": [f"shared_given_{name}" for name in self.kinds]}
        self.densities = {name: kind for key, kind in mapping("densities", self.densities).items() for name in of.get(key, [key])}


@dataclass
class JointRun(RunArguments):
    """Defaults that train on the built-in sprites in a few minutes."""

    dataset: str = "sprites:3"
    output_dir: str = "outputs/mmvae"
    batch_size: int = 64
    num_epochs: int | None = 8
    importance_samples: int = 10
    learning_rate: float = 2e-3
    adam_beta2: float = 0.95  # with 0.999 the posteriors of captions were still all alike after 1,256 steps
    lr_schedule: str = "cosine_with_min_lr"
    lr_options: str = '{"min_lr_rate": 0.02}'
    max_grad_norm: float | None = None
    kl_options: str = '{"steps": 300}'
    objective: str = "jmvae"
    objective_options: str = '{"alpha": 0.5}'

    refused: ClassVar[dict[str, str]] = {"compile": "the joint recipe does not compile its children"}


def build(args: JointRun, joint: JointArguments, data: Mapping[str, Any]) -> tuple[MMVAE, MMVAEProcessor, list[Column]]:
    """The model, what reads and writes for it, and a column for every modality."""
    sizes = {name: {"latent_dim": joint.latent_dim + joint.private_dims.get(name, 0)} for name in joint.kinds}
    fields = {name: joint.vaes.get(name, {}) | size for name, size in sizes.items()}
    for name, own in fields.items():
        if own.get("binarize", "none") != "none":
            expected = "expected 'none': a joint model is trained on the pixels as they are"
            raise ValueError(f"vaes: {name}: binarize: received {own['binarize']!r}, {expected}")
    for own in (own for own in fields.values() if "pose" in own):
        own["pose"] = suited_pose(own["pose"], args.dataset)
    reading = {"max_length": args.max_length, "truncate": args.truncate}
    text = {"kind": joint.tokenizer, "vocab_size": joint.vocab_size}
    parts = new_modalities(data["train"], joint.kinds, fields, reading=reading, text=text, name=args.dataset, on_bad_row=args.on_bad_row)
    options = {name: value for name, value in vars(joint).items() if name not in NOT_THE_MODELS}
    config, processor, columns = joined(parts, objective=args.objective, objective_options=args.objective_options, **options)
    torch.manual_seed(args.seed)
    return MMVAE(config), processor, columns


def main() -> None:
    """Load, train, fit densities, evaluate, write the model folder."""
    args, joint = parse(JointRun, JointArguments)
    args.suit_prior(joint.prior, joint.latent_dim, joint.prior_components)
    accelerator = start(args)
    data = splits(args.dataset, streaming=args.streaming, on_bad_row=args.on_bad_row)
    model, processor, columns = build(args, joint, data)
    unfitted(model, joint.densities)  # refuses what cannot be, before any work
    rows = {split: Rows(part, columns, **args.rows) for split, part in data.items() if split != "train"}
    changed = [replace(c, augmentation=joint.augmentation[c.modality]) if c.modality in joint.augmentation else c for c in columns]
    hidden = {"drop": joint.drop_modality, "drop_seed": args.seed, "complete": joint.complete_only}
    rows["train"] = Rows(data["train"], changed, **args.rows, **hidden)
    if joint.weighs_by_size:
        model.config.likelihood_weights = weights_by_size(model, rows["train"])
    loaders = make_loaders(accelerator, args, rows)
    refuse_grey(model.config, loaders)

    def readable(name: str, made: Tensor) -> Tensor | list[str]:
        part, kind = processor.parts[name], joint.kinds[name][0]
        if kind == "topic":
            return part.words(made)
        return decode_text(part, made) if kind == "text" else made

    def generate(model: MMVAE, target: str | Sequence[str], number: int = 1, **inputs: Any) -> dict[str, Tensor | list[str]]:
        targets = [target] if isinstance(target, str) else target
        options = {"max_new_tokens": 40} if any(joint.kinds[name][0] == "text" for name in targets) else {}
        made = model.generate(targets, number, torch.Generator().manual_seed(args.seed), **inputs, **options)
        return {name: readable(name, value) for name, value in made.items()}

    def show(model: MMVAE, step: int) -> dict[str, Any]:
        made = generate(model, model.modalities, 8)
        return {f"samples/{name}": table({name: value}) if isinstance(value, list) else value for name, value in made.items()}

    def draw(model: MMVAE, figures: Path) -> dict[str, str]:
        batch = next(Loader(loaders["validation"].rows, 64, seed=args.seed, pool=0).batches(0))
        batch = {name: value[batch["present"].all(1)][:8].to(model.device) for name, value in batch.items() if name in model.input_names}
        tables = side_by_side(generate(model, model.modalities, 8), figures, f"from the {latents_from(model)}")
        if not len(batch["present"]):
            return tables
        own, _ = model.split(batch)
        real = {name: readable(name, next(iter(own[name].values()))) for name in model.modalities}
        for source, target in permutations(model.modalities, 2):
            made = generate(model, target, **{f"{source}_{name}": value for name, value in own[source].items()})[target]
            title = f"{source} to {target}"
            tables |= side_by_side({source: real[source], target: made}, figures, title, {f"real {target}": real[target]})
        return tables

    result = train(accelerator, args, model, loaders, show=show)
    finish(accelerator, args, model, processor, result, loaders, draw=draw, densities=joint.densities)


if __name__ == "__main__":
    main()

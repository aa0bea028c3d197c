"""Train a head that masks pictures, on a VAE that is trained already, or together with one.

    accelerate launch recipes/segmentation.py                            # built-in sprites: picture, latent and mask jointly, minutes
    accelerate launch recipes/segmentation.py --vae outputs/image_vae --head_only true --dataset sprites:3
    accelerate launch recipes/segmentation.py --config recipes/configs/segmentation_emoji.yaml --dataset path/to/emoji

The mask is drawn by what draws the picture: all that it shows went through the latent. With --joint the loss is -ELBO + alpha times the
cross-entropy, with --head_only the VAE stays as it is, with neither the VAE is tuned to the masks alone. Masks are a column of the data,
or with --mask_column alpha what is opaque in pictures that are then laid on random colours. Results: see the configs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from mmvae import ImageVAEConfig, ImageVAEForSemanticSegmentation
from mmvae.data import Augmentation, ImageColumn, Loader, MaskColumn, Rows, find_column, on_random_colours, splits
from mmvae.evaluation import Transform, evaluate_vae, model_inputs, refuse_grey
from mmvae.experiment import RunArguments, finish, image_processor, make_loaders, parse, start, train
from mmvae.metrics import overlaps
from mmvae.models.segmentation import UNLABELLED
from mmvae.noise import fold
from mmvae.optimization import unwrap
from mmvae.options import mapping, suited_pose
from mmvae.pictures import grid, overlaid
from mmvae.training import evaluate

SPRITES = '{"latent_dim": 16, "pose": "auto", "hidden_channels": [32, 64, 64], "likelihood": "gaussian", "scale_mode": "optimal"}'
_MASKS = 0x6D61736B


@dataclass
class SegmentationArguments:
    """Options of the model and its masks."""

    vae: str | None = field(default=None, metadata={"help": "folder or Hub id of a VAE, or of a model with a head; otherwise from scratch"})
    architecture: str = field(default="", metadata={"help": "from scratch: fields of ImageVAEConfig; by default what suits the sprites"})
    image_column: str | None = field(default=None, metadata={"help": "column of the pictures; guessed when there is only one"})
    mask_column: str = field(default="mask", metadata={"help": "column of the masks; or alpha: what is opaque is the mask"})
    mask_values: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "what stands for each class in a mask, background first"}
    )
    class_names: list[str] | None = None
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    shift: int = 0

    def __post_init__(self) -> None:
        if self.vae and self.architecture:
            raise ValueError(f"architecture: received {self.architecture!r} with --vae {self.vae}, expected none: the folder has its own")
        if len(self.class_names or self.mask_values) != len(self.mask_values):
            raise ValueError(f"class_names: received {self.class_names}, expected one for each of mask_values {self.mask_values}")
        self.architecture = mapping("architecture", self.architecture or SPRITES)


@dataclass
class SegmentationRun(RunArguments):
    """Defaults that train on the built-in sprites in minutes."""

    head_only: bool = field(default=False, metadata={"help": "leave the VAE as it is"})
    joint: bool = field(default=False, metadata={"help": "train for pictures and masks; from scratch always"})
    alpha: float = field(default=1.0, metadata={"help": "weight of the masks' cross-entropy, a sum over pixels, beside -ELBO"})
    output_dir: str = "outputs/segmentation"
    batch_size: int = 64
    num_epochs: int | None = 6
    importance_samples: int = 10
    learning_rate: float = 2e-3
    lr_schedule: str = "cosine_with_min_lr"
    lr_options: str = '{"min_lr_rate": 0.02}'
    max_grad_norm: float | None = None
    kl_options: str = '{"steps": 300}'
    monitor: str = "cross_entropy_nats"

    monitors: ClassVar[tuple[str, ...]] = ("cross_entropy_nats", "last")


def build(args: SegmentationRun, masks: SegmentationArguments) -> ImageVAEForSemanticSegmentation:
    """The model, from scratch or from a folder."""
    if args.head_only and (args.joint or not masks.vae):
        raise ValueError(f"head_only: received True with joint={args.joint}, vae={masks.vae}, expected a trained VAE, and not jointly")
    args.joint = args.joint or not masks.vae
    names = masks.class_names or [f"class {value}" for value in masks.mask_values]
    labels = {"id2label": dict(enumerate(names))}
    torch.manual_seed(args.seed)
    if masks.vae:
        saved = ImageVAEConfig.from_pretrained(masks.vae)
        if ImageVAEForSemanticSegmentation.__name__ in (saved.architectures or ()) and saved.num_labels != len(names):
            raise ValueError(f"mask_values: received {masks.mask_values}, expected {saved.num_labels} of them, the classes of {masks.vae}")
        model = ImageVAEForSemanticSegmentation.from_pretrained(masks.vae, dtype="float32", **labels)
    else:
        fields = masks.architecture | {"pose": suited_pose(masks.architecture.get("pose", "none"), args.dataset)}
        model = ImageVAEForSemanticSegmentation(ImageVAEConfig(**fields, **labels))
    model.config.classifier_alpha = args.alpha if args.joint else None
    if model.config.binarize != "none":
        raise ValueError(f"binarize: received {model.config.binarize!r}, expected 'none': masks are drawn of the pixels as they are")
    if masks.mask_column == "alpha" and model.config.num_channels != 3:
        raise ValueError(f"num_channels: received {model.config.num_channels} with --mask_column alpha, expected 3, which then stay")
    return model.freeze(args.head_only).train().to(memory_format=torch.channels_last)


def measure(accelerator: Accelerator, model: Any, loader: Any, *, seed: int, transform: Transform | None) -> dict[str, float]:
    """Intersection over union of every class over all pixels, from the posterior's mean, and the cross-entropy."""
    classes = unwrap(model).config.num_labels

    def count(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        key = fold(seed, _MASKS, batch["row"])
        batch = transform(batch, key) if transform else batch
        out = model(**model_inputs(model, batch), noise_key=key)
        predicted, labels = out.logits.argmax(1), batch["labels"]
        both, either = overlaps(predicted, labels, classes)
        front, anything = overlaps(predicted > 0, torch.where(labels == UNLABELLED, UNLABELLED, (labels > 0).to(labels.dtype)), 2)
        values = {"both front": front[:, 1], "either front": anything[:, 1], "cross_entropy_nats": out.cross_entropy}
        return values | {f"both {c}": both[:, c] for c in range(classes)} | {f"either {c}": either[:, c] for c in range(classes)}

    means = evaluate(accelerator, count, loader, models=[model])
    found = [means[f"both {c}"] / means[f"either {c}"] for c in range(classes) if means[f"either {c}"]]
    front = means["both front"] / max(means["either front"], 1e-9)
    return {"foreground_iou": front, "mean_iou": sum(found) / len(found), "cross_entropy_nats": means["cross_entropy_nats"]}


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, masks = parse(SegmentationRun, SegmentationArguments)
    accelerator = start(args)
    data, model = splits(args.dataset, streaming=args.streaming, on_bad_row=args.on_bad_row), build(args, masks)
    alpha, size = masks.mask_column == "alpha", model.config.height_width
    move = Augmentation(masks.horizontal_flip, masks.vertical_flip, masks.shift)
    options = {"num_channels": 4} if alpha else {"num_channels": model.config.num_channels, "resize": "refuse"}
    column = ImageColumn(find_column(data["train"], "image", masks.image_column), size, **options)
    columns = [column] if alpha else [column, MaskColumn(masks.mask_column, size, tuple(masks.mask_values))]
    moved = [replace(each, augmentation=move) for each in columns]
    rows = {split: Rows(part, moved if split == "train" else columns, **args.rows) for split, part in data.items()}
    loaders, transform = make_loaders(accelerator, args, rows), on_random_colours if alpha else None
    refuse_grey(model.config, loaders)

    def draw(model: ImageVAEForSemanticSegmentation, figures: Path) -> Mapping[str, str]:
        batch = next(Loader(rows["test" if "test" in rows else "validation"], 24, seed=args.seed).batches(0))
        batch = transform(batch, batch["row"]) if transform else batch
        pixels = model.image_vae.target(batch["pixel_values"].to(model.device))
        with torch.no_grad():
            out = model(pixels)
        masked = [overlaid(pixels, mask) for mask in (batch["labels"], out.logits.argmax(1))]
        seen = [each[:, :3].expand(-1, 3, -1, -1).cpu() for each in (pixels, model.image_vae.render(out.latents))]
        grid(torch.stack([*seen, *masked], 1), figures / "masks.png", 12)
        return {
            "How to read the masks": "Of every four: the picture, what the latent keeps of it, its mask, and the mask that the model gives."
        }

    def final(accelerator: Accelerator, model: Any, loader: Any, **options: Any) -> dict[str, float]:
        figures = evaluate_vae(accelerator, model.image_vae, loader, num_samples=args.importance_samples, **options)
        return measure(accelerator, model, loader, **options) | figures

    processor = image_processor(replace(column, resize="crop", num_channels=model.config.num_channels))
    result = train(accelerator, args, model, loaders, transform=transform, measure=measure)
    finish(accelerator, args, model, processor, result, loaders, transform=transform, draw=draw, measure=final)


if __name__ == "__main__":
    main()

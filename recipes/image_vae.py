"""Train a convolutional VAE on any image data set.

    accelerate launch recipes/image_vae.py                                             # built-in sprites, about a minute on two cores
    accelerate launch recipes/image_vae.py --config recipes/configs/image_vae_mnist.yaml --dataset path/to/mnist
    accelerate launch recipes/image_vae.py --config recipes/configs/image_vae_eurosat.yaml --dataset path/to/eurosat
    accelerate launch recipes/image_vae.py --label_column shape --pose none              # with classes: pictures of each, and a classifier
    accelerate launch recipes/image_vae.py --config recipes/configs/image_classes_mnist.yaml --dataset path/to/mnist

Start the same command again after a stop and it goes on where it was. Results so far: see the configs.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from mmvae import ImageVAE, ImageVAEConfig
from mmvae.data import Augmentation, ImageColumn, Loader, find_column, splits
from mmvae.data.partly_labelled import LabelArguments, partly_labelled
from mmvae.density_fitting import unfitted
from mmvae.evaluation import binarization, refuse_grey
from mmvae.experiment import RunArguments, finish, image_processor, make_loaders, parse, start, train
from mmvae.options import mapping, suited_pose
from mmvae.pictures import grid, reconstructions, traversals


@dataclass
class ImageArguments(LabelArguments):
    """Options of the model and its pictures."""

    image_column: str | None = field(default=None, metadata={"help": "column of the pictures; guessed when there is only one"})
    image_size: int = 64
    num_channels: int = 3
    binarize: str = field(default="none", metadata={"help": "none, threshold, or dynamic: pixels drawn anew at every step"})
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    shift: int = 0
    min_scale: float = 1.0
    rotation: float = 0.0
    brightness: float = 0.0
    input_noise: float = field(default=0.0, metadata={"help": "standard deviation of noise on the encoder's input: a denoising VAE"})
    input_jitter: float = field(default=0.0, metadata={"help": "strength, to 1, of turns, slants and shifts of the encoder's input alone"})
    latent_dim: int = field(default=16, metadata={"help": "16 suits the built-in sprites; pictures with more in them want more"})
    hidden_channels: list[int] | None = field(default=None, metadata={"help": "of every level; else the default network of this size"})
    num_blocks: int | None = None
    patch_size: int | None = None
    hidden_size: int | None = None
    pose: str = field(
        default="auto", metadata={"help": "none, or rotation, rotation+shift of one object; auto: the last for built-in sprites, else none"}
    )
    pose_window: float = field(default=0.5, metadata={"help": "side of the square that the object fits into, in sides of the picture"})
    spatial_latent: bool = False
    norm: str = "group"
    dropout: float = 0.0
    likelihood: str = "gaussian"
    scale_mode: str = "learned"
    scale: float = 0.1
    prior: str = "mixture"
    prior_components: int = 50
    densities: str = field(default="{}", metadata={"help": 'fitted after training: {"latent": {"kind": "mixture", "num_components": 10}}'})

    def __post_init__(self) -> None:
        self.densities = mapping("densities", self.densities)


@dataclass
class ImageRun(RunArguments):
    """Defaults that train on the built-in sprites in about a minute."""

    dataset: str = "sprites:3"
    output_dir: str = "outputs/image_vae"
    batch_size: int = 64
    num_epochs: int | None = 2
    importance_samples: int = 10
    learning_rate: float = 2e-3
    max_grad_norm: float | None = None
    kl_options: str = '{"steps": 100}'


AUGMENTATION = ("horizontal_flip", "vertical_flip", "shift", "min_scale", "rotation", "brightness")
DATA = ("image_column", "densities", *(option.name for option in fields(LabelArguments)))


def walks(model: ImageVAE, start: Tensor, units: int = 8, steps: int = 9, **condition: Tensor) -> tuple[Tensor, list[str]]:
    """Pictures (units, steps, C, H, W) along the latent's most active dimensions, -3 to 3, and their names."""
    spread = start.flatten(1).var(0, correction=0)
    chosen = spread.argsort(descending=True)[:units]
    z = start[:1].expand(len(chosen) * steps, *start.shape[1:]).clone(memory_format=torch.contiguous_format)
    values = torch.linspace(-3, 3, steps, device=z.device).repeat(len(chosen))
    z.flatten(1)[torch.arange(len(z)), chosen.repeat_interleave(steps)] = values
    return model.render(z, **condition).unflatten(0, (-1, steps)), [f"z{unit}" for unit in chosen.tolist()]


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, image = parse(ImageRun, ImageArguments)
    args.suit_prior(image.prior, image.latent_dim, image.prior_components)
    image.pose = suited_pose(image.pose, args.dataset)
    accelerator = start(args)
    data = splits(args.dataset, streaming=args.streaming, on_bad_row=args.on_bad_row)
    name = find_column(data["train"], "image", image.image_column)
    augmentation = Augmentation(**{key: getattr(image, key) for key in AUGMENTATION})
    column = ImageColumn(name, image.image_size, image.num_channels)
    columns = {split: replace(column, augmentation=augmentation) if split == "train" else column for split in data}
    rows, classes = partly_labelled(data, columns, image, seed=args.seed, **args.rows)
    loaders = make_loaders(accelerator, args, rows)

    options = {key: value for key, value in vars(image).items() if key not in (*AUGMENTATION, *DATA)} | classes
    torch.manual_seed(args.seed)
    model = ImageVAE(ImageVAEConfig(**options)).to(memory_format=torch.channels_last)
    refuse_grey(model.config, loaders)
    unfitted(model, image.densities)  # refuses what cannot be, before any work
    transform = binarization(image.binarize)

    def show(model: ImageVAE, step: int) -> dict[str, Tensor]:
        samples = model.sample(36, torch.Generator().manual_seed(args.seed))
        grid(samples, Path(args.output_dir) / "samples" / f"step-{step:08d}.png", 6)
        return {"samples": samples}

    def draw(model: ImageVAE, figures: Path) -> dict[str, str]:
        batch = next(Loader(loaders["validation"].rows, 64, seed=args.seed).batches(0))  # the same for any batch size and number of ranks
        pixels = (transform(batch, batch["row"]) if transform else batch)["pixel_values"].to(model.device)
        latents, likely = model.encode(pixels).mean, {}
        if classes:
            likely = {"class_labels": model.classify(pixel_values=pixels).argmax(1)}
            every = torch.arange(len(classes["id2label"])).repeat_interleave(10)
            grid(model.generate(every, generator=torch.Generator().manual_seed(args.seed)), figures / "classes.png", 10)
        reconstructions(pixels[:16], model.reconstruct(pixel_values=pixels[:16]), figures / "reconstructions.png")
        grid(model.sample(64, torch.Generator().manual_seed(args.seed)), figures / "samples.png", 8)
        ends = latents[:12]
        walk = model.interpolate(ends[:6], ends.flip(0)[:6], 9, **{name: value[:6] for name, value in likely.items()})
        grid(walk.unflatten(0, (-1, 9)), figures / "interpolation.png")
        traversals(*walks(model, latents, **{name: value[0] for name, value in likely.items()}), figures / "traversals.png")
        return {}

    result = train(accelerator, args, model, loaders, transform=transform, show=show)
    finish(accelerator, args, model, image_processor(column), result, loaders, transform=transform, draw=draw, densities=image.densities)


if __name__ == "__main__":
    main()

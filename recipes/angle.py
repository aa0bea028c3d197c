"""What a trained image VAE knows of the angle, on data that says what the angle is.

    accelerate launch recipes/image_vae.py --config recipes/configs/angle_hearts.yaml
    accelerate launch recipes/angle.py --model outputs/angle_hearts --dataset sprites:3:10000:heart
    accelerate launch recipes/angle.py --model outputs/angle_mnist outputs/angle_mnist_none --dataset turned:path/to/mnist

No model here has seen an angle. Of a model with a pose: the mean absolute error in degrees, modulo the symmetry of the shape, after one
offset that is fitted to the validation rows, and the circular correlation. Of every model: the share of the variance of (cos, sin) that a
linear regression and a small network, fitted to training rows, read in its content (all of the latent where there is no pose); and -ELBO,
which says whether the pose is a better model too. One process. Results: see the configs.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from mmvae import ImageVAE
from mmvae.angles import angle_told, angular_error, circular_correlation, fitted_offset
from mmvae.data import ImageColumn, Loader, Rows, find_column, splits
from mmvae.data.sprites import ATTRIBUTES, SYMMETRY
from mmvae.evaluation import binarization, evaluate_vae
from mmvae.experiment import build_accelerator, check_alone, parse
from mmvae.pictures import table
from mmvae.record import public, without_place


@dataclass
class AngleArguments:
    """Options of the measurement."""

    model: list[str] = field(default_factory=lambda: ["outputs/angle_hearts"], metadata={"help": "folders or Hub ids of image VAEs"})
    dataset: str = field(default="sprites:3:10000:heart", metadata={"help": "with a column angle: sprites, or turned:NAME"})
    symmetry: int = field(default=1, metadata={"help": "a turn by 360 / symmetry degrees changes nothing; of sprites each shape's own"})
    fit_rows: int = field(default=5000, metadata={"help": "first training rows, for the regressions"})
    max_rows: int = field(default=10_000, metadata={"help": "first validation and test rows"})
    importance_samples: int = field(default=0, metadata={"help": "per test row, for the log-likelihood; 0 leaves it out"})
    batch_size: int = 100
    seed: int = 0


@torch.no_grad()
def latents(model: ImageVAE, rows: Rows, transform: Any, batch_size: int) -> Tensor:
    """Posterior means (N, D) of all rows."""
    batches = (transform(batch, batch["row"]) if transform else batch for batch in Loader(rows, batch_size, shuffle=False).batches(0))
    return torch.cat([model.encode(batch["pixel_values"].to(model.device)).mean.flatten(1).cpu() for batch in batches])


def groups(data: dict[str, Any], symmetry: int) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """By shape, its symmetry and which rows of every split show it; all rows together where the data names no shapes."""
    if not all("shape" in part.column_names for part in data.values()):
        return {"all": (symmetry, {split: torch.arange(len(part)) for split, part in data.items()})}
    shapes = {split: torch.tensor(part["shape"][:]) for split, part in data.items()}
    found = {name: {split: (each == i).nonzero().flatten() for split, each in shapes.items()} for i, name in enumerate(ATTRIBUTES["shape"])}
    return {name: (SYMMETRY[name], rows) for name, rows in found.items() if all(len(each) for each in rows.values())}


def evaluate(accelerator: Accelerator, name: str, data: dict[str, Any], args: AngleArguments) -> dict[str, Any]:
    """The record of one model."""
    began = time.perf_counter()
    model = AutoModel.from_pretrained(name, dtype="float32").to(accelerator.device).eval()
    if not isinstance(model, ImageVAE):
        raise ValueError(f"model: received {name!r}, a {type(model).__name__}, expected an ImageVAE")
    processor, transform = AutoProcessor.from_pretrained(name), binarization(model.config.binarize)
    options = {"background": tuple(processor.background), "resize": processor.resize_mode}
    column = ImageColumn(find_column(data["test"], "image"), model.config.height_width, model.config.num_channels, **options)
    rows = {split: Rows(part, column, name=args.dataset) for split, part in data.items()}
    mean = {split: latents(model, part, transform, args.batch_size) for split, part in rows.items()}
    true = {split: torch.tensor(part["angle"][:]) for split, part in data.items()}
    figures: dict[str, float] = {}
    for shape, (symmetry, chosen) in groups(data, args.symmetry).items():
        content, angle = ({split: each[split][chosen[split]] for split in each} for each in (mean, true))
        if model.pose:
            found = {split: model.pose.split(each[:, model.content_dim :])[0] for split, each in content.items()}
            content = {split: each[:, : model.content_dim] for split, each in content.items()}
            offset = fitted_offset(found["validation"], angle["validation"], symmetry)
            error = angular_error(found["test"], angle["test"], symmetry, offset)
            figures[f"{shape}: mean absolute error, degrees"] = math.degrees(error.mean())
            figures[f"{shape}: median absolute error, degrees"] = math.degrees(error.median())
            figures[f"{shape}: circular correlation"] = circular_correlation(found["test"], angle["test"], symmetry)
        told = angle_told(content["train"], angle["train"], content["test"], angle["test"], symmetry, args.seed)
        figures |= {f"{shape}: R2 of the angle in the content, {kind}": value for kind, value in told.items()}
    loader = Loader(rows["test"], args.batch_size, shuffle=False)
    vae = evaluate_vae(accelerator, model, loader, num_samples=args.importance_samples, seed=args.seed, transform=transform)
    figures |= {name: vae[name] for name in ("nll_nats", "neg_elbo_nats", "kl_nats") if name in vae}
    told = {"model": without_place(name), "dataset": without_place(args.dataset), "rows": len(true["test"]), "fit_rows": len(true["train"])}
    return told | {"seed": args.seed, "seconds": round(time.perf_counter() - began, 1), "metrics": figures}


def main() -> None:
    """Load, measure, print and write."""
    (args,) = parse(AngleArguments)
    accelerator = build_accelerator("no")
    check_alone(accelerator)
    data = splits(args.dataset)
    if "angle" not in data["train"].column_names:
        raise ValueError(f"{args.dataset} has no column 'angle', expected sprites, or turned:{args.dataset}")
    data = {"test": data.get("test", data["validation"])} | data
    most = {"train": args.fit_rows, "validation": args.max_rows, "test": args.max_rows}
    data = {split: part.select(range(min(most[split], len(part)))) for split, part in data.items()}
    records = [evaluate(accelerator, name, data, args) for name in args.model]
    for name, record in zip(args.model, records, strict=True):
        if Path(name).is_dir():
            (Path(name) / "angle.json").write_text(json.dumps(public(record), indent=2) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(figure for record in records for figure in record["metrics"]))
    columns = {f"{record['model']}, {record['seconds']} s": [record["metrics"].get(each, "") for each in names] for record in records}
    print(table({"figure": names} | columns))


if __name__ == "__main__":
    main()

"""How good the default network is in nats, beside transposed convolutions and a network of finer levels, after equally many steps.

    OMP_NUM_THREADS=1 python recipes/benchmark_decoder.py --images path/to/mnist --network default      # or transposed, or levels

Digits with pixels drawn anew at every step, the same rows, noise and schedule for each; "transposed" has the default's encoder and as many
parameters as its decoder (``recipes/benchmark_references.py``), "levels" halves the picture level by level, as larger pictures are.
Prints JSON: parameters, seconds of CPU time in training, and of the test rows -ELBO and -log p(x), in nats.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from benchmark_references import transposed_decoder
from benchmark_training import descend, endless
from torch import nn

from mmvae import ImageVAE, ImageVAEConfig
from mmvae.data import ImageColumn, Loader, Rows, find_column, splits
from mmvae.evaluation import binarization, evaluate_vae
from mmvae.experiment import build_accelerator, parse
from mmvae.noise import fold

NETWORKS = {"default": {}, "transposed": {}, "levels": {"hidden_channels": [32, 64]}}


@dataclass
class DecoderArguments:
    """Options."""

    network: str = "default"
    images: str = "sprites:5"
    steps: int = 2500
    batch_size: int = 128
    learning_rate: float = 2e-3
    latent_dim: int = 40
    image_size: int = 28
    test_rows: int = 1000
    num_samples: int = 100
    seed: int = 0


def build(args: DecoderArguments) -> ImageVAE:
    """The model of a network."""
    if args.network not in NETWORKS:
        raise ValueError(f"network: received {args.network!r}, expected one of {list(NETWORKS)}")
    torch.manual_seed(args.seed)
    known = {"image_size": args.image_size, "num_channels": 1, "likelihood": "bernoulli", "binarize": "dynamic"}
    model = ImageVAE(ImageVAEConfig(latent_dim=args.latent_dim, **known, **NETWORKS[args.network]))
    if args.network == "transposed":
        size = sum(p.numel() for part in (model.from_latent, model.decoder) for p in part.parameters())
        model.from_latent, shape, *layers = transposed_decoder(model.config, 1, size)
        model.decoder = nn.Sequential(nn.Flatten(), shape, *layers)  # whatever shape the features come in
    return model.to(memory_format=torch.channels_last)


def main() -> None:
    """Train, evaluate, print."""
    (args,) = parse(DecoderArguments)
    accelerator, data = build_accelerator("no"), splits(args.images)
    column = ImageColumn(find_column(data["train"], "image"), args.image_size, 1)
    model, transform = build(args).train(), binarization("dynamic")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs).loss

    batches, began = endless(Loader(Rows(data["train"], column), args.batch_size, seed=args.seed)), time.process_time()
    for step in range(args.steps):
        rise, fall = min(1, (step + 1) / 300), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rise * (0.01 + 0.99 * fall)
        batch = next(batches)
        key = fold(args.seed, step, batch["row"])
        inputs = {"pixel_values": transform(batch, key)["pixel_values"], "beta": min(1, 10 * (step + 1) / args.steps), "noise_key": key}
        loss = descend(optimizer, partial(forward, inputs))
        if not (step + 1) % 250:
            print(step + 1, f"{loss.item():.2f} nats, {time.process_time() - began:.0f} s", flush=True)
    seconds = time.process_time() - began
    test = data.get("test", data["validation"])
    rows = Rows(test.select(range(min(args.test_rows, len(test)))), column)
    figures = evaluate_vae(accelerator, model.eval(), Loader(rows, 10), num_samples=args.num_samples, transform=transform)
    sizes = {"parameters": sum(p.numel() for p in model.parameters())}
    decoder = sum(p.numel() for part in (model.from_latent, model.decoder) for p in part.parameters())
    print(json.dumps(asdict(args) | sizes | {"of the decoder": decoder, "CPU seconds": round(seconds, 1)} | figures))


if __name__ == "__main__":
    main()

"""What many GPUs would do, on paper: where time goes, what they send each other, and how fast rows must come in.

    python recipes/benchmark_scaling.py
    python recipes/benchmark_scaling.py --peak 312 --inside 300 --between 25            # another GPU and network

Counted, by running one training step of ours on a few rows: parameters, floating-point operations a row, operators a step. Measured, here
and now, on one thread: how fast pictures are decoded. Assumed, as options: what a GPU reaches and what lies between them. The rest follows:

- a step takes the longer of its arithmetic, at ``share`` of the peak, and of the launches of its operators, one after the other;
- gradients are summed in float32, reduced within a node, across nodes, and spread again, each GPU sending 2 (n - 1) / n of its part; of the
  arithmetic two thirds are the backward pass, under which DistributedDataParallel hides what is sent;
- efficiency, of the most GPUs, is the step of one over that of many: rows a second are so many times those of one; and below the fewest
  rows a GPU the sums would show (0: launches take longer than they at any number).

One process. Not measured: anything on a GPU.
"""

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig, TextVAE, TextVAEConfig
from mmvae.experiment import parse
from mmvae.models.base import VAE
from mmvae.nn import GroupNorm
from mmvae.pictures import table
from mmvae.record import hardware

LARGE = {"hidden_channels": [128, 256, 512, 768], "num_blocks": 2, "latent_dim": 256}
WORDS, ROW = 10_000, 24  # of the vocabulary, and of a sentence


@dataclass
class ScalingArguments:
    """What is assumed."""

    work: str = field(
        default="", metadata={"help": "beginnings of the names of what is counted, separated by commas; everything when empty"}
    )
    gpus: list[int] = field(default_factory=lambda: [8, 64, 512], metadata={"help": "how many"})
    node: int = field(default=8, metadata={"help": "GPUs in a node"})
    peak: float = field(default=989.0, metadata={"help": "TFLOP/s of a GPU in bfloat16"})
    share: float = field(default=0.3, metadata={"help": "of the peak that training reaches"})
    launch: float = field(default=5.0, metadata={"help": "microseconds between operators; compiled into graphs it is a tenth"})
    inside: float = field(default=450.0, metadata={"help": "GB/s that a GPU sends within its node"})
    between: float = field(default=50.0, metadata={"help": "GB/s that a GPU sends to other nodes"})


class Operators(TorchDispatchMode):
    """Counts the operators that are run, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def pictures(size: int, channels: int, **options: Any) -> tuple[VAE, Callable[[int], dict[str, Tensor]]]:
    """An image VAE, and rows for it."""
    model = ImageVAE(ImageVAEConfig(image_size=size, num_channels=channels, **options))
    return model, lambda rows: {"pixel_values": torch.randint(0, 256, (rows, channels, size, size), dtype=torch.uint8)}


def words(rows: int) -> dict[str, Tensor]:
    """Rows of text."""
    ids = torch.randint(4, WORDS, (rows, ROW))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text() -> tuple[VAE, Callable[[int], dict[str, Tensor]]]:
    """A text VAE of the size of PTB's."""
    return TextVAE(TextVAEConfig(vocab_size=WORDS, embedding_size=256, hidden_size=256, latent_dim=32)), words


def both() -> tuple[VAE, Callable[[int], dict[str, Tensor]]]:
    """A joint VAE of pictures and captions."""
    parts = {"image": ImageVAEConfig(image_size=64), "text": TextVAEConfig(vocab_size=WORDS, embedding_size=256, hidden_size=256)}
    model, image = MMVAE(MMVAEConfig(modalities=parts, latent_dim=32, draw="one")), pictures(64, 3)[1]

    def rows(number: int) -> dict[str, Tensor]:
        own = {"image": image(number), "text": words(number)}
        return {f"{name}_{child}": value for name, values in own.items() for child, value in values.items()}

    return model, rows


WORK: dict[str, tuple[Callable[[], tuple[VAE, Callable[[int], dict[str, Tensor]]]], int, tuple[int, int] | None]] = {
    "pictures 28x28x1, default": (lambda: pictures(28, 1), 1024, (28, 1)),
    "pictures 64x64x3, default": (lambda: pictures(64, 3), 512, (64, 3)),
    "pictures 64x64x3, large": (lambda: pictures(64, 3, **LARGE), 256, (64, 3)),
    "pictures 128x128x3, large": (lambda: pictures(128, 3, **LARGE), 64, (128, 3)),
    "pictures 256x256x3, large": (lambda: pictures(256, 3, **LARGE), 16, (256, 3)),
    f"sentences of {ROW} words": (text, 512, None),
    "pictures 64x64x3 with captions": (both, 512, (64, 3)),
}


def counted(model: VAE, rows: Callable[[int], dict[str, Tensor]], few: int = 2) -> tuple[float, int]:
    """Floating-point operations a row and operators a step, the optimizer's (one, fused) included."""
    model.train()
    for part in model.modules():
        if isinstance(part, GroupNorm):
            part.__class__ = nn.GroupNorm  # one operator, as on a GPU; ours of the CPU are many
    with FlopCounterMode(display=False) as flops, Operators() as operators:
        model(**rows(few)).loss.backward()
    return flops.get_total_flops() / few, operators.count + 1


def decoded(size: int, channels: int, seconds: float = 0.3) -> float:
    """PNG files of noise, which compresses worst, decoded a second by one thread."""
    file = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, (size, size, channels), dtype=torch.uint8).squeeze(-1).numpy()).save(file, "png")
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        Image.open(io.BytesIO(file.getvalue())).load()
        done += 1
    return done / passed


def sending(parameters: int, gpus: int, args: ScalingArguments) -> float:
    """Seconds that summing the gradients of so many parameters takes."""
    near, size = min(gpus, args.node), 4 * parameters
    nodes = math.ceil(gpus / args.node)
    return 2 * (near - 1) / near * size / (1e9 * args.inside) + 2 * (nodes - 1) / nodes * size / near / (1e9 * args.between)


def foreseen(name: str, args: ScalingArguments) -> dict[str, Any]:
    """A line of the table."""
    make, batch, picture = WORK[name]
    model, rows = make()
    flops, operators = counted(model, rows)
    parameters = model.num_parameters()
    arithmetic, launches = batch * flops / (1e12 * args.peak * args.share), 1e-6 * args.launch * operators
    alone = max(arithmetic, launches)
    shown = {"work, rows a GPU": f"{name}, {batch}", "M parameters": parameters / 1e6, "GFLOP a row": flops / 1e9, "operators": operators}
    shown |= {"arithmetic ms": 1e3 * arithmetic, "launches ms": 1e3 * launches, "rows/s a GPU": batch / alone}
    shown["decoding threads a GPU"] = batch / alone / decoded(*picture) if picture else 0.0
    for gpus in args.gpus:
        shown[f"sums of {gpus}, ms"] = 1e3 * sending(parameters, gpus, args)
    most = sending(parameters, max(args.gpus), args)
    shown["efficiency"] = alone / (alone + max(0.0, most - 2 / 3 * alone))
    shown["fewest rows"] = 0 if most <= 2 / 3 * launches else math.ceil(batch * 1.5 * most / arithmetic)
    return {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in shown.items()}


def main() -> None:
    """Count, measure, print."""
    (args,) = parse(ScalingArguments)
    torch.manual_seed(0)
    lines = [foreseen(name, args) for name in WORK if name.startswith(tuple(args.work.split(",")))]
    print(table({key: [line[key] for line in lines] for key in lines[0]}))
    print(hardware())


if __name__ == "__main__":
    main()

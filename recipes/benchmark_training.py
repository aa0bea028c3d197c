"""Training, for ``recipes/benchmark.py``: each function gives the reference's step, ours, and the unit of what they return."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, repeat
from typing import Any

import datasets
import torch
import torch.multiprocessing as processes
from benchmark_references import PlainImageVAE, PlainTextVAE, subset_loss, transposed_decoder
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig, TextVAE, TextVAEConfig
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, find_column, load_rows
from mmvae.processes import keep_memory
from mmvae.processing import train_tokenizer


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    work: str = field(
        default="", metadata={"help": "beginnings of the names of what is measured, separated by commas; everything when empty"}
    )
    text: str = field(default="sprites:5", metadata={"help": "text data set"})
    images: str = field(default="sprites:5", metadata={"help": "image data set"})
    seconds: float = field(default=1.0, metadata={"help": "that a repeat takes at least, of each of the two"})
    repeats: int = 5
    clock: str = field(
        default="wall", metadata={"help": "wall, or cpu: the processes' own time, for a machine with other work; not for ranks"}
    )
    bf16: bool = field(
        default=False, metadata={"help": "train and score under bfloat16 autocast, where the hardware has it; not the references"}
    )
    compile: bool = field(default=False, metadata={"help": "compile the trunks in image training, as the recipes' option does"})
    profile: bool = field(default=False, metadata={"help": "show where the time of ours goes"})
    batch_size: int = field(default=128, metadata={"help": "of image training; of every rank"})
    num_samples: int = field(default=1000, metadata={"help": "importance samples of a picture"})
    num_sentences: int = field(default=1000, metadata={"help": "written at once"})
    num_pictures: int = field(default=10_000, metadata={"help": "in the file that is loaded"})
    warm_steps: int = field(default=600, metadata={"help": "training steps of the model that writes the sentences"})
    streamed_rows: int = field(default=0, metadata={"help": "rows of text streamed to measure memory, beside a hundredth of them; 0: none"})
    output: str | None = field(default=None, metadata={"help": "JSON file"})


Step = Callable[[], float]
Work = tuple[Step, Step, str]


def optimizers(model: nn.Module, plain: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Ours and the reference's."""
    return torch.optim.AdamW(model.parameters(), fused=True), torch.optim.Adam(plain.parameters(), foreach=False)


def descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], bf16: bool = False) -> Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss()
    value.backward()
    optimizer.step()
    return value


def endless(loader: Loader) -> Any:
    """Batches of one epoch after the other."""
    return chain.from_iterable(map(loader.batches, count()))


def text_loader(args: BenchmarkArguments, batch_size: int) -> tuple[Loader, Any, TextVAE]:
    """Ours, all rows and a tokenizer, and a new model."""
    data = load_rows(args.text)
    column = find_column(data, "text")
    tokenizer = train_tokenizer(data[column])
    loader = Loader(Rows(data, TextColumn(column, tokenizer)), batch_size)
    config = TextVAEConfig(vocab_size=len(tokenizer), embedding_size=300, hidden_size=256, latent_dim=16)
    return loader, tokenizer(list(data[column]))["input_ids"], TextVAE(config).train()


def text_training(batch_size: int, args: BenchmarkArguments) -> Work:
    """A step of a GRU sentence VAE on real rows."""
    loader, rows, model = text_loader(args, batch_size)
    plain = PlainTextVAE(model.config.vocab_size, 300, 256, 16)
    optimizer, unfused = optimizers(model, plain)
    ours, theirs = endless(loader), chain.from_iterable(repeat(DataLoader(rows, batch_size, shuffle=True, collate_fn=list)))

    def step() -> float:
        batch = next(ours)
        descend(optimizer, lambda: model(batch["input_ids"], batch["attention_mask"]).loss, args.bf16)
        return batch["attention_mask"][:, 1:].sum().item()

    def reference() -> float:
        rows = [torch.tensor(row) for row in next(theirs)]
        lengths = torch.tensor([len(row) for row in rows])
        descend(unfused, lambda: plain(pad_sequence(rows, batch_first=True), lengths)).item()
        return (lengths - 1).sum().item()

    return reference, step, "tokens/s"


def image_rows(args: BenchmarkArguments, config: ImageVAEConfig) -> Rows:
    """At most 2,000 pictures, prepared."""
    data = load_rows(args.images)
    data = data.select(range(min(len(data), 2000))) if isinstance(data, datasets.Dataset) else data
    return Rows(data, ImageColumn(find_column(data, "image"), config.image_size, config.num_channels))


def some_pixels(rows: Rows, number: int) -> Tensor:
    """The first pictures, (B, C, H, W) uint8."""
    return rows.batch(rows.numbers[:number], torch.zeros(min(number, rows.num_rows), dtype=torch.int64))["pixel_values"]


def image_training(size: int, channels: int, args: BenchmarkArguments) -> Work:
    """A step of the default network."""
    config = ImageVAEConfig(image_size=size, num_channels=channels)
    rows = image_rows(args, config)
    items = [pixels.float() / 255 for pixels in some_pixels(rows, 2000)]
    plain, model = PlainImageVAE(config).train(), ImageVAE(config).to(memory_format=torch.channels_last).train()
    if args.compile:
        model.encoder.compile(), model.decoder.compile()
    optimizer, unfused = optimizers(model, plain)
    ours, theirs = endless(Loader(rows, args.batch_size)), chain.from_iterable(repeat(DataLoader(items, args.batch_size, shuffle=True)))

    def step() -> float:
        pixels = next(ours)["pixel_values"]
        descend(optimizer, lambda: model(pixels).loss, args.bf16)
        return len(pixels)

    def reference() -> float:
        pixels = next(theirs)
        descend(unfused, lambda: plain(pixels)).item()
        return len(pixels)

    return reference, step, "images/s"


def decoder(size: int, channels: int, args: BenchmarkArguments) -> Work:
    """From latents to pictures and back, by transposed convolutions and by the default network, with equally many parameters."""
    config = ImageVAEConfig(image_size=size, num_channels=channels)
    model = ImageVAE(config)
    parts = nn.Sequential(model.from_latent, nn.Unflatten(1, (-1, *config.bottom_size)), model.decoder).to(
        memory_format=torch.channels_last
    )
    plain = transposed_decoder(config, channels, sum(p.numel() for p in parts.parameters()))
    z = torch.randn(args.batch_size, config.latent_dim)

    def step(module: nn.Module, bf16: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module(z).square().mean()
        loss.backward()
        return len(z)

    return partial(step, plain, False), partial(step, parts, args.bf16), "images/s"


def joint_training(size: int, args: BenchmarkArguments) -> Work:
    """A step of MoPoE, over captioned pictures for two modalities, else over coloured pictures: ours draws a subset for every row first."""
    if size == 2:
        configs = {"image": ImageVAEConfig(latent_dim=16), "text": TextVAEConfig(vocab_size=1000, latent_dim=16)}
    else:
        configs = {f"m{i}": ImageVAEConfig(image_size=28, latent_dim=16) for i in range(size)}
    rows, inputs = 64 if size == 2 else 32, {}
    for name, config in configs.items():  # noise: what is in a row does not change what it costs
        if isinstance(config, ImageVAEConfig):
            inputs[name] = {"pixel_values": torch.rand(rows, 3, config.image_size, config.image_size)}
        else:
            inputs[name] = {"input_ids": torch.randint(4, 1000, (rows, 12)), "attention_mask": torch.ones(rows, 12, dtype=torch.int64)}
    drawn = {"aggregation": "poe", "inference_aggregation": "mopoe", "modality_dropout": dict.fromkeys(configs, 0.5)}
    build = partial(MMVAE, MMVAEConfig(modalities=configs, latent_dim=16, **drawn))
    model, plain = build().train(), build().train()
    optimizer, unfused = optimizers(model, plain)
    own = {f"{name}_{child}": value for name, values in inputs.items() for child, value in values.items()}

    def step() -> float:
        descend(optimizer, lambda: model(**own).loss, args.bf16)
        return rows

    def reference() -> float:
        descend(unfused, lambda: subset_loss(plain.vaes, inputs, 16)).item()
        return rows

    return reference, step, "rows/s"


def train_rank(rank: int, world: int, pipe: Any, args: BenchmarkArguments, meeting: str) -> None:
    """A rank of one thread: a training step of 28x28 pictures for every message."""
    torch.set_num_threads(1), keep_memory()
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    config = ImageVAEConfig(image_size=28, num_channels=1)
    model = nn.parallel.DistributedDataParallel(ImageVAE(config).to(memory_format=torch.channels_last).train())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = endless(Loader(image_rows(args, config), world * args.batch_size, rank=rank, world_size=world))
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while pipe.recv():
            pixels = next(batches)["pixel_values"]
            descend(optimizer, lambda pixels=pixels: model(pixels).loss, args.bf16)
            pipe.send(len(pixels))
    os._exit(0)  # the teardown of gloo sometimes aborts after all work is done


def ranks(args: BenchmarkArguments) -> Work:
    """Steps of image training by one rank of one thread, and by two, each of as many rows."""
    context, folder = processes.get_context("spawn"), tempfile.mkdtemp()

    def team(world: int) -> Step:
        pipes = [context.Pipe() for _ in range(world)]
        for rank, (_, far) in enumerate(pipes):
            options = (rank, world, far, args, f"{folder}/{world}")
            context.Process(target=train_rank, args=options, daemon=True).start()
            far.close()  # so that a rank that has died is seen

        def step() -> float:
            for near, _ in pipes:
                near.send(True)
            return sum(near.recv() for near, _ in pipes)

        return step

    return team(1), team(2), "images/s"

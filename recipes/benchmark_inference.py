"""All but training, for ``recipes/benchmark.py``: likelihoods, samples, loading, saving, memory; see ``benchmark_training.py``."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from benchmark_references import PlainImageVAE, write_sentences
from benchmark_training import BenchmarkArguments, Work, descend, endless, image_rows, some_pixels, text_loader
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from mmvae import ImageVAE, ImageVAEConfig, checkpoint
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, load_rows
from mmvae.processing import train_tokenizer


def likelihood(args: BenchmarkArguments) -> Work:
    """Importance-sampled log p(x) of 28x28 pictures."""
    config = ImageVAEConfig(image_size=28, num_channels=1)
    model, plain = ImageVAE(config).to(memory_format=torch.channels_last).eval(), PlainImageVAE(config).eval()
    pixels = some_pixels(image_rows(args, config), 8)

    def reference() -> float:
        plain.log_marginal(pixels[0].float() / 255, args.num_samples)
        return 1

    def ours() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            model.log_marginal(num_samples=args.num_samples, pixel_values=pixels[:2])
        return 2

    return reference, ours, "images/s"


def sentences(args: BenchmarkArguments) -> Work:
    """Sentences of at most 40 tokens written from the prior, greedily, by a model that was trained a little."""
    loader, _, model = text_loader(args, 32)
    optimizer, batches = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True), endless(loader)
    for _ in range(args.warm_steps):
        batch = next(batches)
        descend(optimizer, lambda batch=batch: model(batch["input_ids"], batch["attention_mask"], beta=0.01).loss)
    latents = 2 * torch.randn(args.num_sentences, 16)
    model.eval()
    starts = iter(chain.from_iterable(repeat(range(0, len(latents), 10))))

    def reference() -> float:
        start = next(starts)
        return len(write_sentences(model, latents[start : start + 10], 40))

    return reference, lambda: len(model.generate(latents=latents, max_new_tokens=40)), "sentences/s"


def pictures(args: BenchmarkArguments) -> Work:
    """Pictures from the prior."""
    config = ImageVAEConfig(image_size=64)
    model, plain = ImageVAE(config).to(memory_format=torch.channels_last).eval(), PlainImageVAE(config).eval()

    @torch.no_grad()
    def reference() -> float:
        return len(plain.decode(torch.randn(64, config.latent_dim)).mean.clamp(0, 1))

    return reference, lambda: len(model.sample(256)), "images/s"


def write_pictures(args: BenchmarkArguments, folder: Path) -> Path:
    """A folder with a parquet of 28x28 grey PNG files."""
    pixels = some_pixels(image_rows(args, ImageVAEConfig(image_size=28, num_channels=1)), 500)
    images = [Image.fromarray(pixels[i % len(pixels), 0].numpy()) for i in range(args.num_pictures)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(folder / "train.parquet")
    return folder


def loading(first: bool, args: BenchmarkArguments) -> Work:
    """The first epoch of 28x28 pictures in a file, opening included, ours in a process for each thread, or a later one."""
    folder = write_pictures(args, Path(tempfile.mkdtemp()))

    def tensors(rows: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
        return {"image": [torch.from_numpy(np.array(image)).unsqueeze(0).float() / 255 for image in rows["image"]]}

    def plain_loader() -> DataLoader:
        data = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
        return DataLoader(data.with_transform(tensors), args.batch_size, shuffle=True)

    def our_loader() -> Loader:
        return Loader(Rows(load_rows(str(folder)), ImageColumn("image", 28, 1), num_workers=torch.get_num_threads()), args.batch_size)

    theirs, ours, epochs = plain_loader(), our_loader(), count(1)

    def reference() -> float:
        return sum(len(batch["image"]) for batch in (plain_loader() if first else theirs))

    def load() -> float:
        batches = our_loader().batches(0) if first else ours.batches(next(epochs))
        return sum(len(batch["pixel_values"]) for batch in batches)

    return reference, load, "images/s"


def saving(args: BenchmarkArguments) -> Work:
    """A checkpoint of weights and moments, hashed, flushed and sealed, beside the bare safetensors of the same tensors."""
    model = ImageVAE(ImageVAEConfig())
    optimizer = torch.optim.AdamW(model.parameters())
    descend(optimizer, lambda: model(torch.rand(2, 3, 64, 64)).loss)
    folder, steps = Path(tempfile.mkdtemp()), count()
    tensors = dict(model.state_dict())
    tensors |= {f"{i}.{name}": x for i, state in optimizer.state_dict()["state"].items() for name, x in state.items()}
    size = sum(x.nbytes for x in tensors.values()) / 2**20

    def reference() -> float:
        save_file(tensors, folder / "plain.safetensors")
        return size

    def ours() -> float:
        checkpoint.save(folder / "checkpoints", next(steps), {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        return size

    return reference, ours, "MiB/s"


def importing(args: BenchmarkArguments) -> Work:
    """``import mmvae``, beside what it needs of transformers."""

    def run(code: str) -> float:
        subprocess.run([sys.executable, "-c", code], check=True)
        return 1

    needed = "from transformers import AutoModel, AutoProcessor, GenerationMixin, PreTrainedModel"
    return partial(run, needed), partial(run, "import mmvae"), "imports/s"


def memory(args: BenchmarkArguments) -> dict[str, float]:
    """MiB of this process after a hundredth of the rows of a file of text were streamed, and after all."""
    folder, shown = Path(tempfile.mkdtemp()), {}
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"row {i % 1000} of a stream of rows"}) + "\n" for i in range(args.streamed_rows))
    tokenizer = train_tokenizer([f"row {i} of a stream of rows" for i in range(1000)])
    loader = Loader(Rows(load_rows(str(folder), streaming=True), TextColumn("text", tokenizer), name="rows"), 100)
    read, marks = 0, [args.streamed_rows // 100, args.streamed_rows]
    for batch in loader.batches(0):
        read += len(batch["row"])
        if marks and read >= marks[0]:
            marks.pop(0)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            shown[f"{read:,} rows"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return shown

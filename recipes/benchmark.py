"""How fast mmvae is: each piece of work beside a plain reference on the same data, network size and batch, in the same run.

    OMP_NUM_THREADS=2 accelerate launch recipes/benchmark.py
    OMP_NUM_THREADS=2 accelerate launch recipes/benchmark.py --text path/to/ptb --images path/to/mnist --image_size 28 --num_channels 1

Reference and mmvae alternate; the table gives medians over the repeats and their spread. Only the ratio means something on a busy machine.
The references are what a first implementation does: text in random batches padded to the longest row, a packed ``nn.GRU``, log-softmax over
all padded positions, unfused Adam; images one by one through a default collate, float32, unfused Adam, ``loss.item()`` at every step.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from mmvae import ImageVAE, ImageVAEConfig, TextVAE, TextVAEConfig
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, find_column, load_rows
from mmvae.experiment import parse
from mmvae.pictures import table
from mmvae.processing import train_tokenizer
from mmvae.record import hardware


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    text: str = field(default="sprites:5", metadata={"help": "text data set"})
    images: str = field(default="sprites:5", metadata={"help": "image data set"})
    image_size: int = 64
    num_channels: int = 3
    text_batch: int = 32
    image_batch: int = 128
    steps: int = field(default=10, metadata={"help": "steps of one repeat"})
    repeats: int = 5
    output: str | None = field(default=None, metadata={"help": "JSON file"})


class PlainTextVAE(nn.Module):
    """A sentence VAE as first written: packed GRUs, logits everywhere, the latent as initial state."""

    def __init__(self, vocab: int, embedding: int, hidden: int, latent: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, embedding)
        self.encoder, self.decoder = (nn.GRU(embedding, hidden, batch_first=True) for _ in range(2))
        self.moments, self.state = nn.Linear(hidden, 2 * latent), nn.Linear(latent, hidden)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) ids and (B,) lengths -> mean loss in nats per row."""
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        mean, logvar = self.moments(self.encoder(packed)[1][0]).chunk(2, -1)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        packed = pack_padded_sequence(self.embed(ids[:, :-1]), lengths - 1, batch_first=True, enforce_sorted=False)
        states = pad_packed_sequence(self.decoder(packed, self.state(z)[None])[0], batch_first=True, total_length=ids.shape[1] - 1)[0]
        nll = F.nll_loss(self.out(states).log_softmax(-1).transpose(1, 2), ids[:, 1:], ignore_index=0, reduction="sum")
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        return (nll + kl) / len(ids)


def text_work(args: BenchmarkArguments) -> tuple[Callable[[], float], Callable[[], float], str]:
    """The reference's step and ours; each returns how many real tokens it trained on."""
    data = load_rows(args.text)
    column = find_column(data, "text")
    tokenizer = train_tokenizer(data[column])
    loader = Loader(Rows(data, TextColumn(column, tokenizer)), args.text_batch)
    plain_rows = DataLoader(tokenizer(list(data[column]))["input_ids"], args.text_batch, shuffle=True, collate_fn=list)
    config = TextVAEConfig(vocab_size=len(tokenizer), embedding_size=300, hidden_size=256, latent_dim=16)
    model, plain = TextVAE(config).train(), PlainTextVAE(len(tokenizer), 300, 256, 16)
    optimizer, unfused = torch.optim.AdamW(model.parameters(), fused=True), torch.optim.Adam(plain.parameters(), foreach=False)
    ours, theirs = chain.from_iterable(map(loader.batches, count())), chain.from_iterable(repeat(plain_rows))

    def step() -> float:
        batch = next(ours)
        optimizer.zero_grad()
        model(batch["input_ids"], batch["attention_mask"]).loss.backward()
        optimizer.step()
        return batch["attention_mask"][:, 1:].sum().item()

    def reference() -> float:
        rows = next(theirs)
        lengths = torch.tensor([len(row) for row in rows])
        unfused.zero_grad()
        plain(pad_sequence([torch.tensor(row) for row in rows], batch_first=True), lengths).backward()
        unfused.step()
        return (lengths - 1).sum().item()

    return reference, step, "tokens/s"


def image_work(args: BenchmarkArguments) -> tuple[Callable[[], float], Callable[[], float], str]:
    """The reference's step and ours, on the same network; each returns how many pictures it trained on."""
    data = load_rows(args.images)
    column = ImageColumn(find_column(data, "image"), args.image_size, args.num_channels)
    rows = Rows(data, column)
    items = rows.batch(torch.arange(min(rows.num_rows, 2000)), torch.zeros(min(rows.num_rows, 2000), dtype=torch.int64))["pixel_values"]
    plain_rows = DataLoader([item.float() / 255 for item in items], args.image_batch, shuffle=True)
    config = ImageVAEConfig(image_size=args.image_size, num_channels=args.num_channels)
    plain, model = ImageVAE(config).train(), ImageVAE(config).to(memory_format=torch.channels_last).train()
    optimizer, unfused = torch.optim.AdamW(model.parameters(), fused=True), torch.optim.Adam(plain.parameters(), foreach=False)
    loader = Loader(rows, args.image_batch)
    ours, theirs = chain.from_iterable(map(loader.batches, count())), chain.from_iterable(repeat(plain_rows))

    def step(model: ImageVAE, pixels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = model(pixels).loss
        loss.backward()
        optimizer.step()
        return loss

    def reference() -> float:
        pixels = next(theirs)
        step(plain, pixels, unfused).item()
        return len(pixels)

    def fast() -> float:
        pixels = next(ours)["pixel_values"]
        step(model, pixels, optimizer)
        return len(pixels)

    return reference, fast, "images/s"


def rate(step: Callable[[], float], steps: int) -> float:
    """Things per second over ``steps`` steps."""
    began = time.perf_counter()
    done = sum(step() for _ in range(steps))
    return done / (time.perf_counter() - began)


def main() -> None:
    """Alternate, measure, print."""
    (args,) = parse(BenchmarkArguments)
    results = {}
    for name, work in (("text training", text_work), ("image training", image_work)):
        reference, ours, unit = work(args)
        rate(reference, 2), rate(ours, 2)
        pairs = [(rate(reference, args.steps), rate(ours, args.steps)) for _ in range(args.repeats)]
        ratios = sorted(fast / slow for slow, fast in pairs)
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        results[name] = {"unit": unit, "reference": medians[0], "mmvae": medians[1], "ratio": statistics.median(ratios)}
        results[name] |= {"ratio_min": ratios[0], "ratio_max": ratios[-1]}
    columns = {"work": list(results)} | {key: [result[key] for result in results.values()] for key in next(iter(results.values()))}
    print(table(columns), hardware(), sep="\n")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"results": results, "hardware": hardware(), "arguments": vars(args)}, file, indent=2)


if __name__ == "__main__":
    main()

"""Captions for pictures and pictures for captions. Trains a small joint model on the built-in sprites first, in about a minute on a CPU.

python examples/cross_modal.py                       # train, save the model folder, generate
python examples/cross_modal.py outputs/cross_modal   # load a folder, this one or one that recipes/joint_vae.py made on sprites
"""

import argparse
from pathlib import Path

import torch

from mmvae import MMVAE, ImageVAEConfig, ImageVAEImageProcessor, MMVAEConfig, MMVAEProcessor, TextVAEConfig
from mmvae.data import sprites
from mmvae.pictures import captioned
from mmvae.processing import train_tokenizer
from mmvae.schedules import linear

IMAGE_SIZE = 32


def train(steps: int) -> tuple[MMVAE, MMVAEProcessor]:
    """A model of small pictures and captions, and its processor."""
    rows = sprites(level=3, num_rows=4000, image_size=IMAGE_SIZE)
    pictures, captions = torch.from_numpy(rows["image"]).movedim(3, 1), rows["caption"]
    tokenizer = train_tokenizer(captions)
    ids = tokenizer(captions, padding=True, return_tensors="pt")
    image = ImageVAEConfig(image_size=IMAGE_SIZE, hidden_channels=[16, 32, 64], norm="none", latent_dim=24)  # 8 private: place and angle
    text = TextVAEConfig(vocab_size=len(tokenizer), embedding_size=32, hidden_size=64, latent_dim=16)
    model = MMVAE(MMVAEConfig(modalities={"image": image, "text": text}, latent_dim=16, likelihood_weights={"text": 10}))
    optimizer, beta = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True), linear(steps=max(steps // 3, 1))
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(captions), (64,))
        words = {name: value[chosen] for name, value in ids.items()}
        present = torch.rand(64, 2) < torch.tensor([1.0, 0.8])  # every fifth caption is missing
        out = model(pixel_values=pictures[chosen], **words, present=present, beta=beta(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: -ELBO {-out.elbo.mean().item():.1f} nats")
    look = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "num_channels": 3}
    return model, MMVAEProcessor({"image": ImageVAEImageProcessor(**look), "text": tokenizer})


def main(folder: str | None, steps: int, output: str) -> tuple[list[str], list[str]]:
    """Train or load, generate both ways, save a figure; returns the captions of eight pictures, true and generated."""
    torch.manual_seed(0)
    if folder is None:
        model, processor = train(steps)
        model.save_pretrained(output), processor.save_pretrained(output)
    else:
        model, processor = MMVAE.from_pretrained(folder), MMVAEProcessor.from_pretrained(folder)
    model.eval()
    held_out = sprites(level=3, split="test", num_rows=8)[:]
    generator = torch.Generator().manual_seed(0)

    inputs = processor(images=list(held_out["image"]))
    words = processor.batch_decode(model.generate("text", generator=generator, **inputs, max_new_tokens=12))
    for true, made in zip(held_out["caption"], words, strict=True):
        print(f"a picture of {true:20} -> {made}")
    made = model.generate("image", generator=generator, **processor(text=held_out["caption"]))
    given = [f"given: {caption}" for caption in held_out["caption"]]
    both = torch.cat([inputs["pixel_values"], made])
    title = "pictures with generated captions, then captions with generated pictures"
    print("figure:", captioned(both, [*words, *given], Path(output, "cross_modal.png"), 8, title))
    return held_out["caption"], words


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="a joint model of image and text; trained when not given")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", default="outputs/cross_modal")
    options = parser.parse_args()
    torch.set_num_threads(1)
    main(options.folder, options.steps, options.output)

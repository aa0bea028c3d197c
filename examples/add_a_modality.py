"""A modality of your own in a joint model, in one file: plucked strings, heard as waveforms, with a caption. Under a minute on a CPU.

What a modality's author writes is ``StringVAEConfig``, ``StringVAE`` and the two lines that register them. The rest is use: train it
with a TextVAE on rows of which half lack the caption, then describe sounds, and make the sounds that words ask for.
"""

import argparse
import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from transformers import AutoConfig, AutoModel

from mmvae import MMVAE, MMVAEConfig, TextVAEConfig
from mmvae.distributions import DiagNormal
from mmvae.models.configuration import VAEConfig
from mmvae.models.unimodal import VAEModel
from mmvae.processing import decode_text, train_tokenizer
from mmvae.schedules import linear


@strict
class StringVAEConfig(VAEConfig):
    """Configuration of a :class:`StringVAE`: samples of a waveform, width of the hidden layers, scale of the likelihood."""

    model_type = "string_vae"
    length: int = 256
    hidden_size: int = 128
    scale: float = 0.05


class StringVAE(VAEModel):
    """q(z|x) = N(mu(x), sigma^2(x)) and p(x|z) = N(f(z), scale^2) over waveforms x (B, length)."""

    config: StringVAEConfig
    main_input_name = "waveform"
    input_names = ("waveform",)

    def __init__(self, config: StringVAEConfig):
        super().__init__(config)
        self.encoder = self._layers(config.length, 2 * config.latent_dim)
        self.decoder = self._layers(config.latent_dim, config.length)
        self.latent_prior = self.build_prior()
        self.post_init()

    def _layers(self, inputs: int, outputs: int) -> nn.Sequential:
        size = self.config.hidden_size
        return nn.Sequential(nn.Linear(inputs, size), nn.SiLU(), nn.Linear(size, size), nn.SiLU(), nn.Linear(size, outputs))

    def encode(self, waveform: Tensor) -> DiagNormal:
        """q(z|x), batch (B,)."""
        return DiagNormal(*self.encoder(waveform).chunk(2, -1))

    def decode(self, z: Tensor) -> Distribution:
        """p(x|z), batch (*, B), event (length,)."""
        return Independent(Normal(self.decoder(z), self.config.scale), 1)

    def target(self, waveform: Tensor) -> Tensor:
        """The x that p(x|z) scores."""
        return waveform

    def render(self, z: Tensor) -> Tensor:
        """What one listens to: the mean of p(x|z)."""
        return self.decode(z).mean


AutoConfig.register(StringVAEConfig.model_type, StringVAEConfig)
AutoModel.register(StringVAEConfig, StringVAE)

PITCHES, LENGTHS = {"low": 5.0, "middle": 10.0, "high": 20.0}, {"short": 0.1, "long": 0.4}  # periods in a waveform; decay time
CAPTIONS = [f"a {length} {pitch} tone" for length in LENGTHS for pitch in PITCHES]


def pluck(captions: list[str], length: int = 256) -> Tensor:
    """Waveforms (B, length) that captions name; the pitch varies by 5 %, and no caption says how loud they are."""
    time, jitter, loudness = torch.arange(length) / length, *torch.rand(2, len(captions), 1)
    pitch = torch.tensor([[PITCHES[caption.split()[2]]] for caption in captions]) * (0.95 + 0.1 * jitter)
    decay = torch.tensor([[LENGTHS[caption.split()[1]]] for caption in captions])
    clean = (0.5 + loudness / 2) * torch.sin(2 * math.pi * pitch * time) * torch.exp(-time / decay)
    return clean + 0.02 * torch.randn_like(clean)


def listen(waveform: Tensor) -> list[str]:
    """Captions of waveforms (B, length), by physics: the loudest frequency, and the time at which half of the energy is over."""
    frequency = torch.fft.rfft(waveform, 4 * waveform.shape[1])[:, 1:].abs().argmax(1) / 4 + 0.25
    energy = waveform.square().cumsum(1)  # half of it is over after tau log(2) / 2
    decay = ((energy < energy[:, -1:] / 2).sum(1) + 1) / waveform.shape[1] * 2 / math.log(2)

    def nearest(known: dict[str, float], value: float) -> str:
        return min(known, key=lambda name: abs(math.log(value / known[name])))

    return [f"a {nearest(LENGTHS, d)} {nearest(PITCHES, f)} tone" for d, f in zip(decay.tolist(), frequency.tolist(), strict=True)]


def main(steps: int) -> list[float]:
    """Train, then generate both ways: the shares of right captions and of right sounds."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS)
    sound = StringVAEConfig(latent_dim=8)  # 4 more than are shared: what no caption says stays in the sound's own latents
    text = TextVAEConfig(vocab_size=len(tokenizer), embedding_size=32, hidden_size=64, latent_dim=4)
    model = MMVAE(MMVAEConfig(modalities={"sound": sound, "text": text}, latent_dim=4, likelihood_weights={"text": 10}))
    optimizer, beta = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True), linear(steps=steps // 2)
    for step in range(steps):
        captions = [CAPTIONS[n] for n in torch.randint(len(CAPTIONS), (64,)).tolist()]
        present = torch.stack([torch.ones(64).bool(), torch.rand(64) < 0.5], 1)  # columns as in `modalities`: half of the captions lack
        out = model(waveform=pluck(captions), **tokenizer(captions, padding=True, return_tensors="pt"), present=present, beta=beta(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: -ELBO {-out.elbo.mean().item():.1f} nats")

    model.eval()
    captions = 20 * CAPTIONS
    described = decode_text(tokenizer, model.generate("text", waveform=pluck(captions), max_new_tokens=6))
    made = listen(model.generate("sound", **tokenizer(captions, padding=True, return_tensors="pt")))
    for caption, words, sound in zip(CAPTIONS, described, made, strict=False):
        print(f"{caption:19} -> sound to text: {words:19} -> text to sound, as heard: {sound}")
    shares = [sum(a == b for a, b in zip(captions, given, strict=True)) / len(captions) for given in (described, made)]
    print("right captions: {:.0%}, right sounds: {:.0%}; by chance 17%".format(*shares))
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)

"""What a first implementation does, for ``recipes/benchmark.py``: the same networks and sizes, written plainly, in float32.

Shapes: ``B`` batch, ``T`` tokens, ``D`` latent, ``C,H,W`` picture, ``S`` samples.
"""

import math
from collections.abc import Mapping
from itertools import chain, combinations, pairwise

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mmvae import ImageVAE, ImageVAEConfig, TextVAE
from mmvae.nn import default_trunk


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)), (B, D) -> (B,) nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)


class PlainTextVAE(nn.Module):
    """A sentence VAE: packed GRUs, logits everywhere, the latent as initial state."""

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
        return (nll + kl(mean, logvar).sum()) / len(ids)


class PlainImageVAE(nn.Module):
    """The networks of an :class:`ImageVAE`, NCHW in memory."""

    def __init__(self, config: ImageVAEConfig):
        super().__init__()
        self.vae = ImageVAE(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [0, 1] -> mean and log-variance (B, D)."""
        trunk = self.vae.encoder
        return self.vae.to_moments(F.silu(trunk.norm(trunk.levels(trunk.stem(2 * x - 1)))).flatten(1)).chunk(2, 1)

    def decode(self, z: Tensor) -> Normal:
        """(B, D) -> the distribution of every pixel, (B, C, H, W)."""
        trunk = self.vae.decoder
        h = self.vae.from_latent(z).unflatten(1, (-1, *self.vae.config.bottom_size))
        loc = trunk.head(F.silu(trunk.norm(trunk.levels(h))))
        return Normal(loc, self.vae.likelihood.scale(loc), validate_args=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> mean loss in nats per row."""
        mean, logvar = self.encode(x)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return (kl(mean, logvar) - self.decode(z).log_prob(x).flatten(1).sum(1)).mean()

    @torch.no_grad()
    def log_marginal(self, picture: Tensor, num_samples: int) -> Tensor:
        """log p(x) of one picture (C, H, W), () nats: encoder and decoder run on ``num_samples`` copies, 100 at a time."""
        log_weights = []
        for copies in picture.expand(num_samples, *picture.shape).split(100):
            mean, logvar = self.encode(copies)
            q = Normal(mean, (0.5 * logvar).exp(), validate_args=False)
            z = q.sample()
            ratio = Normal(0.0, 1.0, validate_args=False).log_prob(z) - q.log_prob(z)
            log_weights.append(self.decode(z).log_prob(copies).flatten(1).sum(1) + ratio.sum(1))
        return torch.cat(log_weights).logsumexp(0) - math.log(num_samples)


def subset_loss(vaes: Mapping[str, nn.Module], inputs: Mapping[str, dict[str, Tensor]], dim: int) -> Tensor:
    """MoPoE's loss with one forward pass for every subset of modalities: encode its members, multiply, sample, decode all. () nats."""
    losses = []
    for members in chain.from_iterable(combinations(vaes, size) for size in range(1, len(vaes) + 1)):
        posteriors = [vaes[name].encode(**inputs[name]) for name in members]
        precision = sum(((-q.logvar[:, :dim]).exp() for q in posteriors), torch.ones(()))  # the prior is an expert, too
        mean = sum((q.loc[:, :dim] * (-q.logvar[:, :dim]).exp() for q in posteriors), torch.zeros(())) / precision
        logvar = -precision.log()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        log_px = sum(vae.decode(z).log_prob(vae.target(**inputs[name])) for name, vae in vaes.items())
        losses.append((kl(mean, logvar) - log_px).mean())
    return torch.stack(losses).mean()


def transposed_decoder(config: ImageVAEConfig, values: int, parameters: int) -> nn.Sequential:
    """From z to a picture by transposed convolutions, 4x4 with stride 2, that are as wide as makes about as many parameters.

    They begin with the features that a network with levels of half the size each has at its bottom.
    """
    plain = default_trunk(max(config.height_width), patch_size=2)
    bottom, (height, width) = plain.channels[-1], (-(-side // plain.stride) for side in config.height_width)

    def build(scale: float) -> nn.Sequential:
        widths = [bottom, *(max(1, round(scale * width)) for width in reversed(plain.channels[:-1])), values]
        layers: list[nn.Module] = [nn.Linear(config.latent_dim, bottom * height * width), nn.Unflatten(1, (bottom, height, width))]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers[:-2])

    def distance(scale: float) -> int:
        with torch.device("meta"):
            return abs(sum(p.numel() for p in build(scale).parameters()) - parameters)

    return build(min((0.5 + 0.05 * i for i in range(300)), key=distance))


@torch.no_grad()
def write_sentences(model: TextVAE, latents: Tensor, max_tokens: int) -> list[list[int]]:
    """The likeliest words of latents (B, D), one token after the other for all rows until every row has ended; ids without BOS and EOS."""
    sentences: list[list[int]] = [[] for _ in latents]
    ended = [False] * len(latents)
    tokens, hidden = torch.full((len(latents), 1), model.config.bos_token_id), None
    while not all(ended) and max(map(len, sentences)) < max_tokens:
        states, hidden = model.decoder(tokens, latents, hidden)
        tokens = model.lm_head(states[:, -1]).argmax(-1, keepdim=True)
        for row, sentence in enumerate(sentences):
            token = tokens[row].item()
            ended[row] = ended[row] or token == model.config.eos_token_id
            if not ended[row]:
                sentence.append(token)
    return sentences

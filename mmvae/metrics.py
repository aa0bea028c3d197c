r"""Figures of merit. Sums are in nats per row; conversions say so in their names.

Shapes: ``N`` rows, ``D`` latent.

References:
    Burda et al. (2016), active units, https://arxiv.org/abs/1509.00519
    Dieng et al. (2019) and Li et al. (2019), mutual information with the aggregated posterior, https://arxiv.org/abs/1909.00868
"""

import math

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal


def active_units(mean: Tensor, threshold: float = 0.01) -> int:
    r"""Number of latent dimensions with :math:`\mathrm{Var}_x(\mathbb E_q[z_d]) \ge` ``threshold`` (the variance over N - 1).

    Arguments:
        mean: (N, *event) posterior means, N >= 2.
        threshold: in squared units of the latent.
    """
    return int((mean.flatten(1).double().var(0) >= threshold).sum())


def mutual_information(q: DiagNormal, z: Tensor | None = None, chunk_size: int = 256) -> float:
    r"""I(x; z) under q in nats, by Li et al.'s estimator over all N rows given (at most ln N):

    .. math:: \frac1N \sum_i \Big[\log q(z_i|x_i) - \log \frac1N \sum_j q(z_i|x_j)\Big], \quad z_i \sim q(z|x_i)

    Arguments:
        q: batch (N,).
        z: (N, *event) one sample of each row; drawn when None.
        chunk_size: rows compared with all others at once.
    """
    q = DiagNormal(q.loc.flatten(1), q.logvar.flatten(1))
    z = (q.rsample() if z is None else z.flatten(1)).detach()
    total = 0.0
    for part in z.split(chunk_size):
        total += q.log_prob(part.unsqueeze(1)).logsumexp(1).double().sum().item()
    return q.log_prob(z).double().mean().item() - total / len(z) + math.log(len(z))


def bits_per_dim(nll_nats: float, dims: int) -> float:
    """Negative log-likelihood per row in bits per pixel value; only true for a discretized likelihood of 8-bit images."""
    return nll_nats / (dims * math.log(2))


def perplexity(nll_nats: float, tokens: float) -> float:
    """``exp(nll / tokens)``: both are means per row, or both totals; EOS is a token, BOS and padding are not."""
    nats = nll_nats / tokens
    return math.inf if nats > 700 else math.exp(nats)  # math.exp raises on overflow


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB (torchmetrics). Both (B, C, H, W) in [0, 1]. Returns (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(pixels.float(), reference.float(), data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (torchmetrics). Both (B, C, H, W) in [0, 1]. Returns (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(pixels.float(), reference.float(), data_range=1.0, reduction="none")
    return torch.as_tensor(value).reshape(len(pixels))

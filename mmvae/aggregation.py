"""From each modality's own posterior to the joint one.

Shapes: ``K`` components, ``B`` batch, ``M`` modalities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal, GaussianMixture


@dataclass(frozen=True)
class Posterior:
    """What was inferred from the inputs.

    Attributes:
        mixture: the posterior of the latent, batch (B,), components (K, B).
        experts: each modality's own q(z|x_m), batch (B,).
        visible: (B, M) bool: what the encoders saw.
        members: (K, B, M) bool: which modalities component k is made of.
    """

    mixture: GaussianMixture
    experts: dict[str, DiagNormal]
    visible: Tensor
    members: Tensor


def alone(name: str, q: DiagNormal) -> Posterior:
    """The posterior of a model of one modality: one component, always visible.

    Arguments:
        name: of the modality.
        q: q(z|x), batch (B,).
    """
    (size,), device = q.batch_shape, q.loc.device
    mixture = GaussianMixture(q.unsqueeze(0), torch.zeros(1, size, device=device))
    seen = torch.ones(1, size, 1, dtype=torch.bool, device=device)
    return Posterior(mixture, {name: q}, seen[0], seen)

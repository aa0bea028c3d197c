r"""A latent on the circle: what two dimensions of a normal say of a direction.

Under the prior N(0, I) of two dimensions the angle is uniform, and how far from the origin they lie, their radius, independent of it. Where
nothing that is decoded depends on the radius, only the angle has to be paid for: the posterior of the angle is a projected normal,

.. math:: \frac{q(\theta)}{1 / 2\pi} = e^{-R^2/2}\Big(1 + \kappa \frac{\Phi(\kappa)}{\phi(\kappa)}\Big),
          \quad \kappa = R \cos(\theta - \mu), \quad R = |m| / \sigma,

and the radius is left as the prior has it.

References:
    Mardia, Jupp (2000), Directional statistics, §3.5.6 (projected, or offset, normal)
"""

import math

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal, at_least_float32

_NODES = 256
_NARROW = 30.0  # beyond it the nodes would be too few, and the first terms of the expansion in 1 / R are exact to a millionth


def log_ratio(along: Tensor, across: Tensor) -> Tensor:
    r"""Log-density of a projected normal relative to the uniform one, in nats.

    Arguments:
        along, across: :math:`R \cos` and :math:`R \sin` of the angle from its mean, any shape.
    """
    ahead, behind = along.clamp_min(0), along.clamp_max(0)
    half = (-0.5 * ahead.square()).exp()
    towards = (half + ahead * math.sqrt(2 * math.pi) * torch.special.ndtr(ahead)).log() - 0.5 * across.square()
    tail = 1 + behind * math.sqrt(math.pi / 2) * torch.special.erfcx(-behind / math.sqrt(2))
    away = tail.clamp_min(1e-7).log() - 0.5 * (along.square() + across.square())
    return torch.where(along > 0, towards, away)


def divergence(concentration: Tensor) -> Tensor:
    """KL divergence of a projected normal from the uniform distribution in nats.

    Arguments:
        concentration: R >= 0, any shape; 0 is uniform.
    """
    angle = 2 * math.pi * (torch.arange(_NODES, device=concentration.device) + 0.5) / _NODES
    wide = concentration.clamp_max(_NARROW).unsqueeze(-1)
    log_f = log_ratio(wide * angle.cos(), wide * angle.sin())
    narrow = concentration.clamp_min(_NARROW)
    on_the_line = narrow.log() + 0.5 * math.log(2 * math.pi / math.e) - 0.5 / narrow.square()
    return torch.where(concentration < _NARROW, (log_f.exp() * log_f).mean(-1), on_the_line)


class ProjectedNormal(DiagNormal):
    """A diagonal normal whose last two dimensions stand for a direction: their angle is told, their radius is that of N(0, I).

    Samples have the radius of the normal, which tells nothing. Both dimensions have one variance, the geometric mean of those given. The
    prior must be N(0, I) in these two.

    Arguments:
        loc: (*, D) mean, not 0 in both.
        logvar: (*, D), nats.
    """

    def __init__(self, loc: Tensor, logvar: Tensor, event_dims: int = 1):
        one = at_least_float32(logvar)[..., -2:].mean(-1, keepdim=True)
        super().__init__(loc, torch.cat([at_least_float32(logvar)[..., :-2], one.expand(*logvar.shape[:-1], 2)], -1), event_dims)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats. ``value``: (*, B, D). Returns (*, B)."""
        with torch.autocast(self.loc.device.type, enabled=False):
            value = at_least_float32(value)
            rest = self.base_dist.log_prob(value)[..., :-2].sum(-1)
            towards, at = self.loc[..., -2:], value[..., -2:]
            square = at.square().sum(-1)
            scale = ((square + 1e-20).sqrt() * self.stddev[..., -1]).reciprocal()
            along = (towards * at).sum(-1) * scale
            across = (towards[..., 0] * at[..., 1] - towards[..., 1] * at[..., 0]) * scale
            return rest - 0.5 * square - math.log(2 * math.pi) + log_ratio(along, across)

    def kl_per_dimension(self, p: DiagNormal) -> Tensor:
        """KL divergence of each coordinate in nats, (*, B, D), with half of the angle's in each of the last two."""
        with torch.autocast(self.loc.device.type, enabled=False):
            of_angle = 0.5 * divergence(self.loc[..., -2:].norm(dim=-1) / self.stddev[..., -1]).unsqueeze(-1)
            rest = super().kl_per_dimension(p)[..., :-2]
            return torch.cat([rest, of_angle.expand(*rest.shape[:-1], 2)], -1)

r"""What an objective is made of: samples, likelihoods and divergences of a batch.

Shapes: ``S`` samples, ``K`` components, ``B`` batch, ``M`` modalities. Rows are independent (but for free bits per batch).

References:
    Kingma et al. (2016), §C.8 (free bits), https://arxiv.org/abs/1606.04934; Li et al. (2019), https://arxiv.org/abs/1909.00868
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from mmvae.aggregation import Posterior
from mmvae.distributions import DiagNormal


@dataclass(frozen=True)
class Terms:
    """All that an objective may know: values and distributions, no model and no config.

    Attributes:
        z: (S, K, B, *event) samples of the posterior's components.
        log_px: per modality (S, K, B) log p(x_m|z) in nats; 0 where absent.
        q: the posterior.
        prior: p(z).
        private: log p(w) - log q(w) of latents that one modality keeps to itself, (S, K, B).
        log_weights: (K, B) nats, of the components that z holds; those of ``q.mixture`` when None. Where one component was drawn per
            row (:meth:`Posterior.draw`), z holds just that one, K = 1, and its weight is 1: zeros.
        members: (K, B, M) or (S, K, B, M) bool: which modalities these components are made of; ``q.members`` when None.
        log_pk: (K, B) nats, log p(k), when k is itself a latent that p(x|z, k) depends on, as a class is. Then the bound is that of (k, z)
            under ``q(k) q(z|k)``, with q(k) the weights; else k only says where z came from, and q(z) is the whole mixture.
        components: these components, batch (K, B), or (S, K, B) where each sample drew its own; ``q.mixture.components`` when None.
        scales: weight of each modality's log-likelihood in what is maximised, 1 where it is not named. Leave it out where a number is to
            be read as a likelihood: in figures, and in importance sampling.
        auxiliary: (S, K, B) nats, what a model maximises beside the objective; part of no objective and no figure.
    """

    z: Tensor
    log_px: dict[str, Tensor]
    q: Posterior
    prior: Distribution
    private: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None
    members: Tensor | None = None
    log_pk: Tensor | None = None
    components: DiagNormal | None = None
    scales: dict[str, float] = field(default_factory=dict)
    auxiliary: Tensor | None = None

    def log_pi(self) -> Tensor:
        """log of the weights of the components in z, (K, B)."""
        return self.q.mixture.log_weights if self.log_weights is None else self.log_weights

    def mean(self, value: Tensor) -> Tensor:
        """Mean over samples of the weighted sum over components, (S, K, B) to (B,), in which an absent one counts nothing."""
        weights = self.log_pi().exp()
        return torch.where(weights > 0, weights * value, 0.0).sum(1).mean(0)

    def drawn_from(self) -> DiagNormal:
        """The components that z holds samples of, batch (K, B) or (S, K, B)."""
        components = self.q.mixture.components if self.components is None else self.components
        if components.batch_shape[-2] != self.z.shape[1]:
            held, of = self.z.shape[1], components.batch_shape[-2]
            raise ValueError(f"components: received None for z of {held} of {of} components, expected those that z was drawn from")
        return components

    def likelihood(self) -> Tensor:
        """log p(x|z) summed over modalities with their ``scales``, (S, K, B)."""
        return torch.stack([self.scales.get(name, 1.0) * value for name, value in self.log_px.items()]).sum(0)

    def log_ratio(self, detach_q: bool = False) -> Tensor:
        """log p(z) - log q(z), plus the private latents' share, (S, K, B)."""
        value = self.prior.log_prob(self.z) + sum(self.private.values())
        if self.log_pk is None:
            return value - (self.q.mixture.detach() if detach_q else self.q.mixture).log_prob(self.z)
        q = self.drawn_from().detach() if detach_q else self.drawn_from()
        return value - q.log_prob(self.z) + self.log_pk - present(self.log_pi())

    def own(self) -> "Terms":
        """The same, but each component scores only the modalities that it is made of, and pays for their private latents alone."""
        made_of = dict(zip(self.q.experts, (self.q.members if self.members is None else self.members).unbind(-1), strict=True))

        def of_members(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.where(made_of[name], value, 0.0) for name, value in values.items()}

        return replace(self, log_px=of_members(self.log_px), private=of_members(self.private))


def present(log_weights: Tensor) -> Tensor:
    """Log-weights with 0 for absent components, whose terms are left out anyway: no infinity may meet a gradient."""
    return log_weights.masked_fill(log_weights == -math.inf, 0.0)


def free_bits(kl: Tensor, nats: float, per: str = "dimension", here: Tensor | None = None) -> Tensor:
    r"""The KL divergence with a floor below which it takes no gradient, :math:`\sum_g \max(\lambda, \mathrm{KL}_g)`.

    Of an estimate :math:`X` of the divergence the floor is on the estimate, and :math:`\mathbb E \max(\lambda, X)` is above
    :math:`\max(\lambda, \mathrm{KL})` by as much as X spreads about lambda.

    Arguments:
        kl: (*, B, D) nats per dimension for ``per="dimension"`` and ``"unit"``, else (*, B) nats per row.
        nats: the floor lambda of each group.
        per: the group: "dimension" (of every row, Li et al. 2019), "unit" (a dimension's mean over rows, Kingma et al. 2016), "row", or
            "batch" (the mean over rows). In "unit" and "batch" rows depend on each other.
        here: (*, B), at least 0, what a row weighs in a mean: whether it is there, or how probable the component is for it; 1 when None.

    Returns:
        The shape of ``kl``; dimensions are for the caller to sum.

    Raises:
        ValueError: for another ``per``.
    """
    if per not in ("dimension", "unit", "row", "batch"):
        raise ValueError(f"free_bits_per: received {per!r}, expected 'dimension', 'unit', 'row' or 'batch'")
    if per in ("unit", "batch"):
        over = -2 if per == "unit" else -1
        weight = torch.ones_like(kl) if here is None else (here if per == "batch" else here.unsqueeze(-1)).expand_as(kl).to(kl.dtype)
        mean = (weight * kl).sum(over, keepdim=True) / weight.sum(over, keepdim=True).clamp_min(1e-9)
        return torch.where(mean > nats, kl, nats + 0.0 * kl)
    return kl.clamp_min(nats)


def kl_to_prior(terms: Terms, floor: float | Mapping[str, float] = 0.0, per: str = "dimension", divergence: str = "mixture") -> Tensor:
    """KL(q || p) of every sample and component in nats, in closed form where there is one, with free bits on the share of z.

    Where there is no closed form (a mixture, or a mixture or Vamp prior) it is log q(z) - log p(z), and free bits are on its mean over
    the samples (of a "mixture" over the components too), the same for all of them: the more samples, the closer that is to a floor
    on the divergence itself.

    Arguments:
        terms: see :class:`Terms`.
        floor, per: see :func:`free_bits`; 0 is off. Floors of several groups by their names, instead: those of dimensions and units come
            first, and what they make of a row's divergence meets the others.
        divergence: "mixture" for that of the whole posterior, "components" for that of each component, whose mean is an upper bound of it.

    Returns:
        (S, K, B).

    Raises:
        ValueError: for another ``divergence``, and for free bits per dimension where the divergence does not fall into dimensions.
    """
    if divergence not in ("mixture", "components"):
        raise ValueError(f"divergence: received {divergence!r}, expected 'mixture' or 'components'")
    each = divergence == "components" or terms.log_pk is not None or terms.q.mixture.components.batch_shape[0] == 1
    q = terms.drawn_from() if each else terms.q.mixture
    floors = {group: nats for group, nats in (floor if isinstance(floor, Mapping) else {per: floor}).items() if nats}
    here = terms.log_pi().exp()
    by_dimension = [group for group in floors if group not in ("row", "batch")]
    if isinstance(q, DiagNormal) and isinstance(terms.prior, DiagNormal):
        value = q.kl_per_dimension(terms.prior).flatten(-len(q.event_shape))
        for group in by_dimension:
            value = free_bits(value, floors[group], group, here)
        value = value.sum(-1)
    elif by_dimension:
        raise ValueError(
            f"free_bits_per: received {by_dimension[0]!r} with a mixture, expected 'row' or 'batch' (the KL has no dimensions)"
        )
    else:
        value = q.log_prob(terms.z) - terms.prior.log_prob(terms.z)
        apart = terms.components is not None and len(terms.components.batch_shape) > 2  # each sample is of a component of its own
        if floors and not (each and apart):  # max(lambda, X) of one sample is in the mean more than that of the mean
            value = value.mean(0, keepdim=True)
            if not each:  # which is one divergence, and no component has one of its own
                value, here = torch.where(here > 0, here * value, 0.0).sum(1, keepdim=True), None
    for group in [group for group in floors if group not in by_dimension]:
        value = free_bits(value, floors[group], group, here)
    if terms.log_pk is not None:
        value = value + present(terms.log_pi()) - terms.log_pk
    return value.expand(terms.z.shape[:3]) - sum(terms.private.values())

r"""What is maximised: functions ``(terms, beta) -> (B,)`` in nats.

With :math:`w = p(x \mid z)\,\big(p(z) / q(z)\big)^\beta` for samples z of the posterior's components:

    elbo:  mean_s  sum_k w_k ( log p(x|z_sk) - beta (log q(z_sk) - log p(z_sk)) )
    iwae:  log mean_s sum_k w_k w(z_sk)
    dreg:  the value of iwae with a gradient of lower variance

Shapes: ``S`` samples, ``K`` components, ``B`` batch. An option is bound with ``functools.partial``: ``partial(elbo, free_bits=0.1)``.

References:
    Kingma, Welling (2014), https://arxiv.org/abs/1312.6114; Burda et al. (2016), https://arxiv.org/abs/1509.00519
    Tucker et al. (2019), Doubly reparameterized gradient estimators, https://arxiv.org/abs/1810.04152
    Kingma et al. (2016), §C.8 (free bits), https://arxiv.org/abs/1606.04934; Li et al. (2019), https://arxiv.org/abs/1909.00868
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution

from mmvae.aggregation import Posterior
from mmvae.distributions import DiagNormal, kl_per_dimension


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
            row, z holds just that one, K = 1, and its weight is 1: zeros.
        members: (K, B, M) bool, likewise: which modalities these components are made of; ``q.members`` when None.
        log_pk: (K, B) nats, log p(k), when k is itself a latent that p(x|z, k) depends on, as a class is. Then the bound is that of (k, z)
            under ``q(k) q(z|k)``, with q(k) the weights; else k only says where z came from, and q(z) is the whole mixture.
    """

    z: Tensor
    log_px: dict[str, Tensor]
    q: Posterior
    prior: Distribution
    private: dict[str, Tensor] = field(default_factory=dict)
    log_weights: Tensor | None = None
    members: Tensor | None = None
    log_pk: Tensor | None = None

    def weights(self) -> Tensor:
        """log of the weights of the components in z, (K, B)."""
        return self.q.mixture.log_weights if self.log_weights is None else self.log_weights

    def likelihood(self) -> Tensor:
        """log p(x|z) summed over modalities, (S, K, B)."""
        return torch.stack(list(self.log_px.values())).sum(0)

    def log_ratio(self, detach_q: bool = False) -> Tensor:
        """log p(z) - log q(z), plus the private latents' share, (S, K, B)."""
        q = self.q.mixture.detach() if detach_q else self.q.mixture
        value = self.prior.log_prob(self.z) + sum(self.private.values())
        if self.log_pk is None:
            return value - q.log_prob(self.z)
        return value - q.components.log_prob(self.z) + self.log_pk - _present(self.weights())


Objective = Callable[[Terms, float], Tensor]


def _present(log_weights: Tensor) -> Tensor:
    """Log-weights with 0 for absent components, whose terms are left out anyway: no infinity may meet a gradient."""
    return log_weights.masked_fill(log_weights == -math.inf, 0.0)


def free_bits(kl: Tensor, nats: float, per: str = "dimension") -> Tensor:
    r"""The KL divergence with a floor below which it takes no gradient, :math:`\sum_g \max(\lambda, \mathrm{KL}_g)`.

    Arguments:
        kl: (*, B, *event) nats per dimension for ``per="dimension"``, else (*, B) nats per row.
        nats: the floor lambda of each group.
        per: the group: "dimension" (of every row), "row", or "batch" (the mean over rows, the only one in which rows depend on each other).

    Returns:
        (*, B), for "dimension" still with its event dimensions, to be summed by the caller.

    Raises:
        ValueError: for another ``per``.
    """
    if per not in ("dimension", "row", "batch"):
        raise ValueError(f"free_bits_per: received {per!r}, expected 'dimension', 'row' or 'batch'")
    if per == "batch":
        mean = kl.mean(-1, keepdim=True)
        return torch.where(mean > nats, kl, nats + 0.0 * kl)
    return kl.clamp_min(nats)


def _closed_form(terms: Terms) -> DiagNormal | None:
    """The posterior's components, when z comes from each alone (there is one, or k is a latent) and the prior is a normal too."""
    q = terms.q.mixture.components
    alone = q.batch_shape[0] == 1 or terms.log_pk is not None
    return q if alone and isinstance(terms.prior, DiagNormal) else None


def kl_to_prior(terms: Terms, floor: float = 0.0, per: str = "dimension") -> Tensor:
    """KL(q || p) of every sample and component in nats, in closed form where there is one, with free bits. Returns (S, K, B).

    Raises:
        ValueError: for free bits per dimension where the divergence does not fall into dimensions.
    """
    q = _closed_form(terms)
    if floor and per == "dimension":
        if q is None:
            raise ValueError("free_bits_per: received 'dimension' with a mixture, expected 'row' or 'batch' (the KL has no dimensions)")
        value = free_bits(kl_per_dimension(q, terms.prior), floor).flatten(2).sum(-1)
    else:
        value = -terms.log_ratio() if q is None else kl_per_dimension(q, terms.prior).flatten(2).sum(-1)
        value = free_bits(value, floor, per) if floor else value
    value = value.expand(terms.z.shape[:3])
    if q is None:
        return value
    if terms.log_pk is not None:
        value = value + _present(terms.weights()) - terms.log_pk
    return value - sum(terms.private.values())


def elbo(terms: Terms, beta: float = 1.0, free_bits: float = 0.0, free_bits_per: str = "dimension") -> Tensor:
    r"""Evidence lower bound, :math:`\mathbb E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: weight of the divergence.
        free_bits: floor of the divergence in nats, per group; 0 is off.
        free_bits_per: the group, see :func:`free_bits`.

    Returns:
        (B,).
    """
    value = terms.likelihood() - beta * kl_to_prior(terms, free_bits, free_bits_per)
    weights = terms.weights().exp()
    return torch.where(weights > 0, weights * value, 0.0).sum(1).mean(0)


def log_weights(terms: Terms, beta: float = 1.0, detach_q: bool = False) -> Tensor:
    """log w of every sample, component weights included, (S K, B) nats; the log of their sum over S is the importance-weighted bound."""
    return (terms.likelihood() + beta * terms.log_ratio(detach_q) + terms.weights()).flatten(0, 1)


def iwae(terms: Terms, beta: float = 1.0) -> Tensor:
    r"""Importance-weighted bound, :math:`\log \tfrac1S \sum_s w(z_s)`, in nats. Returns (B,)."""
    return log_weights(terms, beta).logsumexp(0) - math.log(len(terms.z))


def dreg(terms: Terms, beta: float = 1.0) -> Tensor:
    r"""The value of :func:`iwae` with the doubly reparameterised gradient.

    The decoder and the prior get :math:`\sum_s \tilde w_s \nabla \log w_s`, the encoder, through z only,
    :math:`\sum_s \tilde w_s^2 \nabla_z \log w_s \nabla z_s`, with :math:`\tilde w` the normalised weights.

    Returns:
        (B,) nats.
    """
    log_w = log_weights(terms, beta, detach_q=True)
    normalised = log_w.detach().softmax(0)
    if terms.z.requires_grad:
        share = normalised.reshape(*terms.z.shape[:3], *[1] * (terms.z.dim() - 3))
        terms.z.register_hook(lambda grad: share * grad)
    surrogate = torch.where(normalised > 0, normalised * log_w, 0.0).sum(0)  # an absent component is 0 times -inf
    bound = (log_w.logsumexp(0) - math.log(len(terms.z))).detach()
    return bound + surrogate - surrogate.detach()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"elbo": elbo, "iwae": iwae, "dreg": dreg}

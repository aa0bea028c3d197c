r"""What is maximised: functions ``(terms, beta) -> (B,)`` in nats.

With :math:`w = p(x \mid z)\,\big(p(z) / q(z)\big)^\beta` for samples z of the posterior's components, of weights pi_k:

    elbo:   mean_s  sum_k pi_k ( log p(x|z_sk) - beta (log q(z_sk) - log p(z_sk)) )
    iwae:   log mean_s sum_k pi_k w(z_sk);    dreg: its value, with a gradient of lower variance
    mvae:   sum_k  ELBO of the modalities that component k is made of
    mvtcae: the ELBO with a share alpha of its divergence taken from each modality's own posterior instead
    mmvm:   every modality from its own posterior, these drawn to each other
    jmvae:  the ELBO less alpha times the divergence from each modality's own posterior

Shapes: ``S`` samples, ``K`` components, ``B`` batch, ``M`` modalities. An option is bound with ``functools.partial``:
``partial(elbo, free_bits=0.1)``. Only visible modalities count in a divergence, and rows are independent (but for free bits per batch).

References:
    Kingma, Welling (2014), https://arxiv.org/abs/1312.6114; Burda et al. (2016), https://arxiv.org/abs/1509.00519
    Tucker et al. (2019), Doubly reparameterized gradient estimators, https://arxiv.org/abs/1810.04152
    Kingma et al. (2016), §C.8 (free bits), https://arxiv.org/abs/1606.04934; Li et al. (2019), https://arxiv.org/abs/1909.00868
    Wu, Goodman (2018), MVAE, https://arxiv.org/abs/1802.05335; Shi et al. (2019), MMVAE, https://arxiv.org/abs/1911.03393
    Sutter et al. (2021), MoPoE, https://arxiv.org/abs/2105.02470; Suzuki et al. (2016), JMVAE, https://arxiv.org/abs/1611.01891
    Hwang et al. (2021), MVTCAE, NeurIPS 34; Sutter et al. (2024), MMVM, https://arxiv.org/abs/2403.05300
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from mmvae.aggregation import Posterior
from mmvae.distributions import DiagNormal, kl, kl_per_dimension


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

    def weights(self) -> Tensor:
        """log of the weights of the components in z, (K, B)."""
        return self.q.mixture.log_weights if self.log_weights is None else self.log_weights

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
        return value - q.log_prob(self.z) + self.log_pk - _present(self.weights())

    def own(self) -> "Terms":
        """The same, but each component scores only the modalities that it is made of, and pays for their private latents alone."""
        made_of = dict(zip(self.q.experts, (self.q.members if self.members is None else self.members).unbind(-1), strict=True))

        def of_members(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.where(made_of[name], value, 0.0) for name, value in values.items()}

        return replace(self, log_px=of_members(self.log_px), private=of_members(self.private))


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


def kl_to_prior(terms: Terms, floor: float = 0.0, per: str = "dimension", divergence: str = "mixture") -> Tensor:
    """KL(q || p) of every sample and component in nats, in closed form where there is one, with free bits on the share of z.

    Arguments:
        terms: see :class:`Terms`.
        floor, per: see :func:`free_bits`; 0 is off.
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
    if isinstance(q, DiagNormal) and isinstance(terms.prior, DiagNormal):
        value = kl_per_dimension(q, terms.prior)
        value = (free_bits(value, floor) if floor and per == "dimension" else value).flatten(-len(q.event_shape)).sum(-1)
    elif floor and per == "dimension":
        raise ValueError("free_bits_per: received 'dimension' with a mixture, expected 'row' or 'batch' (the KL has no dimensions)")
    else:
        value = q.log_prob(terms.z) - terms.prior.log_prob(terms.z)
    value = free_bits(value, floor, per) if floor and per != "dimension" else value
    if terms.log_pk is not None:
        value = value + _present(terms.weights()) - terms.log_pk
    return value.expand(terms.z.shape[:3]) - sum(terms.private.values())


def _mean(terms: Terms, value: Tensor) -> Tensor:
    """Mean over samples of the weighted sum over components, (S, K, B) to (B,), in which an absent one counts nothing."""
    weights = terms.weights().exp()
    return torch.where(weights > 0, weights * value, 0.0).sum(1).mean(0)


def _sum(terms: Terms, value: Tensor) -> Tensor:
    """Likewise the sum over present components, which have equal weights: an estimate of it where z holds one that was drawn."""
    return (terms.q.mixture.log_weights > -math.inf).sum(0) * _mean(terms, value)


def elbo(terms: Terms, beta: float = 1.0, free_bits: float = 0.0, free_bits_per: str = "dimension", divergence: str = "mixture") -> Tensor:
    r"""Evidence lower bound, :math:`\mathbb E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: weight of the divergence.
        free_bits: floor of the divergence in nats, per group; 0 is off.
        free_bits_per: the group, see :func:`free_bits`.
        divergence: "mixture", or "components" for the upper bound :math:`\sum_k \pi_k \mathrm{KL}(q_k \| p)` of MoPoE, which needs no
            samples and has free bits per dimension.

    Returns:
        (B,).
    """
    return _mean(terms, terms.likelihood() - beta * kl_to_prior(terms, free_bits, free_bits_per, divergence))


def _log_w(terms: Terms, beta: float, detach_q: bool, looser: bool) -> Tensor:
    """log w, (S, K, B) nats, times the components' weights unless their mean is taken outside the logarithm."""
    value = terms.likelihood() + beta * terms.log_ratio(detach_q)
    return value if looser else value + terms.weights()


def log_weights(terms: Terms, beta: float = 1.0) -> Tensor:
    """log w of every sample, component weights included, (S K, B) nats; the log of their sum over S is the importance-weighted bound."""
    return _log_w(terms, beta, False, False).flatten(0, 1)


def iwae(terms: Terms, beta: float = 1.0, looser: bool = False) -> Tensor:
    r"""Importance-weighted bound, :math:`\log \tfrac1S \sum_s \sum_k \pi_k w(z_{sk})`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: weight of the divergence.
        looser: take the mean over components outside the logarithm, :math:`\sum_k \pi_k \log \tfrac1S \sum_s w(z_{sk})`: a lower bound
            in which no component can leave its rows to another (Shi et al. 2019).

    Returns:
        (B,).
    """
    log_w = _log_w(terms, beta, False, looser)
    bound = log_w.logsumexp(0 if looser else (0, 1)) - math.log(len(log_w))
    return _mean(terms, bound.unsqueeze(0)) if looser else bound


def dreg(terms: Terms, beta: float = 1.0, looser: bool = False) -> Tensor:
    r"""The value of :func:`iwae` with the doubly reparameterised gradient.

    The decoder and the prior get :math:`\sum_s \tilde w_s \nabla \log w_s`, the encoder, through z only,
    :math:`\sum_s \tilde w_s (1 - \beta + \beta \tilde w_s) \nabla_z \log w_s \nabla z_s`, with :math:`\tilde w` the normalised weights,
    over s alone when ``looser``. (The source has beta = 1; the factor is what its identity gives when log q counts beta times.)

    The encoder's gradient is unbiased for one component. For a mixture it is the published estimator (Shi et al. 2019), which leaves out
    the score of the other components, and is unbiased only when ``looser`` with one sample.

    Returns:
        (B,) nats.
    """
    log_w, over = _log_w(terms, beta, True, looser), 0 if looser else (0, 1)
    total = log_w.detach().logsumexp(over, keepdim=True)
    normalised = (log_w.detach() - total).exp()
    if terms.z.requires_grad:
        share = (1 - beta + beta * normalised).reshape(*terms.z.shape[:3], *[1] * (terms.z.dim() - 3))
        terms.z.register_hook(lambda grad: share * grad)
    surrogate = torch.where(normalised > 0, normalised * log_w, 0.0).sum(over, keepdim=True)  # an absent component is 0 times -inf
    bound = total - math.log(len(terms.z)) + surrogate - surrogate.detach()
    return _mean(terms, bound) if looser else bound[0, 0]


def mvae(terms: Terms, beta: float = 1.0, free_bits: float = 0.0, free_bits_per: str = "dimension") -> Tensor:
    r"""Sum of the ELBOs of subsets, :math:`\sum_A \mathbb E_{q_A}[\log p(x_A|z)] - \beta\,\mathrm{KL}(q_A \| p)` (Wu, Goodman 2018).

    The subsets are the components of the posterior: "mixture" over the full set, every single modality, and any more that one likes, with
    a prior expert. Each scores only what it is made of. The private latents of a modality count with it.

    Arguments:
        terms: with equal weights of the present components; see :class:`Terms`.
        beta, free_bits, free_bits_per: of every ELBO, see :func:`elbo`.

    Returns:
        (B,) nats: a sum, which grows with the number of subsets that are present.
    """
    own = terms.own()
    return _sum(terms, own.likelihood() - beta * kl_to_prior(own, free_bits, free_bits_per, "components"))


def _kl_to_experts(terms: Terms, name: str) -> Tensor:
    """Sum over visible modalities of KL(q || q_m) in nats, (B,)."""
    q = terms.q.mixture.components
    if len(q.loc) != 1:
        raise ValueError(f"{name}: received a posterior of {len(q.loc)} components, expected one (aggregation 'poe')")
    each = torch.stack([kl(q, expert)[0] for expert in terms.q.experts.values()], -1)
    return torch.where(terms.q.visible, each, 0.0).sum(-1)


def mvtcae(terms: Terms, beta: float = 1.0, alpha: float = 5 / 6) -> Tensor:
    r"""Bound on the total correlation that the latent explains (Hwang et al. 2021), with n visible modalities:

    :math:`\tfrac{n-\alpha}n \mathbb E_q[\log p(x|z)]
    - \beta \big[(1-\alpha) \mathrm{KL}(q \| p) + \tfrac\alpha n \sum_m \mathrm{KL}(q \| q_m)\big]`

    Private latents, which the paper has not, keep their whole weight beta.

    Arguments:
        terms: of one component; see :class:`Terms`.
        beta: weight of the divergences.
        alpha: in [0, 1], the share of the total correlation in the objective; 0 is the ELBO.

    Returns:
        (B,) nats.

    Raises:
        ValueError: for a posterior of several components.
    """
    share = alpha / terms.q.visible.sum(-1).clamp_min(1)
    shared = replace(terms, private={})
    bound = (1 - share) * terms.likelihood() - beta * ((1 - alpha) * kl_to_prior(shared) - sum(terms.private.values()))
    return _mean(terms, bound) - beta * share * _kl_to_experts(terms, "mvtcae")


def jmvae(terms: Terms, beta: float = 1.0, alpha: float = 0.1, free_bits: float = 0.0, free_bits_per: str = "dimension") -> Tensor:
    r"""The ELBO with every modality's own posterior drawn over the joint one, :math:`\mathrm{ELBO} - \alpha \sum_m \mathrm{KL}(q \| q_m)`.

    After Suzuki et al. (2016), where q has an encoder of its own; here it is any aggregation of one component.

    Arguments:
        terms: of one component; see :class:`Terms`.
        beta, free_bits, free_bits_per: of the ELBO, see :func:`elbo`.
        alpha: weight of the alignment, at least 0; beta does not scale it.

    Returns:
        (B,) nats.

    Raises:
        ValueError: for a posterior of several components.
    """
    return elbo(terms, beta, free_bits, free_bits_per) - alpha * _kl_to_experts(terms, "jmvae")


def mmvm(terms: Terms, beta: float = 1.0, prior_weight: float = 0.0, regularizer: str = "mixture") -> Tensor:
    r"""Every modality from its own posterior, these drawn to each other rather than aggregated (Sutter et al. 2024):

    :math:`\sum_m \mathbb E_{q_m}[\log p(x_m|z_m)]
    - \beta \big[\mathrm{KL}(q_m \| \tfrac1n \sum_l q_l) + \gamma\,\mathrm{KL}(q_m \| p)\big]`

    Arguments:
        terms: whose components are the modalities (aggregation "moe"); see :class:`Terms`.
        beta: weight of the divergences.
        prior_weight: gamma, at least 0. At 0 nothing holds the latents to p(z).
        regularizer: "mixture", from the samples, or "pairwise", its bound :math:`\tfrac1n \sum_l \mathrm{KL}(q_m \| q_l)` in closed form.

    Returns:
        (B,) nats.

    Raises:
        ValueError: for another ``regularizer``, and where there is not one component for every modality.
    """
    mixture, size = terms.q.mixture, len(terms.q.experts)
    if len(mixture.log_weights) != size:
        raise ValueError(
            f"mmvm: received {len(mixture.log_weights)} components of {size} modalities, expected one each (aggregation 'moe')"
        )
    if regularizer == "mixture":
        divergence = terms.drawn_from().log_prob(terms.z) - mixture.log_prob(terms.z)
    elif regularizer == "pairwise":
        q = terms.drawn_from()
        pairs = kl(q.unsqueeze(len(q.batch_shape) - 1), mixture.components)  # (*, K, M, B)
        weights = mixture.log_weights.exp()
        divergence = torch.where(weights > 0, weights * pairs, 0.0).sum(-2)
    else:
        raise ValueError(f"regularizer: received {regularizer!r}, expected 'mixture' or 'pairwise'")
    own = terms.own()
    if prior_weight:
        divergence = divergence + prior_weight * kl_to_prior(replace(terms, private={}), divergence="components")
    return _sum(terms, own.likelihood() - beta * (divergence - sum(own.private.values())))


OBJECTIVES: dict[str, Callable[..., Tensor]] = {function.__name__: function for function in (elbo, iwae, dreg, mvae, mvtcae, mmvm, jmvae)}

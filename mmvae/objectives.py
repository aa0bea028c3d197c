r"""What is maximised: functions ``(terms, beta) -> (B,)`` in nats.

With :math:`w = p(x \mid z)\,\big(p(z) / q(z)\big)^\beta` for samples z of the posterior's components, of weights pi_k:

    elbo:   mean_s  sum_k pi_k ( log p(x|z_sk) - beta (log q(z_sk) - log p(z_sk)) )
    capacity: the ELBO with its divergence drawn to so many nats
    iwae:   log mean_s sum_k pi_k w(z_sk);    dreg: its value, with a gradient of lower variance
    mvae:   sum_k  ELBO of the modalities that component k is made of
    mvtcae: the ELBO with a share alpha of its divergence taken from each modality's own posterior instead
    mmvm:   every modality from its own posterior, these drawn to each other
    jmvae:  the ELBO less alpha times the divergence from each modality's own posterior

Shapes: ``S`` samples, ``K`` components, ``B`` batch, ``M`` modalities. An option is bound with ``functools.partial``:
``partial(elbo, free_bits=0.1)``. Only the visible counts in a divergence, and rows are independent (not by free bits per unit or batch).

References:
    Kingma, Welling (2014), https://arxiv.org/abs/1312.6114; Burda et al. (2016), https://arxiv.org/abs/1509.00519
    Tucker et al. (2019), Doubly reparameterized gradient estimators, https://arxiv.org/abs/1810.04152
    Burgess et al. (2018), Understanding disentangling in beta-VAE (capacity), https://arxiv.org/abs/1804.03599
    Wu, Goodman (2018), MVAE, https://arxiv.org/abs/1802.05335; Shi et al. (2019), MMVAE, https://arxiv.org/abs/1911.03393
    Sutter et al. (2021), MoPoE, https://arxiv.org/abs/2105.02470; Suzuki et al. (2016), JMVAE, https://arxiv.org/abs/1611.01891
    Hwang et al. (2021), MVTCAE, NeurIPS 34; Sutter et al. (2024), MMVM, https://arxiv.org/abs/2403.05300
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real

import torch
from torch import Tensor

from mmvae.distributions import kl
from mmvae.terms import Terms, kl_to_prior

Objective = Callable[[Terms, float], Tensor]


def _sum(terms: Terms, value: Tensor) -> Tensor:
    """Mean over samples of the sum over present components, which have equal weights; an estimate of it where z holds a drawn one."""
    return (terms.q.mixture.log_weights > -math.inf).sum(0) * terms.mean(value)


def elbo(
    terms: Terms,
    beta: float = 1.0,
    free_bits: float | Mapping[str, float] = 0.0,
    free_bits_per: str = "dimension",
    divergence: str = "mixture",
) -> Tensor:
    r"""Evidence lower bound, :math:`\mathbb E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: weight of the divergence.
        free_bits: floor of the divergence in nats, per group; 0 is off. Of several groups: ``{"unit": 0.1, "row": 6.0}``. Where the
            divergence is sampled it is on the estimate, see :func:`mmvae.terms.kl_to_prior`.
        free_bits_per: the group, see :func:`mmvae.terms.free_bits`.
        divergence: "mixture", or "components" for the upper bound :math:`\sum_k \pi_k \mathrm{KL}(q_k \| p)` of MoPoE, which needs no
            samples and has free bits per dimension.

    Returns:
        (B,).
    """
    return terms.mean(terms.likelihood() - beta * kl_to_prior(terms, free_bits, free_bits_per, divergence))


def capacity(terms: Terms, beta: float = 1.0, nats: float = 8.0, strength: float = 1.0) -> Tensor:
    r"""The ELBO, its divergence drawn to a capacity, :math:`\mathbb E_q[\log p(x|z)] - \gamma |\mathrm{KL}(q \| p) - \beta C|`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: share of the capacity that is open, so that a schedule from 0 to 1 opens it.
        nats: C, per row.
        strength: gamma, at least 0.

    Returns:
        (B,). No bound on log p(x) unless the divergence is at least the capacity. Where the divergence is sampled it is its estimate,
        the mean over the samples, that is drawn to C: :math:`|X - C|` is in the mean more than :math:`|\mathrm{KL} - C|`.
    """
    return terms.mean(terms.likelihood()) - strength * (terms.mean(kl_to_prior(terms)) - beta * nats).abs()


def _log_w(terms: Terms, beta: float, detach_q: bool, looser: bool) -> Tensor:
    """log w, (S, K, B) nats, times the components' weights unless their mean is taken outside the logarithm."""
    if looser and terms.components is not None and len(terms.components.batch_shape) > 2 and len(terms.z) > 1:
        raise ValueError(f"looser: received True with one component drawn for each of {len(terms.z)} samples, expected all (draw: 'all')")
    value = terms.likelihood() + beta * terms.log_ratio(detach_q)
    return value if looser else value + terms.log_pi()


def log_importance(terms: Terms, beta: float = 1.0) -> Tensor:
    """log w of every sample, component weights included, (S K, B) nats; the log of their sum over S is the importance-weighted bound."""
    return _log_w(terms, beta, False, False).flatten(0, 1)


def iwae(terms: Terms, beta: float = 1.0, looser: bool = False) -> Tensor:
    r"""Importance-weighted bound, :math:`\log \tfrac1S \sum_s \sum_k \pi_k w(z_{sk})`, in nats.

    Arguments:
        terms: see :class:`Terms`.
        beta: weight of the divergence.
        looser: take the mean over components outside the logarithm, :math:`\sum_k \pi_k \log \tfrac1S \sum_s w(z_{sk})`: a lower bound
            in which no component can leave its rows to another (Shi et al. 2019). Several samples then want all components.

    Returns:
        (B,).

    Raises:
        ValueError: when ``looser``, for several samples that each drew a component.
    """
    log_w = _log_w(terms, beta, False, looser)
    bound = log_w.logsumexp(0 if looser else (0, 1)) - math.log(len(log_w))
    return terms.mean(bound.unsqueeze(0)) if looser else bound


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
    return terms.mean(bound) if looser else bound[0, 0]


def mvae(terms: Terms, beta: float = 1.0, free_bits: float = 0.0, free_bits_per: str = "dimension") -> Tensor:
    r"""Sum of the ELBOs of subsets, :math:`\sum_A \mathbb E_{q_A}[\log p(x_A|z)] - \beta\,\mathrm{KL}(q_A \| p)` (Wu, Goodman 2018).

    The subsets are the components of the posterior: "mixture" over the full set, every single modality, and any more that one likes, with
    a prior expert. Each scores only what it is made of. The private latents of a modality count with it.

    Arguments:
        terms: with equal weights of the present components; see :class:`Terms`.
        beta, free_bits, free_bits_per: of every ELBO, see :func:`elbo`.

    Returns:
        (B,) nats: a sum, which grows with the number of subsets that are present.

    Raises:
        ValueError: for components that are not subsets of modalities, but classes.
    """
    if terms.log_pk is not None:
        raise ValueError("mvae: received components that are classes, expected modalities: with classes take elbo, iwae or dreg")
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
    return terms.mean(bound) - beta * share * _kl_to_experts(terms, "mvtcae")


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


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options of an objective that are no numbers or negative ones where it takes nats or a weight: ValueError, naming them.

    Arguments:
        name: of the options.
        options: by name; free bits may be those of several groups.
    """
    for option in _NATS_AND_WEIGHTS & options.keys():
        value = options[option]
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if not isinstance(number, Real) or not 0 <= number < math.inf:
                raise ValueError(f"{name}: {option}: received {value!r}, expected a finite number of at least 0")


_NATS_AND_WEIGHTS = {"free_bits", "nats", "strength", "alpha", "prior_weight"}
_ALL = (elbo, capacity, iwae, dreg, mvae, mvtcae, mmvm, jmvae)
OBJECTIVES: dict[str, Callable[..., Tensor]] = {function.__name__: function for function in _ALL}

r"""From each modality's own posterior to the joint one: functions ``(experts, visible, prior, **options) -> Posterior``.

Every aggregation is a mixture over subsets A of the modalities, each component a product of the experts in it:

    q(z|x) = mean over present A of q_A(z),    q_A proportional to prod_{m in A} q(z|x_m)  (times p(z), with a prior expert)

    poe     the full set alone
    moe     every single modality
    mopoe   every non-empty subset
    mixture the subsets that one names

A component is present in a row if its whole subset is visible there. In a row in which none is, the last component stands in as the
product of whatever is visible; with nothing visible that is the prior. So every row has a posterior, and no row needs to know another.

Shapes: ``K`` components, ``B`` batch, ``M`` modalities, ``*event`` the latent's event.

References:
    Wu, Goodman (2018), product of experts, https://arxiv.org/abs/1802.05335; Shi et al. (2019), mixture, https://arxiv.org/abs/1911.03393
    Sutter et al. (2021), mixture of products, https://arxiv.org/abs/2105.02470
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.distributions import Distribution

from mmvae.distributions import DiagNormal, GaussianMixture

MOST_MODALITIES = 8
"""Of ``mopoe``, whose components number 2^M - 1."""


@dataclass(frozen=True)
class Posterior:
    """What was inferred from the inputs.

    Attributes:
        mixture: the posterior of the latent, batch (B,), components (K, B).
        experts: each modality's own q(z|x_m), batch (B,); N(0, I) in rows in which it is not visible.
        visible: (B, M) bool: what the encoders saw.
        members: (K, B, M) bool: which modalities component k is made of; none where it is absent.
    """

    mixture: GaussianMixture
    experts: dict[str, DiagNormal]
    visible: Tensor
    members: Tensor

    def draw(self, uniform: Tensor) -> Tensor:
        """The number of one component of every row, chosen by the weights; an absent one never is.

        Arguments:
            uniform: (*, B) floats in [0, 1): they decide.

        Returns:
            (*, B) int64.
        """
        weights = self.mixture.log_weights.exp().expand(self.members.shape[:2])
        last = len(weights) - 1 - (weights.flip(0) > 0).int().argmax(0)  # of those present: rounding may leave the sum below `uniform`
        return (weights.cumsum(0) <= uniform.unsqueeze(-2)).sum(-2).minimum(last)

    def fullest(self) -> Tensor:
        """The number of the best informed component of every row, (B,) int64: of those made of most modalities the one of least entropy."""
        size = torch.where(self.mixture.log_weights > -torch.inf, self.members.sum(-1), -1)
        entropy = self.mixture.components.logvar.flatten(2).sum(-1)  # twice, but for a constant
        return entropy.masked_fill(size < size.amax(0), torch.inf).argmin(0)

    def at(self, index: Tensor) -> tuple[DiagNormal, Tensor]:
        """One component of every row: what :class:`mmvae.terms.Terms` takes as ``components`` and ``members`` (with zeros as weights).

        Arguments:
            index: (*, B) int64, as from :meth:`draw` or :meth:`fullest`.

        Returns:
            The components, batch (*, 1, B), and which modalities they are made of, (*, 1, B, M) bool.
        """
        q, rows = self.mixture.components, torch.arange(index.shape[-1], device=index.device)
        pick = index.unsqueeze(-2)
        return DiagNormal(q.loc[pick, rows], q.logvar[pick, rows], len(q.event_shape)), self.members[pick, rows]


@dataclass(frozen=True)
class JointPosterior(Posterior):
    """What was inferred from the visible modalities of a joint model.

    Attributes:
        private: q(w_m|x_m) of the modalities that have private latents, batch (B,); N(0, I) where one is not visible.
        states: (B, L, F), the encoder's states of the modalities that are a source of others; 0 on padding and where one is not visible.
    """

    private: dict[str, DiagNormal]
    states: dict[str, Tensor]


def hide(present: Tensor, probability: Tensor, uniform: Tensor) -> Tensor:
    r"""What is left of the modalities when each is hidden with a probability: those with :math:`u_m \ge p_m`, and never none.

    Of a row that would be left with nothing, the modality that it has with the largest :math:`u_m - p_m` stays.

    Arguments:
        present: (B, M) bool.
        probability: (M,) in [0, 1].
        uniform: (B, M) in (0, 1): they decide.

    Returns:
        (B, M) bool, a subset of ``present``.
    """
    margin = uniform - probability
    left = present & (margin >= 0)
    last = margin.masked_fill(~present, -2.0).argmax(1, keepdim=True)
    return left | present & torch.zeros_like(present).scatter(1, last, ~left.any(1, keepdim=True))


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


def product(experts: DiagNormal, members: Tensor, prior: DiagNormal, prior_expert: bool = False, pooling: str = "product") -> DiagNormal:
    r"""All subset products at once: precision :math:`\lambda = \sum_m \lambda_m`, mean :math:`\tfrac1\lambda \sum_m \lambda_m \mu_m`.

    "geometric" divides the precision by the number of experts: the normalised geometric mean, which is Hoelder pooling with alpha -> 0, and
    does not count what experts agree on twice. A log-variance stays in ``LOGVAR_RANGE`` (see :class:`DiagNormal`).

    Arguments:
        experts: batch (M, B); what belongs to no subset may be any finite number and takes a gradient of exactly 0.
        members: (K, B, M) bool: which experts each product is made of.
        prior: batch (), (1,) or (B,): the product of no experts.
        prior_expert: make the prior a member of every product.
        pooling: "product" or "geometric".

    Returns:
        Batch (K, B).

    Raises:
        ValueError: for another ``pooling``.
    """
    if pooling not in ("product", "geometric"):
        raise ValueError(f"pooling: received {pooling!r}, expected 'product' or 'geometric'")
    prior = prior.expand(experts.batch_shape[1:]).unsqueeze(0)
    with_prior = members.new_full(members.shape[:2], prior_expert) | ~members.any(-1)
    chosen = torch.cat([members, with_prior.unsqueeze(-1)], -1)
    used = chosen.any(0).T.reshape(-1, chosen.shape[1], *[1] * len(experts.event_shape))
    loc, logvar = (torch.where(used, torch.cat(pair), 0.0) for pair in ((experts.loc, prior.loc), (experts.logvar, prior.logvar)))
    precision = (-logvar).exp()
    natural = torch.cat([precision.flatten(2), (precision * loc).flatten(2)], -1)
    # In float64, which no setting rounds to TF32 (nor autocast to bfloat16): the sum is small. There is none on mps.
    wide = natural if natural.device.type == "mps" else natural.double()
    with torch.autocast(wide.device.type, enabled=False):
        sums = torch.einsum("kbm,mbd->kbd", chosen.to(wide.dtype), wide).to(natural.dtype)
    total, weighted = (half.unflatten(-1, experts.event_shape) for half in sums.chunk(2, -1))
    count = chosen.sum(-1).reshape(*chosen.shape[:2], *[1] * len(experts.event_shape)) if pooling == "geometric" else 1
    return DiagNormal(weighted / total, -(total / count).log(), len(experts.event_shape))


def mixture(
    experts: Mapping[str, DiagNormal],
    visible: Tensor,
    prior: Distribution,
    subsets: Sequence[Sequence[str]],
    prior_expert: bool = False,
    pooling: str = "product",
) -> Posterior:
    """Mixture, with equal weights, of the products over the chosen subsets that are wholly visible.

    Arguments:
        experts: q(z|x_m) of every modality, batch (B,); where not visible, any finite numbers.
        visible: (B, M) bool, columns in the order of ``experts``.
        prior: p(z). Where it is not a DiagNormal, N(0, I) takes its place as an expert, and as the posterior of a row with nothing visible.
        subsets: names of the modalities of each component, ``[["image"], ["image", "text"]]``.
        prior_expert: multiply every product by the prior.
        pooling: "product" or "geometric", see :func:`product`.

    Returns:
        K = the number of subsets. In a row in which none is wholly visible the last component is the product of what is visible.

    Raises:
        ValueError: without a modality, for ``visible`` of another shape, for an unknown ``pooling``, or for subsets that are none, empty,
            alike, or name a modality that is not there.
    """
    names = list(experts)
    chosen = _subsets(names, subsets).to(visible.device)
    stacked = _stack(experts, visible)
    normal = _normal(prior, stacked)
    wholly = (visible | ~chosen.unsqueeze(1)).all(-1)  # (K, B)
    stands_in = ~wholly.any(0)
    members = chosen.unsqueeze(1) & wholly.unsqueeze(-1)
    members = torch.cat([members[:-1], torch.where(stands_in.unsqueeze(-1), visible, members[-1]).unsqueeze(0)])
    present = torch.cat([wholly[:-1], (wholly[-1] | stands_in).unsqueeze(0)])
    components = product(stacked, members, normal, prior_expert, pooling)
    log_weights = torch.zeros_like(present, dtype=stacked.loc.dtype).masked_fill(~present, -torch.inf)
    dims = len(stacked.event_shape)
    own = {name: DiagNormal(stacked.loc[m], stacked.logvar[m], dims) for m, name in enumerate(names)}
    return Posterior(GaussianMixture(components, log_weights), own, visible, members)


def poe(
    experts: Mapping[str, DiagNormal], visible: Tensor, prior: Distribution, prior_expert: bool = False, pooling: str = "product"
) -> Posterior:
    """Product of the visible experts: K = 1. Arguments and errors of :func:`mixture`."""
    return mixture(experts, visible, prior, [list(experts)], prior_expert, pooling)


def moe(experts: Mapping[str, DiagNormal], visible: Tensor, prior: Distribution, prior_expert: bool = False) -> Posterior:
    """Mixture of the visible experts: K = M, in the order of the modalities. Arguments and errors of :func:`mixture`."""
    return mixture(experts, visible, prior, [[name] for name in experts], prior_expert)


def mopoe(
    experts: Mapping[str, DiagNormal], visible: Tensor, prior: Distribution, prior_expert: bool = False, pooling: str = "product"
) -> Posterior:
    """Mixture of the products over every visible subset: K = 2^M - 1, small ones first. Arguments and errors of :func:`mixture`.

    Raises:
        ValueError: also for more than ``MOST_MODALITIES`` modalities.
    """
    if len(experts) > MOST_MODALITIES:
        raise ValueError(
            f"mopoe: received {len(experts)} modalities, expected at most {MOST_MODALITIES}; use 'moe', or 'mixture' with subsets"
        )
    subsets = [subset for size in range(1, len(experts) + 1) for subset in combinations(experts, size)]
    return mixture(experts, visible, prior, subsets, prior_expert, pooling)


def _subsets(names: list[str], subsets: Sequence[Sequence[str]]) -> Tensor:
    """(K, M) bool."""
    if not names:
        raise ValueError("experts: received none, expected at least one modality")
    if isinstance(subsets, str) or not subsets:
        raise ValueError(f"subsets: received {subsets!r}, expected a list of lists of names among {names}")
    for subset in subsets:
        if isinstance(subset, str) or not subset or not set(subset) <= set(names):
            raise ValueError(f"subsets: received {subset!r}, expected a non-empty list of names among {names}")
    if len({frozenset(subset) for subset in subsets}) < len(subsets):
        raise ValueError(f"subsets: received {subsets!r}, expected each subset once")
    return torch.tensor([[name in subset for name in names] for subset in subsets])


def _stack(experts: Mapping[str, DiagNormal], visible: Tensor) -> DiagNormal:
    """The experts as one distribution, batch (M, B), with N(0, I) in place of those that are not visible."""
    first = next(iter(experts.values()))
    expected = (*first.batch_shape, len(experts))
    if visible.shape != expected or visible.dtype != torch.bool:
        raise ValueError(f"visible: received {visible.dtype} of shape {tuple(visible.shape)}, expected bool of shape {expected}")
    seen = visible.T.reshape(len(experts), -1, *[1] * len(first.event_shape))
    loc, logvar = (torch.stack([getattr(q, name) for q in experts.values()]) for name in ("loc", "logvar"))
    return DiagNormal(torch.where(seen, loc, 0.0), torch.where(seen, logvar, 0.0), len(first.event_shape))


def _normal(prior: Distribution, like: DiagNormal) -> DiagNormal:
    if isinstance(prior, DiagNormal):
        return prior
    zeros = like.loc.new_zeros(like.event_shape)
    return DiagNormal(zeros, zeros, len(like.event_shape))


AGGREGATIONS: dict[str, Callable[..., Posterior]] = {"poe": poe, "moe": moe, "mopoe": mopoe, "mixture": mixture}

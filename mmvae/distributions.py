r"""The distributions that a variational autoencoder is made of.

Everything but the batch is event, so ``log_prob`` and ``kl`` return ``(*, B)`` in nats, in float32 or better whatever the precision of
the network. Shapes: ``S`` samples, ``K`` mixture components, ``B`` batch, ``D`` latent, ``T`` tokens.

The log-variance is clamped to ``LOGVAR_RANGE`` by :func:`bound`, whose gradient beyond the range still pulls back:

    bound(v) = min(max(v, low), high),    dL/dv = dL/dbound  if v is inside or if descending dL/dbound moves v inside, else 0
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

LOGVAR_RANGE = (-20.0, 11.0)
"""Bounds of a log-variance, nats. ``exp(11) / 2``, the largest gradient of the KL divergence, is finite in float16."""


class _Bound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.range = (low, high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.range
        outward = ((x > high) & (grad < 0)) | ((x < low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def bound(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp whose gradient vanishes only where descent would move further out, so that no unit is lost beyond the bound.

    Arguments:
        x: any shape, floating.
        low, high: the range.

    Returns:
        ``x`` clamped, same shape and dtype.
    """
    return _Bound.apply(x, low, high)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 when it is that already."""
    return x if x.dtype == torch.float64 else x.float()


class DiagNormal(Independent):
    r"""Normal distribution with diagonal covariance, :math:`\prod_d \mathcal N(x_d; \mu_d, e^{v_d})`.

    Arguments:
        loc: (*, *event) mean, any floating dtype; kept in float32 or better.
        logvar: same shape, log-variance in nats; clamped to ``LOGVAR_RANGE`` by :func:`bound`.
        event_dims: number of trailing event dimensions: 1 for a vector, 3 for a spatial latent (C,h,w).

    Example:
        >>> q = DiagNormal(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> q.batch_shape, q.event_shape, q.log_prob(q.mean).shape
        (torch.Size([4]), torch.Size([2]), torch.Size([4]))
    """

    def __init__(self, loc: Tensor, logvar: Tensor, event_dims: int = 1):
        loc, logvar = torch.broadcast_tensors(at_least_float32(loc), bound(at_least_float32(logvar), *LOGVAR_RANGE))
        self.loc, self.logvar = loc, logvar
        super().__init__(Normal(loc, (0.5 * logvar).exp(), validate_args=False), event_dims, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats. ``value``: (*, B, *event). Returns (*, B)."""
        with torch.autocast(self.loc.device.type, enabled=False):
            return super().log_prob(at_least_float32(value))

    def rsample(self, sample_shape: Sequence[int] = (), noise: Tensor | None = None) -> Tensor:
        """``loc + exp(logvar / 2) * noise``, (*sample_shape, B, *event); ``noise`` is standard normal of that shape (drawn when None)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device) if noise is None else noise
        return self.loc + (0.5 * self.logvar).exp() * noise

    def kl_per_dimension(self, p: "DiagNormal") -> Tensor:
        r"""KL divergence of each coordinate in nats, :math:`\tfrac12 (v_p - v_q + e^{v_q - v_p} + (\mu_q - \mu_p)^2 e^{-v_p} - 1)`.

        Arguments:
            p: of the same event; batches broadcast.

        Returns:
            (*, B, *event).
        """
        with torch.autocast(self.loc.device.type, enabled=False):
            difference = self.logvar - p.logvar
            return 0.5 * (torch.expm1(difference) - difference + (self.loc - p.loc).square() * (-p.logvar).exp())

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "DiagNormal":
        """The same distribution with its batch broadcast to ``batch_shape``."""
        shape = torch.Size(batch_shape) + self.event_shape
        return type(self)(self.loc.expand(shape), self.logvar.expand(shape), len(self.event_shape))

    def detach(self) -> "DiagNormal":
        """The same distribution with parameters that take no gradient."""
        return type(self)(self.loc.detach(), self.logvar.detach(), len(self.event_shape))

    def unsqueeze(self, dim: int) -> "DiagNormal":
        """The same distribution with a batch dimension of size 1 inserted at ``dim`` (counted from the left)."""
        return type(self)(self.loc.unsqueeze(dim), self.logvar.unsqueeze(dim), len(self.event_shape))


class GaussianMixture(Distribution):
    r"""Mixture of diagonal normals, :math:`\sum_k w_k \mathcal N(x; \mu_k, e^{v_k})`.

    Arguments:
        components: DiagNormal of batch (K, B), or (K, 1) to broadcast over rows.
        log_weights: (K, B) or (K, 1), in nats; ``-inf`` marks an absent component. Normalised over K here.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, components: DiagNormal, log_weights: Tensor):
        self.log_weights = at_least_float32(log_weights).log_softmax(0)
        self.components = components.expand(torch.broadcast_shapes(components.batch_shape, log_weights.shape))
        super().__init__(self.components.batch_shape[1:], components.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(B, *event)."""
        return (self._over_events(self.log_weights.exp()) * self.components.mean).sum(0)

    @property
    def variance(self) -> Tensor:
        """(B, *event)."""
        spread = self.components.variance + (self.components.mean - self.mean).square()
        return (self._over_events(self.log_weights.exp()) * spread).sum(0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats. ``value``: (*, B, *event). Returns (*, B)."""
        at = value.unsqueeze(-1 - len(self.event_shape) - len(self.batch_shape))
        dim = -1 - len(self.batch_shape)
        return (self.components.log_prob(at) + self.log_weights).logsumexp(dim)

    def stratified(self, num_samples: int = 1, noise: Tensor | None = None) -> Tensor:
        """Samples of every component, with gradient: (S, K, B, *event). ``noise``: standard normal of that shape."""
        return self.components.rsample(torch.Size([num_samples]), noise)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples of the mixture, without gradient: (*sample_shape, B, *event)."""
        shape, dims = torch.Size(sample_shape), len(self.event_shape)
        with torch.no_grad():
            z = self.components.rsample(shape)
            weights = self.log_weights.exp().movedim(0, -1).expand(*self.batch_shape, -1)
            k = torch.distributions.Categorical(probs=weights).sample(shape)
            index = k.reshape(*shape, 1, *k.shape[len(shape) :], *[1] * dims).expand(*shape, 1, *z.shape[len(shape) + 1 :])
            return z.gather(len(shape), index).squeeze(len(shape))

    def detach(self) -> "GaussianMixture":
        """The same distribution with parameters that take no gradient."""
        return GaussianMixture(self.components.detach(), self.log_weights.detach())

    def _over_events(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape, *[1] * len(self.event_shape))


class Autoregressive(Distribution):
    r"""A distribution over sequences by the chain rule, :math:`\log p(x) = \sum_t \log p(x_t \mid x_{<t})`.

    Arguments:
        token_log_prob: maps a target (*, B, T) to the log-probabilities (*, B, T) of its tokens, each given the ones before
            (teacher forcing); must be 0 where the target is -100.
        batch_shape: (*, B).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, token_log_prob: Callable[[Tensor], Tensor], batch_shape: torch.Size):
        self._token_log_prob = token_log_prob
        super().__init__(torch.Size(batch_shape), torch.Size([-1]), validate_args=False)

    def token_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of every token in nats, 0 where ``value`` is -100. ``value``: (*, B, T) int64. Returns (*, B, T)."""
        return self._token_log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of every row in nats; -100 is not scored. ``value``: (*, B, T) int64. Returns (*, B)."""
        return at_least_float32(self.token_log_prob(value)).sum(-1)


class BagOfWords(Distribution):
    r"""Words drawn one by one from one distribution, :math:`\log p(x) = \sum_v x_v \log p_v`, of a document whose length is given.

    That is the probability of the words in their order; that of the counts alone, a multinomial's, has a coefficient too that no parameter
    changes, and is not what the perplexity of topic models is made of.

    Arguments:
        logits: (*, B, V), of log p up to a constant.

    Example:
        >>> BagOfWords(torch.tensor([0.5, 0.25, 0.25]).log()).log_prob(torch.tensor([2, 1, 0])).exp()
        tensor(0.0625)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, logits: Tensor):
        self.log_probs = at_least_float32(logits).log_softmax(-1)
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """(*, B, V), the probability of every word: the counts to be expected of one word."""
        return self.log_probs.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of every document in nats. ``value``: (*, B, V) counts. Returns (*, B)."""
        return (value * self.log_probs).sum(-1)


def kl(q: DiagNormal, p: DiagNormal) -> Tensor:
    r"""KL divergence :math:`\mathrm{KL}(q \| p)` of distributions over the same event, in nats: (*, B); batches broadcast."""
    return q.kl_per_dimension(p).flatten(-len(q.event_shape)).sum(-1)

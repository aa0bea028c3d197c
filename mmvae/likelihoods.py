r"""From a decoder's output to a distribution over pixels in [0, 1].

Every density is normalised over the values it is about, and training and evaluation use the same ``log_prob``:

==================== ============================ ==========================================================
name                 normalised over              parameters per value
==================== ============================ ==========================================================
bernoulli            {0, 1}: binarise the pixels  logit
continuous_bernoulli [0, 1]                       logit
gaussian             the real line                mean; one scale shared by all values
laplace              the real line                median; one scale shared by all values
discretized_logistic {0, 1/255, ..., 1}           location and log-scale: bits/dim of 8-bit images
==================== ============================ ==========================================================

Shapes: a decoder gives ``(*, n C, H, W)`` with ``n`` parameters per value; the distribution has batch ``(*)`` and event ``(C, H, W)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, ContinuousBernoulli, Distribution, Independent, Laplace, Normal, constraints
from torch.nn import functional as F

from mmvae.distributions import at_least_float32, bound

SCALES = ("fixed", "learned", "optimal")
LOG_SCALE_RANGE = (-9.0, 3.0)


def bernoulli(logits: Tensor) -> Distribution:
    r""":math:`p(x) = \pi^x (1 - \pi)^{1 - x}` for x in {0, 1}. ``logits``: (*, C, H, W)."""
    return Independent(Bernoulli(logits=at_least_float32(logits), validate_args=False), 3, validate_args=False)


class _ContinuousBernoulli(ContinuousBernoulli):
    r"""torch's, whose normaliser loses its digits in float32: with logit l, :math:`p(x) = e^{l x}\, l / (e^l - 1)`."""

    def log_prob(self, value: Tensor) -> Tensor:
        logit = self.logits
        size = logit.abs().clamp_min(1e-2)
        log_norm = logit.clamp_min(0) + (-torch.expm1(-size) / size).log()
        return logit * value - torch.where(logit.abs() < 1e-2, logit / 2 + logit.square() / 24, log_norm)

    @property
    def mean(self) -> Tensor:
        logit = torch.where(self.logits.abs() < 1e-2, 1e-2, self.logits)
        return torch.where(self.logits.abs() < 1e-2, 0.5 + self.logits / 12, -1 / torch.expm1(-logit) - 1 / logit)


def continuous_bernoulli(logits: Tensor) -> Distribution:
    r""":math:`p(x) = C(\pi) \pi^x (1 - \pi)^{1 - x}` for x in [0, 1]. ``logits``: (*, C, H, W), clamped to +-15.

    References:
        Loaiza-Ganem, Cunningham (2019), The continuous Bernoulli, https://arxiv.org/abs/1907.06845
    """
    logits = bound(at_least_float32(logits), -15.0, 15.0)  # beyond, one black pixel could pay for all the others
    return Independent(_ContinuousBernoulli(logits=logits, validate_args=False), 3, validate_args=False)


def gaussian(loc: Tensor, scale: Tensor) -> Distribution:
    r""":math:`\mathcal N(x; \mu, \sigma^2)`. ``loc``: (*, C, H, W); ``scale``: broadcasts against it, in units of the pixel range."""
    return Independent(Normal(at_least_float32(loc), scale, validate_args=False), 3, validate_args=False)


def laplace(loc: Tensor, scale: Tensor) -> Distribution:
    r""":math:`e^{-|x - \mu| / b} / 2 b`. ``loc``: (*, C, H, W); ``scale``: broadcasts against it, in units of the pixel range."""
    return Independent(Laplace(at_least_float32(loc), scale, validate_args=False), 3, validate_args=False)


class DiscretizedLogistic(Distribution):
    r"""Logistic distribution integrated over the 256 bins of 8-bit pixels.

    .. math:: P(x) = \sigma\big((x + \tfrac1{510} - \mu) / s\big) - \sigma\big((x - \tfrac1{510} - \mu) / s\big),

    the outer bins reaching to infinity, so that the probabilities of ``k / 255``, k = 0 ... 255, sum to one.

    Arguments:
        loc: (*, C, H, W).
        log_scale: (*, C, H, W), log of s in units of the pixel range.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, §D, https://arxiv.org/abs/1606.04934
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, loc: Tensor, log_scale: Tensor):
        self.loc, self.log_scale = at_least_float32(loc), bound(at_least_float32(log_scale), *LOG_SCALE_RANGE)
        super().__init__(loc.shape[:-3], loc.shape[-3:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The location cut to [0, 1] (the exact mean differs from it near the borders), (*, C, H, W)."""
        return self.loc.clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability in nats. ``value``: (*, C, H, W), multiples of 1/255. Returns (*)."""
        value, inverse = at_least_float32(value), (-self.log_scale).exp()
        above, below = (value + 0.5 / 255 - self.loc) * inverse, (value - 0.5 / 255 - self.loc) * inverse
        lower, upper = F.softplus(-above), F.softplus(below)  # -log P(X < upper edge), -log P(X > lower edge)
        inside = (-torch.expm1(-inverse / 255)).log() - lower - upper
        inside = torch.where(value < 0.5 / 255, -lower, torch.where(value > 254.5 / 255, -upper, inside))
        return inside.flatten(-3).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """(*sample_shape, *, C, H, W), multiples of 1/255."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(torch.Size(sample_shape)), device=self.loc.device).clamp(1e-6, 1 - 1e-6)
            return ((self.loc + self.log_scale.exp() * (u.log() - (-u).log1p())) * 255).round().clamp(0, 255) / 255


def discretized_logistic(loc: Tensor, log_scale: Tensor) -> Distribution:
    """:class:`DiscretizedLogistic`; ``log_scale`` is relative to a scale of 0.1."""
    return DiscretizedLogistic(loc, log_scale + math.log(0.1))


class Scale(nn.Module):
    r"""The scale that all pixels of a gaussian or laplace likelihood share.

    Arguments:
        mode: "fixed"; "learned" by gradient (as ten times a parameter, so that Adam at 1e-3 does not lag); or "optimal", the running
            average of the closed-form optimum of each training batch, :math:`\sigma^2 = \overline{(x - \mu)^2}` or
            :math:`b = \overline{|x - \mu|}`, each picture with the weight that the objective gives to its score. The backward pass of a
            loss moves it, so that a batch is scored by those before it; evaluation leaves it alone. Of several ranks it is that of the
            first, which DistributedDataParallel gives the others.
        scale: its first value, in units of the pixel range.
        power: 2 for gaussian, 1 for laplace.
        momentum: of the running average.

    References:
        Rybkin, Daniilidis, Levine (2021), Simple and effective VAE training with calibrated decoders, https://arxiv.org/abs/2006.13202
    """

    def __init__(self, mode: str, scale: float, power: int = 2, momentum: float = 0.95):
        super().__init__()
        self.mode, self.first, self.power, self.momentum = mode, scale, power, momentum
        self.log_first = math.log(max(scale, 1e-9))  # transformers' own tests set it to 0
        if mode == "learned":
            self.log_scale_tenth = nn.Parameter(torch.full((), self.log_first / 10))
        elif mode == "optimal":
            self.register_buffer("moment", torch.full((), float(scale) ** power))

    def reset_parameters(self) -> None:
        """Set the first value again."""
        if self.mode == "learned":
            nn.init.constant_(self.log_scale_tenth, self.log_first / 10)
        elif self.mode == "optimal":
            nn.init.constant_(self.moment, self.first**self.power)

    @torch.no_grad()
    def observe(self, moments: Tensor, gradient: Tensor) -> None:
        """Move the running optimum towards a batch's.

        Arguments:
            moments: (*) mean of each picture's deviations to the ``power``.
            gradient: (*) of what is minimised, with respect to each picture's log-probability: what that picture weighs. Where all are 0
                nothing moves.
        """
        weights = gradient.abs().to(moments.dtype)
        total = weights.sum()
        optimum = torch.where(total > 0, (weights * moments).sum() / total, self.moment)
        self.moment.lerp_(optimum.to(self.moment.dtype), 1 - self.momentum)

    def forward(self, like: Tensor) -> Tensor:
        """The scale, (), on the device of ``like``."""
        if self.mode == "fixed":
            return torch.full((), self.first, device=like.device)
        if self.mode == "learned":
            return bound(10 * self.log_scale_tenth.float(), *LOG_SCALE_RANGE).exp()
        return self.moment.float().clamp_min(math.exp(self.power * LOG_SCALE_RANGE[0])).pow(1 / self.power)


class _Observed(Independent):
    """A location-scale likelihood whose scores show the running optimum, on the way back, how far they were off and what they weigh."""

    def __init__(self, p: Independent, scale: Scale):
        super().__init__(p.base_dist, 3, validate_args=False)
        self._scale = scale

    def log_prob(self, value: Tensor) -> Tensor:
        score = super().log_prob(value)
        if score.requires_grad:
            deviation = (at_least_float32(value) - self.mean).detach().abs()
            score.register_hook(partial(self._scale.observe, deviation.pow(self._scale.power).flatten(-3).mean(-1)))
        return score


@dataclass(frozen=True)
class _Family:
    function: Callable[..., Distribution]
    parameters: int = 1
    power: int = 0  # of the deviation whose mean gives the optimal scale; 0: no shared scale


class Likelihood(nn.Module):
    """A named likelihood with what it must remember between batches.

    Arguments:
        name: a key of ``LIKELIHOODS``.
        scale_mode: "fixed", "learned" or "optimal"; only gaussian and laplace have a scale.
        scale: its (first) value, in units of the pixel range.

    Raises:
        ValueError: for a name or mode that does not exist.
    """

    def __init__(self, name: str, scale_mode: str = "learned", scale: float = 0.1):
        super().__init__()
        if name not in LIKELIHOODS:
            raise ValueError(f"likelihood: received {name!r}, expected one of {sorted(LIKELIHOODS)}")
        if scale_mode not in SCALES:
            raise ValueError(f"scale_mode: received {scale_mode!r}, expected one of {list(SCALES)}")
        self.family = LIKELIHOODS[name]
        self.parameters_per_value = self.family.parameters
        self.scale = Scale(scale_mode, scale, self.family.power) if self.family.power else None

    def forward(self, output: Tensor) -> Distribution:
        """``output``: (*, n C, H, W). Returns a distribution of batch (*) and event (C, H, W)."""
        if self.scale is None:
            return self.family.function(*output.chunk(self.parameters_per_value, dim=-3))
        if self.scale.mode == "optimal" and self.training:
            return _Observed(self.family.function(output, self.scale(output)), self.scale)
        return self.family.function(output, self.scale(output))


LIKELIHOODS: dict[str, _Family] = {
    "bernoulli": _Family(bernoulli),
    "continuous_bernoulli": _Family(continuous_bernoulli),
    "gaussian": _Family(gaussian, power=2),
    "laplace": _Family(laplace, power=1),
    "discretized_logistic": _Family(discretized_logistic, parameters=2),
}

r"""Priors over the latent. Each is a module whose ``forward`` gives a distribution that broadcasts over rows.

References:
    Srivastava, Sutton (2017), Autoencoding variational inference for topic models, eq. 3, https://arxiv.org/abs/1703.01488
    Tomczak, Welling (2018), VAE with a VampPrior, https://arxiv.org/abs/1705.07120
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mmvae.distributions import DiagNormal, GaussianMixture

Encode = Callable[[Tensor], DiagNormal]


class Prior(nn.Module):
    """What every prior takes and gives; a new one is a subclass and a line in ``PRIORS``.

    Arguments:
        event_shape: (D,) or (C, h, w).
        num_components: K, where it has components.
        pseudo_input_shape: shape of one pseudo-input, where it has them; what that means is the encoder's business (see
            ``VAEModel.encode_pseudo_inputs``).
    """

    def __init__(self, event_shape: Sequence[int], num_components: int = 50, pseudo_input_shape: Sequence[int] = ()):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.build(num_components, tuple(pseudo_input_shape))
        self.reset_parameters()

    def build(self, num_components: int, pseudo_input_shape: tuple[int, ...]) -> None:
        """Make the parameters, if there are any."""

    def reset_parameters(self) -> None:
        """Give every parameter its first value, with ``torch.nn.init`` only."""

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """p(z), of batch () or (1,), so that it broadcasts over rows."""
        raise NotImplementedError


class StandardNormal(Prior):
    r""":math:`p(z) = \mathcal N(0, I)`."""

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """A DiagNormal of batch ()."""
        zeros = torch.zeros(self.event_shape, device=device)
        return DiagNormal(zeros, zeros, len(self.event_shape))


class LearnedNormal(Prior):
    r""":math:`p(z) = \mathcal N(\mu, e^v)` with a learned mean and variance, N(0, I) at first."""

    def build(self, num_components: int, pseudo_input_shape: tuple[int, ...]) -> None:
        """Mean and log-variance, (*event)."""
        self.loc = nn.Parameter(torch.empty(self.event_shape))
        self.logvar = nn.Parameter(torch.empty(self.event_shape))

    def reset_parameters(self) -> None:
        """Mean 0, variance 1."""
        nn.init.zeros_(self.loc), nn.init.zeros_(self.logvar)

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """A DiagNormal of batch ()."""
        return DiagNormal(self.loc, self.logvar, len(self.event_shape))


class LaplaceDirichlet(Prior):
    r""":math:`\theta = \mathrm{softmax}(z)` nearly Dirichlet: :math:`p(z) = \mathcal N(0, (1 - 1/K) / \alpha)`, its Laplace approximation.

    Not in ``PRIORS``: only a model that takes the softmax of z has a use for it.

    Arguments:
        event_shape: (K,), K >= 2.
        concentration: alpha of each of the K, above 0; the smaller, the fewer topics in a document.
    """

    def __init__(self, event_shape: Sequence[int], concentration: float):
        super().__init__(event_shape)
        self.variance = (1 - 1 / self.event_shape[0]) / concentration

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """A DiagNormal of batch ()."""
        zeros = torch.zeros(self.event_shape, device=device)
        return DiagNormal(zeros, zeros + math.log(self.variance))


class MixtureOfGaussians(Prior):
    r""":math:`p(z) = \sum_k w_k \mathcal N(\mu_k, e^{v_k})` with learned weights, means and log-variances."""

    def build(self, num_components: int, pseudo_input_shape: tuple[int, ...]) -> None:
        """Means and log-variances (K, 1, *event), logits of the weights (K, 1)."""
        self.loc = nn.Parameter(torch.empty(num_components, 1, *self.event_shape))
        self.logvar = nn.Parameter(torch.empty(num_components, 1, *self.event_shape))
        self.logits = nn.Parameter(torch.empty(num_components, 1))

    def reset_parameters(self) -> None:
        """Means from N(0, 1/2), variances 1/2, equal weights: together close to N(0, I)."""
        nn.init.normal_(self.loc, std=0.5**0.5)
        nn.init.constant_(self.logvar, -0.6931)
        nn.init.zeros_(self.logits)

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """A GaussianMixture of batch (1,)."""
        return GaussianMixture(DiagNormal(self.loc, self.logvar, self.loc.dim() - 2), self.logits)


class VampPrior(Prior):
    r""":math:`p(z) = \sum_k w_k\, q(z \mid u_k)`: the encoder's own posteriors at learned pseudo-inputs.

    Raises:
        ValueError: for a modality that has no pseudo-inputs.
    """

    def build(self, num_components: int, pseudo_input_shape: tuple[int, ...]) -> None:
        """Pseudo-inputs (K, *pseudo_input_shape), logits of the weights (K, 1)."""
        if not pseudo_input_shape:
            raise ValueError("prior: received 'vamp' for a modality without pseudo-inputs, expected a pseudo_input_shape")
        self.pseudo_inputs = nn.Parameter(torch.empty(num_components, *pseudo_input_shape))
        self.logits = nn.Parameter(torch.empty(num_components, 1))

    def reset_parameters(self) -> None:
        """Pseudo-inputs from N(0, 1), equal weights."""
        nn.init.normal_(self.pseudo_inputs)
        nn.init.zeros_(self.logits)

    def forward(self, encode: Encode, device: torch.device) -> Distribution:
        """A GaussianMixture of batch (1,)."""
        return GaussianMixture(encode(self.pseudo_inputs).unsqueeze(1), self.logits)


PRIORS: dict[str, type[Prior]] = {
    "standard_normal": StandardNormal,
    "learned_normal": LearnedNormal,
    "mixture": MixtureOfGaussians,
    "vamp": VampPrior,
}

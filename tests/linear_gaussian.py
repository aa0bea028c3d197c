"""A VAE whose every quantity has a closed form: p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I) with orthogonal columns of W.

Then p(x) = N(b, W W' + s^2 I), and the exact posterior is diagonal: precision 1 + |W_d|^2 / s^2 in dimension d.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from mmvae.distributions import DiagNormal
from mmvae.models.base import VAEConfig, VAEModel, VAEOutput

WIDTH, NOISE = 5, 0.6


@strict
class LinearGaussianConfig(VAEConfig):
    model_type = "linear_gaussian"

    latent_dim: int = 3
    exact: bool = True


class LinearGaussian(VAEModel):
    """``encode`` is the exact posterior, or that posterior moved and widened; its error is a parameter."""

    config: LinearGaussianConfig
    main_input_name = "values"
    input_names = ("values",)

    def __init__(self, config: LinearGaussianConfig):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(WIDTH, config.latent_dim, generator=generator))[0]
        self.weight = nn.Parameter(basis * torch.linspace(0.5, 1.5, config.latent_dim))
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator))
        self.shift = nn.Parameter(torch.full((config.latent_dim,), 0.0 if config.exact else 0.3))
        self.widen = nn.Parameter(torch.full((config.latent_dim,), 0.0 if config.exact else 0.4))
        self.latent_prior = self.build_prior()
        self.calls, self.most_rows = 0, 0
        self.post_init()

    def encode(self, values: Tensor) -> DiagNormal:
        self.calls += 1
        weight, bias = self.weight.detach(), self.bias.detach()  # so that the decoder's gradient is the decoder's alone
        precision = 1 + weight.square().sum(0) / NOISE**2
        mean = (values - bias) @ weight / NOISE**2 / precision
        return DiagNormal(mean + self.shift, (-precision.log() + self.widen).expand_as(mean))

    def decode(self, z: Tensor) -> Distribution:
        self.most_rows = max(self.most_rows, z.shape[:-1].numel())
        loc = z @ self.weight.T + self.bias
        return Independent(Normal(loc, torch.tensor(NOISE, dtype=loc.dtype), validate_args=False), 1, validate_args=False)

    def target(self, values: Tensor) -> Tensor:
        return values

    def forward(self, values: Tensor, **options) -> VAEOutput:
        return self.bound({"values": values}, **options)

    def exact_log_marginal(self, values: Tensor) -> Tensor:
        """log p(x), (B,)."""
        with torch.no_grad():
            covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(WIDTH, dtype=values.dtype)
            return MultivariateNormal(self.bias, covariance).log_prob(values)


def linear_gaussian(exact: bool = True, **options) -> tuple[LinearGaussian, Tensor]:
    """A model in float64 and a batch of 6 rows."""
    model = LinearGaussian(LinearGaussianConfig(exact=exact, **options)).double()
    return model, torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

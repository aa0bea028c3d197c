"""A VAE whose every quantity has a closed form: p(z) = N(0, I), p(x|z) = N(W z + b, s^2 I) with orthogonal columns of W.

Then p(x) = N(b, W W' + s^2 I), and the exact posterior is diagonal: precision 1 + |W_d|^2 / s^2 in dimension d.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from mmvae.distributions import DiagNormal
from mmvae.models.base import VAEConfig, VAEOutput
from mmvae.models.unimodal import VAEModel

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


class JointLinearGaussian:
    """Several such modalities of one z, p(x_m|z) = N(W_m z + b_m, s_m^2 I): plain tensors in float64, for aggregations and objectives.

    ``experts`` are the likelihoods read as normals of z, moved and widened by ``shift`` and ``widen`` (M, D); with both 0 their product
    with the prior is the exact posterior given whatever is visible.
    """

    def __init__(self, names: tuple[str, ...], latent_dim: int = 3, error: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        self.names, self.latent_dim = names, latent_dim
        self.weight, self.bias, self.noise = {}, {}, {}
        for m, name in enumerate(names):
            basis = torch.linalg.qr(torch.randn(WIDTH, latent_dim, generator=generator, dtype=torch.float64))[0]
            self.weight[name] = (basis * torch.linspace(0.5, 1.5, latent_dim, dtype=torch.float64)).requires_grad_()
            self.bias[name] = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
            self.noise[name] = NOISE + 0.2 * m
        self.shift, self.widen = (torch.full((len(names), latent_dim), size * error, dtype=torch.float64) for size in (0.3, 0.4))
        self.shift.requires_grad_(), self.widen.requires_grad_()
        self.prior = DiagNormal(torch.zeros(latent_dim, dtype=torch.float64), torch.zeros(latent_dim, dtype=torch.float64))

    def rows(self, size: int = 6) -> dict[str, Tensor]:
        """A batch, {name: (B, WIDTH)}."""
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) for name in self.names}

    def experts(self, x: dict[str, Tensor]) -> dict[str, DiagNormal]:
        """q(z|x_m) without the prior, batch (B,)."""
        found = {}
        for m, name in enumerate(self.names):
            weight = self.weight[name].detach()
            precision = weight.square().sum(0) / self.noise[name] ** 2
            mean = (x[name] - self.bias[name]) @ weight / self.noise[name] ** 2 / precision
            found[name] = DiagNormal(mean + self.shift[m], (-precision.log() + self.widen[m]).expand_as(mean))
        return found

    def log_px(self, z: Tensor, x: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
        """log p(x_m|z), (S, K, B) each, 0 where absent."""
        found = {}
        for m, name in enumerate(self.names):
            p = Normal(z @ self.weight[name].T + self.bias[name], torch.tensor(self.noise[name], dtype=z.dtype), validate_args=False)
            found[name] = torch.where(present[:, m], p.log_prob(x[name]).sum(-1), 0.0)
        return found

    def log_marginal(self, x: dict[str, Tensor], present: Tensor) -> Tensor:
        """log p of what is present in each row, (B,)."""
        found = []
        for row, has in enumerate(present.tolist()):
            names = [name for name, here in zip(self.names, has) if here]
            weight = torch.cat([self.weight[name].detach() for name in names])
            noise = torch.cat([torch.full((WIDTH,), self.noise[name] ** 2, dtype=torch.float64) for name in names])
            normal = MultivariateNormal(torch.cat([self.bias[name] for name in names]), weight @ weight.T + noise.diag())
            found.append(normal.log_prob(torch.cat([x[name][row] for name in names])))
        return torch.stack(found)


def sigma_points(latent_dim: int) -> Tensor:
    """Noise (2D, 1, 1, D) with exactly the first two moments of N(0, I): means over it are exact for quadratics, as the ELBO is here."""
    corners = latent_dim**0.5 * torch.eye(latent_dim, dtype=torch.float64)
    return torch.cat([corners, -corners]).reshape(2 * latent_dim, 1, 1, latent_dim)

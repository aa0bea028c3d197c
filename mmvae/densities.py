r"""Densities that are estimated after training: what the latents of real rows look like, so that samples look like them too.

A prior that was fixed while the model was trained is not where the latents went. A density is fitted to latents of training rows and
replaces it: :math:`p(z)` for the shared latent, :math:`p(w \mid s)` for a private one, :math:`p(z \mid x_m)` for the latents of one
modality. It is a module made from plain options, so a model that holds it stores it with its weights.
Shapes: ``N`` rows, ``D`` the density's dimensions, ``C`` its context's, ``K`` components.

References:
    Ghosh et al. (2020), From variational to deterministic autoencoders (ex-post density estimation), https://arxiv.org/abs/1903.12436
    Papamakarios, Pavlakou, Murray (2017), Masked autoregressive flow for density estimation, https://arxiv.org/abs/1705.07057
    Durkan et al. (2019), Neural spline flows, https://arxiv.org/abs/1906.04032
"""

import difflib
import inspect
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvae.density import Density, TooFewRows, Values, check_integer, check_size


class GaussianMixtureDensity(Density):
    r"""Mixture of Gaussians, :math:`p_u(u) = \sum_k w_k \mathcal N(u; \mu_k, L_k L_k^\top)`, by expectation maximisation.

    Arguments:
        dim: D.
        context_dim: 0; a mixture is not conditional.
        num_components: K.
        covariance: "full" or "diagonal".

    Training options of ``fit``: ``max_iterations`` (200). Figures: ``iterations`` and ``converged`` (0 or 1).
    """

    def __init__(self, dim: int, context_dim: int = 0, num_components: int = 50, covariance: str = "full"):
        super().__init__(dim, context_dim)
        if context_dim:
            raise ValueError(f"context_dim: received {context_dim}, expected 0: a mixture is not conditional, a flow is")
        check_integer("num_components", num_components, 1)
        if covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance: received {covariance!r}, expected 'full' or 'diagonal'")
        check_size("num_components", num_components, num_components * dim * dim)
        self.num_components, self.covariance = num_components, covariance
        self.register_buffer("log_weights", torch.full((num_components,), -math.log(num_components), device="cpu"))
        self.register_buffer("means", torch.zeros(num_components, dim, device="cpu"))
        self.register_buffer("cholesky", torch.eye(dim, device="cpu").repeat(num_components, 1, 1))

    def _log_prob(self, u: Tensor, context: None) -> Tensor:
        flat = u.reshape(-1, self.dim)
        centred = (flat - self.means.unsqueeze(1)).mT  # (K, D, N)
        squares = torch.linalg.solve_triangular(self.cholesky, centred, upper=False).square().sum(1)
        log_det = self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.log_weights - log_det - 0.5 * self.dim * math.log(2 * math.pi)
        return (constant.unsqueeze(1) - 0.5 * squares).logsumexp(0).view(u.shape[:-1])

    def _sample(self, num_samples: int, context: None, generator: torch.Generator | None) -> Tensor:
        device = self.loc.device if generator is None else generator.device
        weights = self.log_weights.exp().to(device)
        k = torch.multinomial(weights, num_samples, replacement=True, generator=generator).to(self.loc.device)
        return self.means[k] + torch.einsum("nij,nj->ni", self.cholesky[k], self._normal(num_samples, generator))

    def _check_number(self, rows: int, train_rows: int) -> None:
        super()._check_number(rows, train_rows)
        if train_rows < self.num_components:
            raise TooFewRows(f"x: received {rows} rows, {train_rows} to fit, expected at least num_components = {self.num_components}")

    def _fit(self, train: Values, held: Values, seed: int, max_iterations: int = 200) -> dict[str, float]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        kind = {"full": "full", "diagonal": "diag"}[self.covariance]
        mixture = GaussianMixture(self.num_components, covariance_type=kind, max_iter=max_iterations, random_state=seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said by the figures
            mixture.fit(train[0].flatten(0, 1).double().cpu().numpy())
        covariances = torch.as_tensor(mixture.covariances_)
        self.cholesky.copy_(torch.linalg.cholesky(covariances) if self.covariance == "full" else covariances.sqrt().diag_embed())
        self.means.copy_(torch.as_tensor(mixture.means_))
        self.log_weights.copy_(torch.as_tensor(mixture.weights_).log())
        return {"iterations": mixture.n_iter_, "converged": float(mixture.converged_)}


def _as_buffers(module: nn.Module) -> nn.Module:
    """The same module with buffers for parameters; ``from_pretrained`` would let frozen parameters take gradients again."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module


class FlowDensity(Density):
    r"""Autoregressive flow, :math:`\log p_u(u \mid c) = \log \mathcal N(f(u; c); 0, I) + \log |\det \partial f / \partial u|`.

    The first transform is affine, so that the splines after it see residuals of the size they are made for, [-5, 5] (beyond it a spline is
    the identity), however narrow the density is given its context. A sample costs D passes per transform.

    Arguments:
        dim: D.
        context_dim: C; 0 when nothing is given.
        transforms: number of transforms, their order of dimensions alternating.
        hidden_sizes: hidden layers of the network of each transform; none narrower than ``dim``, or dimensions would not see each other.
        bins: of the splines; 0 makes every transform affine.

    Training options of ``fit``: ``steps`` (1000) of Adam, ``batch_size`` (256), ``learning_rate`` (0.01, falling to 0 by a cosine),
    ``context_noise`` (0), the deviation of normal noise on the context in deviations of the context. The best of 20 held-out scores is
    kept. Figures: ``steps`` and ``best_step``.
    """

    def __init__(self, dim: int, context_dim: int = 0, transforms: int = 2, hidden_sizes: Sequence[int] = (128, 128), bins: int = 8):
        super().__init__(dim, context_dim)
        check_integer("transforms", transforms, 1), check_integer("bins", bins, 0)
        if not isinstance(hidden_sizes, Sequence) or isinstance(hidden_sizes, str):
            raise ValueError(f"hidden_sizes: received {hidden_sizes!r:.80}, expected integers of at least {dim}")
        for size in hidden_sizes:
            check_integer("hidden_sizes", size, dim)
        widths = (dim + context_dim, *hidden_sizes, dim * max(3 * bins - 1, 2))
        check_size("hidden_sizes", hidden_sizes, transforms * sum(a * b for a, b in itertools.pairwise(widths)))
        self.options = (transforms, tuple(hidden_sizes), bins)
        self.transform = self._build()

    def _build(self) -> nn.Module:
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.lazy import LazyComposedTransform
        from zuko.transforms import MonotonicRQSTransform

        transforms, hidden_sizes, bins = self.options
        spline = {"univariate": MonotonicRQSTransform, "shapes": [(bins,), (bins,), (bins - 1,)]}
        with torch.device("cpu"):  # the masks are computed from values
            orders = [torch.arange(self.dim), torch.arange(self.dim).flip(0)]
            layers = [
                MaskedAutoregressiveTransform(
                    self.dim,
                    self.context_dim,
                    order=orders[i % 2],
                    hidden_features=hidden_sizes,
                    activation=nn.SiLU,
                    **(spline if i and bins else {}),
                )
                for i in range(transforms)
            ]
        return _as_buffers(LazyComposedTransform(*layers))

    def _log_prob(self, u: Tensor, context: Tensor | None) -> Tensor:
        noise, log_det = self.transform(context).call_and_ladj(u)
        return log_det - 0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)

    def _sample(self, num_samples: int, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return self.transform(context).inv(self._normal(num_samples, generator))

    def _fit(
        self,
        train: Values,
        held: Values,
        seed: int,
        steps: int = 1000,
        batch_size: int = 256,
        learning_rate: float = 1e-2,
        context_noise: float = 0.0,
    ) -> dict[str, float]:
        self._initialise(seed)
        generator = torch.Generator().manual_seed(seed)
        parameters = [weight for weight in self.transform.buffers() if weight.is_floating_point()]
        optimizer = torch.optim.Adam(parameters, learning_rate)
        best, best_step, weights = -math.inf, 0, self.transform.state_dict()
        try:
            for weight in parameters:
                weight.requires_grad_(True)
            for step in range(1, steps + 1):
                optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
                self._update(optimizer, parameters, self._batch(train, batch_size, context_noise, generator))
                if step % max(1, steps // 20) == 0 and (score := self._mean_log_prob(held)) > best:
                    best, best_step, weights = score, step, {k: v.clone() for k, v in self.transform.state_dict().items()}
        finally:
            for weight in parameters:
                weight.requires_grad_(False)
        self.transform.load_state_dict(weights)
        return {"steps": steps, "best_step": best_step}

    def _update(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor], batch: Values) -> None:
        with torch.enable_grad(), torch.autocast(self.loc.device.type, enabled=False):
            loss = -self._log_prob(*batch).mean()
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()

    def _initialise(self, seed: int) -> None:
        """New first values and masks, whatever the module held before."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.transform.load_state_dict(self._build().state_dict())

    @staticmethod
    def _batch(values: Values, size: int, context_noise: float, generator: torch.Generator) -> Values:
        """Rows with replacement, a draw of each, all by the CPU's generator: the same on every device."""
        x, context = values
        draw, row = (torch.randint(n, (size,), generator=generator).to(x.device) for n in x.shape[:2])
        if context is None:
            return x[draw, row], None
        noise = torch.randn(size, context.shape[-1], generator=generator).to(x.device) if context_noise else 0.0
        return x[draw, row], context[draw, row] + context_noise * noise


DENSITIES: dict[str, type[Density]] = {"mixture": GaussianMixtureDensity, "flow": FlowDensity}


def build_density(dim: int, context_dim: int, options: Mapping[str, Any]) -> Density:
    """A density that is not fitted yet, from plain options as a configuration holds them.

    Arguments:
        dim: D.
        context_dim: C; 0 when nothing is given.
        options: ``kind``, a key of ``DENSITIES``, and arguments of that class.

    Returns:
        The density, on the CPU.

    Raises:
        ValueError: for an unknown kind or option, naming the nearest one, and for values that do not fit.

    Example:
        >>> build_density(8, 0, {"kind": "mixture", "num_components": 20}).means.shape
        torch.Size([20, 8])
    """
    kind = options.get("kind")
    if kind not in DENSITIES:
        nearest = difflib.get_close_matches(str(kind), DENSITIES, 1, 0.0)[0]
        raise ValueError(f"kind: received {kind!r}, expected one of {', '.join(map(repr, DENSITIES))}; the nearest one is {nearest!r}")
    known = inspect.signature(DENSITIES[kind]).parameters.keys() - {"dim", "context_dim"}
    for name in options.keys() - known - {"kind"}:
        nearest = difflib.get_close_matches(name, sorted(known), 1, 0.0)[0]
        raise ValueError(f"density {kind!r}: unknown option {name!r} = {options[name]!r}; the nearest one is {nearest!r}")
    return DENSITIES[kind](dim, context_dim, **{name: value for name, value in options.items() if name != "kind"})

"""What every VAE shares: the bodies of ``forward`` and ``log_marginal``, samples and interpolations.

Shapes: ``S`` samples, ``K`` components of the posterior, ``B`` batch, ``*event`` the latent's event, (D,) or (C, h, w).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from transformers.utils import ModelOutput

from mmvae.aggregation import Posterior
from mmvae.densities import build_density
from mmvae.density import Density
from mmvae.distributions import DiagNormal
from mmvae.likelihoods import Scale
from mmvae.models.configuration import VAEConfig
from mmvae.models.pretrained import VerifiedModel
from mmvae.nn import ScaledMean, outputs_of, running_statistics
from mmvae.noise import fold, keyed_normal
from mmvae.objectives import Objective, elbo, log_importance
from mmvae.priors import Prior
from mmvae.terms import Terms, kl_to_prior


@dataclass
class VAEOutput(ModelOutput):
    """What ``forward`` returns. Nats; ``None`` where it does not apply.

    In evaluation mode z is the posterior's mean unless ``sample_posterior`` is true: then ``log_px``, ``elbo`` and ``loss`` are no bounds,
    and a divergence without a closed form (of a mixture, or from a mixture or Vamp prior) is some D / 2 nats too large.

    Attributes:
        loss: (), mean over rows of minus the objective.
        loss_rows: (B,), minus the objective.
        elbo: (B,), evidence lower bound at weight 1 and without free bits, whatever the objective was.
        log_px: (B,), log p(x|z), mean over samples.
        log_px_by_modality: (B, M), the same for every modality of a joint model; 0 where one is not present.
        kl: (B,), KL(q(z|x) || p(z)) in closed form, or its estimate from the samples.
        latents: (B, *event), the first sample.
        latent_mean: (B, *event), the posterior's mean.
        latent_logvar: (B, *event), the log of the posterior's variance; of a mixture both moments are the whole mixture's.
        class_log_probs: (B, N), log q(y|x) of a model with classes, whether or not it was told y.
        logits: (B, T, V), only when latents were given and text was decoded.
        past_key_values: the decoder's recurrent state while generating.
        hidden_states: where asked for, what the encoder's layers gave, what enters the first one before; when text was decoded, what the
            logits are made from.
    """

    loss: Tensor | None = None
    loss_rows: Tensor | None = None
    elbo: Tensor | None = None
    log_px: Tensor | None = None
    log_px_by_modality: Tensor | None = None
    kl: Tensor | None = None
    latents: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_logvar: Tensor | None = None
    class_log_probs: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


@contextlib.contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global generator follow ``generator`` meanwhile; no effect when None."""
    with torch.random.fork_rng(enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        yield


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small: ValueError."""
    if value < least:
        raise ValueError(f"{name}: received {value!r}, expected at least {least}")


class VAE(VerifiedModel):
    """A variational autoencoder over one modality or many: what is the same for all of them.

    A subclass gives ``posterior``, ``log_px`` and ``render``, the module ``latent_prior``, and ``terms`` where it draws more than z; its
    ``forward`` calls :meth:`bound`.

    Attributes:
        input_names: the inputs that are encoded and scored, main input first.
        condition_names: the inputs that p(x|z) may depend on besides z.
        inference_modules: names of its modules that make q(z|x).
    """

    config: VAEConfig
    base_model_prefix = "vae"
    input_names: ClassVar[tuple[str, ...]] = ()
    condition_names: ClassVar[tuple[str, ...]] = ()
    inference_modules: ClassVar[tuple[str, ...]] = ("encoder", "to_moments")

    def post_init(self) -> None:
        """Add the densities that the configuration names, and what transformers does at the end of ``__init__``."""
        self.densities = nn.ModuleDict(
            {name: build_density(*self.density_dims(name), kind) for name, kind in self.config.densities.items()}
        )
        if self.densities:
            self._keep_in_fp32_modules_strict = {"densities"}  # a flow in bfloat16 is not the flow that was fitted
        super().post_init()

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The latent's event shape."""
        return (self.config.latent_dim,)

    def density_dims(self, name: str) -> tuple[int, int]:
        """Size of what a density is over, and of what it is conditioned on."""
        self.config.density(name)  # a name that there is
        return math.prod(self.latent_shape), 0

    def posterior(self, **inputs: Tensor) -> Posterior:
        """Infer the latent from the inputs."""
        raise NotImplementedError

    def log_px(self, z: Tensor, q: Posterior, **inputs: Tensor) -> dict[str, Tensor]:
        """Log-likelihood of every modality under ``z`` (S, K, B, *event): (S, K, B) nats each."""
        raise NotImplementedError

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u), batch (K,), of a VampPrior's pseudo-inputs (K, *)."""
        raise NotImplementedError

    def prior(self) -> Distribution:
        """p(z), broadcasting over rows; pseudo-inputs are normalised by the statistics of data and leave these as they are."""
        with running_statistics(self):
            return self.latent_prior(self.encode_pseudo_inputs, self.device)

    def hidden_layers(self) -> list[nn.Module]:
        """Whose outputs are the encoder's hidden states, for models that show them: what enters the first layer, then each layer."""
        return []

    def render(self, z: Tensor, **options: Any) -> Tensor:
        """What a person looks at, made from latents (B, *event)."""
        raise NotImplementedError

    def terms(
        self, q: Posterior, inputs: dict[str, Tensor], num_samples: int, noise_key: Tensor | None, sample: bool = True, first: int = 0
    ) -> Terms:
        """Draw latents and score the inputs under them: all that an objective needs.

        Arguments:
            q: the posterior of ``inputs``.
            num_samples: S.
            noise_key: (B,) int64 keys; torch's generator when None.
            sample: draw samples, or use the components' means.
            first: number of the first sample, which keyed noise depends on.
        """
        drawn = self._draw(q, num_samples, noise_key, sample, first)
        z = drawn.view_as(drawn)  # so that what an objective makes of its gradient is not done to that of the auxiliary
        return Terms(z, self.log_px(z, q, **inputs), q, self.prior(), auxiliary=self.auxiliary_log_prob(drawn, inputs))

    def auxiliary_log_prob(self, z: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
        """What the model maximises beside the objective, (S, K, B) nats of z (S, K, B, *event); None: nothing."""
        return None

    def bound(
        self,
        inputs: dict[str, Tensor],
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        output_hidden_states: bool | None = None,
        q: Posterior | None = None,
    ) -> VAEOutput:
        """Encode, sample, decode and weigh: the body of every model's ``forward``.

        Arguments:
            inputs: the model's inputs by name.
            beta: weight of the divergence.
            num_samples: S.
            objective: (terms, beta) -> (B,) nats; the ELBO when None.
            noise_key: (B,) int64 keys of the posterior's noise (see :mod:`mmvae.noise`); torch's generator when None.
            sample_posterior: sample, or use the mean; None samples in training mode only.
            output_hidden_states: return what the encoder's layers gave, too; as the configuration says when None.
            q: the posterior of ``inputs`` where it is known already.
        """
        at_least("num_samples", num_samples, 1)
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with outputs_of(self.hidden_layers() if shown else ()) as hidden_states:
            q = self.posterior(**inputs) if q is None else q
        terms = self.terms(q, inputs, num_samples, noise_key, self.training if sample_posterior is None else sample_posterior)
        return VAEOutput(**self.weigh(terms, beta, objective or elbo), hidden_states=tuple(hidden_states) or None)

    def weigh(self, terms: Terms, beta: float, objective: Objective) -> VAEOutput:
        """What :meth:`bound` returns of terms, hidden states apart; a model that maximises more than the objective adds it here."""
        loss_rows = -objective(terms, beta)
        if terms.auxiliary is not None:
            loss_rows = loss_rows - terms.mean(terms.auxiliary)
        with torch.no_grad():
            each = [terms.mean(value) for value in terms.log_px.values()]
            log_px = torch.stack(each).sum(0)
            kl = terms.mean(kl_to_prior(terms))
            present = terms.log_pi().argmax(0)  # a component that is not absent
        return VAEOutput(
            loss=loss_rows.mean(),
            loss_rows=loss_rows,
            elbo=log_px - kl,
            log_px=log_px,
            log_px_by_modality=torch.stack(each, 1) if len(each) > 1 else None,
            kl=kl,
            latents=terms.z[0, present, torch.arange(len(present), device=present.device)],
            latent_mean=terms.q.mixture.mean,
            latent_logvar=terms.q.mixture.variance.log(),
        )

    @torch.no_grad()
    def log_marginal(
        self, num_samples: int = 100, chunk_size: int | None = None, noise_key: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        r"""Importance-sampled log-likelihood, :math:`\log \tfrac1S \sum_s p(x, z_s) / q(z_s|x)`, in nats.

        Encodes once; memory depends on ``chunk_size``, not on ``num_samples``.

        Arguments:
            num_samples: S, per component of the posterior.
            chunk_size: samples of every row decoded at once; about 512 decoded rows when None. Keyed results do not depend on it.
            noise_key: (B,) int64 keys of the noise; torch's generator when None.
            inputs: the model's inputs by name.

        Returns:
            (B,) float32.
        """
        q = self.posterior(**inputs)
        chunk_size = max(1, 512 // q.mixture.components.batch_shape.numel()) if chunk_size is None else chunk_size
        at_least("num_samples", num_samples, 1), at_least("chunk_size", chunk_size, 1)
        total = torch.full(q.mixture.batch_shape, -math.inf, device=self.device)
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            terms = self.terms(q, inputs, size, noise_key, first=start)
            total = torch.logaddexp(total, log_importance(terms).logsumexp(0))
        return total - math.log(num_samples)

    def _draw(self, q: Posterior, num_samples: int, key: Tensor | None, sample: bool, first: int = 0) -> Tensor:
        """(S, K, B, *event) samples of the posterior's components, or their means."""
        components = q.mixture.components
        shape = components.batch_shape[:1] + components.event_shape
        if not sample:
            return components.mean.expand(num_samples, *components.batch_shape, *components.event_shape)
        if key is None:
            return q.mixture.stratified(num_samples)
        noise = self._normal(q.mixture, key, num_samples, first, shape)
        return q.mixture.stratified(num_samples, noise.movedim(2, 1))

    def _normal(
        self, like: Distribution, key: Tensor | None, num_samples: int, first: int, shape: tuple[int, ...], salt: int = 0
    ) -> Tensor:
        """Standard normal (S, B, *shape) for the B rows of ``like``, by (salt, key, number of the sample), or by torch's generator."""
        rows = like.batch_shape[-1]
        if key is None:
            return torch.randn(num_samples, rows, *shape, device=self.device)
        samples = torch.arange(first, first + num_samples, device=key.device).unsqueeze(1)
        return keyed_normal(fold(salt, key, samples).flatten(), shape).unflatten(0, (num_samples, rows))

    @torch.no_grad()
    def sample_prior(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents from p(z), or from the density that was fitted to it, (num_samples, *event)."""
        at_least("num_samples", num_samples, 1)
        event = self.prior().event_shape
        if self.config.latent_density in self.densities:
            density = self.densities[self.config.latent_density]
            return density.sample(num_samples, generator=generator).to(self.device).unflatten(1, event)
        with seeded(generator):
            z = self.prior().sample(torch.Size([num_samples]))
        return z.flatten(0, -1 - len(event))

    def sample(self, num_samples: int, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Draw latents by :meth:`sample_prior` and render: ``num_samples`` things that were never seen.

        Arguments:
            num_samples: how many.
            generator: makes the latents (and sampled words) repeatable; torch's global generator when None.
            options: handed to :meth:`render`.
        """
        z = self.sample_prior(num_samples, generator)
        with seeded(generator):
            return self.render(z, **options)

    @torch.no_grad()
    def reconstruct(self, **inputs: Any) -> Tensor:
        """Render the posterior's mean. Names that are not inputs of the model are options of :meth:`render`, as conditions are."""
        given = {name: value for name, value in inputs.items() if name in self.input_names}
        options = {name: value for name, value in inputs.items() if name in self.condition_names or name not in given}
        return self.render(self.posterior(**given).mixture.mean, **options)

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, num_steps: int = 8, **options: Any) -> Tensor:
        """Render the straight line between latents, ends included.

        Arguments:
            start, end: (B, *event).
            num_steps: points on each line, at least 2.
            options: handed to :meth:`render`.

        Returns:
            (B * num_steps, ...), the points of a line next to each other.
        """
        at_least("num_steps", num_steps, 2)
        share = torch.linspace(0, 1, num_steps, device=start.device, dtype=start.dtype).view(1, -1, *[1] * (start.dim() - 1))
        return self.render(torch.lerp(start.unsqueeze(1), end.unsqueeze(1), share).flatten(0, 1), **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                limit = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -limit, limit)
            if getattr(module, "starts_at_zero", False):
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.GRU):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(module.hidden_size), 1 / math.sqrt(module.hidden_size))
        elif isinstance(module, Scale | Prior | Density | ScaledMean):
            module.reset_parameters()
        else:
            super()._init_weights(module)

"""What every VAE shares: the configuration, the contract of a modality, and the bodies of ``forward`` and ``log_marginal``.

Shapes: ``S`` samples, ``K`` components of the posterior, ``B`` batch, ``*event`` the latent's event, (D,) or (C, h, w).
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Distribution
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmvae.aggregation import Posterior, alone
from mmvae.distributions import DiagNormal
from mmvae.likelihoods import Scale
from mmvae.noise import fold, keyed_normal
from mmvae.objectives import Objective, Terms, elbo, kl_to_prior
from mmvae.priors import PRIORS, MixtureOfGaussians, VampPrior

# Names that transformers itself hands to a config beside its fields.
_FOREIGN = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


@strict
class VAEConfig(PreTrainedConfig):
    """What the configurations of all VAEs share. A name that is not a field is an error that names the nearest field.

    Arguments:
        latent_dim: size of the latent vector, or its channels when it is spatial; 1 to 65,536.
        prior: a key of ``mmvae.priors.PRIORS``.
        prior_components: K of a mixture or Vamp prior; 1 to 10,000.
    """

    latent_dim: int = 64
    prior: str = "standard_normal"
    prior_components: int = 50

    # Allowed closed ranges and sets of values, by field; subclasses add theirs.
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"latent_dim": (1, 65_536), "prior_components": (1, 10_000)}
    choices: ClassVar[dict[str, Sequence[Any]]] = {"prior": tuple(PRIORS)}

    def __post_init__(self, **kwargs: Any) -> None:
        known = {f.name for f in fields(self)}
        for name in kwargs.keys() - _FOREIGN:
            nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise ValueError(f"{type(self).__name__}: unknown field {name!r} = {kwargs[name]!r}; the nearest one is {nearest!r}")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check every field against ``ranges`` and ``choices`` before any module is built.

        Raises:
            ValueError: naming the field, its value and what was expected.
        """
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is not None and not low <= item <= high:  # false for NaN too
                    raise ValueError(f"{type(self).__name__}.{name}: received {value!r}, expected {low} to {high}")
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{type(self).__name__}.{name}: received {getattr(self, name)!r}, expected one of {expected}")


@dataclass
class VAEOutput(ModelOutput):
    """What ``forward`` returns. Nats; ``None`` where it does not apply.

    Attributes:
        loss: (), mean over rows of minus the objective.
        loss_rows: (B,), minus the objective.
        elbo: (B,), evidence lower bound at weight 1 and without free bits, whatever the objective was.
        log_px: (B,), log p(x|z), mean over samples.
        kl: (B,), KL(q(z|x) || p(z)) in closed form, or its estimate from the samples.
        latents: (B, *event), the first sample.
        latent_mean: (B, *event), the posterior's mean.
        latent_logvar: (B, *event), the posterior's log-variance (of its first component).
        logits: (B, T, V), only when latents were given and text was decoded.
        past_key_values: the decoder's recurrent state while generating.
    """

    loss: Tensor | None = None
    loss_rows: Tensor | None = None
    elbo: Tensor | None = None
    log_px: Tensor | None = None
    kl: Tensor | None = None
    latents: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_logvar: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: received {value!r}, expected at least {least}")


class VAE(PreTrainedModel):
    """A variational autoencoder over one modality or many: what is the same for all of them.

    A subclass gives ``posterior``, ``log_px`` and ``prior``; ``forward`` is spelled out by each model and calls :meth:`bound`.
    """

    config: VAEConfig
    base_model_prefix = "vae"
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False  # Trainer must divide by the accumulation steps itself
    model_tags: ClassVar[list[str]] = ["mmvae", "vae"]

    def posterior(self, **inputs: Tensor) -> Posterior:
        """Infer the latent from the inputs."""
        raise NotImplementedError

    def log_px(self, z: Tensor, q: Posterior, **inputs: Tensor) -> dict[str, Tensor]:
        """Log-likelihood of every modality under ``z`` (S, K, B, *event): (S, K, B) nats each."""
        raise NotImplementedError

    def prior(self) -> Distribution:
        """p(z), broadcasting over rows."""
        raise NotImplementedError

    def render(self, z: Tensor, **options: Any) -> Tensor:
        """What a person looks at, made from latents (B, *event)."""
        raise NotImplementedError

    def bound(
        self,
        inputs: dict[str, Tensor],
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
    ) -> VAEOutput:
        """Encode, sample, decode and weigh: the body of every model's ``forward``.

        Arguments:
            inputs: the model's inputs by name.
            beta: weight of the divergence.
            num_samples: S.
            objective: (terms, beta) -> (B,) nats; the ELBO when None.
            noise_key: (B,) int64 keys of the posterior's noise (see :mod:`mmvae.noise`); torch's generator when None.
            sample_posterior: sample, or use the mean; None samples in training mode only.
        """
        _at_least("num_samples", num_samples, 1)
        q = self.posterior(**inputs)
        z = self._draw(q, num_samples, noise_key, self.training if sample_posterior is None else sample_posterior)
        terms = Terms(z, self.log_px(z, q, **inputs), q, self.prior())
        loss_rows = -(objective or elbo)(terms, beta)
        with torch.no_grad():
            weights = q.mixture.log_weights.exp()
            log_px = (weights * terms.likelihood()).sum(1).mean(0)
            kl = (weights * kl_to_prior(terms)).sum(1).mean(0)
        return VAEOutput(
            loss=loss_rows.mean(),
            loss_rows=loss_rows,
            elbo=log_px - kl,
            log_px=log_px,
            kl=kl,
            latents=z[0, 0],
            latent_mean=q.mixture.mean,
            latent_logvar=q.mixture.components.logvar[0],
        )

    @torch.no_grad()
    def log_marginal(
        self, num_samples: int = 100, chunk_size: int | None = None, noise_key: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        r"""Importance-sampled log-likelihood, :math:`\log \tfrac1S \sum_s p(x, z_s) / q(z_s|x)`, in nats.

        Encodes once; memory depends on ``chunk_size``, not on ``num_samples``.

        Arguments:
            num_samples: S, per component of the posterior.
            chunk_size: samples of every row decoded at once; about 2,048 decoded rows when None. Keyed results do not depend on it.
            noise_key: (B,) int64 keys of the noise; torch's generator when None.
            inputs: the model's inputs by name.

        Returns:
            (B,) float32.
        """
        _at_least("num_samples", num_samples, 1)
        q, prior = self.posterior(**inputs), self.prior()
        rows = q.mixture.components.batch_shape.numel()
        chunk_size = chunk_size or max(1, 2048 // rows)
        total = torch.full(q.mixture.batch_shape, -math.inf, device=self.device)
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            z = self._draw(q, size, noise_key, True, start)
            terms = Terms(z, self.log_px(z, q, **inputs), q, prior)
            weights = terms.likelihood() + terms.log_ratio() + q.mixture.log_weights
            total = torch.logaddexp(total, weights.flatten(0, 1).logsumexp(0))
        return total - math.log(num_samples)

    def _draw(self, q: Posterior, num_samples: int, key: Tensor | None, sample: bool, first: int = 0) -> Tensor:
        """(S, K, B, *event) samples of the posterior's components, or their means."""
        components = q.mixture.components
        shape = components.batch_shape[:1] + components.event_shape
        if not sample:
            return components.mean.expand(num_samples, *components.batch_shape, *components.event_shape)
        if key is None:
            return q.mixture.stratified(num_samples)
        samples = torch.arange(first, first + num_samples, device=key.device).unsqueeze(1)
        noise = keyed_normal(fold(0, key, samples).flatten(), shape).unflatten(0, (num_samples, -1))
        return q.mixture.stratified(num_samples, noise.movedim(2, 1))

    @torch.no_grad()
    def sample_prior(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Latents from p(z), (num_samples, *event)."""
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                seed = torch.randint(2**62, (), generator=generator, device=generator.device)
                torch.manual_seed(int(seed))
            z = self.prior().sample(torch.Size([num_samples]))
        return z.flatten(0, -1 - len(self.prior().event_shape))

    def sample(self, num_samples: int, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Draw from the prior and render: ``num_samples`` things that were never seen.

        Arguments:
            num_samples: how many.
            generator: makes the latents repeatable; torch's global generator when None.
            options: handed to :meth:`render`.
        """
        return self.render(self.sample_prior(num_samples, generator), **options)

    @torch.no_grad()
    def reconstruct(self, **inputs: Any) -> Tensor:
        """Render the posterior's mean. Names that are not inputs of the model are options of :meth:`render`."""
        given = {name: inputs.pop(name) for name in list(inputs) if name in self.input_names}
        return self.render(self.posterior(**given).mixture.mean, **inputs)

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
        _at_least("num_steps", num_steps, 2)
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
        elif isinstance(module, Scale | MixtureOfGaussians | VampPrior):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class VAEModel(VAE):
    """A VAE of one modality, and the whole contract of a modality: what its author writes.

    Attributes:
        input_names: what ``encode`` and ``target`` take, main input first.
        condition_names: what ``decode`` may depend on besides z.
    """

    input_names: ClassVar[tuple[str, ...]] = ()
    condition_names: ClassVar[tuple[str, ...]] = ()

    def encode(self, **inputs: Tensor) -> DiagNormal:
        """q(z|x), batch (B,)."""
        raise NotImplementedError

    def decode(self, z: Tensor, **conditions: Tensor) -> Distribution:
        """p(x|z), batch (*, B), from z (*, B, *event)."""
        raise NotImplementedError

    def target(self, **inputs: Tensor) -> Tensor:
        """The x that p(x|z) scores."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The latent's event shape."""
        return (self.config.latent_dim,)

    @property
    def pseudo_input_shape(self) -> tuple[int, ...]:
        """Shape of one pseudo-input of a VampPrior."""
        raise NotImplementedError

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u), batch (K,), of a VampPrior's pseudo-inputs (K, *pseudo_input_shape)."""
        raise NotImplementedError

    def build_prior(self) -> nn.Module:
        """The prior that the configuration names."""
        vamp = {"pseudo_input_shape": self.pseudo_input_shape} if self.config.prior == "vamp" else {}
        return PRIORS[self.config.prior](self.latent_shape, num_components=self.config.prior_components, **vamp)

    def posterior(self, **inputs: Tensor) -> Posterior:
        """q(z|x) as the only expert."""
        return alone(self.main_input_name, self.encode(**inputs))

    def log_px(self, z: Tensor, q: Posterior, **inputs: Tensor) -> dict[str, Tensor]:
        """log p(x|z), (S, K, B) nats."""
        return {self.main_input_name: self.decode(z).log_prob(self.target(**inputs))}

    def prior(self) -> Distribution:
        """p(z), broadcasting over rows."""
        return self.latent_prior(self.encode_pseudo_inputs, self.device)

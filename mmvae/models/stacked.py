r"""Classes on the latent of a trained VAE: M1 + M2.

    p(x, y, z1, z2) = p(y) p(z2) p(z1|y, z2) p(x|z1),    q(y, z1, z2|x) = q(z1|x) q(y|z1) q(z2|z1, y)

M1 is p(x|z1) and q(z1|x) of any VAE of one modality, trained before on rows without labels, and stays as it is. M2 is a VAE with classes
(:mod:`mmvae.models.classes`) over samples of q(z1|x), made of small dense networks: in training nothing is decoded but z1, so summing over
the classes of rows without a label costs little. Figures are of x: its bound is log p(x|z1) - log q(z1|x) plus M2's bound on log p(z1).

Shapes: ``B`` batch, ``D`` latent of M2, ``E`` latent of M1, ``N`` classes.

References:
    Kingma et al. (2014), Semi-supervised learning with deep generative models, section 2.3, https://arxiv.org/abs/1406.5298
"""

import math
from dataclasses import field
from typing import Any, ClassVar, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from mmvae.aggregation import Posterior
from mmvae.distributions import DiagNormal
from mmvae.models.base import VAEOutput, at_least
from mmvae.models.classes import ClassVAE, ClassVAEConfig, without_labels
from mmvae.models.configuration import VAEConfig, inner, plain
from mmvae.models.unimodal import VAEModel
from mmvae.noise import fold

_BELOW = 0x62656C6F  # keeps the noise of z1 apart from that of z2


@strict
class StackedVAEConfig(ClassVAEConfig):
    """Configuration of a :class:`StackedVAE`: of M2, and M1's.

    Arguments:
        below: M1's configuration, or its fields with their ``model_type``.
        hidden_size: width of the two hidden layers of M2's encoder and of the one of its decoder.
        dropout: in M2's encoder, [0, 1).
    """

    model_type = "stacked_vae"

    below: Any = field(default_factory=dict)
    hidden_size: int = 500
    dropout: float | int = 0.0

    ranges: ClassVar[dict[str, tuple[float, float]]] = ClassVAEConfig.ranges | {"hidden_size": (1, 65_536), "dropout": (0, 0.99)}

    def __post_init__(self, **kwargs: Any) -> None:
        if self.below != {}:  # as it is without arguments
            self.below = inner("StackedVAEConfig.below", self.below)
        super().__post_init__(**kwargs)

    @property
    def binarize(self) -> str:
        """How the data's pixels were made 0 or 1."""
        return getattr(self.below, "binarize", "none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, M1's too."""
        return super().to_dict() | {"below": plain(self.below) if isinstance(self.below, PreTrainedConfig) else self.below}


class StackedVAE(ClassVAE):
    """M1 + M2; see the module's docstring. It takes the inputs of M1, its latent is M2's, and what it renders is M1's.

    Example:
        >>> from mmvae import ImageVAE, ImageVAEConfig
        >>> model = StackedVAE.over(ImageVAE(ImageVAEConfig(image_size=16, latent_dim=6)), num_classes=10, latent_dim=4).eval()
        >>> model.classify(pixel_values=torch.zeros(2, 3, 16, 16)).shape, model.generate(class_labels=[3, 7]).shape
        (torch.Size([2, 10]), torch.Size([2, 3, 16, 16]))
    """

    config: StackedVAEConfig
    config_class = StackedVAEConfig
    base_model_prefix = "stacked_vae"
    input_names = ("below_latents",)  # what M2 sees; a model's own are M1's

    def __init__(self, config: StackedVAEConfig):
        super().__init__(config)
        if not isinstance(config.below, VAEConfig) or not config.num_classes:
            received = f"{getattr(config.below, 'model_type', config.below)!r} with {config.num_classes} classes"
            raise ValueError(f"StackedVAEConfig.below, num_classes: received {received}, expected a VAE's configuration and at least 2")
        self.below = AutoModel.from_config(config.below, dtype=torch.get_default_dtype())
        if getattr(config.below, "pose", "none") != "none" and config.below.prior == "standard_normal":
            why = "whose posterior has no density under another prior than its own; expected a mixture or Vamp prior, or no pose"
            raise ValueError(f"StackedVAEConfig.below: received pose {config.below.pose!r} with prior 'standard_normal', {why}")
        size, hidden, shape = config.below.latent_dim, config.hidden_size, self.below.latent_shape
        if not isinstance(self.below, VAEModel) or len(shape) != 1 or not size or getattr(config.below, "num_classes", 0):
            expected = "expected a VAE of one modality without classes whose latent is a vector"
            raise ValueError(f"StackedVAEConfig.below: received {config.below.model_type!r} with a latent of shape {shape}, {expected}")
        drop = nn.Dropout(config.dropout)
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), drop, nn.Linear(hidden, hidden), nn.SiLU(), drop)
        self.to_moments = nn.Linear(hidden, 2 * config.latent_dim)
        self.decoder = nn.Sequential(nn.Linear(config.latent_dim + config.num_classes, hidden), nn.SiLU(), nn.Linear(hidden, 2 * size))
        self.build_classes(hidden)
        self.latent_prior = self.build_prior()
        self.main_input_name, self.input_modalities = self.below.main_input_name, self.below.input_modalities
        self.input_names = (*self.below.input_names, "labels")
        self.post_init()
        self.train(self.training)

    @classmethod
    def over(cls, vae: VAEModel, **fields: Any) -> Self:
        """A new M2 on a trained M1, of which it takes a copy.

        Arguments:
            vae: M1.
            fields: of the configuration.
        """
        model = cls(StackedVAEConfig(below=plain(vae.config), **fields))
        model.below.load_state_dict(vae.state_dict())
        return model

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which M1 stays in evaluation mode, and frozen: loading gives it new parameters."""
        super().train(mode)
        self.below.eval().requires_grad_(False)
        return self

    def _seen(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What M2 sees: z1, the mean of q(z1|x) where it is not given, and the labels."""
        given = without_labels(inputs)
        return {"labels": inputs.get("labels")} | (
            given if "below_latents" in given else {"below_latents": self.below.posterior(**given).mixture.mean}
        )

    def features(self, below_latents: Tensor) -> Tensor:
        """(B, H) from z1 (B, E)."""
        return self.encoder(below_latents.to(self.dtype))

    def encode(self, **inputs: Tensor) -> DiagNormal:
        """q(z2|x) at the mean of q(z1|x), as one normal; see :meth:`ClassVAE.latent_given`."""
        return self.latent_given(self.features(self._seen(inputs)["below_latents"]))

    def posterior(self, **inputs: Tensor) -> Posterior:
        """q(y, z2|z1) at the mean of q(z1|x), or of given ``below_latents``."""
        return super().posterior(**self._seen(inputs))

    @torch.no_grad()
    def classify(self, **inputs: Tensor) -> Tensor:
        """log q(y|z1) at the mean of q(z1|x), (B, N) nats, from M1's inputs."""
        return super().classify(**self._seen(inputs))

    def decode(self, z: Tensor, class_labels: Tensor | None = None) -> DiagNormal:
        """p(z1|y, z2) from z2 (*, B, D) and classes (*, B)."""
        self.check_latents(z)
        return DiagNormal(*self.decoder(self.with_class(z, class_labels).to(self.dtype)).chunk(2, -1))

    def target(self, below_latents: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """What is scored: z1 by M2; of inputs, what M1 scores."""
        return self.below.target(**inputs) if below_latents is None else below_latents

    @torch.no_grad()
    def render(self, z: Tensor, class_labels: Tensor | None = None, **options: Any) -> Tensor:
        """What M1 renders at the mean of p(z1|y, z2)."""
        return self.below.render(self.decode(z, class_labels).mean, **options)

    def _draw_below(self, q: Posterior, key: Tensor | None, sample: bool = True, first: int = 0) -> Tensor:
        """z1 (1, 1, B, E) of M1's q."""
        return self.below._draw(q, 1, None if key is None else fold(_BELOW, key), sample, first)

    def bound(
        self,
        inputs: dict[str, Tensor],
        *args: Any,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        **options: Any,
    ) -> VAEOutput:
        """M2's objective at one sample of q(z1|x), or at its mean; see :meth:`VAE.bound`.

        In evaluation mode ``elbo``, ``log_px`` and ``kl`` are of x, and the classes those of :meth:`classify`; in training they are of z1.
        """
        given, sampled = without_labels(inputs), self.training if sample_posterior is None else sample_posterior
        with torch.no_grad():
            q = self.below.posterior(**given)
            z = self._draw_below(q, noise_key, sampled)
        seen = {"below_latents": z[0, 0], "labels": inputs.get("labels")}
        out = super().bound(seen, *args, noise_key=noise_key, sample_posterior=sample_posterior, **options)
        if self.training:
            return out
        log_weight, log_px = self._scored(z, q, given)
        elbo = log_weight + out.elbo
        figures = {"elbo": elbo, "log_px": log_px, "kl": log_px - elbo, "class_log_probs": self.classify(**given)}
        return VAEOutput(**{**out, **figures})

    @torch.no_grad()
    def _scored(self, z: Tensor, q: Posterior, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log p(x|z1) - log q(z1|x), and log p(x|z1), (B,) nats, of z1 (1, 1, B, E)."""
        (log_px,) = self.below.log_px(z, q, **inputs).values()
        return (log_px - q.mixture.components.log_prob(z))[0, 0], log_px[0, 0]

    @torch.no_grad()
    def log_marginal(
        self, num_samples: int = 100, chunk_size: int | None = None, noise_key: Tensor | None = None, **inputs: Tensor
    ) -> Tensor:
        r"""log p(x) by importance sampling, :math:`p(z_1)` of each sample by one of q(y, z2|z1); see :meth:`VAE.log_marginal`.

        Arguments:
            chunk_size: there for what calls any model alike; samples are decoded one after the other.
        """
        at_least("num_samples", num_samples, 1)
        given = without_labels(inputs)
        q, total = self.below.posterior(**given), torch.full((), -math.inf, device=self.device)
        for n in range(num_samples):
            z = self._draw_below(q, noise_key, first=n)
            log_pz = super().log_marginal(1, noise_key=None if noise_key is None else fold(noise_key, n), below_latents=z[0, 0])
            total = torch.logaddexp(total, self._scored(z, q, given)[0] + log_pz)
        return total - math.log(num_samples)

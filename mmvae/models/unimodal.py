"""The contract of a modality: what the author of a new one writes.

Shapes: ``S`` samples, ``K`` components of the posterior, ``B`` batch, ``*event`` the latent's event, (D,) or (C, h, w).
"""

from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution
from transformers.utils.generic import can_return_tuple

from mmvae.aggregation import Posterior, alone
from mmvae.distributions import DiagNormal
from mmvae.models.base import VAE, VAEOutput
from mmvae.models.inherited import refuse_unknown
from mmvae.priors import PRIORS

_OPTIONS = ("num_samples", "objective", "noise_key", "sample_posterior", "output_hidden_states")  # of VAE.bound


class VAEModel(VAE):
    """A VAE of one modality, and the whole contract of a modality: what its author writes.

    Its author sets ``main_input_name`` and ``input_names`` (what ``encode`` and ``target`` take; ``condition_names`` are what ``decode``
    takes besides z), builds the modules and ``self.latent_prior = self.build_prior()`` in ``__init__`` and ends that with
    ``self.post_init()``, and writes ``encode``, ``decode``, ``target`` and ``render``; ``encode_pseudo_inputs`` with its shape for a
    VampPrior, and a ``forward`` that names the inputs, so that ``Trainer`` sees them.
    """

    def encode(self, **inputs: Tensor) -> DiagNormal:
        """q(z|x), batch (B,)."""
        raise NotImplementedError

    def encode_with_states(self, **inputs: Tensor) -> tuple[DiagNormal, Tensor]:
        """q(z|x), and the states (B, L, ``config.states_size``) that decoders of other modalities may attend to, 0 where there is none."""
        raise NotImplementedError

    def decode(self, z: Tensor, **conditions: Tensor) -> Distribution:
        """p(x|z), batch (*, B), from z (*, B, *event)."""
        raise NotImplementedError

    def target(self, **inputs: Tensor) -> Tensor:
        """The x that p(x|z) scores."""
        raise NotImplementedError

    def num_tokens(self, **inputs: Tensor) -> Tensor | None:
        """How many tokens or words p(x|z) scores of each row, (B,): what a perplexity is per; None where x has none."""
        return None

    @property
    def pseudo_input_shape(self) -> tuple[int, ...]:
        """Shape of one pseudo-input of a VampPrior; () where the modality has none."""
        return ()

    def build_prior(self) -> nn.Module:
        """The prior that the configuration names."""
        return PRIORS[self.config.prior](self.latent_shape, self.config.prior_components, self.pseudo_input_shape)

    @can_return_tuple
    def forward(self, main_input: Tensor | None = None, /, beta: float = 1.0, *, return_loss: bool = True, **kwargs: Any) -> VAEOutput:
        """Minus the objective, and what it is made of. A model that ``Trainer`` is to read the inputs' names off spells them out.

        Arguments:
            main_input: what is called ``main_input_name``, and may be given by that name instead.
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            kwargs: inputs, conditions, and options of :meth:`VAE.bound` by name; what else transformers hands to every model; any other
                name is a TypeError.
        """
        given = {name: kwargs.pop(name) for name in (*self.input_names, *self.condition_names) if name in kwargs}
        given |= {} if main_input is None else {self.main_input_name: main_input}
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        refuse_unknown(self, kwargs, _OPTIONS)
        return self.bound(given, beta, **options)

    def posterior(self, **inputs: Tensor) -> Posterior:
        """q(z|x) as the only expert."""
        return alone(self.main_input_name, self.encode(**self._only(self.input_names, inputs)))

    def log_px(self, z: Tensor, q: Posterior, **inputs: Tensor) -> dict[str, Tensor]:
        """log p(x|z), (S, K, B) nats."""
        p = self.decode(z, **self._only(self.condition_names, inputs))
        return {self.main_input_name: p.log_prob(self.target(**self._only(self.input_names, inputs)))}

    def check_latents(self, z: Tensor) -> None:
        """Refuse latents of another width than the model's, naming it."""
        dim = -len(self.latent_shape)
        if z.shape[dim] != self.config.latent_dim:
            raise ValueError(f"latents: received shape {tuple(z.shape)}, expected {self.config.latent_dim} at dimension {dim}")

    @staticmethod
    def _only(names: tuple[str, ...], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in inputs.items() if name in names}

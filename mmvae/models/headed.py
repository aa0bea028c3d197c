"""What every model has that is a VAE with a head: what it takes, and which part of it is trained.

A folder of the VAE alone gives the head new first values, and a VAE's ``from_pretrained`` takes the folder of a model with a head.
Densities that were fitted to the VAE's latents stay while it is frozen; in training that moves its latents they are dropped.
What ``transformers.Trainer`` predicts, and shows to ``compute_metrics``, is the logits alone.
"""

import logging
from typing import Self

from torch import nn

from mmvae.models.configuration import VAEConfig
from mmvae.models.pretrained import VerifiedModel

logger = logging.getLogger(__name__)

# What outputs hold beside the loss and the logits.
_NOT_PREDICTED = ["loss_rows", "cross_entropy", "elbo", "log_px", "kl", "latents", "latent_mean", "latent_logvar", "hidden_states"]


class HeadedVAE(VerifiedModel):
    """A VAE, ``base_model``, with a head; its author builds both and writes ``forward``."""

    config: VAEConfig

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        config.keys_to_ignore_at_inference = _NOT_PREDICTED  # where Trainer looks

    @property
    def input_names(self) -> tuple[str, ...]:
        """The VAE's inputs, and "labels"."""
        return (*self.base_model.input_names, "labels")

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What the VAE's p(x|z) may depend on besides z."""
        return self.base_model.condition_names

    @property
    def inference_modules(self) -> tuple[str, ...]:
        """The head, beside those of the VAE."""
        return tuple(name for name, _ in self.named_children() if name != self.base_model_prefix)

    def freeze(self, frozen: bool = True) -> Self:
        """Leave the VAE as it is, its statistics too, and train the head alone; or, with False, train everything again."""
        self.base_model.requires_grad_(not frozen)
        return self.train(self.training)

    @property
    def frozen(self) -> bool:
        """Whether only the head is trained."""
        return not any(parameter.requires_grad for parameter in self.base_model.parameters())

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which a frozen VAE stays in evaluation mode: no dropout, no input noise, no statistics. One that is not
        frozen loses its densities, which are of the latents that it had."""
        super().train(mode)
        if self.frozen:
            self.base_model.eval()
        elif mode and self.config.densities:
            logger.warning("dropping the fitted densities %s: the VAE is trained, and its latents move", list(self.config.densities))
            self.config.densities, self.base_model.densities = {}, nn.ModuleDict()
        return self

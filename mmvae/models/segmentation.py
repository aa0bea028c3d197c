r"""Segmentation from the latent: a mask is drawn by what draws the picture.

The head reads the last features of the decoder, half the picture's size, as they are when the decoder draws the picture from z, and gives
logits of the class of every pixel,

.. math:: p(y_{ij} \mid z) = \mathrm{softmax}\big(\mathrm{head}(\mathrm{features}(z))\big)_{ij}, \qquad z \sim q(z \mid x),

with the posterior's mean in evaluation. There is no path around the latent: what the mask shows, z holds. With a pose the head draws in the
canonical window, as the decoder does, and its logits are turned and shifted by the same latent; beyond the window is background, class 0.

Shapes: ``B`` pictures, ``C,H,W`` picture, ``N`` classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from mmvae.models.classes import checked_labels
from mmvae.models.headed import HeadedVAE
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.inherited import refuse_unknown
from mmvae.nn import outputs_of
from mmvae.objectives import Objective, dreg
from mmvae.pose import OUTSIDE, within

UNLABELLED = 255  # the class of a pixel of which nothing is known, as in transformers' models


@dataclass
class SegmenterOutput(ModelOutput):
    """What ``forward`` returns: what transformers' models for segmentation do, and the parts of the loss. Nats.

    Attributes:
        loss: (), mean over rows of ``loss_rows``; None without labels.
        logits: (B, N, H, W).
        loss_rows: (B,), the cross-entropy, or jointly the negative objective of the VAE plus alpha times that.
        cross_entropy: (B,), sum over the labelled pixels; None without labels.
        elbo, log_px, kl, latents, latent_mean, latent_logvar, hidden_states: the VAE's, see :class:`mmvae.models.base.VAEOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_rows: Tensor | None = None
    cross_entropy: Tensor | None = None
    elbo: Tensor | None = None
    log_px: Tensor | None = None
    kl: Tensor | None = None
    latents: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_logvar: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class ImageVAEForSemanticSegmentation(HeadedVAE):
    """An :class:`ImageVAE` without classes of its own, and a head that gives the class of every pixel; see the module's docstring.

    ``from_pretrained`` takes a folder of an ``ImageVAE``, to which it adds a new head, and ``ImageVAE.from_pretrained`` one of this model.

    Example:
        >>> model = ImageVAEForSemanticSegmentation(ImageVAEConfig(image_size=16, latent_dim=4, num_labels=3)).eval()
        >>> model(torch.zeros(2, 3, 16, 16)).logits.shape
        torch.Size([2, 3, 16, 16])
    """

    config: ImageVAEConfig
    config_class = ImageVAEConfig
    base_model_prefix = "image_vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: ClassVar[list[str]] = ["ResidualBlock"]

    def __init__(self, config: ImageVAEConfig):
        super().__init__(config)
        if config.num_classes:
            raise ValueError(f"ImageVAEConfig.num_classes: received {config.num_classes} with a head for masks, expected 0")
        if config.num_labels < 2:
            raise ValueError(f"ImageVAEConfig.num_labels: received {config.num_labels}, expected at least 2: background, and what is there")
        self.image_vae = ImageVAE(config)
        width, patch = config.trunk.channels[0], config.trunk.patch_size
        last = nn.Conv2d(width, patch**2 * config.num_labels, 3, padding=1)
        self.mask_head = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), last, nn.PixelShuffle(patch))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.image_vae._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        alpha: float | None = None,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        output_hidden_states: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> SegmenterOutput:
        r"""Logits, and with labels the loss: :math:`\mathrm{CE}`, or with ``alpha`` :math:`-\mathrm{ELBO} + \alpha\,\mathrm{CE}`.

        Arguments:
            pixel_values: (B, C, H, W), uint8 or float in [0, 1].
            labels: (B, H, W), whole numbers below N, or ``UNLABELLED``: such pixels count nothing, so rows without a mask are welcome.
            alpha: weight of the cross-entropy beside the VAE's objective; None: as the configuration's ``classifier_alpha`` says, and where
                that is None too, the cross-entropy is the loss.
            num_samples: of the VAE's objective; the mask is that of the first.
            beta, objective, noise_key, sample_posterior, output_hidden_states: see :meth:`mmvae.models.base.VAE.bound`.
            return_loss: there for ``transformers.Trainer``.
            kwargs: what transformers hands to every model and this one has no use for; any other name is a TypeError.

        Raises:
            ValueError: the objective dreg; labels of another shape or kind than (B, H, W) whole numbers; in the host's memory also for one
                that is no class.
        """
        refuse_unknown(self, kwargs)
        if getattr(objective, "func", objective) is dreg:
            raise ValueError("objective: received dreg, expected another: it would weigh the mask's gradient, too")
        alpha = self.config.classifier_alpha if alpha is None else alpha
        sampled = self.training if sample_posterior is None else sample_posterior
        vae, inputs = self.image_vae, {"pixel_values": pixel_values}
        # drawn: of finding the pose, if there is one, then of the decoding, then of a Vamp prior's pseudo-inputs
        with outputs_of([vae.decoder.norm]) as drawn:
            out = vae.bound(inputs, beta, num_samples, objective, noise_key, sampled, output_hidden_states)
        logits = self._placed(self.mask_head(F.silu(drawn[0 if vae.pose is None else 1][: len(pixel_values)])), out.latents)
        given = {name: value for name, value in out.items() if name in SegmenterOutput.__annotations__ and "loss" not in name}
        if labels is None:
            return SegmenterOutput(logits=logits, **given)
        labels = checked_labels("labels", labels, (len(logits), *logits.shape[2:]), logits.shape[1], UNLABELLED)
        cross_entropy = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="none").sum((1, 2))
        # times 0: every parameter has a gradient, which data-parallel training needs
        loss_rows = cross_entropy + 0 * out.loss_rows if alpha is None else out.loss_rows + alpha * cross_entropy
        return SegmenterOutput(loss=loss_rows.mean(), logits=logits, loss_rows=loss_rows, cross_entropy=cross_entropy, **given)

    def _placed(self, drawn: Tensor, z: Tensor) -> Tensor:
        """Logits (B, N, H, W) of what was drawn where the decoder draws: cut to size, or turned and shifted."""
        vae = self.image_vae
        height, width = vae.config.trunk_size
        drawn = drawn[..., :height, :width]
        if vae.pose is None:
            return drawn
        outside = torch.full((drawn.shape[1], 1, 1), OUTSIDE, dtype=drawn.dtype, device=drawn.device)
        outside[0] = 0
        return within(drawn, vae.pose.places(z[:, vae.content_dim :]), outside)

r"""A convolutional VAE over images.

Sizes: the trunk shrinks an image by its stride, ``patch_size`` and a halving for every further level. An image that the stride does not
divide is padded at the right and bottom by repeating its last column and row, and what is decoded is cut back to its size; 28x28 in
squares of 4x4 needs no padding. Shapes: ``(B, C, H, W)`` pixels, uint8 or float in [0, 1]; latents ``(B, D)``, or ``(B, D, h, w)`` when
they are spatial.

References:
    Kingma, Welling (2014), Auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from mmvae.aggregation import Posterior
from mmvae.direction import ProjectedNormal
from mmvae.distributions import DiagNormal
from mmvae.likelihoods import Likelihood
from mmvae.models.base import VAEOutput
from mmvae.models.classes import ClassVAE
from mmvae.models.image_configuration import ImageVAEConfig
from mmvae.models.tiling import TiledModel
from mmvae.nn import ConvDecoder, ConvEncoder, fold_leading, linear
from mmvae.pose import POSES, Pose, jittered, lay

_NARROW = -6.0  # log-variance of a pose at the beginning: 3 degrees


class ImageVAE(ClassVAE, TiledModel):
    """Convolutional VAE over images; see the module's docstring for sizes.

    Example:
        >>> model = ImageVAE(ImageVAEConfig(image_size=28, num_channels=1, latent_dim=16)).eval()
        >>> model.encode(pixel_values=torch.zeros(2, 1, 28, 28)).mean.shape
        torch.Size([2, 16])
    """

    config: ImageVAEConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "image_vae"
    input_names = ("pixel_values",)
    _no_split_modules: ClassVar[list[str]] = ["ResidualBlock"]

    def __init__(self, config: ImageVAEConfig):
        super().__init__(config)
        channels, num_blocks, patch_size, hidden = config.trunk
        trunk = (channels, num_blocks, config.norm, config.dropout, patch_size)
        width, (height, across) = channels[-1], config.bottom_size
        self.likelihood = Likelihood(config.likelihood, config.scale_mode, config.scale)
        values = config.num_channels * self.likelihood.parameters_per_value
        self.pose = None if config.pose == "none" else Pose(config.pose, config.height_width, config.pose_window)
        self.content_dim = config.latent_dim - POSES[config.pose]
        self.encoder = ConvEncoder(config.num_channels, *trunk)
        self.decoder = ConvDecoder(values + bool(self.pose), *trunk)  # of a pose also a mask
        if config.spatial_latent:
            self.to_moments: nn.Module = nn.Conv2d(width, 2 * config.latent_dim, 3, padding=1)
            self.from_latent: nn.Module = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        else:
            self.to_moments = linear(width * height * across, hidden, self.content_dim + config.latent_dim)
            self.from_latent = linear(self.content_dim + config.num_classes, hidden, width * height * across)
        self.behind = nn.Linear(self.content_dim, values) if self.pose else None
        self.build_classes(width * height * across)
        self.latent_prior = self.build_prior()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution, from squares of ``patch_size`` pixels a side to features: what comes nearest to an embedding."""
        return self.encoder.stem[1]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the first convolution."""
        self.encoder.stem[1] = value

    def hidden_layers(self) -> list[nn.Module]:
        """The stem, then the last of every level's layers: features (B, C, h, w), from the image's size over ``patch_size`` down."""
        blocks = self.config.trunk.num_blocks
        return [self.encoder.stem, *list(self.encoder.levels)[max(blocks - 1, 0) :: blocks + 1]]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(D,), or (D, h, w) when the latent is spatial."""
        dim = self.config.latent_dim
        return (dim, *self.config.bottom_size) if self.config.spatial_latent else (dim,)

    @property
    def pseudo_input_shape(self) -> tuple[int, ...]:
        """(C, H, W), logits of pixels."""
        return (self.config.num_channels, *self.config.height_width)

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u) at pixels ``sigmoid(u)``, without input noise."""
        return self._infer(pseudo_inputs.sigmoid())

    def encode(self, pixel_values: Tensor) -> DiagNormal:
        """q(z|x).

        Arguments:
            pixel_values: (B, C, H, W), uint8 or float in [0, 1].

        Returns:
            DiagNormal of batch (B,) and event (D,) or (D, h, w).

        Raises:
            TypeError: for pixels that are not a tensor.
            ValueError: for pixels of another shape or kind than the model's. A model with a spatial latent encodes, decodes and
                renders other sizes too if the stride divides them; its ``forward`` does not. Also for floats outside [0, 1], but only
                in the host's memory: on an accelerator the comparison would wait for the device.
        """
        return self._infer(self._seen(pixel_values))

    def _seen(self, pixel_values: Tensor) -> Tensor:
        """What is encoded: pixels in [0, 1], with jitter and noise in training."""
        self._check(pixel_values, any_size=self.config.spatial_latent)
        pixels = self.target(pixel_values=pixel_values)
        if self.training and self.config.input_jitter:
            pixels = jittered(pixels, self.config.input_jitter)
        noise = self.config.input_noise if self.training else 0
        return pixels + noise * torch.randn_like(pixels) if noise else pixels

    def _infer(self, pixels: Tensor) -> DiagNormal:
        """q(z|x) of pixels in [0, 1], (B, C, H, W)."""
        if self.pose is None:
            return self.latent_given(self._trunk(pixels))
        pixels = pixels.float()
        shift, heading = self.pose.locate(pixels)
        # the content is inferred in a frame that turns with the object, and so cannot know its angle
        moments = self.to_moments(self._trunk(self.pose.cut(pixels, shift, heading)))
        loc, logvar = moments.tensor_split([self.content_dim], 1)
        with torch.no_grad():
            drawn = self.likelihood(lay(*self._canonical(loc))).mean
            angle = self.pose.match(self.pose.cut(pixels, shift, torch.zeros_like(shift[:, 0])), drawn.float())
        logvar = torch.cat([logvar[:, : self.content_dim], logvar[:, self.content_dim :] + _NARROW], 1)
        kind = ProjectedNormal if self.config.prior == "standard_normal" else DiagNormal
        return kind(torch.cat([loc, self.pose.latent(angle, shift)], 1), logvar)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the trunk makes of pixels (B, C, H, W), as a vector (B, F); with a pose, of the object in its own frame."""
        return self._trunk(self.pose.upright(self._seen(pixel_values)) if self.pose else self._seen(pixel_values))

    def _trunk(self, pixels: Tensor) -> Tensor:
        """What the posterior is read off: (B, F), or (B, F, h, w) with a spatial latent."""
        x, stride = 2 * pixels.to(self.dtype) - 1, self.config.trunk.stride
        height, width = x.shape[-2:]
        if height % stride or width % stride:
            x = F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate")
        return self.encoder(x) if self.config.spatial_latent else self.encoder(x).flatten(1)

    def _canonical(self, content: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Object (B, C, h, w), logits of its mask (B, 1, h, w) and background (B, C) of contents (B, D)."""
        height, width = self.config.trunk_size
        drawn = self.decoder(self.from_latent(content).unflatten(1, (-1, *self.config.bottom_size)))[..., :height, :width]
        return drawn[:, :-1], drawn[:, -1:], self.behind(content)

    def decode(self, z: Tensor, class_labels: Tensor | None = None) -> Distribution:
        """p(x|z), or p(x|y, z).

        Arguments:
            z: (*, B, D) or (*, B, D, h, w).
            class_labels: y, (*, B) int64, of a model with classes.

        Returns:
            A distribution of batch (*, B) and event (C, H, W).

        Raises:
            ValueError: for latents of another width, or classes that are not the model's.
        """
        self.check_latents(z)
        flat, leading = fold_leading(self.with_class(z, class_labels).to(self.dtype), len(self.latent_shape))
        if self.pose is not None:
            output = self.pose.place(*self._canonical(flat[:, : self.content_dim]), flat[:, self.content_dim :])
        else:
            h = self.from_latent(flat)
            h = h if self.config.spatial_latent else h.unflatten(1, (-1, *self.config.bottom_size))
            height, width = self._picture_size(h)
            output = self.decoder(h)[..., :height, :width]
        return self.likelihood(output.unflatten(0, leading) if leading else output[0])

    def target(self, pixel_values: Tensor) -> Tensor:
        """The pixels that p(x|z) scores: (B, C, H, W) float in [0, 1]."""
        return pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values

    @torch.no_grad()
    def render(self, z: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Pictures: the mean of p(x|z) or p(x|y, z), (B, C, H, W) float32 in [0, 1]."""
        return self.decode(z, class_labels).mean.float().clamp(0, 1)

    def forward(
        self, pixel_values: Tensor, beta: float = 1.0, *, noise_key: Tensor | None = None, return_loss: bool = True, **options: Any
    ) -> VAEOutput:
        """Minus the objective, and what it is made of; see :meth:`VAEModel.forward`.

        Arguments:
            pixel_values: (B, C, H, W), uint8 or float in [0, 1].
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            options: of :meth:`VAE.bound`; of a model with classes also ``labels`` (B,) int64, -100 where unknown (as an argument of its own
                it would keep ``Trainer`` from a loss without labels).
        """
        return super().forward(beta=beta, pixel_values=pixel_values, noise_key=noise_key, **options)

    def log_px(self, z: Tensor, q: Posterior, pixel_values: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """log p(x|z), (S, K, B) nats; the prior, and so every bound, is about the configured size."""
        self._check(pixel_values)
        return super().log_px(z, q, pixel_values=pixel_values, **inputs)

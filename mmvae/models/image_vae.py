r"""A convolutional VAE over images.

Sizes: the trunk halves an image ``len(hidden_channels)`` times. An image that the total stride ``2 ** L`` does not divide is padded at
the right and bottom by repeating its last column and row, and what is decoded is cut back to its size; 28x28 with two halvings needs
no padding. Shapes: ``(B, C, H, W)`` pixels, uint8 or float in [0, 1]; latents ``(B, D)``, or ``(B, D, h, w)`` when they are spatial.

References:
    Kingma, Welling (2014), Auto-encoding variational Bayes, https://arxiv.org/abs/1312.6114
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from mmvae.aggregation import Posterior
from mmvae.direction import ProjectedNormal
from mmvae.distributions import DiagNormal
from mmvae.likelihoods import LIKELIHOODS, SCALES, Likelihood
from mmvae.models.base import VAEOutput
from mmvae.models.classes import ClassVAE, ClassVAEConfig
from mmvae.models.inherited import refuse_unknown
from mmvae.models.tiling import TiledModel
from mmvae.nn import NORMS, ConvDecoder, ConvEncoder, fold_leading
from mmvae.objectives import Objective
from mmvae.pose import POSES, Pose, jittered, lay

_NARROW = -6.0  # log-variance of a pose at the beginning: 3 degrees

BINARIZATIONS = ("none", "threshold", "dynamic")


@strict
class ImageVAEConfig(ClassVAEConfig):
    """Configuration of an :class:`ImageVAE`, with classes or without; see :class:`ClassVAEConfig`.

    Arguments:
        image_size: pixels per side, or [height, width]; 4 to 4,096.
        num_channels: 1 grey, 3 RGB, 4 RGBA.
        hidden_channels: channels of every level of the trunks, from the image down; each level halves the image. None: as many levels as
            bring a side to 7 pixels or fewer, the last 64 wide, those above 64, 32, then 16 (two levels: 32, 64); below 1 M parameters.
        num_blocks: residual blocks per level.
        pose: "rotation" or "rotation+shift": the last two dimensions of the latent are the angle, the two before them the place, of an
            object on a plain background, which the trunks see and draw in a canonical pose; see :mod:`mmvae.pose`. Where texts tell of
            the place, a joint model shares it: then 2 dimensions are private, otherwise 4.
        pose_window: side of the square that the object fits into at every angle, in sides of the picture; with a shift.
        spatial_latent: a latent of ``latent_dim`` channels at the bottom's resolution instead of a vector, for large pictures.
        norm: "group", "batch" or "none".
        dropout: inside residual blocks, [0, 1).
        likelihood: a key of ``mmvae.likelihoods.LIKELIHOODS``. "bernoulli" with ``binarize`` "none" is for data that is 0 or 1 already;
            "discretized_logistic" is about 256 levels and takes no other ``binarize``.
        scale_mode: of a gaussian or laplace likelihood: "fixed", "learned" or "optimal"; the last follows every micro-batch of the
            first rank, so that it alone makes a loss depend on gradient accumulation and on the rows of a batch.
        scale: its (first) value in units of the pixel range.
        input_noise: standard deviation of noise on the encoder's input in training (a denoising VAE), in units of the pixel range.
        input_jitter: strength, at most 1, of random turns, scales, slants and shifts of the encoder's input in training, see
            :func:`mmvae.pose.jittered`. The decoder draws the true picture: the latent learns what a picture shows rather than how.
        binarize: how the data's pixels were made 0 or 1: "none", "threshold" or "dynamic". The recipes do it, before the model; the field
            is a record for evaluation.
    """

    model_type = "image_vae"
    base_config_key = "image_config"

    image_size: int | list[int] | tuple[int, ...] = 64
    num_channels: int = 3
    hidden_channels: list[int] | tuple[int, ...] | None = None
    num_blocks: int = 1
    pose: str = "none"
    pose_window: float = 0.5
    spatial_latent: bool = False
    norm: str = "group"
    dropout: float | int = 0.0
    likelihood: str = "gaussian"
    scale_mode: str = "learned"
    scale: float | int = 0.1
    input_noise: float | int = 0.0
    input_jitter: float | int = 0.0
    binarize: str = "none"

    ranges: ClassVar[dict[str, tuple[float, float]]] = ClassVAEConfig.ranges | {
        "image_size": (4, 4096),
        "hidden_channels": (1, 4096),
        "num_blocks": (0, 64),
        "pose_window": (0.05, 1),
        "dropout": (0, 0.99),
        "scale": (1e-3, 10),
        "input_noise": (0, 10),
        "input_jitter": (0, 1),
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = ClassVAEConfig.choices | {
        "num_channels": (1, 3, 4),
        "norm": tuple(NORMS),
        "pose": tuple(POSES),
        "likelihood": tuple(LIKELIHOODS),
        "scale_mode": SCALES,
        "binarize": BINARIZATIONS,
    }

    @property
    def height_width(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def trunk_channels(self) -> list[int]:
        """``hidden_channels``, or the default for this size."""
        if self.hidden_channels is not None:
            return list(self.hidden_channels)
        levels, side = 1, -(-max(self.trunk_size) // 2)
        while side > 7:
            levels, side = levels + 1, -(-side // 2)
        return [32, 64][-levels:] if levels < 3 else [*[16] * (levels - 3), 32, 64, 64]

    @property
    def stride(self) -> int:
        """Pixels per latent pixel."""
        return 2 ** len(self.trunk_channels)

    @property
    def bottom_size(self) -> tuple[int, int]:
        """(h, w) at the bottom of the trunk."""
        return tuple(-(-side // self.stride) for side in self.trunk_size)

    @property
    def least_private_dim(self) -> int:
        """The two dimensions of an angle: matching finds it in a picture, another modality's encoder cannot learn to agree with that."""
        return min(POSES[self.pose], 2)

    @property
    def trunk_size(self) -> tuple[int, int]:
        """(H, W) of what the trunks see and draw: the picture, or the canonical window of a pose."""
        return self.height_width if self.pose == "none" else Pose(self.pose, self.height_width, self.pose_window).window_size

    def validate_architecture(self) -> None:
        """Check the fields; see :meth:`VAEConfig.validate_architecture`."""
        super().validate_architecture()
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"ImageVAEConfig.image_size: received {self.image_size!r}, expected a number or [height, width]")
        if self.hidden_channels is not None and not 1 <= len(self.hidden_channels) <= 8:
            raise ValueError(f"ImageVAEConfig.hidden_channels: received {self.hidden_channels!r}, expected 1 to 8 levels")
        if self.likelihood == "discretized_logistic" and self.binarize != "none":
            raise ValueError(f"ImageVAEConfig.binarize: received {self.binarize!r}, expected 'none' with likelihood 'discretized_logistic'")
        if self.pose != "none":
            for name, wrong, expected in (
                ("image_size", len(set(self.height_width)) > 1, "a square: a turn would change shapes"),
                ("latent_dim", self.latent_dim <= POSES[self.pose], f"more than the {POSES[self.pose]} of the pose"),
                ("spatial_latent", self.spatial_latent, "False"),
                ("norm", self.norm == "batch", "'group' or 'none': the angle is found by drawing"),
                ("input_jitter", self.input_jitter > 0, "0: the latent is to tell the pose"),
            ):
                if wrong:
                    raise ValueError(f"ImageVAEConfig.{name}: received {getattr(self, name)!r} with a pose, expected {expected}")
        if self.num_classes and (self.pose != "none" or self.spatial_latent):
            with_ = f"pose {self.pose!r}" if self.pose != "none" else "spatial_latent"
            raise ValueError(f"ImageVAEConfig.num_classes: received {self.num_classes} with {with_}, expected 0")


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
        trunk = {"channels": config.trunk_channels, "num_blocks": config.num_blocks, "norm": config.norm, "dropout": config.dropout}
        width, (height, across) = config.trunk_channels[-1], config.bottom_size
        self.likelihood = Likelihood(config.likelihood, config.scale_mode, config.scale)
        channels = config.num_channels * self.likelihood.parameters_per_value
        self.pose = None if config.pose == "none" else Pose(config.pose, config.height_width, config.pose_window)
        self.content_dim = config.latent_dim - POSES[config.pose]
        self.encoder = ConvEncoder(config.num_channels, **trunk)
        self.decoder = ConvDecoder(channels + bool(self.pose), **trunk)  # of a pose also a mask
        if config.spatial_latent:
            self.to_moments: nn.Module = nn.Conv2d(width, 2 * config.latent_dim, 3, padding=1)
            self.from_latent: nn.Module = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        else:
            self.to_moments = nn.Linear(width * height * across, self.content_dim + config.latent_dim)
            self.from_latent = nn.Linear(self.content_dim + config.num_classes, width * height * across)
        self.behind = nn.Linear(self.content_dim, channels) if self.pose else None
        self.build_classes(width * height * across)
        self.latent_prior = self.build_prior()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution, from 2x2 patches of pixels to features: what comes nearest to an embedding."""
        return self.encoder.stem[1]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the first convolution."""
        self.encoder.stem[1] = value

    def hidden_layers(self) -> list[nn.Module]:
        """The stem, then the last of every level's layers: features (B, C, h, w) at every size from half the image down."""
        return [self.encoder.stem, *list(self.encoder.levels)[max(self.config.num_blocks - 1, 0) :: self.config.num_blocks + 1]]

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
        x, stride = 2 * pixels.to(self.dtype) - 1, self.config.stride
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

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        output_hidden_states: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> VAEOutput:
        """Minus the objective, and what it is made of; see :meth:`VAE.bound` for the arguments.

        Arguments:
            pixel_values: (B, C, H, W), uint8 or float in [0, 1].
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            kwargs: ``labels`` (B,) int64, -100 where unknown, of a model with classes (as an argument of its own it would keep ``Trainer``
                from a loss without labels); what else transformers hands to every model; any other name is a TypeError.
        """
        refuse_unknown(self, kwargs)
        inputs = {"pixel_values": pixel_values, "labels": kwargs.get("labels")}
        return self.bound(inputs, beta, num_samples, objective, noise_key, sample_posterior, output_hidden_states)

    def log_px(self, z: Tensor, q: Posterior, pixel_values: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """log p(x|z), (S, K, B) nats; the prior, and so every bound, is about the configured size."""
        self._check(pixel_values)
        return super().log_px(z, q, pixel_values=pixel_values, **inputs)

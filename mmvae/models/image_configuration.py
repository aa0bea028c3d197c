"""What an :class:`mmvae.models.image_vae.ImageVAE` is: its configuration, checked.

Sizes: ``H,W`` picture, ``h,w`` the bottom of the trunk.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from mmvae.likelihoods import LIKELIHOODS, SCALES
from mmvae.models.classes import ClassVAEConfig
from mmvae.nn import NORMS, TrunkSizes, default_trunk
from mmvae.pose import POSES, Pose

BINARIZATIONS = ("none", "threshold", "dynamic")


@strict
class ImageVAEConfig(ClassVAEConfig):
    """Configuration of an :class:`ImageVAE`, with classes or without; see :class:`ClassVAEConfig`.

    Arguments:
        image_size: pixels per side, or [height, width]; 4 to 4,096.
        num_channels: 1 grey, 3 RGB, 4 RGBA.
        hidden_channels: channels of every level of the trunks, from the image down, each at half the size of the one before. None: the
            default network, see :func:`mmvae.nn.default_trunk`; at most about 1 M parameters at up to 64 pixels.
        num_blocks: residual blocks per level. None here and below: as the default network has it, and beside ``hidden_channels`` 1.
        patch_size: side of the squares of pixels that the first level sees, and draws, as one; beside ``hidden_channels`` 2.
        hidden_size: width of a hidden layer between trunk and latent, both ways; beside ``hidden_channels`` 0, which is none.
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

    image_size: int | list[int] | tuple[int, ...] = 64
    num_channels: int = 3
    hidden_channels: list[int] | tuple[int, ...] | None = None
    num_blocks: int | None = None
    patch_size: int | None = None
    hidden_size: int | None = None
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
        "patch_size": (1, 64),
        "hidden_size": (0, 65_536),
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
    def trunk(self) -> TrunkSizes:
        """The sizes of the trunks: the fields, and where they are None the default's."""
        own = {name: getattr(self, name) for name in ("num_blocks", "patch_size", "hidden_size")}
        own = {name: value for name, value in own.items() if value is not None}
        if self.hidden_channels is not None:
            return TrunkSizes(list(self.hidden_channels), **own)
        return default_trunk(max(self.trunk_size), self.patch_size, plain=self.spatial_latent or self.pose != "none")._replace(**own)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the default network is spelt out, so that a folder keeps it whatever the default will be."""
        names = ("hidden_channels", "num_blocks", "patch_size", "hidden_size")
        return super().to_dict() | dict(zip(names, self.trunk, strict=True))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See :meth:`VAEConfig.from_dict`.

        Files of before ``patch_size`` held a number of blocks always, and None as the channels of the default of that time: that is what
        these two mean without a ``patch_size``, also in a mapping inside of another configuration.
        """
        blocks, unnamed = config_dict.get("num_blocks"), config_dict.get("hidden_channels", ()) is None
        older = unnamed and blocks is not None and "patch_size" not in config_dict
        return super().from_dict(config_dict | {"patch_size": 2} if older else config_dict, **kwargs)

    @property
    def bottom_size(self) -> tuple[int, int]:
        """(h, w) at the bottom of the trunk."""
        return tuple(-(-side // self.trunk.stride) for side in self.trunk_size)

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
        if self.hidden_channels is not None and not 1 <= len(self.hidden_channels) <= 11:  # the most that a default has
            raise ValueError(f"ImageVAEConfig.hidden_channels: received {self.hidden_channels!r}, expected 1 to 11 levels")
        if self.hidden_size and self.spatial_latent:
            raise ValueError(f"ImageVAEConfig.hidden_size: received {self.hidden_size} with spatial_latent, expected 0")
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

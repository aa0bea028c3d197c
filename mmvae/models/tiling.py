"""Sizes of pictures: which ones a model takes, and large ones tile by tile with a spatial latent, in memory that depends on the tile."""

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal
from mmvae.models.unimodal import VAEModel
from mmvae.nn import receptive_radius


class TiledModel(VAEModel):
    """Sizes and tiles for a model with trunks and a latent between them, as :class:`mmvae.models.image_vae.ImageVAE` has."""

    def _check(self, pixel_values: Tensor, any_size: bool = False) -> None:
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: received a {type(pixel_values).__name__}, expected a tensor")
        expected, shape, stride = (self.config.num_channels, *self.config.height_width), tuple(pixel_values.shape), self.config.trunk.stride
        if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values: received {pixel_values.dtype}, expected torch.uint8, or floating point in [0, 1]")
        divides = len(shape) == 4 and shape[1] == expected[0] and not any(side % stride for side in shape[2:])
        if len(shape) != 4 or not (shape[1:] == expected or (any_size and divides)):
            other = f", or sides that {stride} divides" if any_size else ""
            raise ValueError(f"pixel_values: received shape {shape}, expected (batch, {', '.join(map(str, expected))}){other}")
        if pixel_values.is_floating_point() and pixel_values.is_cpu and pixel_values.numel() and not torch.compiler.is_compiling():
            low, high = (float(bound) for bound in pixel_values.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # rounding is forgiven, NaN is not
                raise ValueError(f"pixel_values: received values from {low} to {high}, expected floats in [0, 1] or torch.uint8")

    def _picture_size(self, bottom: Tensor) -> tuple[int, int]:
        """(H, W) of the picture with this (*, h, w) at the bottom of the trunk."""
        height, width = bottom.shape[-2:]
        stride, configured = self.config.trunk.stride, (height, width) == self.config.bottom_size
        return self.config.height_width if configured else (height * stride, width * stride)

    def encode_tiled(self, pixel_values: Tensor, tile_size: int = 64) -> DiagNormal:
        """:meth:`encode` of a large picture with a spatial latent, tile by tile with overlap, in memory that depends on the tile.

        Exact for norm "none" and, in evaluation mode, "batch": the overlap covers the receptive field. GroupNorm sees the tile instead of
        the picture; compare with :meth:`encode` to know the deviation. Adds no input noise.

        Arguments:
            pixel_values: (B, C, H, W), of the configured size or with sides that the stride divides.
            tile_size: of a tile's core, in latent pixels.
        """
        stride = self.config.trunk.stride
        self._check(pixel_values, any_size=True)
        size = tuple(-(-side // stride) for side in pixel_values.shape[-2:])
        loc, logvar = (torch.empty(len(pixel_values), self.config.latent_dim, *size, device=pixel_values.device) for _ in range(2))
        for core, halo, inner in self._tiles(size, tile_size):  # only tiles at the right and bottom are padded, just as the whole is
            tile = pixel_values[..., _scaled(halo[0], stride), _scaled(halo[1], stride)]
            q = self._infer(self.target(pixel_values=tile))
            loc[..., core[0], core[1]], logvar[..., core[0], core[1]] = (v[..., inner[0], inner[1]] for v in (q.loc, q.logvar))
        return DiagNormal(loc, logvar, 3)

    def render_tiled(self, z: Tensor, tile_size: int = 64) -> Tensor:
        """:meth:`render` of a large spatial latent (B, D, h, w), tile by tile; exact where :meth:`encode_tiled` is."""
        stride, size = self.config.trunk.stride, tuple(z.shape[-2:])
        pixels = torch.empty(len(z), self.config.num_channels, *(side * stride for side in size), device=z.device)
        for core, halo, inner in self._tiles(size, tile_size):
            # decoded without the cut to the configured size, which a tile may happen to have
            tile = self.likelihood(self.decoder(self.from_latent(z[..., halo[0], halo[1]].to(self.dtype)))).mean.float().clamp(0, 1)
            pixels[..., _scaled(core[0], stride), _scaled(core[1], stride)] = tile[
                ..., _scaled(inner[0], stride), _scaled(inner[1], stride)
            ]
        height, width = self._picture_size(z)
        return pixels[..., :height, :width]

    def _tiles(self, size: tuple[int, ...], tile: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...], tuple[slice, ...]]]:
        """Core, core with halo, and the core inside its halo, in latent pixels, for every tile."""
        if not self.config.spatial_latent:
            raise ValueError("tiles: received a model with spatial_latent=False, expected a spatial latent")
        if tile < 1:
            raise ValueError(f"tile_size: received {tile}, expected at least 1")
        trunk = self.config.trunk
        radius = receptive_radius(len(trunk.channels), trunk.num_blocks, trunk.patch_size)
        axes = []
        for side in size:
            starts = range(0, side, tile)
            cores = [slice(start, min(start + tile, side)) for start in starts]
            halos = [slice(max(core.start - radius, 0), min(core.stop + radius, side)) for core in cores]
            axes.append([(c, h, slice(c.start - h.start, c.stop - h.start)) for c, h in zip(cores, halos, strict=True)])
        return [tuple(zip(row, column, strict=True)) for row in axes[0] for column in axes[1]]


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)

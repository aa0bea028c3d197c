"""Convolution trunks for images; leading dimensions, the rows of a batch that count, and what layers give.

Shapes: ``B`` batch, ``C,H,W`` image, ``h,w`` its size at the bottom of the trunk.
Blocks are those that are fast on CPU and GPU alike: space-to-depth instead of a large first convolution, stride-1 convolutions and
PixelShuffle instead of transposed ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vecdot
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, in about half of its time on a CPU with the channels last, where torch's own is slow."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not plain or not last or torch.compiler.is_compiling():
            return super().forward(x)
        return _Grouped.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class _Grouped(torch.autograd.Function):
    """Group normalisation as one multiplication and one addition by channel, of sums over pixels: rows are (B, h w, C) in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        size = rows.shape[1] * rows.shape[2] // groups
        mean, square = (each.unflatten(1, (groups, -1)).sum(-1, keepdim=True) / size for each in (rows.sum(1), vecdot(rows, rows, dim=1)))
        rstd = (square - mean.square()).clamp_min(0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        factor = rstd * weight.view(groups, -1)
        y = torch.addcmul(_by_channel(bias.view(groups, -1) - mean * factor, rows), rows, _by_channel(factor, rows))
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again, which torch's own can
            needed = [each for each, wanted in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if wanted]
            found = iter(torch.autograd.grad(F.group_norm(x, mean.shape[1], weight, bias, ctx.eps), needed, gradient, create_graph=True))
            return (*(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None)
        rows, grad = (each.permute(0, 2, 3, 1).flatten(1, 2) for each in (x, gradient))
        groups, size = mean.shape[1], rows.shape[1] * rows.shape[2] // mean.shape[1]
        of_bias, products = (each.unflatten(1, (groups, -1)) for each in (grad.sum(1), vecdot(grad, rows, dim=1)))
        of_weight, weight = (products - mean * of_bias) * rstd, weight.view(groups, -1)
        slope = -rstd.square() * (of_weight * weight).sum(-1, keepdim=True) / size
        offset = -rstd * (of_bias * weight).sum(-1, keepdim=True) / size - slope * mean
        of_x = torch.addcmul(_by_channel(offset, rows), rows, _by_channel(slope, rows)).addcmul(grad, _by_channel(rstd * weight, rows))
        return of_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), of_weight.sum(0).flatten(), of_bias.sum(0).flatten(), None, None


def _by_channel(values: Tensor, rows: Tensor) -> Tensor:
    """(B, groups, 1 or channels of one) -> (B, 1, C)."""
    return values.expand(-1, -1, rows.shape[2] // values.shape[1]).flatten(1).unsqueeze(1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "group": lambda channels: GroupNorm(max(g for g in range(1, 9) if channels % g == 0), channels),
    "batch": nn.BatchNorm2d,
}


def fold_leading(x: Tensor, event_dims: int) -> tuple[Tensor, torch.Size]:
    """(*, *event) -> (N, *event) and the leading shape (*) that ``y.unflatten(0, leading)`` restores."""
    leading = x.shape[: x.dim() - event_dims]
    return x.reshape(leading.numel(), *x.shape[x.dim() - event_dims :]), leading


def some_rows(mask: Tensor) -> Tensor | None:
    """Numbers of the rows where mask (B,) is true; None for all. At least one, so that no parameter ever falls out of the graph."""
    if bool(mask.all()):
        return None
    rows = mask.nonzero().squeeze(1)
    return rows if len(rows) else rows.new_zeros(1)


def unless_seen(module: nn.Module, mask: Tensor, rows: Tensor | None) -> AbstractContextManager[None]:
    """:func:`running_statistics` where mask (B,) is true of no row, so that its :func:`some_rows` are a filler; else nothing."""
    seen = rows is None or len(rows) > 1 or bool(mask.any())
    return nullcontext() if seen else running_statistics(module)


def take_rows(inputs: Mapping[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
    """These rows (N,) of every input; all when None."""
    return {name: value if rows is None else value[rows] for name, value in inputs.items()}


class ResidualBlock(nn.Module):
    """``x + conv(act(norm(conv(act(norm(x))))))``, 3x3, with dropout before the second convolution."""

    def __init__(self, channels: int, norm: str = "group", dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](channels), NORMS[norm](channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2.starts_at_zero = True  # a block begins as the identity
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(self.dropout(F.silu(self.norm2(y))))


class ConvEncoder(nn.Module):
    """Space-to-depth and one level of residual blocks per entry of ``channels``, each level at half the size of the one before.

    Arguments:
        in_channels: of the image.
        channels: of every level; the image shrinks by ``patch_size * 2 ** (len(channels) - 1)``.
        num_blocks: residual blocks per level.
        norm: a key of ``NORMS``.
        dropout: inside the residual blocks.
        patch_size: side of the squares of pixels that the first level sees as one.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], num_blocks: int, norm: str, dropout: float = 0.0, patch_size: int = 2):
        super().__init__()
        patches = nn.PixelUnshuffle(patch_size)
        self.stem = nn.Sequential(patches, nn.Conv2d(patch_size**2 * in_channels, channels[0], 3, padding=1))
        levels: list[nn.Module] = []
        for i, width in enumerate(channels):
            if i:
                levels.append(nn.Conv2d(channels[i - 1], width, 3, stride=2, padding=1))
            levels += [ResidualBlock(width, norm, dropout) for _ in range(num_blocks)]
        self.levels = nn.Sequential(*levels)
        self.norm = NORMS[norm](channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels[-1], h, w), channels last in memory: on a CPU a tenth faster without gradients, else as fast."""
        x = x.contiguous(memory_format=torch.channels_last)
        return F.silu(self.norm(self.levels(self.stem(x))))


class ConvDecoder(nn.Module):
    """The mirror of :class:`ConvEncoder`: residual blocks, then 1x1 convolution and PixelShuffle to the next level.

    Arguments:
        out_channels: values per pixel.
        channels: of every level, from the image down, as for the encoder.
        num_blocks, norm, dropout, patch_size: as for the encoder.
    """

    def __init__(self, out_channels: int, channels: Sequence[int], num_blocks: int, norm: str, dropout: float = 0.0, patch_size: int = 2):
        super().__init__()
        levels: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            levels += [ResidualBlock(channels[i], norm, dropout) for _ in range(num_blocks)]
            if i:
                levels += [nn.Conv2d(channels[i], 4 * channels[i - 1], 1), nn.PixelShuffle(2)]
        self.levels = nn.Sequential(*levels)
        self.norm = NORMS[norm](channels[0])
        self.head = nn.Sequential(nn.Conv2d(channels[0], patch_size**2 * out_channels, 3, padding=1), nn.PixelShuffle(patch_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels[-1], h, w) -> (B, out_channels, H, W), channels last in memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.head(F.silu(self.norm(self.levels(x))))


class TrunkSizes(NamedTuple):
    """Sizes of both trunks: see :class:`ConvEncoder`, and :func:`linear` for ``hidden_size``."""

    channels: list[int]
    num_blocks: int = 1
    patch_size: int = 2
    hidden_size: int = 0

    @property
    def stride(self) -> int:
        """Pixels per latent pixel."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


def default_trunk(side: int, patch_size: int | None = None, plain: bool = False) -> TrunkSizes:
    """The default network for pictures of ``side`` pixels: as many levels as bring them to 7 or fewer.

    From 16 to 32 pixels it sees squares of 4x4 and has a hidden layer to and from the latent: on MNIST better after as many steps than
    finer levels, in a third of their time (``SPEED.md``). Pictures of 64 pixels lose by such squares; spatial latents and poses
    (``plain``) have not been tried with them, and have none.
    """
    patches = patch_size is None and not plain and 16 <= side <= 32
    patch_size = patch_size or (4 if patches else 2)
    levels = 1
    while -(-side // (patch_size * 2 ** (levels - 1))) > 7:
        levels += 1
    if patches:
        return TrunkSizes([32, 64][:levels], 2, patch_size, 240)
    return TrunkSizes([32, 64][-levels:] if levels < 3 else [*[16] * (levels - 3), 32, 64, 64], 1, patch_size)


def linear(size: int, hidden: int, out: int) -> nn.Module:
    """A linear layer from ``size`` to ``out`` numbers, or two with ``hidden`` between them, unless that is 0."""
    return nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, out)) if hidden else nn.Linear(size, out)


def receptive_radius(num_levels: int, num_blocks: int, patch_size: int = 2) -> int:
    """How far, in latent pixels, an output of a trunk depends on its input: the halo that makes tiles exact.

    Level ``i`` (0 at the image) has pixels of size ``patch_size * 2 ** i``; each residual block reaches 2 of them, stem, head and every
    change of level one, and the two projections at the bottom one each.
    """
    reach = sum((2 * num_blocks + 2) * patch_size * 2**i for i in range(num_levels)) + 2
    return -(-reach // (patch_size * 2 ** (num_levels - 1))) + 1


@contextmanager
def running_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation anywhere in a module stays as it is, and is used as in evaluation."""
    running = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    for part in running:
        part.training = False
    try:
        yield
    finally:
        for part in running:
            part.training = True


@contextmanager
def outputs_of(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what layers give meanwhile, in the order in which they are called."""
    outputs: list[Tensor] = []
    layers = list(layers)
    for layer in layers:
        if getattr(layer, "_is_replica", False):  # of nn.DataParallel's, which run at once and share their hooks
            layer._forward_hooks = layer._forward_hooks.copy()
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class ScaledMean(nn.Module):
    r"""A posterior's mean normalised over rows to a fixed standard deviation gamma, so that it cannot be the same for every row.

    :math:`\mu \leftarrow \gamma (\mu - \bar\mu) / s + b`: the KL divergence to N(0, I) is at least :math:`D \gamma^2 / 2` on average.
    In evaluation, and for one row, :math:`\bar\mu` and s are the running ones.

    Arguments:
        size: D.
        scale: gamma.

    References:
        Zhu et al. (2020), A batch normalized inference network keeps the KL vanishing away, https://arxiv.org/abs/2004.12585
    """

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm1d(size, affine=False)
        self.shift = nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        """Start without a shift."""
        nn.init.zeros_(self.shift)

    def forward(self, moments: Tensor) -> Tensor:
        """Mean and log-variance next to each other, (*, 2 D), with that mean."""
        mean, logvar = moments.chunk(2, -1)
        rows = mean.reshape(-1, mean.shape[-1])
        norm = self.norm if len(rows) > 1 else partial(F.batch_norm, running_mean=self.norm.running_mean, running_var=self.norm.running_var)
        return torch.cat([self.scale * norm(rows).view_as(mean) + self.shift, logvar], -1)

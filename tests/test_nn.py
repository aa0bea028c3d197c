"""Convolution trunks: shapes at every size, and how far they look."""

import pytest
import torch
from torch import nn

from mmvae.nn import (
    NORMS,
    ConvDecoder,
    ConvEncoder,
    GroupNorm,
    ResidualBlock,
    ScaledMean,
    TrunkSizes,
    _Grouped,
    fold_leading,
    receptive_radius,
)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("channels", "patch_size"), [([4], 2), ([4, 6], 2), ([4, 6, 10], 2), ([4, 6], 1), ([4, 6], 3)])
def test_trunks_mirror_each_other(norm, channels, patch_size):
    side = TrunkSizes(channels, patch_size=patch_size).stride
    encoder, decoder = (make(values, channels, 2, norm, patch_size=patch_size) for make, values in ((ConvEncoder, 3), (ConvDecoder, 5)))
    h = encoder(torch.rand(2, 3, 3 * side, 2 * side))
    assert h.shape == (2, channels[-1], 3, 2)
    assert decoder(h).shape == (2, 5, 3 * side, 2 * side)


def test_a_residual_block_whose_second_convolution_is_zero_is_the_identity():
    block = ResidualBlock(4)
    nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)
    assert block.conv2.starts_at_zero


def test_group_norm_is_that_of_torch():
    ours, torchs = GroupNorm(3, 6), nn.GroupNorm(3, 6)
    x, grads = torch.randn(4, 6, 5, 3) * 2 + 7, []
    with torch.no_grad():
        for each in (ours, torchs):
            each.weight.copy_(torch.arange(1.0, 7.0)), each.bias.copy_(-torch.arange(6.0))
    for norm, given in ((ours, x.to(memory_format=torch.channels_last)), (torchs, x)):
        given.requires_grad_()
        y = norm(given)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        grads.append([y, given.grad, norm.weight.grad, norm.bias.grad])
    assert grads[0][0].is_contiguous(memory_format=torch.channels_last)
    for own, true in zip(*grads, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-4)
    wide = [value.detach().double().requires_grad_() for value in (grads[0][0], ours.weight, ours.bias)]
    assert torch.autograd.gradcheck(lambda *given: _Grouped.apply(*given, 3, 1e-5), wide)
    assert torch.autograd.gradgradcheck(lambda *given: _Grouped.apply(*given, 3, 1e-5), wide)
    far = 100 + torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):  # under which some products are of 8 bits
        torch.testing.assert_close(ours(far), torchs(far))


def test_group_norm_takes_any_width():
    for channels in (1, 2, 7, 8, 12, 13, 36):
        norm = NORMS["group"](channels)
        assert channels % norm.num_groups == 0
        assert norm.num_groups <= 8


@pytest.mark.parametrize(
    ("levels", "blocks", "patch"), [(1, 0, 2), (1, 1, 2), (2, 1, 2), (2, 2, 2), (3, 1, 2), (1, 2, 4), (2, 1, 3), (2, 1, 1)]
)
def test_the_receptive_radius_covers_what_an_output_depends_on(levels, blocks, patch):
    """The gradient of one output with respect to the input vanishes beyond the radius, and does not vanish everywhere inside."""
    radius, stride = receptive_radius(levels, blocks, patch), patch * 2 ** (levels - 1)
    side = 2 * radius + 5
    middle = side // 2
    bottom = nn.Conv2d(3, 2, 3, padding=1).double()
    pixels = torch.randn(1, 1, side * stride, side * stride, dtype=torch.float64, requires_grad=True)
    latent = bottom(ConvEncoder(1, [3] * levels, blocks, "none", patch_size=patch).double()(pixels))
    reach = torch.autograd.grad(latent[0, :, middle, middle].sum(), pixels)[0][0, 0].abs()
    inside = slice((middle - radius) * stride, (middle + radius + 1) * stride)
    assert reach[inside, inside].any()
    reach[inside, inside] = 0
    assert not reach.any()

    top = nn.Conv2d(2, 3, 3, padding=1).double()
    z = torch.randn(1, 2, side, side, dtype=torch.float64, requires_grad=True)
    pixels = ConvDecoder(1, [3] * levels, blocks, "none", patch_size=patch).double()(top(z))
    core = pixels[..., middle * stride : (middle + 1) * stride, middle * stride : (middle + 1) * stride]
    reach = torch.autograd.grad(core.sum(), z)[0][0].abs().sum(0)
    inside = slice(middle - radius, middle + radius + 1)
    assert reach[inside, inside].any()
    reach[inside, inside] = 0
    assert not reach.any()


def test_fold_leading():
    x = torch.randn(2, 3, 4, 5)
    for dims, leading in ((1, (2, 3, 4)), (3, (2,)), (4, ())):
        flat, shape = fold_leading(x, dims)
        assert shape == leading
        assert flat.shape[1:] == x.shape[4 - dims :]
        assert torch.equal(flat.reshape(x.shape), x)


@pytest.mark.parametrize("shape", [(50,), (3, 20)], ids=["rows", "classes and rows"])
def test_a_scaled_mean_keeps_the_divergence_from_the_prior(shape):
    scaled = ScaledMean(4, 0.6)
    moments = torch.cat([0.1 * torch.randn(*shape, 4) + 7, torch.randn(*shape, 4)], -1)  # means that are nearly all alike
    out = scaled(moments)
    mean, logvar = out.chunk(2, -1)
    torch.testing.assert_close(mean.reshape(-1, 4).std(0, correction=0), torch.full((4,), 0.6), atol=3e-3, rtol=0)
    assert torch.equal(logvar, moments.chunk(2, -1)[1])
    kl = 0.5 * (mean**2 + logvar.exp() - logvar - 1).sum(-1)
    assert kl.mean() >= 4 * 0.6**2 / 2 - 0.01


def test_a_scaled_mean_of_one_row_or_in_evaluation_uses_what_it_has_seen():
    scaled = ScaledMean(2, 0.5)
    for _ in range(200):
        scaled(torch.cat([3 + 2 * torch.randn(64, 2), torch.zeros(64, 2)], 1))
    with torch.no_grad():
        scaled.shift.fill_(0.25)
    row = torch.tensor([[3.0, 5.0, 0.0, 0.0]])
    before = scaled.norm.running_mean.clone()
    expected = torch.tensor([[0.25, 0.75, 0.0, 0.0]])
    torch.testing.assert_close(scaled(row), expected, atol=0.1, rtol=0)
    torch.testing.assert_close(scaled.eval()(row.repeat(3, 1)), expected.repeat(3, 1), atol=0.1, rtol=0)
    assert torch.equal(scaled.norm.running_mean, before)

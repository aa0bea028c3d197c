"""ImageVAE: any size and number of channels, normalised scores, and tiles that are exact where they can be."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import AutoModel

from mmvae import MMVAE, MMVAEConfig
from mmvae.likelihoods import LIKELIHOODS
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.noise import fold
from mmvae.pose import grid, sample


def make(**options) -> ImageVAE:
    """A small model whose residual branches do something."""
    model = ImageVAE(ImageVAEConfig(**{"num_channels": 1, "hidden_channels": [4, 8], "latent_dim": 3, "image_size": 16} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv2" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def pictures(rows: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, *shape), dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 30), (4, [33, 47]), (1, 4), (3, 5)])
@pytest.mark.parametrize("spatial", [False, True])
def test_any_size(channels, size, spatial):
    model = make(num_channels=channels, image_size=size, spatial_latent=spatial)
    height, width = model.config.height_width
    x = pictures(2, channels, height, width)
    h, w = -(-height // 4), -(-width // 4)
    assert model.latent_shape == ((3, h, w) if spatial else (3,))
    out = model.train()(pixel_values=x)
    out.loss.backward()
    assert out.latents.shape == (2, *model.latent_shape)
    for picture in (model.reconstruct(pixel_values=x), model.sample(2)):
        assert picture.shape == (2, channels, height, width)
        assert picture.dtype == torch.float32
        assert picture.min() >= 0
        assert picture.max() <= 1


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_default_has_at_most_a_million_parameters(size, channels):
    model = ImageVAE(ImageVAEConfig(image_size=size, num_channels=channels))
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert max(model.config.bottom_size) <= 7 or size == 64


@pytest.mark.parametrize(
    ("options", "channels", "blocks", "patch", "hidden"),
    [
        ({"image_size": 28}, [32], 2, 4, 240),
        ({"image_size": 32}, [32, 64], 2, 4, 240),
        ({"image_size": 28, "patch_size": 2}, [32, 64], 1, 2, 0),
        ({"image_size": 28, "spatial_latent": True}, [32, 64], 1, 2, 0),
        ({"image_size": 64, "hidden_size": 100}, [16, 32, 64, 64], 1, 2, 100),
        ({"image_size": 64, "pose": "rotation+shift"}, [32, 64, 64], 1, 2, 0),
        ({"image_size": 28, "hidden_channels": [8]}, [8], 1, 2, 0),
        ({"image_size": 28, "hidden_channels": [8, 9], "num_blocks": 0, "patch_size": 7}, [8, 9], 0, 7, 0),
    ],
)
def test_the_network_is_what_the_fields_say_else_the_default(options, channels, blocks, patch, hidden, tmp_path):
    model = ImageVAE(ImageVAEConfig(num_channels=1, **options))
    assert model.config.trunk == (channels, blocks, patch, hidden)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert [told[name] for name in ("hidden_channels", "num_blocks", "patch_size", "hidden_size")] == [channels, blocks, patch, hidden]
    assert ImageVAE.from_pretrained(tmp_path).config.trunk == model.config.trunk
    assert model(pictures(2, 1, *model.config.height_width)).loss.isfinite()


@pytest.mark.parametrize(("size", "patch", "levels"), [(1792, None, 8), (1793, None, 9), (4096, None, 10), ([4, 4096], 1, 11)])
def test_what_the_default_of_large_pictures_writes_can_be_read(size, patch, levels):
    config = ImageVAEConfig(image_size=size, patch_size=patch)
    assert len(config.trunk.channels) == levels
    assert ImageVAEConfig.from_dict(config.to_dict()).trunk == config.trunk


def test_folders_of_older_versions_keep_the_default_of_their_time(tmp_path):
    """It was named by None, and squares of pixels had no name."""
    model = ImageVAE(ImageVAEConfig(image_size=28, num_channels=1, latent_dim=3, patch_size=2)).eval()
    x = pictures(2, 1, 28, 28)
    for place, whole, reach in (
        (tmp_path / "one", model, lambda values: values),
        (tmp_path / "two", MMVAE(MMVAEConfig(modalities={"image": model.config})).eval(), lambda values: values["modalities"]["image"]),
    ):
        whole.save_pretrained(place)
        (place / "manifest.json").unlink()
        values = json.loads((place / "config.json").read_text())
        inner = reach(values)
        del inner["patch_size"], inner["hidden_size"]
        inner |= {"hidden_channels": None, "num_blocks": 1}
        (place / "config.json").write_text(json.dumps(values))
        again = AutoModel.from_pretrained(place).eval()
        torch.testing.assert_close(again(pixel_values=x).loss, whole(pixel_values=x).loss)


def test_fields_in_a_mapping_mean_what_they_do_in_a_configuration():
    fields = {"image_size": 28, "num_channels": 1, "hidden_channels": None}
    for given in (fields, fields | {"num_blocks": None}, fields | {"num_blocks": None, "patch_size": None}):
        joint = MMVAEConfig(modalities={"image": {"model_type": "image_vae", **given}})
        assert joint.modalities["image"].trunk == ImageVAEConfig(**given).trunk == ([32], 2, 4, 240)


def test_a_spatial_latent_has_no_hidden_layer():
    with pytest.raises(StrictDataclassError, match="ImageVAEConfig.hidden_size: received 8 with spatial_latent, expected 0"):
        make(hidden_size=8, spatial_latent=True)


@pytest.mark.parametrize(
    ("likelihood", "scale_mode"),
    [*((name, "learned") for name in LIKELIHOODS), ("gaussian", "fixed"), ("gaussian", "optimal"), ("laplace", "optimal")],
)
def test_every_likelihood_trains(likelihood, scale_mode):
    model = make(likelihood=likelihood, scale_mode=scale_mode).train()
    x = pictures(8, 1, 16, 16) // 255
    x = x * 255 if likelihood == "bernoulli" else x * 200
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for step in range(12):
        loss = model(pixel_values=x, noise_key=fold(step, torch.arange(8))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_bytes_and_floats_are_the_same_picture():
    model, x = make(), pictures(2, 1, 16, 16)
    torch.testing.assert_close(model(pixel_values=x).loss, model(pixel_values=x.float() / 255).loss)
    assert torch.equal(model.target(pixel_values=x), x.float() / 255)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 16, 16),
        torch.zeros(2, 3, 16, 16),
        torch.zeros(2, 1, 16, 12),
        torch.zeros(2, 1, 16, 16, dtype=torch.int64),
        torch.zeros(2, 1, 16, 16, dtype=torch.bool),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)
def test_wrong_pictures_are_named(x):
    model = make()
    for call in (model, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=r"pixel_values: received (shape \(|torch\.(int64|bool)).*, expected"):
            call(pixel_values=x)


def test_what_is_not_a_tensor_is_named():
    model, x = make(), pictures(1, 1, 16, 16)
    for wrong in (x.numpy(), x.tolist(), None):
        for call in (model, model.encode, model.reconstruct):
            with pytest.raises(TypeError, match="pixel_values: received a (ndarray|list|NoneType), expected a tensor"):
                call(pixel_values=wrong)


@pytest.mark.parametrize("value", [-0.5, 1.5, 255.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pixels_outside_their_range_are_named(value, dtype):
    model, x = make().train(), torch.rand(2, 1, 16, 16)
    x[1, 0, 3, 4] = value
    for call in (model, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match=r"pixel_values: received values from .* to .*, expected floats in \[0, 1\] or torch.uint8"):
            call(pixel_values=x.to(dtype))
    x[1, 0, 3, 4] = 1 + 1e-7  # what resizing may leave of a white picture
    assert model(pixel_values=x).loss.isfinite()


def test_a_discretized_likelihood_refuses_binary_pixels():
    for binarize in ("threshold", "dynamic"):
        with pytest.raises(
            StrictDataclassError, match=f"ImageVAEConfig.binarize: received '{binarize}', expected 'none' with .*discretized_logistic"
        ):
            make(likelihood="discretized_logistic", binarize=binarize)
        assert make(likelihood="bernoulli", binarize=binarize).config.binarize == binarize
    assert make(likelihood="bernoulli").config.binarize == "none"  # of data that is binary already


def test_pseudo_inputs_are_encoded_alike_in_training_and_evaluation():
    model, z = make(prior="vamp", prior_components=4, input_noise=1.0), torch.randn(2, 3)
    expected = model.prior().log_prob(z)
    model.train()
    torch.testing.assert_close(model.prior().log_prob(z), expected)
    x = pictures(2, 1, 16, 16)
    assert not torch.equal(model.encode(pixel_values=x).mean, model.encode(pixel_values=x).mean)  # the data still gets its noise


def test_jitter_is_seen_by_the_encoder_alone_and_in_training_alone():
    model, x = make(input_jitter=1.0), pictures(2, 1, 16, 16)
    assert torch.equal(model.encode(pixel_values=x).mean, model.encode(pixel_values=x).mean)
    model.train()
    assert not torch.equal(model.encode(pixel_values=x).mean, model.encode(pixel_values=x).mean)
    assert torch.equal(model.target(pixel_values=x), model.eval().target(pixel_values=x))
    with pytest.raises(StrictDataclassError, match="ImageVAEConfig.input_jitter: received 0.5 with a pose, expected 0"):
        make(input_jitter=0.5, pose="rotation", latent_dim=8)


def test_a_spatial_model_is_bounded_at_its_own_size_and_encodes_others():
    model = make(spatial_latent=True)
    x = pictures(1, 1, 24, 32)
    q = model.encode(pixel_values=x)
    assert q.mean.shape == (1, 3, 6, 8)
    assert model.render(q.mean).shape == (1, 1, 24, 32)
    for call in (model, model.log_marginal):
        with pytest.raises(ValueError, match=r"pixel_values: received shape \(1, 1, 24, 32\), expected \(batch, 1, 16, 16\)"):
            call(pixel_values=x)
    with pytest.raises(ValueError, match=r"received shape \(1, 1, 23, 32\), expected .*sides that 4 divides"):
        model.encode(pixel_values=x[:, :, 1:])


def test_padding_repeats_the_border_and_is_cut_off_again():
    model = make(image_size=[30, 29], norm="none")
    x = pictures(1, 1, 30, 29)
    wide = make(image_size=32, norm="none")
    wide.load_state_dict(model.state_dict())
    padded = F.pad(x.float() / 255, (0, 3, 0, 2), mode="replicate")
    torch.testing.assert_close(model.encode(pixel_values=x).mean, wide.encode(pixel_values=padded).mean)
    z = torch.randn(1, 3)
    torch.testing.assert_close(model.render(z), wide.render(z)[..., :30, :29])


def test_batch_norm_couples_rows_in_training_only():
    model, x = make(norm="batch"), pictures(6, 1, 16, 16)
    whole, part = (model(pixel_values=v).loss_rows for v in (x, x[:2]))
    torch.testing.assert_close(whole[:2], part, rtol=1e-4, atol=1e-3)
    model.train()
    whole, part = (model(pixel_values=v, sample_posterior=False).loss_rows for v in (x, x[:2]))
    assert not torch.allclose(whole[:2], part, rtol=1e-4, atol=1e-3)  # the documented exception


def test_dropout_acts_in_training_only():
    model, x = make(dropout=0.5), pictures(4, 1, 16, 16)
    assert torch.equal(model(pixel_values=x).loss, model(pixel_values=x).loss)
    model.train()
    first, second = (model(pixel_values=x, sample_posterior=False).loss for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("tile_size", [2, 7, 64])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_tiles_are_exact_without_global_normalisation(norm, tile_size):
    model = make(spatial_latent=True, norm=norm, num_channels=3)
    if norm == "batch":
        with torch.no_grad():
            model.train()(pixel_values=pictures(8, 3, 16, 16))
        model.eval()
    x = pictures(1, 3, 76, 64)
    with torch.no_grad():
        q, tiled = model.encode(pixel_values=x), model.encode_tiled(x, tile_size)
    torch.testing.assert_close(tiled.loc, q.loc, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiled.logvar, q.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.render_tiled(q.mean, tile_size), model.render(q.mean), atol=1e-5, rtol=1e-5)


def test_tiles_under_group_norm_deviate_a_little(record_property):
    model = make(spatial_latent=True, norm="group", num_channels=3)
    smooth = F.interpolate(torch.rand(1, 3, 13, 11), size=(104, 88), mode="bilinear")
    with torch.no_grad():
        q, tiled = model.encode(pixel_values=smooth), model.encode_tiled(smooth, 7)
        deviation = ((tiled.loc - q.loc).square().mean().sqrt() / q.loc.std()).item()
        pixels = (model.render_tiled(q.mean, 7) - model.render(q.mean)).abs().mean().item()
    record_property("relative deviation of tiled latents under GroupNorm", deviation)
    record_property("mean deviation of tiled pixels under GroupNorm", pixels)
    assert 1e-4 < deviation < 0.5
    assert 0 < pixels < 0.1
    torch.testing.assert_close(model.encode_tiled(smooth, 64).loc, q.loc)  # one tile is the whole


def test_a_small_tile_is_not_cut_to_the_configured_size():
    model = make(spatial_latent=True, norm="none", image_size=30)  # 30 pixels are 8 latent pixels of 4
    z = torch.randn(1, 3, 20, 20)
    torch.testing.assert_close(model.render_tiled(z, 8), model.render(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [30, [29, 33], [45, 38]])
def test_tiles_of_a_size_that_the_stride_does_not_divide(size):
    model = make(spatial_latent=True, norm="none", image_size=size)
    x = pictures(2, 1, *model.config.height_width)
    q = model.encode(pixel_values=x)
    for tile_size in (1, 3, 64):
        tiled = model.encode_tiled(x, tile_size)
        torch.testing.assert_close(tiled.loc, q.loc, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tiled.logvar, q.logvar, atol=1e-5, rtol=1e-5)
        picture = model.render_tiled(q.mean, tile_size)
        assert picture.shape == x.shape
        torch.testing.assert_close(picture, model.render(q.mean), atol=1e-5, rtol=1e-5)


def test_tiles_name_what_is_wrong():
    with pytest.raises(ValueError, match="tiles: received a model with spatial_latent=False"):
        make().encode_tiled(pictures(1, 1, 16, 16))
    model = make(spatial_latent=True, image_size=30)
    with pytest.raises(ValueError, match=r"pixel_values: received shape \(1, 1, 29, 29\), expected.*sides that 4 divides"):
        model.encode_tiled(pictures(1, 1, 29, 29))
    with pytest.raises(ValueError, match="tile_size: received 0, expected at least 1"):
        model.encode_tiled(pictures(1, 1, 32, 32), tile_size=0)


def test_channels_last_changes_no_result():
    model, x = make(num_channels=3), pictures(2, 3, 16, 16)
    expected = model(pixel_values=x).loss_rows
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(pixel_values=x.contiguous(memory_format=torch.channels_last)).loss_rows, expected, rtol=1e-4, atol=1e-3
    )


def test_autocast_keeps_the_loss():
    model, x = make(likelihood="continuous_bernoulli"), pictures(2, 1, 16, 16)
    expected = model(pixel_values=x).loss_rows
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(pixel_values=x, sample_posterior=False)
    assert out.loss_rows.dtype == torch.float32
    torch.testing.assert_close(out.loss_rows, expected, rtol=0.05, atol=1.0)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_first_convolution_stands_for_the_embedding():
    model = make()
    first = model.get_input_embeddings()
    assert first is model.encoder.stem[1]
    model.set_input_embeddings(torch.nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1))
    assert model.get_input_embeddings() is not first


def posed(**options) -> ImageVAE:
    torch.manual_seed(0)
    config = {"image_size": 24, "num_channels": 1, "hidden_channels": [8, 16], "latent_dim": 5, "pose": "rotation"}
    return ImageVAE(ImageVAEConfig(**config | options))


def test_the_angle_turns_what_is_drawn():
    model = posed().eval()
    content, angle = torch.randn(2, 3), torch.tensor([0.4, 2.0])
    plain, turned = (model.render(torch.cat([content, model.pose.latent(a, torch.zeros(2, 2))], 1)) for a in (angle, angle + math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(plain, -1, (2, 3)), atol=1e-5, rtol=0)


def test_a_turn_of_the_picture_leaves_the_content_as_it_is():
    model = posed().eval()
    pixels = torch.nn.functional.avg_pool2d(torch.rand(8, 1, 36, 36, generator=torch.Generator().manual_seed(1)), 13, 1)  # no texture
    pixels = ((pixels - pixels.amin()) / (pixels.amax() - pixels.amin())).square()
    there, turned = (model.encode(each).mean for each in (pixels, torch.rot90(pixels, -1, (2, 3))))
    torch.testing.assert_close(turned[:, :3], there[:, :3], atol=1e-3, rtol=1e-3)


def test_angles_are_learned_without_labels():
    """A wedge, turned anyhow: after training its angle is known up to one offset, and a turn of the picture is a turn of the latent."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(256, generator=generator)
    down, across = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24), indexing="ij")
    wedge = ((across > -0.5) & (across < 0.6) & (down.abs() < 0.3 * (0.7 - across))).float()
    pixels = sample(wedge.expand(256, 1, 24, 24), grid(angle, torch.zeros(256, 2), (24, 24), 1.0), "zeros")
    model = posed(likelihood="bernoulli", binarize="threshold").train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80):
        rows = torch.arange(64) + 64 * (step % 4)
        model(pixel_values=pixels[rows].round(), beta=0.1).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    found, _ = model.eval().pose.split(model.encode(pixels).mean[:, 3:])
    offset = torch.polar(torch.ones(256), found - angle).mean().angle()
    error = (found - angle - offset + math.pi) % (2 * math.pi) - math.pi
    assert error.abs().mean() < math.radians(8)


def test_features_of_a_pose_are_what_the_content_is_read_off():
    model, pixels = posed(pose="rotation+shift", latent_dim=6).eval(), torch.rand(2, 1, 24, 24)
    moments = model.to_moments(model.features(pixels))
    torch.testing.assert_close(moments[:, :2], model.encode(pixels).mean[:, :2])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"latent_dim": 2}, "latent_dim"),
        ({"norm": "batch"}, "norm"),
        ({"spatial_latent": True}, "spatial_latent"),
        ({"image_size": [24, 16]}, "image_size"),
    ],
)
def test_what_no_pose_can_have_is_refused(options, field):
    with pytest.raises(StrictDataclassError, match=rf"ImageVAEConfig.{field}: received .* with a pose, expected"):
        posed(**options)
